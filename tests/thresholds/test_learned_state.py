"""The states of learned thresholds: dtypes, transformations of JAX, checkpoints."""

import functools

from helpers import learned
from helpers import registry
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import actions
from optax_clip import measures

methods = pytest.mark.parametrize("name", learned.METHODS)
# What does not depend on the method is tested with each kind of memory by default.
KINDS = ("autoclip", "zclip", "adagc")
each_kind = pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=() if name in KINDS else pytest.mark.slow)
    for name in learned.METHODS
  ],
)


# Of most sequences, so that a method is compiled once for them.
STEPS = 30


def sequence(seed, steps=STEPS, dtype="float32", leading=()):
  rng = np.random.default_rng(seed)
  size = rng.uniform(0.5, 2, (steps, *leading, 1)) * np.where(
    rng.random((steps, *leading, 1)) < 0.1, 30, 1
  )
  return {
    "a": jnp.asarray(rng.standard_normal((steps, *leading, 3)) * size, dtype),
    "b": jnp.asarray(rng.standard_normal((steps, *leading, 5)) * size, dtype),
  }


def first(tree):
  return jax.tree.map(lambda x: x[0], tree)


def described(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


@methods
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_memory_is_float32_whatever_the_updates_are(name, dtype):
  with jax.enable_x64(dtype == "float64"):
    updates = first(sequence(0, steps=1, dtype=dtype))
    tx = learned.make(name)
    start = tx.init(updates)
    for x in learned.memory(start):
      assert x.dtype in (np.float32, np.int32)
    found, state = jax.eval_shape(tx.update, updates, start)
    assert described(state) == described(start)
    assert described(found) == described(updates)


@each_kind
def test_an_ensemble_is_its_members(name):
  tx = learned.make(name)
  updates = sequence(0, leading=(4,))
  together, _ = jax.vmap(
    functools.partial(learned.run, tx), in_axes=1, out_axes=(1, 0)
  )(updates)
  for i in range(4):
    member = jax.tree.map(lambda x, i=i: x[:, i], updates)
    alone, _ = learned.run_method(name, member)
    for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
      np.testing.assert_allclose(x[:, i], y, rtol=1e-5, atol=1e-7)


@each_kind
@pytest.mark.foreign
def test_multi_steps_learns_once_per_step(name):
  updates = jax.tree.map(np.asarray, sequence(0, 3 * STEPS))
  steps = optax.MultiSteps(learned.make(name), 3)
  state = steps.init(first(updates))
  update = jax.jit(steps.update)
  for i in range(3 * STEPS):
    _, state = update(jax.tree.map(lambda x, i=i: x[i], updates), state)
  means = jax.tree.map(lambda x: x.reshape(STEPS, 3, -1).mean(axis=1), updates)
  _, reference = learned.run_method(name, means)
  for x, y in zip(
    learned.memory(state.inner_opt_state), learned.memory(reference), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=1e-5)


STATIC = {row.name for row in registry.LEARNED if row.takes("window")}


@methods
def test_inject_hyperparams_changes_nothing(name):
  factory, defaults, _ = learned.METHODS[name]
  static = ("window",) if name in STATIC else ()
  injected = optax.inject_hyperparams(factory, static_args=static)(**defaults)
  updates = sequence(0)
  # Around that alone: with other settings JAX compiles all of it again.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    found, _ = learned.run(injected, updates)
  wanted, _ = learned.run_method(name, updates)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-7)


@pytest.mark.foreign
def test_injected_hyperparameters_act():
  make = optax.inject_hyperparams(optax_clip.autoclip, static_args=("window",))
  tx = make(percentile=0.0, window=9)
  updates = {"w": jnp.array([1.0])}
  state = tx.init(updates)
  update = jax.jit(tx.update)
  for n in (1.0, 2.0):
    new, state = update({"w": jnp.array([n])}, state)
  np.testing.assert_allclose(new["w"], [1.0])
  state.hyperparams["percentile"] = jnp.asarray(100.0)
  new, state = update({"w": jnp.array([2.0])}, state)
  np.testing.assert_allclose(new["w"], [2.0])


@pytest.mark.foreign
@pytest.mark.parametrize("name", sorted(STATIC))
def test_a_traced_window_says_what_to_do(name):
  factory, defaults, _ = learned.METHODS[name]
  with pytest.raises(TypeError, match=r"static_args=\('window',\)"):
    optax.inject_hyperparams(factory)(**defaults).init({"w": jnp.ones(1)})


@each_kind
@pytest.mark.filterwarnings("ignore")
@pytest.mark.foreign
def test_a_restored_checkpoint_continues_bit_for_bit(name, tmp_path):
  checkpoint = pytest.importorskip("orbax.checkpoint")
  tx = learned.make(name)
  half = [sequence(seed) for seed in range(2)]
  _, middle = learned.run_method(name, half[0])
  with checkpoint.StandardCheckpointer() as saver:
    saver.save(tmp_path / "state", middle)
    saver.wait_until_finished()
    blank = jax.tree.map(jnp.zeros_like, tx.init(first(half[0])))
    restored = saver.restore(tmp_path / "state", blank)
  assert jax.tree.structure(restored) == jax.tree.structure(middle)
  wanted, reference = learned.run_method(name, half[1], state=middle)
  found, state = learned.run_method(name, half[1], state=restored)
  learned.assert_same_memory(state, reference)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
  "name",
  [*registry.names(registry.LAYERWISE), "clip_element_spikes"],
)
def test_another_number_of_layers_is_a_clear_error(name):
  tx = learned.make(name)
  params = {"a": jnp.ones(3), "b": jnp.ones(3)}
  state = tx.init({**params, "c": jnp.ones(3)})
  with pytest.raises(ValueError, match=r"3 (norms|leaves).*updates\s+have 2"):
    tx.update(params, state)


def test_another_window_is_a_clear_error():
  g = {"a": jnp.ones(3)}
  state = optax_clip.autoclip(window=10).init(g)
  with pytest.raises(ValueError, match="window of 10"):
    optax_clip.autoclip(window=20).update(g, state)


MEASURES = {
  "global": measures.global_norm(),
  "layers": measures.layer_norm(),
  "rms": measures.layer_rms(),
  "groups": measures.group_norm({"a": "x", "b": "y"}, ["x", "y"]),
  "units": measures.unit_norm(),
  "relative": measures.relative(measures.unit_norm()),
}


@pytest.mark.parametrize("threshold", learned.THRESHOLDS)
def test_every_threshold_works_with_every_measure(threshold):
  rng = np.random.default_rng(0)
  updates = {
    "a": jnp.asarray(rng.standard_normal((30, 4, 3)), jnp.float32),
    "b": jnp.asarray(rng.standard_normal((30, 5)), jnp.float32),
  }
  updates = jax.tree.map(lambda x: x.at[25].multiply(1000.0), updates)
  params = jax.tree.map(jnp.ones_like, first(updates))
  every = {
    name: optax_clip.clip_with(
      measure, learned.THRESHOLDS[threshold], actions.rescale()
    )
    for name, measure in MEASURES.items()
  }

  # One program with a state for each measure.
  def init(params):
    return {name: tx.init(params) for name, tx in every.items()}

  def update(updates, states, params):
    both = {
      name: tx.update(updates, states[name], params) for name, tx in every.items()
    }
    return tuple({name: x[i] for name, x in both.items()} for i in range(2))

  together = optax.GradientTransformation(init, update)
  found, state = learned.run(together, updates, params)
  for name in MEASURES:
    for x in jax.tree.leaves((found[name], state[name])):
      assert not np.any(np.isnan(x)), name
    if threshold not in ("average", "mean_over_rms"):
      assert float(jnp.max(jnp.abs(found[name]["a"][25]))) < 100, name


@methods
def test_empty_trees_and_absent_leaves_pass(name):
  tx = learned.make(name)
  for tree in ({}, {"a": None}, {"a": jnp.zeros((0, 3))}):
    new, _ = jax.eval_shape(tx.update, tree, tx.init(tree))
    assert jax.tree.structure(new) == jax.tree.structure(tree)


@methods
def test_derivatives_are_finite_at_zero(name):
  tx = learned.make(name)
  g = jax.tree.map(jnp.zeros_like, first(sequence(0)))
  _, warm = learned.run_method(name, sequence(0))
  slope_at = jax.jit(
    jax.grad(lambda g, s: sum(x.sum() for x in tx.update(g, s)[0].values()))
  )
  for state in (tx.init(g), warm):
    slope = slope_at(g, state)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(slope))


@methods
def test_metrics_show_norm_and_limit(name):
  _, state = learned.run_method(name, sequence(0))
  found = optax_clip.metrics(state)
  norms = [v for k, v in found.items() if k.endswith("/norm")]
  limits = [v for k, v in found.items() if k.endswith("/limit")]
  assert len(norms) == len(limits) == (2 if name == "stable_spam" else 1)
  assert all(np.isfinite(x) for x in norms + limits)
  assert all(int(v) == 30 for k, v in found.items() if k.endswith("/steps"))
