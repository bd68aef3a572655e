"""Norms against float64: every dtype, order, magnitude and number of leaves."""

import functools
import math

from helpers import oracles
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_clip

pytestmark = pytest.mark.optimized

RELATIVE = 1e-6

# Few, so that few programs are compiled: the values are what varies.
TREES = {
  "vector": ((7,),),
  "mixed": ((4,), (8, 16), (2, 2, 3, 4), (), (0, 3)),
  "32 by 32": ((32, 32),),
  "33 by 31": ((33, 31),),
  "long": ((20_000,), (3, 300)),
}

every_dtype = pytest.mark.parametrize("dtype", oracles.LOW)
seeds = st.integers(0, 2**32 - 1)
# Where in the exponents of the dtype's normal numbers, as a share of them.
places = st.floats(0, 1)
patterns = st.sampled_from(["equal", "normal", "spread", "one", "two sizes"])


def values(rng, shape, dtype, low, high, pattern):
  """Finite values with exponents between two shares of the normal range."""
  info = oracles.finfo(dtype)
  least, top = (math.log2(float(x)) for x in (info.tiny, info.max))
  low, high = sorted((low, high))
  low, high = (least + share * (top - least) for share in (low, high))
  signs = rng.choice([-1.0, 1.0], shape)
  if pattern == "equal":
    exponents = np.full(shape, high)
  elif pattern == "normal":
    signs = np.clip(rng.standard_normal(shape), -4, 4) / 4
    exponents = np.full(shape, high)
  elif pattern == "spread":
    exponents = rng.uniform(low, high, shape)
  elif pattern == "one":
    signs = np.zeros(shape)
    signs.reshape(-1)[:1] = -1
    exponents = np.full(shape, high)
  else:
    exponents = rng.choice([low, high], shape)
  top = float(info.max)
  size = np.clip(signs * np.exp2(np.minimum(exponents, 1023)), -top, top)
  # Subnormals may be flushed to zero on the way into a sum.
  size = np.where(np.abs(size) < float(info.tiny), 0, size)
  return jnp.asarray(size.astype(np.dtype(dtype)))


def make(shapes, dtype, seed, low, high, pattern):
  rng = np.random.default_rng(seed)
  return [values(rng, shape, dtype, low, high, pattern) for shape in shapes]


@functools.cache
def norm_of(ord=None, eager=False):
  norm = functools.partial(optax_clip.global_norm, ord=ord)
  return norm if eager else jax.jit(norm)


def assert_norm(tree, ord=2.0, relative=RELATIVE, eager=False):
  got = float(norm_of(ord, eager)(tree))
  want = oracles.tree_norm(jax.tree.leaves(tree), ord)
  largest = float(np.finfo(np.float32).max)
  if relative == RELATIVE and want > largest:  # Saturates.
    assert got == largest
    return
  assert abs(got - want) <= relative * want, (got / want - 1, want)


class TestValue:
  @every_dtype
  @pytest.mark.parametrize("shapes", TREES.values(), ids=TREES)
  @given(seed=seeds, low=places, high=places, pattern=patterns)
  def test_is_that_of_float64_over_the_normal_range(
    self, dtype, shapes, seed, low, high, pattern
  ):
    assert_norm(make(shapes, dtype, seed, low, high, pattern))

  @every_dtype
  @pytest.mark.parametrize("ord", [0.5, 1, 3, math.inf])
  @given(seed=seeds, low=places, high=places, pattern=patterns)
  def test_of_every_order_is_that_of_float64(
    self, dtype, ord, seed, low, high, pattern
  ):
    assert_norm(make(TREES["mixed"], dtype, seed, low, high, pattern), ord)

  @given(seed=seeds, low=places, high=places, pattern=patterns)
  def test_of_float64_is_right_to_1e_12(self, seed, low, high, pattern):
    with jax.enable_x64(True):
      # Up to where the norm itself is still a float64.
      tree = make(TREES["mixed"], "float64", seed, low * 0.99, high * 0.99, pattern)
      assert_norm(tree, relative=1e-12)

  @pytest.mark.parametrize("ord", [1, 2, 3, math.inf])
  @given(seed=seeds, low=places, high=places, pattern=patterns)
  def test_of_complex_leaves_is_that_of_their_moduli(
    self, ord, seed, low, high, pattern
  ):
    shapes = TREES["mixed"]
    # Up to where the moduli are floats.
    parts = [
      make(shapes, "float32", s, low * 0.99, high * 0.99, pattern)
      for s in (seed, seed + 1)
    ]
    assert_norm(jax.tree.map(jax.lax.complex, *parts), ord)

  @given(seed=seeds, low=places, high=places, pattern=patterns)
  def test_without_jit_small_leaves_are_summed_together_as_well(
    self, seed, low, high, pattern
  ):
    assert_norm(make(TREES["mixed"], "float32", seed, low, high, pattern), eager=True)

  @given(seed=seeds, high=st.floats(0.3, 0.7), pattern=patterns)
  def test_mixes_dtypes_without_loss(self, seed, high, pattern):
    tree = [make(((8, 3), (5,)), d, seed, high, high, pattern) for d in oracles.LOW]
    assert_norm(tree)

  @pytest.mark.parametrize("value", [1.0, 1e-4, 0.7])
  @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
  def test_of_a_million_low_precision_values_loses_nothing(self, dtype, value):
    assert_norm([jnp.full((1000, 1000), value, dtype)])

  @pytest.mark.parametrize("size", [1, 31, 32, 33, 1023, 1024, 1025, 4096, 65_537])
  @pytest.mark.parametrize("fill", [0.5000001, 0.77, 0.9999])
  def test_of_equal_values_does_not_drift(self, size, fill):
    assert_norm([jnp.full((size,), fill, jnp.float32)])

  @pytest.mark.parametrize(
    "shape", [(16, 16), (32, 32), (32, 33), (1, 32, 32), (3, 3, 32), (64, 64)]
  )
  @pytest.mark.parametrize("fill", [0.5000001, 0.77, 0.9999])
  def test_of_equal_values_in_small_matrices_does_not_drift(self, shape, fill):
    assert_norm([jnp.full(shape, fill, jnp.float32)])

  @pytest.mark.parametrize(
    "count", [1, 2, 100, 1000, pytest.param(10_000, marks=pytest.mark.slow)]
  )
  def test_of_many_leaves(self, count):
    rng = np.random.default_rng(0)
    leaves = [jnp.asarray(x, jnp.bfloat16) for x in rng.standard_normal((count, 3))]
    assert_norm(leaves, eager=True)

  def test_of_a_thousand_bfloat16_leaves_of_ones_is_a_thousand(self):
    leaves = [jnp.ones(1000, jnp.bfloat16) for _ in range(1000)]
    assert float(optax_clip.global_norm(leaves)) == 1000.0

  @every_dtype
  def test_beyond_the_largest_float_saturates(self, dtype):
    top = oracles.finfo(dtype).max
    tree = jnp.asarray(np.full(4, top, np.dtype(dtype)))
    expected = min(2 * float(top), float(np.finfo(np.float32).max))
    assert float(optax_clip.global_norm(tree)) == expected

  @pytest.mark.parametrize("ord", [1, 2, 3, math.inf])
  def test_of_nothing_is_zero(self, ord):
    for tree in ((), {}, [None], [jnp.zeros((0, 3))], [jnp.zeros(5)]):
      assert float(optax_clip.global_norm(tree, ord=ord)) == 0

  @pytest.mark.parametrize("ord", [1, 2, 3, math.inf])
  @every_dtype
  def test_of_nan_is_nan_and_of_inf_is_inf(self, dtype, ord):
    def norm(*x):
      return float(norm_of(ord)([jnp.asarray(x, dtype), jnp.ones(2, dtype)]))

    assert math.isnan(norm(1.0, math.nan, 0.0))
    assert norm(1.0, -math.inf, 0.0) == math.inf
    assert math.isnan(norm(math.nan, math.inf, 0.0))

  def test_of_float64_beside_float32_is_float64(self):
    with jax.enable_x64(True):
      tree = [jnp.ones(3, jnp.float32), jnp.full(3, 1 / 3, jnp.float64)]
      assert optax_clip.global_norm(tree).dtype == jnp.float64
      assert_norm(tree, relative=1e-12)


@pytest.mark.parametrize("forms", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_one_element_is_its_own_norm(shape, forms, monkeypatch):
  """XLA rewrites arithmetic on scalars as it does not on arrays."""
  monkeypatch.setenv("OPTAX_CLIP_FORMS", forms)
  sizes = np.float32(2.0) ** np.arange(-126, 128, 21, dtype=np.float32)

  @jax.jit
  def norms(sizes):
    rows = [sizes[i] for i in range(sizes.size)]
    return [optax_clip.global_norm(jnp.full(shape, x)) for x in rows]

  np.testing.assert_array_equal(norms(sizes), sizes)


class TestDerivative:
  @pytest.mark.parametrize("ord", [0.5, 1, 2, 2.5, 3, math.inf])
  def test_at_zero_is_zero(self, ord):
    # One of the subgradients: |x| and max |x| have none that is better.
    grad = jax.grad(functools.partial(optax_clip.global_norm, ord=ord))(jnp.zeros(3))
    assert np.all(np.isfinite(grad))
    if ord not in (1, math.inf):
      np.testing.assert_array_equal(grad, 0)
    assert np.all(np.abs(grad) <= 1)

  @pytest.mark.parametrize("ord", [1, 1.5, 2, 3])
  @pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
  def test_is_that_of_the_formula_at_any_magnitude(self, ord, scale):
    x = np.array([3.0, -4.0, 0.5])
    got = jax.grad(functools.partial(optax_clip.global_norm, ord=ord))(
      jnp.asarray(scale * x, jnp.float32)
    )
    n = (np.abs(x) ** ord).sum() ** (1 / ord)
    want = np.sign(x) * (np.abs(x) / n) ** (ord - 1)
    np.testing.assert_allclose(got, want, rtol=2e-6)


@functools.cache
def clip_of(strict=False):
  return jax.jit(lambda tree, c: optax_clip.clip_tree(tree, c, strict=strict))


class TestClipped:
  @every_dtype
  @pytest.mark.parametrize("shapes", TREES.values(), ids=TREES)
  @given(
    seed=seeds,
    high=st.floats(0.3, 1.0),
    pattern=st.sampled_from(["equal", "normal", "one"]),
    ratio=st.floats(1.0, 12.0),
  )
  def test_norm_exceeds_the_limit_by_two_ulps_at_most(
    self, dtype, shapes, seed, high, pattern, ratio
  ):
    tree = make(shapes, dtype, seed, high, high, pattern)
    norm = oracles.tree_norm(tree)
    limit = float(np.float32(min(norm / ratio, 3e38)))
    new, measured = clip_of()(tree, limit)
    info = oracles.finfo(dtype)
    # What the norm lacks, at most 1e-6 of it, the result has too much. (Where it
    # is no float32, it is that of the same values in other units.)
    if norm > 3e38:
      shrunk = [x * 2.0**-40 for x in tree]
      measured = np.ldexp(np.float64(jax.jit(optax_clip.global_norm)(shrunk)), 40)
    lack = max(0.0, 1 - float(measured) / norm)
    # Where results are subnormal, all their errors may point upwards.
    rounding = sum(x.size for x in tree) ** 0.5 * float(info.smallest_subnormal) / 2
    allowed = limit * (1 + 2 * float(info.eps) + lack) + rounding
    assert oracles.tree_norm(new) <= allowed, oracles.tree_norm(new) / limit - 1

  @every_dtype
  @given(
    seed=seeds,
    high=st.floats(0.5, 1.0),
    pattern=patterns,
    ratio=st.floats(1.001, 1000.0),
  )
  def test_direction_is_kept(self, dtype, seed, high, pattern, ratio):
    tree = make(TREES["mixed"], dtype, seed, high, high, pattern)
    norm = oracles.tree_norm(tree)
    limit = float(np.float32(min(norm / ratio, 3e38)))
    new, _ = clip_of()(tree, limit)
    for x, y in zip(tree, new, strict=True):
      want = oracles.wide(x) * (limit / norm)
      allowed = 1e-6 * np.abs(want) + 0.51 * oracles.ulps(np.asarray(y))
      assert np.all(np.abs(oracles.wide(y) - want) <= allowed)

  @every_dtype
  @given(
    seed=seeds,
    high=st.floats(0.5, 1.0),
    pattern=patterns,
    ratio=st.floats(1.001, 1000.0),
  )
  def test_clipping_twice_is_clipping_once(self, dtype, seed, high, pattern, ratio):
    """The second clip moves an element by 1e-6 of it or by one ulp at most.

    Rounding may leave the norm of the first result a little above the limit.
    """
    tree = make(TREES["mixed"], dtype, seed, high, high, pattern)
    limit = float(np.float32(min(oracles.tree_norm(tree) / ratio, 3e38)))
    once, _ = clip_of()(tree, limit)
    twice, _ = clip_of()(once, limit)
    for x, y in zip(once, twice, strict=True):
      moved = np.abs(oracles.wide(x) - oracles.wide(y))
      slack = np.maximum(1e-6 * np.abs(oracles.wide(x)), oracles.ulps(np.asarray(x)))
      assert np.all(moved <= slack), (moved / oracles.ulps(np.asarray(x))).max()

  @every_dtype
  @given(seed=seeds, low=places, high=places, pattern=patterns)
  def test_within_the_limit_is_bit_for_bit(self, dtype, seed, low, high, pattern):
    tree = make(TREES["mixed"], dtype, seed, low, high, pattern)
    least = oracles.finfo(dtype).smallest_subnormal
    special = np.array([-0.0, least, -least, 0.0], np.dtype(dtype))
    tree.append(jnp.asarray(special))
    limit = min(oracles.tree_norm(tree) * (1 + 2e-6), 3.4e38)
    if oracles.tree_norm(tree) < limit:
      new, _ = clip_of()(tree, np.float64(limit))
      oracles.assert_identical(tree, new)
