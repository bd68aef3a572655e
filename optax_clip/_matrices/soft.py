"""How s / sqrt(1 + s² / c²) acts on singular values: SPECTRA's soft clip.

It is ``c (c² I + W Wᵀ)^(-1/2) W``, the left block of the polar factor of ``[W, c I]``.
No singular value of that is below c, so that the number of steps is known. What is
above a hundred limits is brought there first, which changes the result by 5e-5.
"""

import jax
import jax.numpy as jnp

from optax_clip._matrices import hard as _hard
from optax_clip._matrices import quintics as _quintics
from optax_clip._matrices.certificate import dot
from optax_clip._matrices.certificate import frobenius
from optax_clip._matrices.hard import Aim
from optax_clip._matrices.hard import Rounded

Array = jax.Array
# Singular values above this many limits are clipped hard first.
_FAR = 100.0


def clipped(
  matrix: Array, limit: Array, aim: Aim, rounded: Rounded, least: Array
) -> tuple[Array, Array]:
  """Shrinks the singular values of a matrix below a limit; as `hard.clipped`.

  Returns:
    The new matrix, and the bound of the old one's largest value over the limit.
  """
  near, bound = _hard.clipped(
    matrix, limit * _FAR, _exact(matrix), lambda x: x, jnp.zeros_like(least)
  )
  new = _shrunk_and_proven(matrix, near, limit, aim, rounded, least)
  usable = jnp.isfinite(bound)
  return new, jnp.where(usable, bound * _FAR, frobenius(matrix) / limit)


def first(matrix: Array, limit: Array, aim: Aim, rounded: Rounded) -> Array:
  """Returns the proven bound of the largest singular value over the limit."""
  del aim, rounded
  near, exact = limit * _FAR, _exact(matrix)
  return _hard.first(matrix, near, exact, lambda x: x) * _FAR


def once(
  matrix: Array,
  bound: Array,
  limit: Array,
  aim: Aim,
  rounded: Rounded,
  least: Array,
) -> Array:
  """Shrinks the singular values of a matrix below a limit, as `hard.once`."""
  exact, far = _exact(matrix), bound / _FAR

  def bring(x: Array) -> Array:
    return _hard.once(x, far, limit * _FAR, exact, lambda x: x, jnp.zeros_like(least))

  near = _hard.in_place(bring, matrix, ~_hard.within(far, exact))
  return _shrunk_and_proven(matrix, near, limit, aim, rounded, least)


def _exact(matrix: Array) -> Aim:
  """For what is shrunk afterwards: nothing is rounded there."""
  return _hard.Aim(1e-3, 8 * float(jnp.finfo(matrix.dtype).eps), 0.0)


def _shrunk_and_proven(
  matrix: Array, near: Array, limit: Array, aim: Aim, rounded: Rounded, least: Array
) -> Array:
  """Shrinks `near`, which a clip at a hundred limits made of a matrix."""
  # Exact arithmetic stays below the limit. Rounding may reach it, where s is large.
  new = shrunk(near, limit) * (1 - aim.below)
  return _hard.proven(matrix, new, limit, aim, rounded, least)


def shrunk(matrix: Array, limit: Array) -> Array:
  """Returns ``c (c² I + W Wᵀ)^(-1/2) W`` for singular values up to a hundred c."""
  identity = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
  scaled = matrix / limit
  gram = dot(scaled, scaled.T)
  # Eigenvalues of G + I lie between 1 and this.
  most = frobenius(gram) + 1
  root = jnp.sqrt(most)

  def step(pair: tuple[Array, Array], row: Array) -> tuple[Array, Array]:
    y, z = pair
    square = dot(z, y)
    factor = row[0] * identity + row[1] * square + row[2] * dot(square, square)
    return dot(y, factor), dot(factor, z)

  start = (gram + identity) / most, identity
  _, inverse = _quintics.composed(step, start, 1 / root)
  return dot(inverse, matrix) / root
