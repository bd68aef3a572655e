"""Norms relative to those of weights, over the whole range of floats."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import actions
from optax_clip import measures
from optax_clip import thresholds

CLIPPING = 0.01
UPDATES = (1e-30, 1.0, 1e10, 1e19, 1e30, 3e38)
# Beside ones the norm of smaller elements may count as 0, as docs/precision.md says.
BESIDE_ONES = (1e-18, *UPDATES[1:])
# All of them normal floats, of which no backend makes 0.
LEAST = (2e-38, 1e-30, 1e-20, 1e-10, 1e-3)
TREE = {"zeros": jnp.zeros(4), "ones": jnp.ones(4)}


def of_measure(measure):
  def make(eps, nonfinite):
    return optax_clip.clip_with(
      measures.relative(measure, floor=eps),
      thresholds.constant(CLIPPING),
      actions.rescale(),
      nonfinite=nonfinite,
      name="relative",
    )

  return make


METHODS = {
  "adaptive_grad_clip": lambda eps, nonfinite: optax_clip.adaptive_grad_clip(
    CLIPPING, eps, nonfinite=nonfinite, name="relative"
  ),
  "relative layer_norm": of_measure(measures.layer_norm()),
  "relative layer_rms": of_measure(measures.layer_rms()),
}


def expected(update, eps, weight):
  """The elements of four equal ones, against four equal weights."""
  norm, limit = 2 * update, CLIPPING * max(2 * weight, eps)
  return update * min(1.0, limit / norm)


@pytest.mark.parametrize("nonfinite", ["zero", "propagate"])
@pytest.mark.parametrize("name", METHODS)
def test_a_large_ratio_scales_its_own_leaf(name, nonfinite):
  def clipped(pair):
    size, eps = pair
    tx = METHODS[name](eps, nonfinite)
    grads = {"zeros": jnp.full(4, 1.0) * size, "ones": jnp.ones(4)}
    new, state = tx.update(grads, tx.init(TREE), TREE)
    return new, optax_clip.metrics(state)

  pairs = np.array([(u, e) for u in BESIDE_ONES for e in LEAST])
  new, record = jax.jit(functools.partial(jax.lax.map, clipped))(
    jnp.asarray(pairs, jnp.float32)
  )
  root = 2 if name == "relative layer_rms" else 1
  for i, (size, eps) in enumerate(pairs):
    wanted = expected(size, eps * root, 0)
    np.testing.assert_allclose(
      new["zeros"][i], wanted, rtol=1e-5, atol=2e-38, err_msg=f"{size}, {eps}"
    )
    np.testing.assert_allclose(new["ones"][i], expected(1, eps * root, 1), rtol=1e-6)
  for key in ("relative/norm", "relative/limit", "relative/coefficient"):
    assert np.all(np.isfinite(record[key])), key
  assert not np.any(record["relative/steps_nonfinite"])


class TestNoLeastNorm:
  """With ``eps=0``, which optax has: weights of zero stay where they are."""

  @pytest.mark.parametrize("nonfinite", ["zero", "propagate"])
  @pytest.mark.parametrize("name", METHODS)
  def test_is_a_limit_of_zero_where_weights_are_zero(self, name, nonfinite):
    tx = METHODS[name](0.0, nonfinite)
    update = jax.jit(tx.update)
    grads = {"zeros": jnp.full(4, 1e10), "ones": jnp.ones(4)}
    new, state = update(grads, tx.init(TREE), TREE)
    np.testing.assert_array_equal(new["zeros"], 0)
    np.testing.assert_allclose(new["ones"], CLIPPING, rtol=1e-6)
    record = optax_clip.metrics(state)
    assert record["relative/steps_nonfinite"] == 0
    assert not any(np.isnan(value) for value in record.values())
    new, state = update(jax.tree.map(jnp.zeros_like, grads), state, TREE)
    assert not any(np.any(x) for x in new.values())
    assert optax_clip.metrics(state)["relative/norm"] == 0

  @pytest.mark.foreign  # AGC of optax mixes ranks.
  def test_is_that_of_optax(self):
    rng = np.random.default_rng(0)
    params = {
      "w": jnp.float32(rng.standard_normal((6, 4))).at[:, 1].set(0),
      "b": jnp.zeros(4),
    }
    grads = jax.tree.map(lambda x: jnp.float32(rng.standard_normal(x.shape)), params)
    ours, theirs = (
      optax_clip.adaptive_grad_clip(0.1, 0),
      optax.adaptive_grad_clip(0.1, 0),
    )
    found, _ = jax.jit(ours.update)(grads, ours.init(params), params)
    wanted, _ = jax.jit(theirs.update)(grads, theirs.init(params), params)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, wanted
    )

  def test_less_than_that_is_an_error(self):
    for eps in (-1e-3, float("nan")):
      with pytest.raises(ValueError, match=f"eps must be non-negative, got {eps}"):
        optax_clip.adaptive_grad_clip(0.1, eps)


@pytest.mark.parametrize("nonfinite", ["zero", "propagate"])
def test_no_weight_moves_beyond_its_bound_however_large_the_update(nonfinite):
  def clipped(pair):
    size, absolute = pair
    tx = optax_clip.clippy(0.1, absolute, nonfinite=nonfinite)
    new, state = tx.update(jnp.full(3, 1.0) * size, tx.init(jnp.zeros(3)), jnp.zeros(3))
    return new, optax_clip.metrics(state)["clippy/steps_nonfinite"]

  pairs = np.array([(u, a) for u in UPDATES for a in LEAST])
  found, broken = jax.jit(functools.partial(jax.lax.map, clipped))(
    jnp.asarray(pairs, jnp.float32)
  )
  wanted = np.min(pairs, axis=1)
  # No coefficient is below 2^-250 but 0, which is on the safe side.
  wanted = np.where(wanted < 2.0**-250 * pairs[:, 0], 0, wanted)[:, None]
  np.testing.assert_allclose(found, np.broadcast_to(wanted, found.shape), rtol=1e-5)
  assert not np.any(broken)


@pytest.mark.parametrize("measure", [measures.layer_norm, measures.unit_norm])
def test_weights_may_be_of_several_dtypes(measure):
  with jax.enable_x64(True):
    updates = {"a": jnp.ones((4, 3), jnp.float32), "b": jnp.ones(4, jnp.float32)}
    params = {"a": jnp.ones((4, 3), jnp.float32), "b": jnp.full(4, 3.0)}
    assert params["b"].dtype == jnp.float64
    tx = of_measure(measure())(1e-3, "propagate")
    new, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    np.testing.assert_allclose(new["a"], np.full((4, 3), CLIPPING), rtol=1e-6)
    np.testing.assert_allclose(new["b"], np.full(4, 3 * CLIPPING), rtol=1e-6)


@pytest.mark.parametrize("order", ["fdf ffd", "ffd fdf", "dff fdf", "fdd ddf"])
@pytest.mark.parametrize("measure", [measures.layer_norm(), measures.unit_norm()])
def test_leaves_of_unlike_dtypes_meet_their_own_weights(order, measure):
  """The norms of updates and of weights stand in blocks, by dtype: not the same."""
  with jax.enable_x64(True):
    dtypes = {"f": jnp.float32, "d": jnp.float64}
    ours, theirs = ([dtypes[x] for x in kinds] for kinds in order.split())
    updates = [jnp.full(4, 10.0**i, d) for i, d in enumerate(ours)]
    params = [jnp.full(4, 10.0 ** (2 * i), d) for i, d in enumerate(theirs)]
    tx = optax_clip.clip_with(
      measures.relative(measure), thresholds.constant(0.05), actions.rescale()
    )
    clipped, _ = jax.jit(tx.update)(updates, tx.init(params), params)
  for i, leaf in enumerate(clipped):
    wanted = min(10.0**i, 0.05 * 10.0 ** (2 * i))
    np.testing.assert_allclose(leaf, wanted, rtol=1e-6)
