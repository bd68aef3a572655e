"""Scripts to start from, as their users meet them: numbers, tables and errors."""

import importlib
import math
import statistics

import jax
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
pytest.importorskip("equinox")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("sklearn")
import bfloat16_resume
import equinox_mlp
import fine_tuning
from flax.training.train_state import TrainState
import flax_linen
import flax_nnx
import lora
import ppo
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
  # But for the sentence at the end.
  return max(map(len, printed.splitlines()[:-1])) <= 80


def flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("script", [flax_nnx, flax_linen, equinox_mlp])
def test_a_loop_leaves_broken_batches_out_and_learns(script, capsys):
  seen = script.main(["--steps", "60", "--broken-every", "20"])
  assert seen["skip_nonfinite/steps_skipped"] == 3
  assert seen["skip_nonfinite/steps"] == 60
  # Inside the guard there were only the others.
  assert seen["clip_by_global_norm/steps"] == 57
  assert seen["clip_by_global_norm/limit"] == 0.5
  assert 30 < seen["clip_by_global_norm/steps_clipped"] <= 57
  # Measured: 89.4%, 87.2% and 86.4%. One NaN that got in would make it 10%.
  assert seen["accuracy"] > 0.8
  assert math.isfinite(seen["loss"])
  printed = capsys.readouterr().out
  last = printed.splitlines()[-1]
  assert f"{seen['accuracy']:.1%}" in last
  assert "3 of 60 steps were skipped" in last
  assert fits_80_columns(printed)


def test_a_guarded_step_is_what_apply_gradients_does():
  network = flax_linen.Network()
  params = network.init(jax.random.key(0), np.zeros((1, 64), np.float32))["params"]
  tx = optax_clip.skip_nonfinite(
    optax.chain(optax_clip.clip_by_global_norm(0.5), optax.adamw(3e-3))
  )
  state = TrainState.create(apply_fn=network.apply, params=params, tx=tx)
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
  assert [run["traces"] for run in done.values()] == [1, 1, 1]
  fixed, schedule, by_hand = (
    (run["clip/norm"], run["clip/limit"]) for run in done.values()
  )
  assert (fixed[1] == 1).all()
  expected = 1 + (0.2 - 1) * np.arange(60) / 60
  np.testing.assert_allclose(schedule[1], expected, rtol=1e-6)
  norms, limits = by_hand
  assert (limits[:20] == 1).all()
  for start in (20, 40):
    median = statistics.median(norms[start - 20 : start].tolist())
    assert limits[start : start + 20] == pytest.approx([median] * 20, rel=1e-6)
  # What is done later changes nothing before.
  assert (norms[:20] == fixed[0][:20]).all()
  assert (norms[21:] != fixed[0][21:]).any()
  # Measured: 93.1%, 90.0%, 92.8%.
  assert min(run["accuracy"] for run in done.values()) > 0.85
  assert fits_80_columns(capsys.readouterr().out)


def test_a_python_number_as_threshold_compiles_once_more(monkeypatch):
  def careless(state, value):
    state[0].hyperparams["max_norm"] = value

  monkeypatch.setattr(threshold_schedule, "set_max_norm", careless)
  flags = threshold_schedule.parse(["--steps", "5", "--every", "2"])
  assert threshold_schedule.train("by hand", flags)["traces"] == 2


def test_frozen_layers_stay_and_count_only_where_the_clip_sees_them(capsys):
  start, done = fine_tuning.main(["--steps", "40"])
  assert list(done) == list(fine_tuning.WAYS)
  for params, _, accuracy in done.values():
    assert np.asarray(params["stem"]).tobytes() == np.asarray(start["stem"]).tobytes()
    for layer in ("body", "head"):
      assert (np.asarray(params[layer]) != start[layer]).any()
    # Measured: 69.4%, of five digits.
    assert accuracy > 0.6

  # The same weights and batch: what differs is who counts.
  first = {
    key: values[0] for _, logs, _ in done.values() for key, values in logs.items()
  }
  everything, counted = first["all/norm"], first["counted/norm"]
  body, head = first["body/norm"], first["head/norm"]
  assert counted == pytest.approx(math.hypot(body, head), rel=1e-5)
  stem = math.sqrt(everything**2 - counted**2)
  assert stem > 0.1
  assert first["groups/norm"] == pytest.approx(max(stem, body, head), rel=1e-5)
  assert first["all/coefficient"] == pytest.approx(1 / everything, rel=1e-5)
  assert first["counted/coefficient"] == pytest.approx(1 / counted, rel=1e-5)
  kept = min(0.6 / body, 0.8 / head)
  assert first["groups/coefficient"] == pytest.approx(kept, rel=1e-5)

  weights = {way: flat(params) for way, (params, _, _) in done.items()}
  assert weights["groups"] == pytest.approx(weights["inside"], abs=1e-5)
  assert np.abs(weights["all"] - weights["groups"]).max() > 1e-3
  assert fits_80_columns(capsys.readouterr().out)


def test_orders_of_penalties_differ_by_the_clip(capsys):
  done = regularisation.main(["--steps", "150", "--seeds", "2"])
  none, in_loss, before, after, l1_in_loss, l1_after = done.values()
  np.testing.assert_allclose(in_loss["weights"], before["weights"], rtol=1e-5)
  np.testing.assert_allclose(in_loss["clip/norm"], before["clip/norm"], rtol=1e-3)
  # Behind the clip the penalty keeps its strength, and so weighs more.
  assert (after["weights"] < 0.95 * in_loss["weights"]).all()
  assert (in_loss["weights"] < none["weights"]).all()
  assert (l1_after["weights"] < l1_in_loss["weights"]).all()
  for run in (none, after, l1_after):
    np.testing.assert_allclose(run["clip/norm"], run["data"], rtol=1e-5)
  for run in (in_loss, l1_in_loss):
    assert (np.abs(run["clip/norm"] - run["data"]) > 1e-4).mean() > 0.9
  for run in done.values():
    expected = np.minimum(1, 0.15 / run["clip/norm"])
    np.testing.assert_allclose(run["clip/coefficient"], expected, rtol=1e-5)
  assert fits_80_columns(capsys.readouterr().out)


def test_orders_are_equal_without_a_clip():
  flags = regularisation.parse(
    ["--steps", "100", "--seeds", "1", "--l2", "0.1", "--max-norm=inf"]
  )
  weights = {
    name: regularisation.train(name, flags)["weights"]
    for name in ("none", "L2 in loss", "decay before", "decay after")
  }
  np.testing.assert_allclose(weights["decay before"], weights["L2 in loss"], rtol=1e-4)
  np.testing.assert_allclose(weights["decay after"], weights["L2 in loss"], rtol=1e-4)
  assert weights["decay after"] < 0.8 * weights["none"]


def test_lora_trains_the_small_matrices_alone():
  start, end, report = lora.main(["--steps", "40", "--max-norm", "0.05"])
  for name, matrix in end["base"].items():
    assert np.asarray(matrix).tobytes() == np.asarray(start["base"][name]).tobytes()
  assert not flat({name: x["b"] for name, x in start["lora"].items()}).any()
  names = {f"lora/{layer}/{part}" for layer in lora.SHAPES for part in "ab"}
  assert set(report.layers) == names
  for name, row in report.layers.items():
    assert row.limit == pytest.approx(0.05)
    assert row.coefficient == pytest.approx(min(1, 0.05 / row.norm), rel=1e-5)
    layer, part = name.split("/")[1:]
    assert (np.asarray(end["lora"][layer][part]) != start["lora"][layer][part]).any()


def test_ppo_learns_and_its_metrics_leave_the_scan(capsys):
  logs = ppo.main(["--steps", "15"])
  assert all(values.shape == (15,) for values in logs.values())
  # A step for each part of each epoch of each update.
  assert logs["clip/steps"][-1] == 15 * ppo.EPOCHS * ppo.PARTS
  assert (logs["critic"] > 3 * logs["actor"]).all()
  length = logs["moves"] / logs["ended"]
  # Measured: 20 and 207.
  assert length[-1] > 1.5 * length[0]
  assert "The pole stood for 20 moves at first" in capsys.readouterr().out


def test_the_cart_moves_as_that_of_gymnasium():
  """Euler's method, in float64, from the paper of Barto, Sutton and Anderson (1983)."""
  carts = np.random.default_rng(0).uniform(-0.3, 0.3, (20, 4))
  actions = np.arange(20) % 2
  moved, failed = ppo.push(np.float32(carts), actions)
  for cart, action, got, over in zip(carts, actions, moved, failed, strict=True):
    x, v, angle, spin = cart
    force, sin, cos = (2 * action - 1) * 10.0, math.sin(angle), math.cos(angle)
    part = (force + 0.1 * 0.5 * spin**2 * sin) / (1.0 + 0.1)
    turn = (9.8 * sin - cos * part) / (0.5 * (4 / 3 - 0.1 * cos**2 / (1.0 + 0.1)))
    pull = part - 0.1 * 0.5 * turn * cos / (1.0 + 0.1)
    expected = [x + 0.02 * v, v + 0.02 * pull, angle + 0.02 * spin, spin + 0.02 * turn]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert over == (abs(expected[0]) > 2.4 or abs(expected[2]) > 12 * math.pi / 180)


def test_advantages_are_discounted_sums_up_to_the_end_of_an_episode():
  random = np.random.default_rng(0)
  values, ended = random.normal(size=(7, 3)), random.uniform(size=(7, 3)) < 0.3
  last = random.normal(size=3)
  seen = {"value": np.float32(values), "ended": ended}
  got = ppo.advantages(seen, np.float32(last))
  following = np.concatenate([values[1:], last[None]])
  for cart in range(3):
    for start in range(7):
      total, weight = 0.0, 1.0
      for time in range(start, 7):
        goes_on = 0.99 * (not ended[time, cart])
        total += weight * (1 + goes_on * following[time, cart] - values[time, cart])
        weight *= goes_on * 0.95
      assert got[start, cart] == pytest.approx(total, rel=1e-5, abs=1e-5)


def test_a_resumed_run_has_the_bits_of_the_whole(capsys):
  # The checkpoint is at 13 microbatches, of which one was skipped: in the middle of 5.
  whole, resumed, seen = bfloat16_resume.main(["--steps", "26", "--accumulate", "5"])
  assert jax.tree.structure(whole) == jax.tree.structure(resumed)
  for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
  assert seen["skip_nonfinite/steps_skipped"] == 1
  assert seen["autoclip/steps"] == 25 // 5
  count = len(jax.tree.leaves(whole))
  assert f"{count} of {count} arrays" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("script", "flag", "value", "part"),
  [
    ("flax_nnx", "--max-norm", "-1", "-1.0 is not at least 0"),
    ("flax_nnx", "--steps", "2.5", "invalid int value: '2.5'"),
    ("flax_linen", "--lr", "nan", "nan is not at least 0"),
    ("flax_linen", "--broken-every", "-2", "-2 is not at least 0"),
    ("threshold_schedule", "--every", "0", "0 is not at least 1"),
    ("threshold_schedule", "--end", "x", "invalid float value: 'x'"),
    ("fine_tuning", "--max-norm", "nan", "nan is not at least 0"),
    ("regularisation", "--l2", "-0.1", "-0.1 is not at least 0"),
    ("regularisation", "--seeds", "0", "0 is not at least 1"),
    ("equinox_mlp", "--steps", "0", "0 is not at least 1"),
    ("lora", "--rank", "0", "0 is not at least 1"),
    ("ppo", "--actor-norm", "-1", "-1.0 is not at least 0"),
    ("bfloat16_resume", "--steps", "1", "1 is not at least 2"),
    ("bfloat16_resume", "--accumulate", "0", "0 is not at least 1"),
  ],
)
def test_a_bad_flag_is_named_with_its_value(script, flag, value, part, capsys):
  with pytest.raises(SystemExit) as caught:
    importlib.import_module(script).main([f"{flag}={value}"])
  out, err = capsys.readouterr()
  assert caught.value.code == 2
  assert not out
  last = err.splitlines()[-1]
  assert f"{flag}: " in last
  assert part in last
