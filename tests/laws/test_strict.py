"""`strict=True`: the norm of the result never exceeds the limit, exactly."""

from fractions import Fraction
import functools
import math

from helpers import oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_clip

pytestmark = pytest.mark.optimized

SHAPES = ((4,), (8, 16), (2, 2, 3, 4), (), (32, 32))
DTYPES = (*oracles.LOW, "complex64", "float64")
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@functools.cache
def clip(strict=True):
  return jax.jit(lambda tree, c: optax_clip.clip_tree(tree, c, strict=strict)[0])


def random_tree(rng, dtype):
  """Leaves of one random magnitude, and a limit that is often below its norm."""
  real = "float32" if dtype == "complex64" else dtype
  info = oracles.finfo(real)
  top = min(math.log10(float(info.max)), 300)
  bottom = max(math.log10(float(info.tiny)), -300)
  scale = rng.uniform(bottom + 1, top - 1)
  pattern = rng.choice(["normal", "equal", "sparse"])

  def leaf(shape):
    x = rng.standard_normal(shape)
    if pattern == "equal":
      x = np.full(shape, rng.uniform(0.1, 1))
    if pattern == "sparse":
      x = x * (rng.uniform(size=shape) < 0.1)
    x = np.clip(x * 10.0**scale, -float(info.max), float(info.max))
    return x.astype(np.dtype(real))

  tree = [leaf(shape) for shape in SHAPES]
  if dtype == "complex64":
    tree = [x + 1j * leaf(x.shape) for x in tree]
    tree = [np.asarray(x, np.complex64) for x in tree]
  norm = oracles.tree_norm(tree)
  # Also a little above the norm and a little below: there rounding decides.
  ratio = rng.choice(
    [1.0, 1 + 1e-7, 1 - 1e-7, rng.uniform(0.5, 2), 10 ** rng.uniform(0, 4)]
  )
  limit = float(norm / ratio)
  if real != "float64":
    limit = min(limit, 3e38)
  return [jnp.asarray(x) for x in tree], limit


def worst_excess(dtype, count, seed):
  """Raises where a result exceeds its limit; else the largest undershoot."""
  rng = np.random.default_rng(seed)
  undershoots = []
  with jax.enable_x64(dtype == "float64"):
    for _ in range(count):
      tree, limit = random_tree(rng, dtype)
      new = clip()(tree, np.float64(limit))
      square = oracles.exact_square(new)
      assert square <= Fraction(limit) ** 2, (limit, float(square) ** 0.5)
      norm = oracles.tree_norm(tree)
      # Small results are subnormal, which are no measure of a relative error.
      tiny = float(oracles.finfo(np.real(new[0]).dtype).tiny)
      if norm > limit > 1e5 * tiny:
        undershoots.append(1 - oracles.tree_norm(new) / limit)
  return max(undershoots)


# The price, as documented in `clip_by_global_norm`.
PRICE = {
  "float16": 1 / 2000,
  "bfloat16": 1 / 250,
  "float32": 2.5e-6,
  "complex64": 2.5e-6,
  "float64": 1e-14,
}


class TestStrict:
  @every_dtype
  def test_exact_norm_never_exceeds_the_limit(self, dtype):
    # Largest undershoot: see `PRICE`; elements of equal size round alike.
    assert worst_excess(dtype, 100, seed=0) <= 2 * PRICE[dtype]

  @pytest.mark.slow
  @every_dtype
  def test_exact_norm_never_exceeds_the_limit_in_thousands_of_trees(self, dtype):
    assert worst_excess(dtype, 5000, seed=1) <= 2 * PRICE[dtype]

  def test_without_strict_the_limit_is_exceeded_by_rounding(self):
    tree = jnp.full(100, 0.77, jnp.bfloat16)
    limits = np.linspace(0.5, 7.0, 50)
    squares = [oracles.exact_square([clip(False)(tree, c)]) for c in limits]
    assert any(s > Fraction(c) ** 2 for s, c in zip(squares, limits, strict=True))

  @pytest.mark.parametrize("dtype", oracles.LOW)
  def test_subnormal_results_do_not_exceed_the_limit(self, dtype):
    info = oracles.finfo(dtype)
    tree = [jnp.full((64,), 3, dtype), jnp.full((5,), 1.1, dtype)]
    for factor in np.linspace(0.1, 40, 57):
      limit = float(info.smallest_subnormal) * factor
      square = oracles.exact_square(clip()(tree, np.float64(limit)))
      assert square <= Fraction(limit) ** 2, factor

  @pytest.mark.parametrize("dtype", oracles.LOW)
  @pytest.mark.parametrize("limit", [0.1, 0.7, 1 / 3, 100.3])
  def test_elements_of_clip_never_exceed_the_limit(self, dtype, limit):
    tx = optax_clip.clip(limit, strict=True)
    x = jnp.asarray([500.0, -500.0, 0.05], dtype)
    new, _ = tx.update(x, tx.init(x))
    assert all(abs(Fraction(float(v))) <= Fraction(limit) for v in new)
    assert np.abs(np.asarray(new[0], np.float64)) >= limit * (
      1 - 2 * oracles.epsilon(dtype)
    )

  @pytest.mark.parametrize("dtype", oracles.LOW)
  def test_layers_and_root_mean_squares_keep_their_limits_exactly(self, dtype):
    rng = np.random.default_rng(0)
    tree = [jnp.asarray(rng.standard_normal(s), dtype) for s in ((33,), (16, 16))]
    limits = (0.1, 0.3, 0.77)

    @jax.jit
    def clipped(tree):
      kinds = (optax_clip.clip_by_layer_norm, optax_clip.clip_by_block_rms)
      txs = [[kind(limit, strict=True) for kind in kinds] for limit in limits]
      return [[tx.update(tree, tx.init(tree))[0] for tx in both] for both in txs]

    for limit, (layers, blocks) in zip(limits, clipped(tree), strict=True):
      assert all(oracles.exact_square([x]) <= Fraction(limit) ** 2 for x in layers)
      for x in blocks:
        assert oracles.exact_square([x]) <= Fraction(limit) ** 2 * x.size

  def test_zero_stays_zero_and_nan_stays_nan(self):
    assert not np.any(clip()(jnp.zeros(3), 0.0))
    assert np.all(np.isnan(clip()(jnp.asarray([1.0, jnp.nan]), 1.0)))
