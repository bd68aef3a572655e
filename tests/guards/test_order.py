"""Guards, observers and accumulators around a loss scale, or an error that says how."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import thresholds

PARAMS = {"w": jnp.ones(3), "b": jnp.ones(2)}
# Gradients of the loss times a scale: beyond this, float16 overflows.
LARGEST = 2184.0


def scale(inner):
  return optax_clip.dynamic_loss_scale(inner)


def spikes(inner):
  return optax_clip.skip_spikes(inner, thresholds.history(6, window=8))


def observe(inner):
  return optax_clip.observe(inner, 64)


def accumulate(inner):
  return optax.MultiSteps(inner, 2).gradient_transformation()


skip, protect = optax_clip.skip_nonfinite, optax_clip.protect
sgd = optax.sgd(1e-3)


def run(tx, steps=40):
  """Steps taken, and the last state, of a run whose first scales overflow."""

  @jax.jit
  def step(state, _):
    factor = optax_clip.loss_scale(state)
    value = jnp.where(factor > LARGEST, jnp.inf, factor)
    grads = jax.tree.map(lambda x: value.astype(x.dtype) * jnp.ones_like(x), PARAMS)
    updates, state = tx.update(grads, state, PARAMS)
    return state, jnp.any(updates["w"] != 0)

  state, moved = jax.lax.scan(step, tx.init(PARAMS), length=steps)
  return np.asarray(moved), state


ORDERS = {
  "skip(scale)": lambda: skip(scale(sgd)),
  "scale(skip)": lambda: scale(skip(sgd)),
  "spikes(scale)": lambda: spikes(scale(sgd)),
  "scale(spikes)": lambda: scale(spikes(sgd)),
  "spikes(skip(scale))": lambda: spikes(skip(scale(sgd))),
  "skip(scale(spikes))": lambda: skip(scale(spikes(sgd))),
  "observe(scale)": lambda: observe(scale(sgd)),
  "observe(skip(scale))": lambda: observe(skip(scale(sgd))),
  "scale(observe)": lambda: scale(observe(sgd)),
  "scale(protect)": lambda: scale(protect(sgd)),
}


@pytest.mark.foreign
@pytest.mark.parametrize("name", ORDERS)
def test_the_scale_falls_until_nothing_overflows(name):
  moved, state = run(ORDERS[name]())
  np.testing.assert_array_equal(moved, np.arange(40) >= 4)
  assert optax_clip.loss_scale(state) == 2048


@pytest.mark.foreign
def test_what_is_around_accumulation_skips_a_microbatch():
  moved, state = run(scale(skip(accumulate(sgd))))
  assert moved.sum() == 18
  assert optax_clip.loss_scale(state) == 2048


@pytest.mark.parametrize("order", ["spikes(scale)", "scale(spikes)"])
def test_spikes_are_judged_in_units_of_the_loss(order):
  _, state = run(ORDERS[order]())
  metrics = optax_clip.metrics(state)
  np.testing.assert_allclose(metrics["skip_spikes/norm"], 5**0.5, rtol=1e-6)
  assert metrics["skip_spikes/steps"] == 36
  assert metrics["skip_spikes/steps_skipped"] == 0


@pytest.mark.parametrize("order", ["observe(scale)", "observe(skip(scale))"])
def test_a_history_is_in_units_of_the_loss(order):
  _, state = run(ORDERS[order]())
  history = optax_clip.norm_history(state)
  assert np.isinf(history[:4]).all()
  np.testing.assert_allclose(history[4:], 5**0.5, rtol=1e-6)


# What puts something between a guard and a loss scale, and the outermost name.
WRONG = {
  "accumulation": (lambda: skip(accumulate(scale(sgd))), "skip_nonfinite"),
  "a clip": (
    lambda: spikes(optax.chain(optax_clip.clip_by_global_norm(1.0), scale(sgd))),
    "skip_spikes",
  ),
  "a mask": (
    lambda: skip(optax.masked(scale(sgd), {"w": True, "b": False})),
    "skip_nonfinite",
  ),
  "an observer": (lambda: skip(observe(scale(sgd))), "skip_nonfinite"),
  "accumulation in an observer": (
    lambda: observe(accumulate(scale(sgd))),
    "observe",
  ),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_order_is_refused_with_the_one_that_works(name):
  wrong, outer = WRONG[name]
  with pytest.raises(ValueError, match=rf"dynamic_loss_scale\({outer}\(...\)\)"):
    wrong().init(PARAMS)


@pytest.mark.parametrize("guard", [skip, None])
def test_protect_does_not_clip_scaled_gradients(guard):
  with pytest.raises(ValueError, match=r"dynamic_loss_scale\(protect\(optimizer\)\)"):
    protect(scale(sgd), guard=guard)
  with pytest.raises(ValueError, match=r"dynamic_loss_scale\(protect\(optimizer\)\)"):
    protect(skip(scale(sgd)), guard=guard)


class TestInsideAnAccumulator:
  """There a NaN stays, so that a guard skips all that follows; `metrics` says so."""

  def run(self, tx, values):
    state, update, moved = tx.init(PARAMS), jax.jit(tx.update), []
    for value in values:
      grads = jax.tree.map(lambda x, v=value: jnp.full_like(x, v), PARAMS)
      updates, state = update(grads, state, PARAMS)
      moved.append(bool(np.any(updates["w"])))
    return moved, state

  @pytest.mark.foreign
  def test_metrics_warn_that_it_skips_for_good(self):
    moved, state = self.run(accumulate(skip(sgd)), [1, np.nan, *[1] * 4])
    assert not any(moved)
    with pytest.warns(UserWarning, match=r"'skip_nonfinite' stands inside optax\.Mult"):
      optax_clip.metrics(state)
    # Not in a program, where nobody knows.
    jax.jit(optax_clip.metrics)(state)

  @pytest.mark.foreign
  def test_nothing_is_said_of_a_run_that_goes_on(self):
    """Nor of a guard around the accumulator, which loses one microbatch."""
    for tx in (accumulate(skip(sgd)), skip(accumulate(sgd))):
      moved, state = self.run(tx, [1, 1, 1, 1])
      assert moved == [False, True, False, True]
      optax_clip.metrics(state)
    moved, state = self.run(skip(accumulate(sgd)), [1, np.nan, 1, np.nan, np.nan, 1, 1])
    assert moved == [False, False, True, False, False, False, True]
    optax_clip.metrics(state)
