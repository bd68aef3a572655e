"""Statistics of Flax's fp8 layers: their "gradients" are new values, and stay so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip

nn = pytest.importorskip("flax.linen")
fp8_ops = pytest.importorskip("flax.linen.fp8_ops")
train_state = pytest.importorskip("flax.training.train_state")

# Flax promotes ranks and dtypes implicitly.
pytestmark = [pytest.mark.foreign, pytest.mark.programs]

OVERWRITE = fp8_ops.OVERWRITE_WITH_GRADIENT
LENGTH = 4
LIMIT = 1e-2

# The line of docs/precision.md.
TRAINED = optax_clip.labels_by_path({"^_overwrite_with_gradient/": False, "": True})


class Model(nn.Module):
  """Two layers, whose products are of fp8."""

  @nn.compact
  def __call__(self, x):
    cls = functools.partial(fp8_ops.Fp8DirectDotGeneralOp, amax_history_length=LENGTH)
    x = nn.relu(nn.Dense(16, dot_general_cls=cls)(x))
    return nn.Dense(16, dot_general_cls=cls)(x)


@pytest.fixture(scope="module")
def problem():
  """Variables, and gradients of a loss large enough that its values matter."""
  x, y = jax.random.normal(jax.random.key(0), (2, 16, 16))
  variables = Model().init(jax.random.key(1), x)

  @jax.jit
  def grads_of(variables):
    return jax.grad(lambda v: 1e3 * jnp.mean((Model().apply(v, x) - y) ** 2))(variables)

  return variables, grads_of


def optimizer():
  return optax.chain(optax_clip.clip_by_global_norm(LIMIT), optax.sgd(0.1))


def taken(tx, grads_of, variables, steps=3):
  """Steps of a loop of one's own: statistics are overwritten."""

  @jax.jit
  def step(variables, state):
    updates, state = tx.update(grads_of(variables), state, variables)
    new = optax.apply_updates(variables["params"], updates["params"])
    return {"params": new, OVERWRITE: updates[OVERWRITE]}, state

  state = tx.init(variables)
  for _ in range(steps):
    variables, state = step(variables, state)
  return variables, state


def largest(variables):
  histories = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables[OVERWRITE])
    if "amax_history" in jax.tree_util.keystr(path)
  ]
  return max(float(jnp.max(x)) for x in histories)


def test_masked_they_are_what_flax_makes_of_them(problem):
  """`TrainState` gives the optimizer the parameters only."""
  variables, grads_of = problem
  flax = train_state.TrainState.create(
    apply_fn=Model().apply, params=variables, tx=optimizer()
  )
  for _ in range(3):
    flax = flax.apply_gradients(grads=grads_of(flax.params))
  tx = optax.masked(optimizer(), TRAINED)
  new, state = taken(tx, grads_of, variables)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
    new,
    flax.params,
  )
  # They were not what they were at first, nor clipped.
  assert largest(new) > 100 * LIMIT
  for leaf in jax.tree.leaves(variables[OVERWRITE]):
    assert leaf.shape in ((1,), (LENGTH,))
  found = optax_clip.metrics(state)
  assert found["clip_by_global_norm/steps_clipped"] == 3


def test_one_update_passes_them_bit_for_bit(problem):
  variables, grads_of = problem
  grads = grads_of(variables)
  tx = optax.masked(optimizer(), TRAINED)
  updates, state = jax.jit(tx.update)(grads, tx.init(variables), variables)
  jax.tree.map(np.testing.assert_array_equal, updates[OVERWRITE], grads[OVERWRITE])
  exact = np.sqrt(
    sum(np.sum(np.float64(x) ** 2) for x in jax.tree.leaves(grads["params"]))
  )
  norm = optax_clip.metrics(state)["clip_by_global_norm/norm"]
  assert norm == pytest.approx(exact, rel=1e-6)


def test_without_the_mask_they_are_ruined(problem):
  """What the page warns of."""
  variables, grads_of = problem
  grads = grads_of(variables)
  clipped, norm = optax_clip.clip_tree(grads, LIMIT)
  assert largest(clipped) < LIMIT < largest(grads)
  own = optax_clip.global_norm(grads["params"])
  assert norm > 1.001 * own


def test_a_guard_inside_the_mask_skips_the_parameters_only(problem):
  variables, grads_of = problem
  grads = grads_of(variables)
  bad = {
    OVERWRITE: grads[OVERWRITE],
    "params": jax.tree.map(lambda x: x * jnp.nan, grads["params"]),
  }
  tx = optax.masked(optax_clip.skip_nonfinite(optimizer()), TRAINED)
  updates, _ = jax.jit(tx.update)(bad, tx.init(variables), variables)
  assert not any(np.any(x) for x in jax.tree.leaves(updates["params"]))
  jax.tree.map(np.testing.assert_array_equal, updates[OVERWRITE], grads[OVERWRITE])
