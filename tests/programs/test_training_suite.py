"""The training studies run, and docs/evidence.md says what was measured."""

import json
import math
import re

import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from benchmarks import _marked
import studies
from studies import __main__ as command
from studies import _agreement
from studies import _page
from studies import _regret
from studies import _small_tasks
from studies import _spectral_results
from studies import _summary
from studies import _sweep
from studies import batch_range
from studies import horizon
from studies import language
from studies import low_precision
from studies import qk_clip
from studies import shifting_scale
from studies import spectral
from studies import temporal_order
from studies import untuned
from studies import update_clipping

# The studies are measured as users would run them, not under the rules of the tests.
pytestmark = [pytest.mark.foreign, pytest.mark.programs]
ONE = ("global 1",)


def rows_of(study):
  if not studies.results(study).exists():
    pytest.skip(f"no results of {study} here")
  return studies.load(study)


def test_temporal_order_runs():
  rows = list(
    temporal_order.run(lengths={10: ONE}, rates=(0.01, 0.1), seeds=2, steps=4, every=2)
  )
  assert [row["rate"] for row in rows] == [0.01, 0.1]
  for row in rows:
    assert row["solved_at"] == [None, None]
    assert row["finite"] == [True, True]
    assert all(0 < x < 0.99 for x in row["best_accuracy"])


def test_the_sequences_hold_two_symbols_that_matter():
  import jax

  symbols, classes = temporal_order.sequences(jax.random.key(0), 50, 30)
  rows, places = np.nonzero(np.asarray(symbols) < 2)
  assert rows.tolist() == sorted([*range(50)] * 2)
  first, second = places.reshape(50, 2).T
  assert set(first) == {3, 4, 5}
  assert set(second) == {12, 13, 14}
  pairs = np.asarray(symbols)[rows, places].reshape(50, 2)
  np.testing.assert_array_equal(classes, 2 * pairs[:, 0] + pairs[:, 1])


def test_language_runs(monkeypatch):
  monkeypatch.setattr(language, "LAYERS", 0)  # Faster to compile.
  rows = list(language.run(names=ONE, optimizers=("sgd",), seeds=1, steps=2))
  assert {row["batches"] for row in rows} == {"clean", "faulty"}
  assert all(3 < row["loss"][0] < 7 for row in rows)
  # The NaN batch is in the middle of the run, and is skipped.
  assert {(row["batches"], row["idle"][0]) for row in rows} == {
    ("clean", 0),
    ("faulty", 1),
  }


def test_shifting_scale_runs():
  rows = list(shifting_scale.run(names=ONE, rates=(0.1,), seeds=1, steps=3))
  assert [row["scale"] for row in rows] == list(shifting_scale.SCALES)
  assert all(0 < row["accuracy"][0] < 100 for row in rows)
  clipped = {row["scale"]: row["clipped"][0] for row in rows}
  assert (clipped["0.01"], clipped["100"]) == (0, 3)


def test_batch_range_runs():
  rows = list(batch_range.run(names=ONE, rates=(0.01, 0.1), seeds=1, steps=2))
  assert [row["clipped"] for row in rows] == [[2], [2]]
  assert all(0 < row["accuracy"][0] < 100 for row in rows)


def test_low_precision_runs():
  half, many = low_precision.run(
    names=("optax",),
    batches=(512,),
    loss_scales=(0.0,),
    rates=(0.1,),
    leaves=4,
    seeds=1,
    steps=2,
  )
  # The norm of a summed loss is above 256, and optax's is inf.
  assert (half["part"], half["idle"], half["finite"]) == ("float16", [2], [True])
  # In few leaves it is right.
  assert (many["part"], many["leaves"]) == ("bfloat16", 4)
  assert many["norms"][0] == pytest.approx(1, abs=0.02)


def test_qk_clip_runs(monkeypatch):
  monkeypatch.setattr(qk_clip, "LAYERS", 1)
  monkeypatch.setitem(qk_clip.OPTIMIZERS, "muon", (qk_clip._muon, (0.3,)))
  taus = (float("inf"), 4.0)
  free, bound = qk_clip.run(optimizers=("muon",), taus=taus, seeds=2, steps=20)
  assert (free["tau"], bound["tau"]) == (None, 4.0)
  assert all(3 < loss < 4 for row in (free, bound) for loss in row["loss"])
  assert free["scaled"] == [0, 0]
  assert free["after"] == [None, None]
  # Two portions of ten steps; the first logits are of the same weights.
  assert [len(sizes) for sizes in bound["largest"]] == [2, 2]
  assert all(n > 5 for n in bound["scaled"])
  assert max(bound["after"]) < min(sizes[-1] for sizes in free["largest"])


def test_the_largest_logits_of_a_row():
  row = {"largest": [[1.0, None, 3.0], [None]]}
  assert _summary.peaks(row) == [3.0, None]


def test_update_clipping_runs():
  rates = {"padded": (0.01,), "sparse": (0.1,)}
  rows = list(
    update_clipping.run(
      names=("none",), rates=rates, seeds=1, phase=20, quiet=20, steps=4
    )
  )
  assert [row["task"] for row in rows] == ["padded", "padded", "sparse"]
  assert [row.get("quiet") for row in rows] == [20, 0, None]
  assert [len(row["course"]) for row in rows[:2]] == [2, 2]
  assert all(0 < row["worst"][0] < 100 for row in rows[:2])
  assert 0 < rows[2]["rare"][0] < 2


def test_spectral_runs():
  rows = list(
    spectral.run(
      tasks=("digits",),
      optimizers=("sgd",),
      names=("none", "spectral"),
      steps=2,
      tries=2,
      seeds=(0,),
      rounds=1,
    )
  )
  runs, costs = rows[:6], rows[6:]
  assert [row["batches"] for row in runs] == [*spectral.KINDS] * 2
  assert [row["clipped"][0] for row in runs] == [0, 0, 0, 2, 2, 2]
  assert [row["limit"] for row in runs[:3]] == [None] * 3
  # A spike in one of two steps may leave any score.
  assert all(x > 0 for row in runs for x in row["score"])
  assert all(row["score"][0] < 3 for row in runs if row["batches"] == "clean")
  assert [row["method"] for row in costs] == ["none", "spectral"]
  assert all(row["ms"] > 0 for row in costs)


def test_what_harms_a_gradient_of_spectral():
  import jax

  grads = [jax.numpy.ones((8, 6)), jax.numpy.ones(5)]
  harmed = jax.jit(lambda kind, key: spectral.harmed(grads, kind, key))
  steps = [
    [harmed(kind, jax.random.key(seed)) for kind in range(3)] for seed in range(200)
  ]
  hit = 0
  for clean, heavy, spiked in steps:
    np.testing.assert_array_equal(clean[0], grads[0])
    assert all(np.any(x != y) for x, y in zip(heavy, grads, strict=True))
    np.testing.assert_array_equal(spiked[1], grads[1])
    values = np.linalg.svd(spiked[0] - grads[0], compute_uv=False)
    is_hit = values[0] > 0
    hit += is_hit
    if is_hit:
      np.testing.assert_allclose(values[0], 30 * np.sqrt(48), rtol=1e-4)
      assert values[1] <= 1e-4 * values[0]
  assert 0 < hit < 20


def test_the_best_by_the_tuning_seeds_are_compared():
  def row(method, tuning, score):
    about = {"task": "digits", "optimizer": "sgd", "batches": "clean"}
    return about | {"method": method, "tuning": tuning, "score": score}

  rows = [
    row("spectral", 0.3, [0.5, None]),
    row("spectral soft", 0.4, [0.1, 0.1]),
    row("agc", 0.2, [0.7, 0.9]),
    row("layer", 0.9, [0.0, 0.0]),
  ]
  nothing = spectral.NOTHING["digits"]
  gain = _spectral_results.advantage(rows, spectral.SPECTRAL, spectral.OTHERS)
  assert gain == pytest.approx([0.2, 0.9 - nothing])
  assert _spectral_results.failed(rows[0]) == 1
  assert _spectral_results.counted(_summary.Mean(0.3, 0.1)) == 1
  assert _spectral_results.counted(_summary.Mean(-0.3, 0.1)) == -1
  assert _spectral_results.counted(_summary.Mean(-0.3, 0.2)) == 0


def test_untuned_runs():
  rows = list(
    untuned.run(
      tasks=("regression",), names=("geometric",), constants=(1.0,), seeds=2, steps=6
    )
  )
  assert len(rows) == 4 * 4 * (2 + 3)
  assert {row["method"]: len({row["scale"]}) for row in rows}.keys() == {
    "none",
    "constant 1",
    "geometric",
  }
  for row in rows:
    assert len(row["score"]) == 2
    assert all(x is None or x > 0 for x in row["score"])
  # A limit without a unit sees no scale, but for rounding (0.01 is no power of two).
  scores = {
    (row["fault"], row["rate"], row["scale"]): row["score"]
    for row in rows
    if row["method"] == "geometric"
  }
  for (fault, rate, _), found in scores.items():
    np.testing.assert_allclose(found, scores[fault, rate, 1.0], rtol=1e-3)


def test_horizon_runs(monkeypatch):
  monkeypatch.setattr(horizon, "CONSTANTS", (1.0,))
  rows = list(
    horizon.run(names=("geometric",), tasks=("regression",), times=(1,), seeds=1)
  )
  assert len(rows) == 2 * 4 * (2 + len(horizon.CONSTANTS))
  assert {row["steps"] for row in rows} == {horizon.STEPS}


@pytest.mark.parametrize("name", _small_tasks.TASKS)
def test_the_faults_of_a_task(name):
  """Clean gradients are finite; a heavy batch is a hundred times a clean one."""
  import jax

  task = _small_tasks.TASKS[name]()
  swept, params = _small_tasks.swept(task), task.init(0)
  key = jax.random.key(3)

  def gradient(fault, step):
    member = {"fault": jax.numpy.int32(_small_tasks.FAULTS.index(fault))}
    return swept.gradient(params, member, key, step)

  clean, early = (gradient(f, _small_tasks.EARLY) for f in ("clean", "early"))
  later = gradient("early", _small_tasks.EARLY + 1)
  for x, y, z in zip(*map(jax.tree.leaves, (clean, early, later)), strict=True):
    assert np.all(np.isfinite(x))
    np.testing.assert_allclose(y, 100 * x, rtol=1e-3, atol=1e-4 * np.max(np.abs(y)))
    np.testing.assert_array_equal(x, z)
  assert any(np.any(x) for x in jax.tree.leaves(clean))
  # Who has learned nothing yet has at least the score of whoever knows nothing.
  assert float(task.score(params)) > 0.9 * task.nothing
  normal = task.loss(params, jax.random.key(0), False)
  corrupted = task.loss(params, jax.random.key(0), True)
  assert float(normal) != float(corrupted)


def rows_by_hand():
  """One task, one fault, two rates: what each limit scores, with two seeds."""
  scores = {
    ("none", 1.0): ([4, 4], [10, None]),
    ("constant 0.01", 1.0): ([8, 8], [8, 8]),
    ("constant 1", 1.0): ([2, 4], [6, 6]),
    ("constant 100", 1.0): ([4, 4], [9, 9]),
    ("ours", 1.0): ([2, 5], [3, 5]),
    ("ours", 100.0): ([2, 4], [10, 10]),
  }
  return [
    {"task": "t", "fault": "clean", "steps": 5, "rate": rate, "nothing": 10.0}
    | {"method": method, "scale": scale, "score": row}
    for (method, scale), both in scores.items()
    for rate, row in zip((0.1, 1.0), both, strict=True)
  ]


def test_regrets():
  study = _regret.Study(rows_by_hand())
  assert study.methods == ["ours"]
  low, high = study.cells
  # Best constants: 1 with 3 at the low rate, 1 with 6 at the high one, so that 7 can be
  # learned. (100 and 0.01 are no constants of the oracle.)
  assert study.regret("constant 1", low).percent == 0
  assert study.regret("ours", low).percent == pytest.approx(100 * 0.5 / 7)
  assert study.regret("ours", high).percent == pytest.approx(100 * -2 / 7)
  assert study.regret("ours", high, 100.0).percent == pytest.approx(100 * 4 / 7)
  found = study.summary("ours")
  assert found.mean == pytest.approx(100 * (0.5 - 2 + 0 + 4) / 7 / 4)
  assert found.worst == pytest.approx(100 * 4 / 7)
  # None of it is worse than no clipping, with 4 and 10.
  assert found.harm == pytest.approx(0)
  assert found.harmed == 0
  assert found.tuned == pytest.approx(100 * (0.5 + 0) / 7 / 2)


def test_a_constant_at_another_scale_is_another_constant():
  study = _regret.Study(rows_by_hand())
  low, _ = study.cells
  # At the scale 100 a limit of 1 is one of 0.01, with 8; the best has 3.
  assert study.regret("constant 1", low, 100.0).percent == pytest.approx(500 / 7)
  assert study.regret("none", low, 100.0) == study.regret("none", low, 1.0)
  # A limit above all that were measured is none.
  assert study.regret("constant 100", low, 0.01) == study.regret("none", low)


def agreement_by_hand(grads, rate=0.3):
  """The equations of `_agreement`, in float64 and for one vector."""
  log, norm = np.log, np.linalg.norm
  h, a, m, d, seen, updates = log(1e-3), 1.0, None, 0.0, 0, []
  for g in np.asarray(grads, np.float64):
    n = norm(g)
    if not np.isfinite(n) or n == 0:
      updates.append(np.zeros_like(g))
      continue
    cosine = g @ d / (n * norm(d)) if seen else 0.0
    if seen:
      speed = max(rate, a * min(1, 10 / (seen + 1)))
      h = np.clip(h + speed * cosine, log(1e-5), log(2))
    else:
      m = log(n)
    u = g * min(1, np.exp(h + m - log(n)))
    m += max(0.05, 1 / (seen + 1)) * (min(log(n), m + log(3)) - m)
    a *= 0.7 if cosine < 0 else 1.0
    d, seen = 0.9 * d + u, seen + 1
    updates.append(u)
  return np.stack(updates)


@pytest.mark.parametrize("by", ["leaf", "all"])
def test_agreement_is_that_of_its_equations(by):
  import jax

  random = np.random.default_rng(0)
  drift = 2 * np.sin(np.arange(400) / 40)[:, None]
  sizes = np.exp(random.normal(size=(400, 1)))
  grads = np.float32((random.normal(size=(400, 7)) + drift) * sizes)
  grads[50], grads[70], grads[90] = np.nan, 0, np.inf
  tree = {"a": grads[:, :3], "b": grads[:, 3:]}
  tx = _agreement.clip_by_agreement(by)

  def step(state, g):
    updates, state = tx.update(g, state)
    return state, updates

  start = tx.init(jax.tree.map(lambda x: jax.numpy.zeros(x.shape[1:]), tree))
  _, found = jax.jit(lambda g: jax.lax.scan(step, start, g))(tree)
  parts = {k: agreement_by_hand(v) for k, v in tree.items()}
  whole = agreement_by_hand(grads)
  wanted = parts if by == "leaf" else {"a": whole[:, :3], "b": whole[:, 3:]}
  for key, x in found.items():
    scale = np.linalg.norm(wanted[key], axis=1, keepdims=True) + 1e-30
    np.testing.assert_allclose(x / scale, wanted[key] / scale, atol=2e-5)


def test_padding_has_no_gradient():
  import jax

  task = update_clipping.padded(phase=2, quiet=3)
  params = task.init(0)
  key = jax.random.key(0)
  still = [
    not any(np.any(g) for g in jax.tree.leaves(task.gradient(params, {}, key, step)))
    for step in range(7)
  ]
  assert still == [False, False, True, True, True, False, False]


def test_stable_adam_is_that_of_its_authors():
  """Their update, in float64: debiased averages, and the RMS of g / sqrt(u)."""
  import jax.numpy as jnp

  b1, b2, eps = 0.9, 0.99, 1e-8
  tx = update_clipping.scale_by_stable_adam(b1, b2, eps)
  random = np.random.default_rng(0)
  state = tx.init(jnp.zeros((3, 4)))
  v = u = np.zeros((3, 4))
  for step in range(1, 30):
    g = random.normal(size=(3, 4)) * (0 if 5 < step < 25 else 10)
    updates, state = tx.update(jnp.float32(g), state)
    hat1 = b1 * (1 - b1 ** (step - 1)) / (1 - b1**step)
    hat2 = b2 * (1 - b2 ** (step - 1)) / (1 - b2**step)
    v, u = hat1 * v + (1 - hat1) * g, hat2 * u + (1 - hat2) * g * g
    rms = np.sqrt(np.mean(g * g / np.maximum(u, eps**2)))
    wanted = v / (np.sqrt(u) + eps) / max(1.0, rms)
    np.testing.assert_allclose(updates, wanted, rtol=2e-5)


def test_settled_members_are_left_out():
  import jax.numpy as jnp
  import optax

  task = _sweep.Task(
    init=lambda seed: jnp.float32(seed),
    gradient=lambda params, member, key, step: jnp.ones(()),
    score=lambda params: {"value": params},
  )
  scores = _sweep.train(
    task,
    lambda member: optax.sgd(member["rate"]),
    _sweep.members(rate=np.float32([1.0]), seed=np.arange(4)),
    steps=4,
    every=1,
    settled=lambda now: now["value"] <= 0,
  )
  # Each goes down to 0 and is not trained any further.
  expected = [[-1] * 4, [0] * 4, [1, 0, 0, 0], [2, 1, 0, 0]]
  np.testing.assert_array_equal(scores["value"], expected)


def test_wilson():
  # Of Brown, Cai & DasGupta 2001, and the closed form at 0.
  assert _summary.wilson(0, 10) == pytest.approx((0, 1.96**2 / (10 + 1.96**2)))
  low, high = _summary.wilson(8, 16)
  assert low + high == pytest.approx(1)
  assert (low, high) == pytest.approx((0.28, 0.72), abs=0.01)


def test_mean_and_its_error():
  assert _summary.mean([1.0, 3.0]) == pytest.approx((2.0, 1.0))


def test_a_mean_is_the_same_in_every_version_of_python():
  # Python 3.11 adds these up to less than 1.
  assert _summary.mean([0.1] * 10).value == 0.1


def test_a_diverged_run_is_worth_a_guess():
  row = {"loss": [2.0, None, 1e9]}
  assert _summary.losses(row) == [2.0, math.log(256), math.log(256)]
  assert _summary.diverged(row) == 2


def test_the_command_writes_a_study_where_it_is_told_and_nowhere_else(
  monkeypatch, tmp_path, capsys
):
  rows = rows_of("batch_range")
  monkeypatch.setattr(batch_range, "run", lambda quick, note: iter(rows))
  monkeypatch.setattr(_page, "PAGE", tmp_path / "page.md")
  monkeypatch.setattr(_page, "FIGURES", tmp_path)
  path = tmp_path / "mine.json"
  assert command.main(["batch_range", "--json", str(path)]) == rows
  assert json.loads(path.read_text())["rows"] == rows
  assert command.main(["batch_range", "--quick"]) == rows
  assert list(tmp_path.iterdir()) == [path]
  assert _page.tables("batch_range", rows) in capsys.readouterr().out


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["bach_range"], "invalid choice: 'bach_range'"),
    (["all", "--json", "x.json"], "argument --json: a file is for one study"),
    (["untuned", "--quick", "--draw"], "not allowed with argument --quick"),
  ],
)
def test_a_wrong_command_is_an_error(arguments, words, capsys):
  with pytest.raises(SystemExit) as caught:
    command.main(arguments)
  assert caught.value.code == 2
  assert words in capsys.readouterr().err


@pytest.mark.parametrize("study", studies.STUDIES)
def test_the_page_has_the_tables_of_the_results(study):
  rows = rows_of(study)
  assert _marked.between(_page.PAGE.read_text(), study) == _page.tables(study, rows)


@pytest.mark.parametrize("study", studies.STUDIES)
def test_the_results_say_what_they_depend_on(study):
  rows_of(study)
  about = json.loads(studies.results(study).read_text())["about"]
  assert about["study"] == study
  assert not about["quick"]
  assert {"device", "date", "jax", "optax", "optax_clip", "wall_s"} <= set(about)


@pytest.mark.parametrize("study", studies.STUDIES)
def test_the_page_has_the_command_and_the_figure(study):
  page = _page.PAGE.read_text()
  assert f"python -m studies {study}\n" in page
  assert re.search(rf"!\[[^]]+\]\(figures/{study}\.png\)", page)
  assert (_page.FIGURES / f"{study}.png").exists()
