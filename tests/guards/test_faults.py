"""Every guard and every threshold that learns, under every plan of faults."""

import pathlib

from helpers import faults
from helpers import learned
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import measures
from optax_clip import thresholds

pytestmark = pytest.mark.programs

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "skipping.md"


def skipped(run):
  """The mask of the steps that a guard, or one inside another, did not take."""
  flags = [v for k, v in run.metrics.items() if k.endswith("/skipped")]
  return np.any(np.stack(flags), axis=0)


def check(name, run_of, plan, expected, healthy=None):
  """All that a run under a guard must be; `healthy` runs without the bad steps."""
  run = run_of(faults.PLANS[plan][0])
  assert run.finite(), (name, plan)
  # Exactly these, so that the first healthy step is taken.
  np.testing.assert_array_equal(skipped(run), expected, err_msg=f"{name}: {plan}")
  healthy = healthy or faults.runner_of("skip_nonfinite")
  without = healthy(faults.PLANS[plan][0].without(expected))
  assert faults.same_trajectory(run, without, expected), (name, plan)


@pytest.mark.foreign  # Adam of optax mixes dtypes.
@pytest.mark.parametrize("name", faults.GUARDS)
def test_guards(name):
  for plan in faults.PLANS:
    check(name, faults.runner_of(name), plan, faults.expected(name, plan))


# Every threshold, as what judges spikes. Where its limit is one that ordinary norms
# exceed, times a factor; where it needs values first, after a warm-up.
JUDGES = {
  "percentile": {"threshold": thresholds.percentile(50, 50), "factor": 4, "warmup": 20},
  "history": {"threshold": thresholds.history(6, 64)},
  "zscore": {"threshold": thresholds.zscore(6)},
  "zscore, mean": {"threshold": thresholds.zscore(6, mode="mean")},
  "zscore, percentile": {"threshold": thresholds.zscore(6, mode="percentile")},
  "adagc": {
    "threshold": thresholds.clipped_mean(warmup=20, warmup_norm=1e30),
    "factor": 4,
    "warmup": 20,
  },
  "average": {"threshold": thresholds.average(0.98), "factor": 4, "warmup": 20},
  "history of layers": {
    "threshold": thresholds.history(6, 64),
    "measure": measures.layer_norm(),
  },
  "history after a warm-up": {
    "threshold": thresholds.warmup(thresholds.history(6, 128), 50, 1e4)
  },
}


@pytest.mark.foreign
@pytest.mark.parametrize("name", JUDGES)
def test_thresholds_as_judges(name):
  keywords = JUDGES[name]
  run = faults.runner(optax_clip.skip_spikes(faults.inner(), **keywords))
  healthy = None
  if "measure" in keywords:
    # The clip inside makes its norm of these: another rounding.
    guard = optax_clip.skip_nonfinite(faults.inner(), measure=keywords["measure"])
    healthy = faults.runner(guard)
  for plan in faults.PLANS:
    check(name, run, plan, faults.expected("skip_spikes", plan), healthy)


@pytest.mark.foreign
@pytest.mark.parametrize("name", learned.METHODS)
def test_thresholds_inside_a_guard(name):
  clip = learned.make(name)
  run_of = faults.runner(optax_clip.skip_nonfinite(optax.chain(clip, optax.adam(3e-3))))
  for plan, (arrays, faulty) in faults.PLANS.items():
    bad = faulty if plan in faults.NONFINITE else np.zeros_like(faulty)
    run = run_of(arrays)
    assert run.finite(), plan
    np.testing.assert_array_equal(skipped(run), bad, err_msg=plan)
    assert faults.same_trajectory(run, run_of(arrays.without(bad)), bad), plan


@pytest.mark.parametrize("name", learned.METHODS)
def test_thresholds_alone(name):
  """With `nonfinite="zero"`, and an optimizer without memory."""
  clip = learned.make(name, nonfinite="zero")
  run_of = faults.runner(optax.chain(clip, optax.sgd(0.05)), whole=False)
  for plan, (arrays, faulty) in faults.PLANS.items():
    run = run_of(arrays)
    assert run.finite(), plan
    if plan in faults.NONFINITE:
      without = run_of(arrays.without(faulty))
      assert faults.same_trajectory(run, without, faulty), plan


@pytest.mark.foreign
@pytest.mark.parametrize("name", faults.GUARDS)
def test_a_wrapped_step_is_a_whole_step(name):
  make, keywords = faults.GUARDS[name]
  run_of = faults.runner(make(), whole=False, **keywords)
  for plan in ("NaN element", "10 steps x 1e3", "level x 30 from here on"):
    run = run_of(faults.PLANS[plan][0])
    whole = faults.runner_of(name)(faults.PLANS[plan][0])
    np.testing.assert_array_equal(skipped(run), skipped(whole), err_msg=plan)
    # Two programs round differently, and training carries that on.
    np.testing.assert_allclose(
      run.params[0]["w"], whole.params[0]["w"], rtol=0, atol=1e-4, err_msg=plan
    )


@pytest.mark.foreign
def test_the_reason_of_a_skip_is_told():
  plans = {
    "NaN loss": optax_clip.SkipReason.NONFINITE_NORM,
    "gradient x 1e3": optax_clip.SkipReason.NORM_SPIKE,
  }
  run_of = faults.runner_of("skip_spikes, norm and loss")
  for plan, reason in plans.items():
    assert run_of(faults.PLANS[plan][0]).metrics["skip_spikes/reason"][-1] == reason
  for value, reason in (
    (np.nan, optax_clip.SkipReason.NONFINITE_LOSS),
    (100, optax_clip.SkipReason.LOSS_SPIKE),
  ):
    arrays, faulty = faults.fault(250, reported=value)
    run = run_of(arrays)
    np.testing.assert_array_equal(skipped(run), faulty)
    assert run.metrics["skip_spikes/reason"][-1] == reason


@pytest.mark.foreign
def test_optax_applies_the_nan_after_five():
  run = faults.runner_of(faults.PEER)(faults.PLANS["10 steps NaN"][0])
  finite = np.isfinite(run.params[0]["w"]).all(axis=(1, 2))
  np.testing.assert_array_equal(finite, np.arange(faults.STEPS) < 255)


@pytest.mark.foreign
def test_float16_overflows_are_skipped_and_the_scale_follows():
  half = faults.runner(
    optax_clip.dynamic_loss_scale(
      faults.inner(), init_scale=2.0**24, growth_interval=30
    ),
    dtype=jnp.float16,
    scaled=True,
  )
  run = half(faults.healthy())
  assert run.finite()
  missing = skipped(run).astype(bool)
  scale = run.metrics["dynamic_loss_scale/scale"]
  # It falls from where everything overflows, grows into an overflow and falls again.
  assert missing[0]
  assert missing[100:].any()
  assert missing.mean() < 0.1
  np.testing.assert_array_equal(scale[1:][missing[1:]], scale[:-1][missing[1:]] / 2)
  assert np.all(np.log2(scale) == np.round(np.log2(scale)))
  # A spike of the loss overflows float16, not float32.
  spike = half(faults.fault(250, loss=1e5)[0])
  assert skipped(spike)[250]
  assert spike.finite()
  # And it learns what float32 learns in as many steps, on the same batches.
  exact = faults.runner_of("skip_nonfinite")(faults.healthy().without(missing))
  last = np.sum(~missing) - 1
  images, labels = faults.every_image()
  ours = faults.loss(jax.tree.map(lambda x: x[-1], run.params), images, labels)
  theirs = faults.loss(jax.tree.map(lambda x: x[last], exact.params), images, labels)
  np.testing.assert_allclose(ours, theirs, rtol=0.01)


@pytest.mark.foreign
def test_docs_agree_with_the_measured_table():
  assert faults.table() in DOCS.read_text()
