"""Norms and clipping as plain functions, against float64 NumPy."""

from helpers.registry import ZERO_IS_MEANT
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import optax_clip

DTYPES = ("float16", "bfloat16", "float32")
RANKS = [(), (5,), (1, 5), (6, 5), (2, 3, 4), (3, 3, 2, 4), (2, 2, 2, 3, 4)]
# The axes of a unit, by rank (by hand).
UNITS = {
  (): (),
  (5,): (0,),
  (1, 5): (0, 1),
  (6, 5): (0,),
  (2, 3, 4): (0,),
  (3, 3, 2, 4): (0, 1, 2),
  (2, 2, 2, 3, 4): (0, 1, 2, 3),
}


def epsilon(dtype):
  return float(ml_dtypes.finfo(dtype).eps)


def wide(x):
  return np.asarray(x).astype(np.float64)


def normal(seed, shape, dtype="float32", scale=1.0):
  values = scale * np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(np.asarray(values).astype(dtype))


def norm_of(*arrays, ord=2.0):
  """Exact enough: scaled to the largest element, in float64."""
  flat = np.abs(np.concatenate([wide(x).ravel() for x in arrays]))
  peak = flat.max(initial=0) or 1.0
  if not np.isfinite(peak) or ord == np.inf:
    return peak
  return peak * ((flat / peak) ** ord).sum() ** (1 / ord)


# --- global_norm --------------------------------------------------------------


@pytest.mark.parametrize("ord", [None, 1, 2, 3.5, float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_global_norm(dtype, ord):
  tree = {"a": normal(0, (30, 7), dtype), "b": [normal(1, 11, dtype), normal(2, ())]}
  expected = norm_of(*jax.tree.leaves(tree), ord=2.0 if ord is None else ord)
  got = optax_clip.global_norm(tree, ord=ord)
  assert got.dtype == jnp.float32
  assert got.shape == ()
  np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("tree", [{}, [], (), None, {"a": None}, jnp.zeros((0, 3))])
def test_global_norm_of_nothing(tree):
  assert optax_clip.global_norm(tree) == 0


@pytest.mark.parametrize(
  ("values", "expected"),
  [
    ([1.0, np.nan], np.nan),
    ([1.0, np.inf], np.inf),
    ([-np.inf, 1.0], np.inf),
    ([np.inf, np.nan], np.nan),
    ([3e38] * 4, np.finfo(np.float32).max),
    ([2e-38] * 4, 4e-38),
    # One square is a normal number, and the others underflow.
    ([1.2e-19, *[1e-19] * 100], (1.2**2 + 100) ** 0.5 * 1e-19),
    ([0.0, -0.0], 0.0),
  ],
)
def test_global_norm_of_special_values(values, expected):
  got = optax_clip.global_norm(jnp.array(values, jnp.float32))
  np.testing.assert_allclose(got, np.float64(expected), rtol=1e-6)


def test_global_norm_of_numpy_and_python_numbers():
  tree = {"a": np.float32([3.0, 0.0]), "b": 4.0}
  assert optax_clip.global_norm(tree) == 5.0


def test_global_norm_of_complex():
  z = jnp.array([3 + 4j, 5 - 12j], jnp.complex64)
  np.testing.assert_allclose(optax_clip.global_norm(z, ord=float("inf")), 13, rtol=1e-6)
  np.testing.assert_allclose(optax_clip.global_norm(z), 194**0.5, rtol=1e-6)
  np.testing.assert_allclose(optax_clip.global_norm(z, ord=1), 18, rtol=1e-6)


def test_global_norm_of_several_complex_leaves():
  with jax.numpy_dtype_promotion("strict"):
    tree = [jnp.array([3 + 4j], jnp.complex64), jnp.array([12j], jnp.complex64)]
    np.testing.assert_allclose(optax_clip.global_norm(tree), 13, rtol=1e-6)


def test_global_norm_keeps_float64():
  with jax.enable_x64(True):
    x = jnp.asarray(np.random.default_rng(0).normal(size=1000))
    got = optax_clip.global_norm({"x": x, "y": jnp.ones(2, jnp.float32)})
    assert got.dtype == jnp.float64
    expected = np.sqrt((np.asarray(x, np.longdouble) ** 2).sum() + 2)
    np.testing.assert_allclose(got, float(expected), rtol=1e-12)


def test_derivative_of_the_norm():
  grad = jax.grad(optax_clip.global_norm)
  np.testing.assert_allclose(grad(jnp.array([3.0, 4.0])), [0.6, 0.8], rtol=5e-7)
  np.testing.assert_array_equal(grad(jnp.zeros(2)), [0, 0])


# --- clip_tree ----------------------------------------------------------------


@ZERO_IS_MEANT
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e3])
def test_clip_tree(dtype, max_norm):
  tree = {"a": normal(0, (30, 7), dtype), "b": normal(1, 11, dtype)}
  clipped, norm = optax_clip.clip_tree(tree, max_norm)
  exact = norm_of(*jax.tree.leaves(tree))
  np.testing.assert_allclose(norm, exact, rtol=1e-6)
  for new, old in zip(jax.tree.leaves(clipped), jax.tree.leaves(tree), strict=True):
    assert new.dtype == old.dtype
    if exact <= max_norm:
      np.testing.assert_array_equal(new, old)
    else:
      np.testing.assert_allclose(
        wide(new),
        wide(old) * (max_norm / exact),
        # Rounded once to the leaf's dtype; what is subnormal there, absolutely.
        rtol=max(epsilon(dtype) / 2, 5e-7) * 1.01,
        atol=float(ml_dtypes.finfo(dtype).smallest_subnormal) / 2 if max_norm else 0,
      )


def test_clip_tree_with_a_known_norm():
  """Half a model, and the norm of the whole."""
  half = {"a": jnp.array([3.0, 0.0])}
  clipped, norm = optax_clip.clip_tree(half, 1.0, norm=5.0)
  np.testing.assert_allclose(clipped["a"], [0.6, 0.0], rtol=5e-7)
  assert norm == 5.0


@pytest.mark.parametrize("norm", [5.0, np.float32(5), jnp.array(5.0, jnp.bfloat16)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_known_norms_never_change_a_dtype(norm, dtype):
  clipped, _ = optax_clip.clip_tree(jnp.ones(2, dtype), 1.0, norm=norm)
  assert clipped.dtype == dtype


def test_known_norm_within_the_limit_changes_nothing():
  tree = normal(0, 50)
  clipped, _ = optax_clip.clip_tree(tree, 1.0, norm=0.5)
  np.testing.assert_array_equal(clipped, tree)


def test_known_norm_that_is_nan():
  tree = jnp.ones(3)
  clipped, norm = optax_clip.clip_tree(tree, 1.0, norm=jnp.nan)
  assert jnp.isnan(clipped).all()
  assert jnp.isnan(norm)
  clipped, _ = optax_clip.clip_tree(tree, 1.0, norm=jnp.nan, nonfinite="zero")
  np.testing.assert_array_equal(clipped, [0, 0, 0])


def test_known_norm_is_traced():
  @jax.jit
  def halves(a, b):
    norm = optax_clip.global_norm((a, b))
    return [optax_clip.clip_tree(x, 1.0, norm=norm)[0] for x in (a, b)]

  a, b = halves(jnp.array([3.0]), jnp.array([4.0]))
  whole, _ = optax_clip.clip_tree((jnp.array([3.0]), jnp.array([4.0])), 1.0)
  np.testing.assert_array_equal((a, b), whole)


def test_clip_tree_is_the_transformation():
  tree = {"a": normal(0, (30, 7)), "b": normal(1, 11)}
  for options in ({}, {"ord": 1}, {"eps": 1e-2}, {"strict": True}):
    tx = optax_clip.clip_by_global_norm(2.0, **options)
    expected, _ = tx.update(tree, tx.init(tree))
    got, _ = optax_clip.clip_tree(tree, 2.0, **options)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_clip_tree_of_huge_values():
  clipped, norm = optax_clip.clip_tree(jnp.full(4, -3e38), 1.0)
  np.testing.assert_allclose(clipped, [-0.5] * 4, rtol=5e-7)
  assert norm == np.finfo(np.float32).max


# --- unitwise -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", RANKS, ids=str)
def test_unitwise_norm(shape, dtype):
  x = normal(0, shape, dtype)
  got = jax.jit(optax_clip.unitwise_norm)(x)
  square = np.square(wide(x)).sum(axis=UNITS[shape], keepdims=True)
  assert got.dtype == jnp.float32
  assert got.shape == shape
  expected = np.broadcast_to(np.sqrt(square), shape)
  np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("axis", [0, -1, (1,), (0, 2), (-1, 0), (0, 1, 2), ()])
def test_unitwise_norm_over_given_axes(axis):
  x = normal(1, (2, 3, 4))
  square = np.square(wide(x)).sum(axis=axis, keepdims=True)
  expected = np.broadcast_to(np.sqrt(square), x.shape)
  got = jax.jit(optax_clip.unitwise_norm, static_argnums=1)(x, axis)
  np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_unitwise_norm_of_units_of_very_different_size():
  """Each unit has its own range: 3e30, 3e-30 and zeros in one matrix."""
  x = jnp.array([[3e30, 3e-30, 0.0, 3.0], [4e30, 4e-30, 0.0, 4.0]])
  got = optax_clip.unitwise_norm(x)[0]
  np.testing.assert_allclose(got, [5e30, 5e-30, 0, 5], rtol=1e-6)


def test_unitwise_norm_of_nonfinite_units():
  x = jnp.array([[np.nan, np.inf, 3.0], [1.0, 1.0, 4.0]])
  np.testing.assert_array_equal(
    optax_clip.unitwise_norm(x)[0], np.float32([np.nan, np.inf, 5])
  )


def test_unitwise_norm_of_float16_that_float16_cannot_hold():
  x = jnp.full((4, 2), 6e4, jnp.float16)
  np.testing.assert_allclose(
    optax_clip.unitwise_norm(x), np.full((4, 2), 2 * wide(x)[0, 0]), rtol=1e-6
  )


def test_unitwise_norm_of_nothing():
  assert optax_clip.unitwise_norm(jnp.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unitwise_clip(dtype):
  g = normal(2, (6, 5), dtype)
  norm = optax_clip.unitwise_norm(g)
  limit = jnp.full(g.shape, 2.0)
  got = optax_clip.unitwise_clip(norm, limit, g)
  exact = np.sqrt(np.square(wide(g)).sum(0, keepdims=True))
  assert got.dtype == g.dtype
  expected = wide(g) * np.minimum(1, 2 / exact)
  np.testing.assert_allclose(
    wide(got), expected, rtol=max(epsilon(dtype) / 2, 5e-7) * 1.01
  )
  within = np.broadcast_to(exact < 2, g.shape)
  np.testing.assert_array_equal(np.asarray(got)[within], np.asarray(g)[within])
  assert within.any()
  assert not within.all()


def test_unitwise_clip_never_divides_by_zero():
  zero = jnp.zeros((2, 3))
  for div_eps in (1e-6, 0.0):
    got = optax_clip.unitwise_clip(zero, zero, zero, div_eps)
    np.testing.assert_array_equal(got, zero)


def test_unitwise_clip_of_huge_values():
  g = jnp.full((1, 4), 3e38)
  norm = jnp.full((1, 4), np.finfo(np.float32).max)
  got = optax_clip.unitwise_clip(norm, jnp.ones((1, 4)), g)
  expected = 3e38 / np.finfo(np.float32).max
  np.testing.assert_allclose(got, np.full((1, 4), expected), rtol=5e-7)


# --- per example --------------------------------------------------------------

BATCH = 6
SHAPES = [(BATCH, 3), (BATCH, 2, 4), (BATCH,)]


def clipped_sum(leaves, limit):
  """The float64 transcription: the sum for each leaf, and the count."""
  flat = np.concatenate([wide(x).reshape(len(x), -1) for x in leaves], axis=1)
  norms = np.sqrt(np.square(flat).sum(1))
  factor = np.minimum(1, limit / np.where(norms > 0, norms, 1))
  factor = np.where(norms > 0, factor, 1)
  sums = [np.tensordot(factor, wide(x), 1) for x in leaves]
  return sums, int((norms > limit).sum())


# Compiled once for all limits.
example_global = jax.jit(optax_clip.per_example_global_norm_clip)
example_layer = jax.jit(optax_clip.per_example_layer_norm_clip, static_argnums=2)


def batch(dtype, scale=1.0):
  return [normal(i, shape, dtype, scale) for i, shape in enumerate(SHAPES)]


# Beyond what a product of two float32 needs: the sum's rounding, relative to
# its terms, and that of the leaf's dtype.
def assert_sums(got, expected, terms, dtype):
  for new, exact, x in zip(got, expected, terms, strict=True):
    assert new.dtype == jnp.dtype(dtype)
    size = np.abs(wide(x)).sum(0)
    error = np.abs(wide(new) - exact)
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    bound = epsilon(dtype) / 2 * np.abs(exact) + 1e-6 * size + tiny
    assert (error <= bound).all(), (error, bound)


def test_per_example_functions_promote_nothing_implicitly():
  with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
    for dtype in DTYPES:
      for clip in (
        optax_clip.per_example_global_norm_clip,
        optax_clip.per_example_layer_norm_clip,
      ):
        jax.eval_shape(lambda x, clip=clip: clip(x, 1.0), batch(dtype))


@pytest.mark.parametrize("limit", [0.0, 0.5, 3.0, 1e3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_per_example_global(dtype, limit):
  grads = batch(dtype)
  got, count = example_global(grads, limit)
  expected, clipped = clipped_sum(grads, limit)
  assert_sums(got, expected, grads, dtype)
  assert count == clipped
  assert count.dtype == jnp.int32


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_per_example_layer(dtype, uniform):
  grads = batch(dtype)
  got, counts = example_layer(grads, 1.5, uniform)
  sizes = np.array([3, 8, 1])
  shares = np.full(3, 1 / 3) if uniform else sizes / sizes.sum()
  for new, count, x, share in zip(got, counts, grads, shares, strict=True):
    expected, clipped = clipped_sum([x], 1.5 * share**0.5)
    assert_sums([new], expected, [x], dtype)
    assert count == clipped


def test_per_example_global_of_trees():
  grads = {"a": normal(0, (4, 3)), "b": {"c": normal(1, (4, 2))}}
  got, _ = example_global(grads, 1.0)
  assert jax.tree.structure(got) == jax.tree.structure(grads)
  assert got["a"].shape == (3,)


@pytest.mark.parametrize("scale", [1e20, 1e36, 1e-22, 1e-30])
def test_per_example_of_any_magnitude(scale):
  """Squares are no floats; sums are."""
  grads = batch("float32", scale)
  got, count = example_global(grads, 0.5 * scale)
  expected, clipped = clipped_sum([wide(x) / scale for x in grads], 0.5)
  for new, exact in zip(got, expected, strict=True):
    np.testing.assert_allclose(wide(new) / scale, exact, rtol=0, atol=1e-6)
  assert count == clipped == BATCH


def test_per_example_of_both_ends_of_the_range():
  """An example of 3e38 beside one of 1e-30, and one of zeros."""
  grads = [jnp.array([[3e38, 3e38], [1e-30, 0.0], [0.0, 0.0]])]
  (got,), count = example_global(grads, 1.0)
  np.testing.assert_allclose(got, [0.5**0.5] * 2, rtol=5e-7)
  assert count == 1


def test_per_example_of_float16_whose_square_overflows():
  grads = [jnp.array([[300.0, 400.0], [0.3, 0.4]], jnp.float16)]
  (got,), count = example_global(grads, 1.0)
  np.testing.assert_allclose(wide(got), [0.9, 1.2], rtol=2.0**-11 * 1.01)
  assert count == 1


def test_per_example_sum_is_accumulated_in_float32():
  """In bfloat16, 256 + 1 is 256."""
  grads = [jnp.ones((1000, 1), jnp.bfloat16)]
  (got,), _ = example_global(grads, 1.0)
  assert got == 1000


def test_per_example_of_zeros():
  grads = [jnp.zeros((3, 2)), jnp.zeros((3,))]
  for limit in (0.0, 1.0):
    got, count = example_global(grads, limit)
    assert all((x == 0).all() for x in got)
    assert count == 0
    got, counts = example_layer(grads, limit)
    assert all((x == 0).all() for x in got)
    assert all(count == 0 for count in counts)


def test_per_example_of_an_empty_batch():
  got, count = example_global([jnp.zeros((0, 2))], 1.0)
  np.testing.assert_array_equal(got[0], [0, 0])
  assert count == 0


def test_per_example_with_a_nan_example():
  """It is seen, not hidden, and only in the leaves that share its norm."""
  grads = [jnp.array([[np.nan, 1.0], [3.0, 4.0]]), jnp.ones((2, 1))]
  got, count = example_global(grads, 1.0)
  assert all(jnp.isnan(x).all() for x in got)
  assert count == 1
  got, counts = example_layer(grads, 1.0)
  assert jnp.isnan(got[0]).all()
  assert jnp.isfinite(got[1]).all()
  assert counts[0] == 1


def test_per_example_under_jit_and_with_a_traced_limit():
  grads = batch("float32")
  function = optax_clip.per_example_global_norm_clip
  expected, count = function(grads, 0.5)
  got, jitted = jax.jit(function)(grads, 0.5)
  assert jitted == count
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_per_example_of_complex():
  grads = [jnp.array([[3 + 4j, 0], [0.3j, 0.4]], jnp.complex64)]
  (got,), count = example_global(grads, 1.0)
  np.testing.assert_allclose(got, [0.6 + 1.1j, 0.4], rtol=1e-6)
  assert count == 1


def test_per_example_keeps_float64():
  with jax.enable_x64(True):
    grads = [jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))]
    got, _ = example_global(grads, 0.7)
    expected, _ = clipped_sum(grads, 0.7)
    assert got[0].dtype == jnp.float64
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=1e-14)
