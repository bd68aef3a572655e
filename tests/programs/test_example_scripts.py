"""Scripts to start from, as their users meet them: numbers, tables and errors."""

import importlib
import math
import statistics

import jax
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
import fine_tuning
import flax_linen
import flax_nnx
import regularisation
import threshold_schedule

import optax_clip

# Flax promotes ranks implicitly.
pytestmark = [pytest.mark.foreign, pytest.mark.programs]


@pytest.fixture(scope="module", autouse=True)
def quick():
  """Compiles fast, not well."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def fits_80_columns(printed):
  # The ellipsis is what rich puts for what it cuts off.
  return max(map(len, printed.splitlines())) <= 80 and "…" not in printed


def flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("script", [flax_nnx, flax_linen])
def test_flax_leaves_broken_batches_out_and_learns(script, capsys):
  seen = script.main(["--steps", "60", "--broken", "3", "--every", "25"])
  assert seen["skip_nonfinite/steps_skipped"] == 3
  assert seen["skip_nonfinite/steps"] == 60
  # Inside the guard there were only the others.
  assert seen["clip_by_global_norm/steps"] == 57
  assert seen["clip_by_global_norm/limit"] == 0.5
  assert 30 < seen["clip_by_global_norm/steps_clipped"] <= 57
  # Measured: 89.4% and 87.2%. One NaN that got in would make it 10%.
  assert seen["accuracy"] > 0.8
  assert math.isfinite(seen["loss"])
  printed = capsys.readouterr().out
  assert [line.split()[0] for line in printed.splitlines()] == [
    "step",
    "25",
    "50",
    "60",
  ]
  assert fits_80_columns(printed)


def test_a_guarded_step_is_what_apply_gradients_does():
  flags = flax_linen.parse([])
  state = flax_linen.create(flags)
  grads = jax.tree.map(np.ones_like, state.params)
  params, opt_state = jax.jit(
    lambda grads, state: optax_clip.guarded_step(
      state.tx, grads, state.opt_state, state.params
    )
  )(grads, state)
  other = jax.jit(lambda grads, state: state.apply_gradients(grads=grads))(grads, state)
  np.testing.assert_allclose(flat(params), flat(other.params), rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(flat(opt_state), flat(other.opt_state), rtol=1e-6)


def test_thresholds_change_without_another_compilation(capsys):
  done = threshold_schedule.main(["--steps", "60", "--every", "20"])
  assert [run.traces for run in done.values()] == [1, 1, 1]
  assert done["fixed"].limits == [1.0] * 60
  expected = 1 + (0.2 - 1) * np.arange(60) / 60
  np.testing.assert_allclose(done["schedule"].limits, expected, rtol=1e-6)
  by_hand = done["by hand"]
  assert by_hand.limits[:20] == [1.0] * 20
  for start in (20, 40):
    median = statistics.median(by_hand.norms[start - 20 : start])
    assert by_hand.limits[start : start + 20] == pytest.approx([median] * 20, rel=1e-6)
  # What is done later changes nothing before.
  assert by_hand.norms[:20] == done["fixed"].norms[:20]
  assert by_hand.norms[21:] != done["fixed"].norms[21:]
  # Measured: 94.2%, 90.6%, 94.2%.
  assert min(run.accuracy for run in done.values()) > 0.85
  assert fits_80_columns(capsys.readouterr().out)


def test_a_python_number_as_threshold_compiles_once_more(monkeypatch):
  def careless(state, value):
    state[0].hyperparams["max_norm"] = value

  monkeypatch.setattr(threshold_schedule, "set_max_norm", careless)
  flags = threshold_schedule.parse(["--steps", "5", "--every", "2"])
  assert threshold_schedule.runs(flags)["by hand"]().traces == 2


def test_frozen_layers_stay_and_count_only_where_the_clip_sees_them(capsys):
  start, done = fine_tuning.main(["--steps", "40"])
  assert list(done) == list(fine_tuning.WAYS)
  for run in done.values():
    for name in ("kernel", "bias"):
      stem, before = run.params["stem"][name], start["stem"][name]
      assert np.asarray(stem).tobytes() == np.asarray(before).tobytes()
      for layer in ("body", "head"):
        assert (np.asarray(run.params[layer][name]) != start[layer][name]).any()
    # Measured: 75.6% to 76.1%, of five digits.
    assert run.accuracy > 0.6

  # The same weights and batch: what differs is who counts.
  first = {way: run.logs[0] for way, run in done.items()}
  everything, counted = first["all"]["all/norm"], first["counted"]["counted/norm"]
  body = first["inside"]["inside, body/norm"]
  head = first["inside"]["inside, head/norm"]
  assert counted == pytest.approx(math.hypot(body, head), rel=1e-5)
  stem = math.sqrt(everything**2 - counted**2)
  assert stem > 0.1
  assert first["groups"]["groups/norm"] == pytest.approx(
    max(stem, body, head), rel=1e-5
  )
  assert first["all"]["all/coefficient"] == pytest.approx(1 / everything, rel=1e-5)
  assert first["counted"]["counted/coefficient"] == pytest.approx(1 / counted, rel=1e-5)
  kept = min(0.6 / body, 0.8 / head)
  assert first["groups"]["groups/coefficient"] == pytest.approx(kept, rel=1e-5)

  assert flat(done["groups"].params) == pytest.approx(
    flat(done["inside"].params), abs=1e-5
  )
  assert np.abs(flat(done["all"].params) - flat(done["groups"].params)).max() > 1e-3
  printed = capsys.readouterr().out
  assert printed.count("unchanged") == 4
  assert "moved" not in printed
  assert fits_80_columns(printed)


def test_what_moves_is_called_moved():
  start, changed = ({"stem": {"kernel": np.full(2, x)}} for x in (1.0, 1.0 + 1e-15))
  assert fine_tuning.moved(fine_tuning.Run(changed, [], 0.0), start)
  assert not fine_tuning.moved(fine_tuning.Run(start, [], 0.0), start)


def test_orders_of_penalties_differ_by_the_clip(capsys):
  flags = ["--steps", "150", "--seeds", "2", "--max-norm", "0.15"]
  done = regularisation.main(flags)
  none, in_loss, before, after, l1_in_loss, l1_after = done.values()
  np.testing.assert_allclose(in_loss.weights, before.weights, rtol=1e-5)
  np.testing.assert_allclose(in_loss.norm, before.norm, rtol=1e-3)
  # Behind the clip the penalty keeps its strength, and so weighs more.
  assert (after.weights < 0.95 * in_loss.weights).all()
  assert (in_loss.weights < none.weights).all()
  assert (l1_after.weights < l1_in_loss.weights).all()
  for run in (none, after, l1_after):
    np.testing.assert_allclose(run.norm, run.data, rtol=1e-5)
  for run in (in_loss, l1_in_loss):
    assert (np.abs(run.norm - run.data) > 1e-4).mean() > 0.9
  for run in done.values():
    np.testing.assert_allclose(run.kept, np.minimum(1, 0.15 / run.norm), rtol=1e-5)

  decay = {
    name: regularisation.effective(name, run, regularisation.parse(flags))
    for name, run in done.items()
  }
  assert decay["none"] == 0
  assert decay["decay after"] == 0.01
  assert decay["L1 after"] == 0.003
  assert decay["L2 in loss"] == pytest.approx(0.01 * in_loss.kept.mean())
  assert decay["decay before"] == pytest.approx(decay["L2 in loss"], rel=1e-4)
  assert decay["L1 in loss"] == pytest.approx(0.003 * l1_in_loss.kept.mean())
  assert fits_80_columns(capsys.readouterr().out)


def test_orders_are_equal_without_a_clip():
  flags = regularisation.parse(
    ["--steps", "100", "--seeds", "1", "--l2", "0.1", "--max-norm=inf"]
  )
  ways = regularisation.ways(flags.l2, flags.l1)
  weights = {
    name: regularisation.train(ways[name], flags).weights
    for name in ("none", "L2 in loss", "decay before", "decay after")
  }
  np.testing.assert_allclose(weights["decay before"], weights["L2 in loss"], rtol=1e-4)
  np.testing.assert_allclose(weights["decay after"], weights["L2 in loss"], rtol=1e-4)
  assert weights["decay after"] < 0.8 * weights["none"]


@pytest.mark.parametrize(
  ("script", "flag", "value", "part"),
  [
    ("flax_nnx", "--max-norm", "-1", "'-1' is not a number of at least 0"),
    ("flax_nnx", "--broken", "501", "501 is more than --steps"),
    ("flax_linen", "--lr", "0", "'0' is not a positive number"),
    ("flax_linen", "--broken", "501", "501 is more than --steps"),
    ("threshold_schedule", "--every", "0", "'0' is not a whole number of at least 1"),
    ("threshold_schedule", "--end", "x", "'x' is not a number of at least 0"),
    ("fine_tuning", "--head-norm", "nan", "'nan' is not a number of at least 0"),
    ("regularisation", "--l2", "-0.1", "'-0.1' is not a number of at least 0"),
    ("regularisation", "--seeds", "0", "'0' is not a whole number of at least 1"),
  ],
)
def test_a_bad_flag_is_one_line(script, flag, value, part, one_line_error):
  err = one_line_error(importlib.import_module(script).main, [f"{flag}={value}"])
  assert f"argument {flag}: " in err
  assert part in err
