"""`protect` is exactly the chain that its docstring says."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import actions
from optax_clip import measures
from optax_clip import thresholds

PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(4)}


def by(threshold):
  return optax_clip.clip_with(measures.global_norm(), threshold, actions.rescale())


def chain(clip, guard=optax_clip.skip_nonfinite):
  return guard(optax.chain(clip, optax.adam(0.1)))


layers = functools.partial(optax_clip.skip_nonfinite, record="layers")
schedule = optax.linear_schedule(1.0, 0.1, 10)

# What is passed beside the optimizer, and the chain that it stands for.
CASES = {
  "nothing": ({}, lambda: chain(by(thresholds.geometric()))),
  "a number": ({"clip": 0.7}, lambda: chain(optax_clip.clip_by_global_norm(0.7))),
  "a schedule": (
    {"clip": schedule},
    lambda: chain(optax_clip.clip_by_global_norm(schedule)),
  ),
  "a threshold": (
    {"clip": thresholds.percentile(50, 10)},
    lambda: chain(by(thresholds.percentile(50, 10))),
  ),
  "a transformation": (
    {"clip": optax_clip.clip_by_layer_norm(0.5)},
    lambda: chain(optax_clip.clip_by_layer_norm(0.5)),
  ),
  "another guard": (
    {"clip": 0.7, "guard": optax_clip.skip_spikes},
    lambda: chain(optax_clip.clip_by_global_norm(0.7), optax_clip.skip_spikes),
  ),
  "layers": (
    {"guard": layers},
    lambda: chain(by(thresholds.geometric()), layers),
  ),
  "no guard": (
    {"clip": 0.7, "guard": None},
    lambda: optax.chain(optax_clip.clip_by_global_norm(0.7), optax.adam(0.1)),
  ),
}


def program(tx):
  """The state that it starts with, and what it does in a step, line by line."""
  state = tx.init(PARAMS)
  jaxpr = jax.make_jaxpr(tx.update)(PARAMS, state, PARAMS)
  return state, re.sub(r"0x[0-9a-f]+", "", str(jaxpr))


@pytest.mark.foreign  # Adam and the schedule of optax mix dtypes.
def test_it_is_the_chain():
  programs = set()
  for name, (keywords, other) in CASES.items():
    state, found = program(optax_clip.protect(optax.adam(0.1), **keywords))
    expected, wanted = program(other())
    assert found == wanted, name
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    programs.add(found)
  # So that it could fail.
  assert len(programs) == len(CASES)


def test_the_whole_step_takes_it():
  tx = optax_clip.protect(optax.sgd(0.1))
  state = tx.init(PARAMS)
  params, state = optax_clip.guarded_step(tx, PARAMS, state, PARAMS)
  assert optax_clip.metrics(state)["skip_nonfinite/steps"] == 1
  assert float(params["w"][0, 0]) < 1


def test_it_takes_extra_arguments_without_a_guard():
  tx = optax_clip.protect(optax.sgd(0.1), 1.0, guard=None)
  updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, loss=1.0)
  assert jnp.isfinite(updates["w"]).all()


def test_an_early_bad_batch_is_bounded_by_default():
  tx = optax_clip.protect(optax.sgd(1.0))
  state = tx.init(PARAMS)
  unit = {"w": jnp.zeros((3, 2)).at[0, 0].set(1), "b": jnp.zeros(4)}
  sizes = []
  for scale in (1.0, 1e4, 1.0):
    grads = jax.tree.map(lambda g, s=scale: s * g, unit)
    updates, state = tx.update(grads, state)
    sizes.append(float(optax_clip.global_norm(updates)))
  np.testing.assert_allclose(sizes, [1, 2, 1], rtol=1e-6)


def test_errors():
  with pytest.raises(TypeError, match="inner must be a GradientTransformation"):
    optax_clip.protect(optax.sgd)
  with pytest.raises(ValueError, match="clip must be non-negative"):
    optax_clip.protect(optax.sgd(0.1), -1.0)
  with pytest.raises(TypeError, match="clip must be a number, got 'auto'"):
    optax_clip.protect(optax.sgd(0.1), "auto")
