"""Examples whose norms are not finite: left out of sums, counts and derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_clip

GLOBAL = optax_clip.per_example_global_norm_clip
LAYER = optax_clip.per_example_layer_norm_clip
both = pytest.mark.parametrize("function", [GLOBAL, LAYER])
every_bad = pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
every_dtype = pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])

SHAPES = [(6, 3), (6, 2, 4), (6,)]
# Which examples stay.
GOOD = np.array([True, False, True, True, False, True])


def batch(dtype="float32"):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in SHAPES]


def spoiled(grads, bad, leaf=1):
  """One element of two examples is bad, in one leaf."""
  x = grads[leaf]
  index = (np.flatnonzero(~GOOD), *[0] * (x.ndim - 1))
  return [y.at[index].set(bad) if i == leaf else y for i, y in enumerate(grads)]


def kept(grads):
  return [x[np.flatnonzero(GOOD)] for x in grads]


@functools.cache
def compiled(function, **keywords):
  """From gradients and a limit to sums and counts: one program for all tests."""
  return jax.jit(functools.partial(function, **keywords))


@both
@every_bad
@every_dtype
@pytest.mark.parametrize("limit", [0.5, 3.0, float("inf")])
def test_the_others_are_summed_as_if_it_were_not_there(function, bad, dtype, limit):
  grads = batch(dtype)
  limit = np.float32(limit)
  sums, counts = compiled(function, nonfinite="zero")(spoiled(grads, bad), limit)
  wanted, wanted_counts = compiled(function)(kept(grads), limit)
  for new, exact, x in zip(sums, wanted, grads, strict=True):
    assert new.dtype == x.dtype
    exact = np.asarray(exact, np.float64)
    error = np.abs(np.asarray(new, np.float64) - exact)
    # Sums of another order: rounded once, and 1e-6 of their terms.
    terms = np.sum(np.abs(np.asarray(x, np.float64)), axis=0)
    bound = float(jnp.finfo(dtype).eps) * np.abs(exact) + 1e-6 * terms
    assert np.all(error <= bound)
  for count, wanted in zip(
    jax.tree.leaves(counts), jax.tree.leaves(wanted_counts), strict=True
  ):
    assert count.dtype == jnp.int32
    assert count == wanted


def test_the_sum_is_that_of_the_formula():
  """Against float64, not against the function itself."""
  grads = spoiled(batch(), np.nan)
  (*sums,), count = compiled(GLOBAL, nonfinite="zero")(grads, 1.5)
  flat = np.concatenate(
    [np.asarray(x, np.float64).reshape(6, -1) for x in grads], axis=1
  )[GOOD]
  norms = np.sqrt(np.sum(flat**2, axis=1))
  exact = np.minimum(1, 1.5 / norms) @ flat
  found = np.concatenate([np.ravel(x) for x in sums])
  np.testing.assert_allclose(found, exact, rtol=0, atol=1e-6 * np.abs(flat).sum())
  assert count == np.sum(norms > 1.5)


@both
def test_a_batch_of_bad_examples_is_zero(function):
  grads = [jnp.full(shape, jnp.nan) for shape in SHAPES]
  sums, counts = compiled(function, nonfinite="zero")(grads, 1.0)
  assert not any(np.any(x) for x in sums)
  assert not any(np.any(x) for x in jax.tree.leaves(counts))


@both
def test_finite_examples_are_summed_as_by_default(function):
  """Also the largest: their norms are no floats."""
  grads = [jnp.array([[3e38, 3e38, -3e38], [1.0, -0.0, 2.0]]), jnp.ones((2, 1))]
  for limit in (0.5, 1.0, float("inf")):
    found = compiled(function, nonfinite="zero")([x / 4 for x in grads], limit)
    wanted = compiled(function)([x / 4 for x in grads], limit)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
  (total, _), count = compiled(GLOBAL, nonfinite="zero")(grads, 1.0)
  assert np.all(np.isfinite(total))
  assert count == 2


@both
def test_by_default_it_is_seen(function):
  sums, _ = compiled(function)(spoiled(batch(), np.nan), 1.0)
  assert np.all(np.isnan(sums[1]))


@every_bad
def test_an_example_is_left_out_of_all_leaves(bad):
  grads = spoiled(batch(), bad)
  sums, _ = compiled(LAYER, nonfinite="zero")(grads, 1.0)
  alone, _ = compiled(LAYER, nonfinite="zero")([grads[0]], 1.0 / 3**0.5)
  wanted, _ = compiled(LAYER)([kept(grads)[0]], 1.0 / 3**0.5)
  np.testing.assert_allclose(sums[0], wanted[0], rtol=0, atol=1e-5)
  assert np.max(np.abs(alone[0] - wanted[0])) > 1e-3


@functools.cache
def derivative(function, mode):
  """Of the squares of the sums; forward along the first element of each example."""

  def total(grads):
    sums, _ = function(grads, 1.0, nonfinite="zero")
    return sum(jnp.sum(x * x) for x in sums)

  def forward(grads):
    firsts = [(i, b) for i, x in enumerate(grads) for b in range(len(x))]
    along = [np.zeros((len(firsts), *x.shape), np.float32) for x in grads]
    for direction, (i, b) in enumerate(firsts):
      along[i][direction, b].flat[0] = 1
    slopes = jax.lax.map(lambda dots: jax.jvp(total, (grads,), (dots,))[1], along)
    return jnp.split(slopes, len(grads))

  return jax.jit(jax.grad(total) if mode == "reverse" else forward)


@both
@every_bad
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_derivatives_are_those_of_the_others(function, bad, mode):
  """Of what is left out they are 0."""
  grads = batch()
  found = derivative(function, mode)(spoiled(grads, bad))
  wanted = derivative(function, mode)(kept(grads))
  for new, exact in zip(found, wanted, strict=True):
    np.testing.assert_allclose(new[np.flatnonzero(GOOD)], exact, rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(new[np.flatnonzero(~GOOD)], 0)


@both
def test_an_empty_batch_and_other_dtypes(function):
  clip = compiled(function, nonfinite="zero")
  (total,), _ = clip([jnp.zeros((0, 2))], 1.0)
  np.testing.assert_array_equal(total, [0, 0])
  z = [jnp.array([[3 + 4j], [complex(np.nan, 1)]], jnp.complex64)]
  (total,), count = clip(z, 1.0)
  np.testing.assert_allclose(total, [0.6 + 0.8j], rtol=1e-6)
  assert jax.tree.leaves(count) == [1]
  with jax.enable_x64(True):
    (total,), _ = clip([jnp.array([[3.0], [jnp.nan]])], 1.0)
    assert total.dtype == jnp.float64
    np.testing.assert_allclose(total, [1], rtol=1e-15)


@both
def test_an_unknown_policy(function):
  with pytest.raises(ValueError, match="nonfinite must be one of 'propagate', 'zero'"):
    function(batch(), 1.0, nonfinite="skip")
