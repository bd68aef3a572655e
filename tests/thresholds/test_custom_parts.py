"""What users put in: measures of their own in guards, and optimizers of their own."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import measures
from optax_clip import thresholds

GRADS = {
  "w": jnp.float32([[3.0, 0.0], [4.0, 0.0], [0.0, 2.0]]),
  "b": jnp.float32([6.0]),
}


def of_number(number):
  """A measure of one number, made of functions of the package."""

  def measure(updates, params=None, **extra_args):
    del params, extra_args
    return number(updates)

  return measures.global_norm()._replace(measure=measure, parts=None)


# And what each of them is of the gradients above.
NUMBERS = {
  "unitwise_norm": (lambda tree: jnp.max(optax_clip.unitwise_norm(tree["w"])), 5.0),
  "global_norm": (lambda tree: optax_clip.global_norm(tree["w"]), np.sqrt(29)),
}
CLIPS = (
  optax_clip.clip_by_global_norm(1.0),
  optax_clip.clip_by_layer_norm(1.0),
  optax_clip.adaptive_grad_clip(0.1),
)
WRAPPERS = {
  "skip_nonfinite": optax_clip.skip_nonfinite,
  "observe": functools.partial(optax_clip.observe, window=4),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("number", NUMBERS)
def test_a_measure_may_call_what_the_package_offers(number, wrapper):
  measure, expected = of_number(NUMBERS[number][0]), NUMBERS[number][1]

  @jax.jit
  def clipped(grads):
    results = []
    for clip in CLIPS:
      tx = WRAPPERS[wrapper](clip, measure=measure)
      new, state = tx.update(grads, tx.init(grads), grads)
      alone, _ = clip.update(grads, clip.init(grads), grads)
      results.append((new, alone, optax_clip.metrics(state)[f"{wrapper}/norm"]))
    return results

  for new, alone, norm in clipped(GRADS):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), new, alone)
    np.testing.assert_allclose(norm, expected, rtol=1e-6)


# --- Optimizers whose state is not what it was ------------------------------------


def momentum(change):
  """An optimizer whose moments are changed by its first update."""

  def init(params):
    return {"moments": jax.tree.map(jnp.zeros_like, params)}

  def update(updates, state, params=None):
    del params
    moments = jax.tree.map(lambda m, g: m + g, state["moments"], updates)
    return updates, {"moments": jax.tree.map(change, moments)}

  return optax.GradientTransformation(init, update)


# And how both types may be written.
CHANGES = {
  "dtype": (lambda x: x.astype(jnp.float32), ("bfloat16", "float32")),
  "shape": (lambda x: x[None], (r"\[2\]|\(2,\)", r"[\[(]1, ?2[\])]")),
}
GUARDS = {
  "skip_nonfinite": optax_clip.skip_nonfinite,
  "skip_spikes": lambda inner: optax_clip.skip_spikes(inner, thresholds.constant(9.0)),
  "both": lambda inner: optax_clip.skip_spikes(optax_clip.skip_nonfinite(inner)),
}


STEPS = {
  "update": lambda tx: tx.update,
  "guarded_step": lambda tx: functools.partial(optax_clip.guarded_step, tx),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("kind", CHANGES)
def test_a_state_that_changes_its_type_is_an_error_that_names_the_leaf(
  kind, guard, step
):
  change, types = CHANGES[kind]
  tx = GUARDS[guard](momentum(change))
  params = {"layer": {"w": jnp.ones(2, jnp.bfloat16)}}
  with pytest.raises((TypeError, ValueError)) as caught:
    jax.eval_shape(STEPS[step](tx), params, tx.init(params), params)
  message = str(caught.value)
  assert "['moments']['layer']['w']" in message
  assert all(re.search(x, message) for x in types), message
  # The cure: what `init` returns should be what `update` does.
  assert "init" in message
  for internal in ("cond branch", "true_fun", "false_fun"):
    assert internal not in message


def test_a_state_that_becomes_another_tree_is_one_too():
  def update(updates, state, params=None):
    del params
    return updates, {**state, "extra": jnp.zeros(())}

  tx = optax_clip.skip_nonfinite(
    optax.GradientTransformation(lambda params: {"count": jnp.zeros(())}, update)
  )
  with pytest.raises((TypeError, ValueError)) as caught:
    jax.eval_shape(tx.update, GRADS, tx.init(GRADS))
  message = str(caught.value)
  assert "extra" in message
  assert "init" in message
  assert "cond" not in message


# --- A threshold around another ---------------------------------------------------


def times(factor, threshold):
  """As in docs/blocks.md."""

  def update(norms, state, **extra_args):
    limits, state = threshold.update(norms, state, **extra_args)
    return factor * limits, state

  return optax_clip.Threshold(threshold.init, update)


def test_twice_the_median_of_the_last_norms():
  """Against NumPy, in a window that is full and one that is not; NaN is not learned."""
  median = thresholds.percentile(50, window=128)
  tx = optax_clip.clip_with(
    measures.global_norm(), times(2, median), optax_clip.actions.rescale()
  )
  norms = np.exp(np.random.default_rng(0).normal(size=200)).astype(np.float32)
  norms[[40, 150]] = np.nan
  limits = optax_clip.replay_limits(tx, norms)
  for i in (0, 1, 39, 41, 127, 128, 149, 151, 199):
    known = norms[: i + 1]
    known = known[np.isfinite(known)][-128:].astype(np.float64)
    np.testing.assert_allclose(limits[i], 2 * np.median(known), rtol=1e-6)
