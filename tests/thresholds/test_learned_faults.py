"""Steps that nothing may be learned from, at every age of a memory.

A step with NaN or inf, and one of zeros, leave a memory bit for bit as it was. The
element rule of SPAM is the exception: zeros are values of its elements, as they
are in Adam, whose second moment it keeps.
"""

import itertools

from helpers import learned
from helpers import registry
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip

methods = pytest.mark.parametrize("name", learned.METHODS)
policies = pytest.mark.parametrize("nonfinite", ["propagate", "zero"])

FAULTS = {
  "NaN": (np.nan, 1),
  "inf": (np.inf, 1),
  "10 NaN": (np.nan, 10),
  "zero": (0.0, 1),
}

# Steps before the fault: none, within all warm-ups, after all of them.
AGES = {"first step": 0, "warm-up": 4, "steady": 120}

CASES = list(itertools.product(FAULTS, AGES))


def healthy(seed, steps):
  """Gradients of two leaves with norms around 1."""
  rng = np.random.default_rng(seed)

  def leaf(size):
    g = rng.standard_normal((steps, size)) + 0.1
    g *= rng.uniform(0.7, 1.3, (steps, 1)) / np.linalg.norm(g, axis=1, keepdims=True)
    return g.astype(np.float32)

  return {"a": leaf(3), "b": leaf(5)}


def faulty(fault):
  """The faulty steps: one bad element, or zeros everywhere."""
  value, steps = FAULTS[fault]
  g = healthy(9, steps)
  if value == 0:
    return jax.tree.map(np.zeros_like, g)
  g["a"][:, 1] = value
  return g


def forgets(name, fault):
  return (name, fault) != ("clip_element_spikes", "zero")


@methods
@policies
def test_memory_is_as_without_the_step(name, nonfinite):
  for fault, age in CASES:
    if not forgets(name, fault):
      continue
    before, after = (healthy(0, AGES[age]), True), (healthy(1, 8), True)
    _, hit = learned.play(
      name, before, (faulty(fault), True), after, nonfinite=nonfinite
    )
    _, spared = learned.play(
      name, before, (faulty(fault), False), after, nonfinite=nonfinite
    )
    learned.assert_same_memory(hit, spared)


def length(tree):
  return np.sqrt(sum(np.sum(np.square(np.float64(x))) for x in jax.tree.leaves(tree)))


@methods
def test_parameters_stay_finite_and_the_next_spike_is_caught(name):
  """The spike comes 5 steps after the fault, or after what is left of warm-up."""
  spike = jax.tree.map(lambda x: np.float32(1000) * x, healthy(2, 1))
  for fault, age in CASES:
    wait = max(4, learned.METHODS[name][2] - AGES[age])
    found, _ = learned.play(
      name,
      (healthy(0, AGES[age]), True),
      (faulty(fault), True),
      (healthy(1, wait), True),
      (spike, True),
      nonfinite="zero",
    )
    assert all(np.all(np.isfinite(np.sum(x, axis=0))) for x in jax.tree.leaves(found))
    kept = length(jax.tree.map(lambda x: x[-1], found)) / length(spike)
    # A first spike is much of the average that AdaClip has of a few steps; the
    # elements' limit of this row is five times their root mean square.
    few = name == "adaclip" and AGES[age] < 100
    assert kept < (0.3 if few else 0.02), (fault, age)


@methods
def test_faulty_steps_are_zero_or_seen(name):
  for fault, age in CASES:
    if fault == "zero":
      continue
    parts = (healthy(0, AGES[age]), True), (faulty(fault), True)
    found, _ = learned.play(name, *parts, nonfinite="zero")
    assert all(np.all(x[-1] == 0) for x in jax.tree.leaves(found))
    found, _ = learned.play(name, *parts)
    seen = any(np.any(~np.isfinite(x[-1])) for x in jax.tree.leaves(found))
    # An element rule turns inf into its limit, as value clipping does.
    laundered = (name, fault) == ("clip_element_spikes", "inf") and AGES[age]
    assert seen != bool(laundered)


@methods
def test_a_leaf_of_zeros_never_freezes(name):
  """An expert without tokens for 60 steps, then with them."""
  g = healthy(0, learned.LONGEST)
  g["a"][:60] = 0
  found, _ = learned.play(name, (g, True))
  a = np.linalg.norm(found["a"], axis=1)
  assert np.all(np.isfinite(a))
  assert np.min(a[60:]) > 0.05


@pytest.mark.parametrize("name", registry.names(registry.LAYERWISE))
def test_other_layers_learn_while_one_is_zero(name):
  g = healthy(0, 40)
  _, both = learned.play(name, (g, True))
  g["a"][:] = 0
  _, beside = learned.play(name, (g, True))
  if name == "adagc":
    return  # Its warm-up depends on the norms of all layers.
  for x, y in zip(learned.memory(both), learned.memory(beside), strict=True):
    np.testing.assert_array_equal(x[1], y[1])
    assert not np.any(y[0])


@methods
def test_nothing_is_learned_from_faulty_steps_alone(name):
  bad = jax.tree.map(lambda x: np.concatenate([x] * 3), faulty("10 NaN"))
  found, state = learned.play(name, (bad, True), nonfinite="zero")
  start = learned.make(name).init(jax.tree.map(lambda x: jnp.asarray(x[0]), bad))
  learned.assert_same_memory(state, start)
  assert all(np.all(x == 0) for x in jax.tree.leaves(found))


@pytest.mark.foreign
def test_element_spikes_learn_zeros_as_adam_does():
  g = healthy(0, 50)
  for x in g.values():
    x[20:25] = 0
  g = jax.tree.map(jnp.asarray, g)
  _, state = learned.run(optax_clip.clip_element_spikes(1e9, 0.9), g)
  _, adam = learned.run(optax.scale_by_adam(b2=0.9), g)
  for rms, nu in zip(jax.tree.leaves(state.rms), jax.tree.leaves(adam.nu), strict=True):
    np.testing.assert_allclose(rms**2, nu, rtol=1e-5)


@pytest.mark.parametrize("name", ["scheduled", "warmup", "at_most"])
def test_combinators_forget_with_their_threshold(name):
  thresholds = optax_clip.thresholds
  inner = thresholds.percentile(50.0, 9)
  threshold = {
    "scheduled": thresholds.at_most(inner, optax.linear_schedule(1.0, 0.1, 10)),
    "warmup": thresholds.warmup(inner, 5, 0.5),
    "at_most": thresholds.at_most(inner, 1.0),
  }[name]
  norms = np.float32([1, 2, 1, 3, 1, 2, 1, 1])
  bad = np.insert(norms, 3, [np.nan, np.inf, 0])
  _, hit = learned.limits(threshold, bad)
  _, spared = learned.limits(threshold, norms)
  if name == "scheduled":  # A schedule counts all steps.
    assert int(hit.cap.step) == int(spared.cap.step) + 3
    hit = hit._replace(cap=spared.cap)
  learned.assert_same_memory(hit, spared)


def test_warmup_has_another_limit_for_the_first_steps():
  thresholds = optax_clip.thresholds
  norms = np.float32([4, 4, 4, 4, 4])
  found, _ = learned.limits(
    thresholds.warmup(thresholds.percentile(50.0, 9), 2, 0.5), norms
  )
  np.testing.assert_allclose(found, [0.5, 0.5, 4, 4, 4])
  found, _ = learned.limits(thresholds.warmup(thresholds.constant(1.0), 3), norms)
  np.testing.assert_allclose(found, [np.inf, np.inf, np.inf, 1, 1])


def test_at_most_takes_the_smaller_limit():
  thresholds = optax_clip.thresholds
  found, _ = learned.limits(
    thresholds.at_most(thresholds.percentile(100.0, 9), 3.0), np.float32([1, 2, 9, 1])
  )
  np.testing.assert_allclose(found, [1, 2, 3, 3])
