"""A proof, by matmuls alone, that no singular value of a matrix exceeds a limit.

For W with m rows and singular values s, let X = 2 W Wᵀ / c² - I. Its eigenvalues are
2 s² / c² - 1: within [-1, 1] where s <= c. The doubling T <- 2 T² - I, begun at T = X,
gives after k steps the Chebyshev polynomial of order N = 2^k, and so:

* *Identity.* If all s <= c, all eigenvalues of T are within [-1, 1], and ||T||_F² <= m.
* *Guarantee.* An eigenvalue cosh(a) > 1 of X is cosh(N a) in T, which ||T||_F bounds.
  With t = max(1, ||T||_F): s <= c sqrt((1 + cosh(acosh(t) / N)) / 2).

A matrix within the limit therefore has t <= sqrt(m), and what has t <= sqrt(m) is
within c (1 + gap): `gap` falls fourfold with each doubling, and is 5.3e-4 for 1,024
rows and six doublings. A bound by powers of W Wᵀ would halve with each. No random
vector is involved, and no matrix escapes.

The bound holds for any N, so that doubling stops as soon as the answer is no.
"""

import math
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

Array = jax.Array
# The share of the tolerance that the gap may use: the rest is for rounding.
_SHARE = 0.6
# What rounding adds to a bound at most, in epsilons: measured, with a factor of ten to
# spare (`tests/matrices`, against exact arithmetic; docs/spectral.md).
_ROUNDING = 256
# An entry of T beyond it is an answer. T² must stay in the range of float32.
_CLEAR = 1e6


class Look(NamedTuple):
  """Holds the results of one look at a matrix.

  Attributes:
    bound: f32[] or f64[], a proven upper bound of its largest singular value over the
      limit.
    filter: [m, m], T: large along left singular vectors whose values exceed the limit.
  """

  bound: Array
  filter: Array


def dot(a: Array, b: Array) -> Array:
  """Multiplies matrices in their own precision.

  By default a TPU rounds the factors to bfloat16 and a GPU may round them to TF32.
  Either breaks the proof: an entry of W Wᵀ would be off by 2^-9, the limit by as much.
  """
  return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def frobenius(x: Array) -> Array:
  """Returns the 2-norm of all entries of a matrix, without over- or underflow."""
  peak = jnp.max(jnp.abs(x))
  peak = jnp.where(peak > 0, peak, 1)
  return jnp.sqrt(jnp.sum(jnp.square(x / peak))) * peak


def gap(rows: int, doublings: int) -> float:
  """Returns the largest share, exactly, by which a matrix that passes is too large."""
  edge = math.acosh(math.sqrt(max(rows, 1))) / 2**doublings
  return math.sqrt((1 + math.cosh(edge)) / 2) - 1


def doublings(rows: int, tolerance: float) -> int:
  """Returns the fewest doublings whose gap leaves room for rounding."""
  count = 1
  while gap(max(rows, 2), count) > _SHARE * tolerance:
    count += 1
  return count


def rounding(dtype: Any) -> float:
  """Returns the share of a bound that stands for its rounding errors."""
  return float(_ROUNDING * jnp.finfo(dtype).eps)


def look(matrix: Array, limit: Array, tolerance: float, *, fixed: bool = False) -> Look:
  """Bounds the largest singular value of a matrix, in units of a limit.

  Every matrix within the limit gets a bound of at most 1 + tolerance.

  Args:
    matrix: f32 or f64 ``[m, n]``, m <= n, finite, of a 2-norm near 1.
    limit: f[], from 2^-22 up.
    tolerance: how far above the limit a matrix that passes may be.
    fixed: whether to double as often whatever the matrix, without a conditional.
  """
  return look_at(dot(matrix, matrix.T), limit, tolerance, fixed=fixed)


def look_at(
  square: Array, limit: Array, tolerance: float, *, fixed: bool = False
) -> Look:
  """Looks at a matrix by ``W Wᵀ``; as `look`."""
  rows, dtype = square.shape[0], square.dtype
  identity = jnp.eye(rows, dtype=dtype)
  gram = square * (1 / limit) * (1 / limit)
  # The 4-norm of the singular values, a bound for nothing. It is often enough.
  coarse = jnp.sqrt(frobenius(gram))
  count = doublings(rows, tolerance)

  def goes_on(t: Array) -> Array:
    return (jnp.max(jnp.abs(t)) < _CLEAR) & (coarse > 1)

  def doubled(t: Array) -> Array:
    return 2 * dot(t, t) - identity

  def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    i, t, order = state
    return i + 1, doubled(t), 2 * order

  def masked(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
    del i
    t, order = state
    live = goes_on(t)
    return jnp.where(live, doubled(t), t), jnp.where(live, 2 * order, order)

  # From the matrix, so that over a mesh its type varies as the matrix does.
  first, one = 2 * gram - identity, (coarse >= 0).astype(dtype)
  if fixed:
    t, order = lax.fori_loop(0, count, masked, (first, one))
  else:
    _, t, order = lax.while_loop(
      lambda state: (state[0] < count) & goes_on(state[1]),
      step,
      (jnp.zeros((), jnp.int32), first, one),
    )
  fine = _limit_of(jnp.maximum(frobenius(t), 1), order)
  bound = jnp.minimum(fine, coarse) * (1 + rounding(dtype))
  return Look(bound, t)


def _limit_of(size: Array, order: Array) -> Array:
  """Solves ``T_N(2 s² - 1) = size`` for s, the largest that the proof allows."""
  log = jnp.log(size + jnp.sqrt(size - 1) * jnp.sqrt(size + 1))
  # The cosine of an N-th of a huge logarithm may overflow: of order 1 it is `size`.
  edge = jnp.where(order == 1, size, jnp.cosh(log / order))
  return jnp.sqrt((1 + edge) / 2)


def columns(rows: int, count: int, seed: Array, dtype: Any) -> Array:
  """Returns columns that no matrix was made to be orthogonal to: ``[rows, count]``.

  Numbers from -1 to 1, mixed from their indices (the finaliser of MurmurHash3): a
  fraction of what `jax.random` adds to a program.
  """
  place = lax.broadcasted_iota(jnp.uint32, (rows, count), 0) * jnp.uint32(count)
  place = place + lax.broadcasted_iota(jnp.uint32, (rows, count), 1)
  bits = place + seed.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
  signed = lax.bitcast_convert_type(bits ^ (bits >> 16), jnp.int32)
  return signed.astype(dtype) / 2.0**31
