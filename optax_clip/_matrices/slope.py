"""The derivative of a function of singular values, by divided differences.

With W = U S Vᵀ and Y = Uᵀ dW V, the derivative of U f(S) Vᵀ is U D Vᵀ plus what lies
outside of V, where::

    D_ij = [f]⁻ (Y_ij + Y_ji) / 2 + [f]⁺ (Y_ij - Y_ji) / 2
    [f]⁻ = (f_i - f_j) / (s_i - s_j),   [f]⁺ = (f_i + f_j) / (s_i + s_j)

Equal values take the slope of f instead of 0 / 0 (Daleckii and Krein). An update is
rarely differentiated: this takes a full SVD.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optax_clip._matrices.certificate import dot

Array = jax.Array


def hard(s: Array, limit: Array) -> tuple[Array, Array, Array]:
  """Returns min(s, c), its derivative by s, and that by c."""
  inside = s <= limit
  return (
    jnp.minimum(s, limit),
    inside.astype(s.dtype),
    (~inside).astype(s.dtype),
  )


def soft(s: Array, limit: Array) -> tuple[Array, Array, Array]:
  """Returns s / sqrt(1 + s² / c²), its derivative by s, and that by c."""
  positive = limit > 0
  ratio = s / jnp.where(positive, limit, 1)
  root = jax.lax.rsqrt(1 + ratio * ratio)
  root = jnp.where(positive, root, 0)
  by_limit = jnp.where(positive, (ratio * root) ** 3, jnp.where(s > 0, 1, 0))
  return s * root, root**3, by_limit.astype(s.dtype)


def along(
  of: Any, matrix: Array, limit: Array, dot_matrix: Array, dot_limit: Array
) -> Array:
  """Differentiates ``U f(S) Vᵀ`` along a change of the matrix and of the limit.

  Args:
    of: `hard` or `soft`.
    matrix: f32 or f64 ``[m, n]``, m <= n, finite.
    limit: f[], at least 0.
    dot_matrix: the change of the matrix.
    dot_limit: the change of the limit.
  """
  left, s, right = jnp.linalg.svd(matrix, full_matrices=False)
  f, slopes, by_limit = of(s, limit)
  rows, columns = s[:, None], s[None]
  same = jnp.abs(rows - columns) <= 1e-6 * jnp.maximum(rows, columns)
  mean = (slopes[:, None] + slopes[None]) / 2
  apart = jnp.where(same, 1, rows - columns)
  minus = jnp.where(same, mean, (f[:, None] - f[None]) / apart)
  total = rows + columns
  plus = (f[:, None] + f[None]) / jnp.where(total > 0, total, 1)
  plus = jnp.where(total > 0, plus, mean)
  inner = dot(dot(left.T, dot_matrix), right.T)
  even, odd = (inner + inner.T) / 2, (inner - inner.T) / 2
  outside = dot(left.T, dot_matrix - dot(dot(dot_matrix, right.T), right))
  gain = jnp.where(s > 0, f / jnp.where(s > 0, s, 1), slopes)
  change = dot(minus * even + plus * odd + jnp.diag(by_limit * dot_limit), right)
  return dot(left, change + gain[:, None] * outside)
