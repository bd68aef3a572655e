"""Derivatives: through what rounds, and through steps that were not taken."""

import functools

from helpers import oracles
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import thresholds

WEIGHTS = np.array([0.5, -1.0, 2.0, 0.25, -0.75, 1.5, -0.125, 1.0])


def gradient(dtype):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.standard_normal(8), dtype)


def weighed(x):
  """A function of updates whose derivative is `WEIGHTS`."""
  return jnp.sum(x.astype(jnp.float32) * jnp.asarray(WEIGHTS, jnp.float32))


def precision(dtype):
  """Of a derivative in this dtype; a strict limit is undershot by 2e-6."""
  return 2 * float(oracles.finfo(dtype).eps) + 2.5e-6


every_dtype = pytest.mark.parametrize("dtype", oracles.LOW)


class TestThroughStrict:
  """Rounding has the derivative 1, as a cast has."""

  @every_dtype
  def test_by_the_updates_with_a_known_norm(self, dtype):
    """It is the coefficient, of each element alone."""

    def loss(g):
      clipped, _ = optax_clip.clip_tree(g, 1.0, norm=4.0, strict=True)
      return weighed(clipped)

    found = np.float64(jax.jit(jax.grad(loss))(gradient(dtype)))
    np.testing.assert_allclose(found, WEIGHTS / 4, rtol=precision(dtype))

  @every_dtype
  def test_by_the_updates_of_which_it_takes_the_norm(self, dtype):
    def loss(g):
      return weighed(optax_clip.clip_tree(g, 1.0, strict=True)[0])

    g = gradient(dtype)
    exact = np.float64(g)
    norm = np.linalg.norm(exact)
    expected = (WEIGHTS - exact * (exact @ WEIGHTS) / norm**2) / norm
    found = np.float64(jax.jit(jax.grad(loss))(g))
    np.testing.assert_allclose(found, expected, atol=4 * precision(dtype))

  @every_dtype
  def test_by_the_limit_of_a_norm(self, dtype):
    g = gradient(dtype)

    def loss(limit):
      return weighed(optax_clip.clip_tree(g, limit, strict=True)[0])

    exact = np.float64(g)
    expected = exact @ WEIGHTS / np.linalg.norm(exact)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(1.0), expected, rtol=1e-5)

  @every_dtype
  def test_by_the_limit_of_elements(self, dtype):
    g = gradient(dtype)

    def loss(limit):
      tx = optax_clip.clip(limit, strict=True)
      return weighed(tx.update(g, tx.init(g))[0])

    large = np.abs(np.float64(g)) > 0.5
    assert 0 < large.sum() < 8
    expected = np.sum(WEIGHTS * np.sign(np.float64(g)) * large)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.5), expected, rtol=1e-6)

  @every_dtype
  def test_by_the_elements_that_are_clipped(self, dtype):
    def loss(g):
      tx = optax_clip.clip(0.5, strict=True)
      return weighed(tx.update(g, tx.init(g))[0])

    g = gradient(dtype)
    expected = np.where(np.abs(np.float64(g)) > 0.5, 0, WEIGHTS)
    np.testing.assert_array_equal(np.float64(jax.jit(jax.grad(loss))(g)), expected)


GUARDS = {
  "skip_nonfinite": optax_clip.skip_nonfinite,
  "skip_spikes": lambda inner: optax_clip.skip_spikes(
    inner, thresholds.constant(100.0)
  ),
  "dynamic_loss_scale": lambda inner: optax_clip.dynamic_loss_scale(
    inner, init_scale=1.0
  ),
}

BROKEN = {
  "NaN": [np.nan, 1.0, 2.0],
  "inf": [np.inf, 1.0, 2.0],
  "all NaN": [np.nan] * 3,
}


def weighed_step(guard, whole):
  """From gradients and parameters to a number that is made of a step."""
  tx = GUARDS[guard](
    optax.chain(optax_clip.clip_by_global_norm(1.0), optax.scale(-0.5))
  )
  state = tx.init(jnp.zeros(3))

  def loss(g, params):
    step = functools.partial(optax_clip.guarded_step, tx) if whole else tx.update
    new, _ = step(g, state, params)
    return jnp.sum(new * jnp.arange(1.0, 4))

  return loss


@functools.cache
def derivatives(guard, whole):
  """Of a step, by its gradients and by the parameters."""
  return jax.jit(jax.grad(weighed_step(guard, whole), argnums=(0, 1)))


class TestThroughGuards:
  PARAMS = np.float32([1.0, -2.0, 3.0])

  @pytest.mark.parametrize("whole", [True, False], ids=["guarded_step", "update"])
  @pytest.mark.parametrize("guard", GUARDS)
  def test_a_step_that_was_not_taken_does_not_depend_on_its_gradients(
    self, guard, whole
  ):
    broken = dict(BROKEN)
    if guard == "skip_spikes":
      broken["a spike"] = [1e3, 0, 0]
    for name, g in broken.items():
      by_gradient, by_params = derivatives(guard, whole)(jnp.float32(g), self.PARAMS)
      np.testing.assert_array_equal(by_gradient, 0, name)
      # The parameters are what they were.
      np.testing.assert_array_equal(by_params, [1, 2, 3] if whole else 0, name)

  @pytest.mark.parametrize("guard", GUARDS)
  def test_nor_does_that_of_one_member_of_an_ensemble(self, guard):
    """Under `vmap` a branch is a selection."""
    grads = np.float32([[3.0, 0.5, -4.0], *BROKEN.values()])
    members = jax.vmap(weighed_step(guard, False), (0, None))
    by_gradient = jax.jit(jax.grad(lambda g: jnp.sum(members(g, self.PARAMS))))(grads)
    alone, _ = derivatives(guard, False)(grads[0], self.PARAMS)
    np.testing.assert_allclose(by_gradient[0], alone, rtol=1e-6)
    assert np.any(by_gradient[0])
    np.testing.assert_array_equal(by_gradient[1:], 0)

  @pytest.mark.parametrize("guard", GUARDS)
  def test_a_step_that_was_taken_depends_on_them_as_without_a_guard(self, guard):
    g = np.float64([3.0, 0.5, -4.0])
    norm, w = np.linalg.norm(g), np.float64([1, 2, 3])
    expected = -0.5 * (w - g * (g @ w) / norm**2) / norm
    found, _ = derivatives(guard, True)(jnp.asarray(g, jnp.float32), self.PARAMS)
    np.testing.assert_allclose(found, expected, rtol=1e-5)

  def test_a_step_made_zero_does_not_depend_on_its_gradients_either(self):
    def loss(g):
      return jnp.sum(optax_clip.clip_tree(g, 1.0, nonfinite="zero")[0])

    derivative = jax.jit(jax.grad(loss))
    for name, g in BROKEN.items():
      np.testing.assert_array_equal(derivative(jnp.float32(g)), 0, name)
