"""Clips the singular values of one leaf: units, dtypes, meshes, the derivative."""

import functools
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from optax_clip import _backend
from optax_clip._matrices import hard as _hard
from optax_clip._matrices import slope as _slope
from optax_clip._matrices import soft as _soft
from optax_clip._matrices import view as _view
from optax_clip._norms import extended as _extended
from optax_clip._norms import power_sums as _power_sums
from optax_clip._norms.extended import Extended
from optax_clip._norms.layout import Place

Array = jax.Array
# The largest ratio of norm and limit that float32 resolves: below, limits are raised
# and the result is lowered.
_DEPTH = 22
# What `strict` allows for the errors of a norm and of a limit, in epsilons.
_NORM_EPSILONS = 16


class _Static(NamedTuple):
  """Holds the settings that decide the program of one leaf; hashable."""

  view: _view.View
  soft: bool
  strict: bool


def settled(
  leaf: Array, place: Place, norm: Extended, limit: Array, *, soft: bool, strict: bool
) -> tuple[Array, Extended] | None:
  """Clips the singular values of each matrix of a leaf; `None` for vectors.

  Args:
    leaf: floating or complex.
    place: which matrices it holds.
    norm: their 2-norms, or another upper bound of their largest singular values.
    limit: f[], or in the shape of the norms.
    soft: whether s becomes s / sqrt(1 + s² / c²), instead of min(s, c).
    strict: whether the limit is none for the proof's own tolerance.

  Returns:
    The new leaf, and upper bounds of the old one's largest singular values.

  Raises:
    ValueError: if a norm measures a part of a matrix, as a unit.
  """
  if leaf.size == 0:
    return None
  view = _view.of(leaf, place)
  if view.is_vector():
    return None  # The one singular value is the norm.
  static = _Static(view, soft, strict)
  limits = jnp.broadcast_to(limit, jnp.shape(norm.value))
  new, value, unit = _compiled(
    leaf, *norm, limits, static=static, forms=_backend.forced()
  )
  return new, Extended(value, unit)


# As in `_norms.norm`: eager callers compile it once; inside `jit` it is inlined.
@functools.partial(jax.jit, static_argnames=("static", "forms"), inline=True)
def _compiled(
  leaf: Array,
  value: Array,
  unit: Array,
  limits: Array,
  *,
  static: _Static,
  forms: str | None,
) -> tuple[Array, ...]:
  del forms  # Forced by tests: another program.
  of_one = functools.partial(_of_one, static)
  return _view.over_matrices(of_one, static.view, leaf, value, unit, limits)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _of_one(
  static: _Static, matrix: Array, value: Array, unit: Array, limit: Array
) -> tuple[Array, Array, Array]:
  norm = Extended(value, unit)
  decided = _is_decided(static, norm, limit, matrix.dtype)

  def keep(matrix: Array) -> tuple[Array, Array, Array]:
    return matrix, value, unit

  def work(matrix: Array) -> tuple[Array, Array, Array]:
    new, size = _worked(static, matrix, norm, limit)
    return new, size, unit

  return lax.cond(decided, keep, work, matrix)


def _is_decided(static: _Static, norm: Extended, limit: Array, dtype: Any) -> Array:
  """Returns whether the norm says enough: all is within the limit, or not finite."""
  eps = float(jnp.finfo(_power_sums.accumulator(dtype)).eps)
  if static.strict:
    limit = limit * (1 - _NORM_EPSILONS * eps)
  if static.soft:
    # Far below the limit the change is below half an epsilon.
    limit = limit * eps**0.5
  return ~_extended.exceeds(norm, limit) | ~jnp.isfinite(norm.value)


def _worked(
  static: _Static, matrix: Array, norm: Extended, limit: Array
) -> tuple[Array, Array]:
  """Clips a matrix that its norm does not decide; returns the bound in its unit."""
  wide = _power_sums.accumulator(matrix.dtype)
  aim = _hard.aim_for(matrix.dtype)
  value, unit, limit = (x.astype(wide) for x in (*norm, limit))
  # In units of powers of two: the matrix near 1, and limits from 2^-22 up.
  size, exponent = jnp.frexp(value)
  exponent = exponent + _exponent(unit)
  ratio = _extended.quotient(jnp.where(limit > 0, limit, 1), Extended(value, unit))
  share, depth = jnp.frexp(ratio.value)
  depth = depth + _exponent(ratio.unit)
  raised = jnp.maximum(-_DEPTH - depth, 0)
  goal = size * share * _power(jnp.minimum(depth + raised, 60), wide)
  if static.strict:
    goal = (
      goal / (1 + aim.tolerance) * (1 - _NORM_EPSILONS * float(jnp.finfo(wide).eps))
    )

  def inside(x: Array) -> Array:
    return _scaled(real(x).astype(wide), -exponent)

  def outside(x: Array) -> Array:
    return _scaled(x, exponent - raised)

  def rounded(x: Array) -> Array:
    # As the leaf will hold it; but in the leaf's own dtype there is nothing to round.
    there = outside(x).astype(jnp.finfo(matrix.dtype).dtype)
    return _scaled(there.astype(wide), raised - exponent)

  whole = inside(_view.gathered(matrix, static.view))
  turned = whole if whole.shape[0] <= whole.shape[1] else whole.T
  least = _scaled(jnp.asarray(aim.least, wide), raised - exponent)
  clipped = _soft.clipped if static.soft else _hard.clipped
  new, bound = clipped(turned, goal, aim, rounded, least)
  new = outside(new if turned is whole else new.T)
  new = jnp.where(limit > 0, new, 0)
  new = _like(new, static.view.shape, matrix.dtype)
  new = _view.scattered(new, matrix, static.view)
  largest = bound * goal / size * value
  if not static.soft:
    passes = _hard.within(bound, aim) & (limit > 0) & (raised == 0)
    new = jnp.where(passes, matrix, new)
    # A matrix that passes exceeds its limit by the tolerance of the proof at most.
    largest = jnp.where(passes, jnp.minimum(largest, limit / unit), largest)
  # The norm is a bound, too; NaN comes of no finite matrix.
  largest = jnp.where(largest < value, largest, value)
  return new, largest.astype(norm.value.dtype)


@_of_one.defjvp
def _of_one_jvp(
  static: _Static, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
  matrix, value, unit, limit = primals
  dot_matrix, _, _, dot_limit = tangents
  found = _of_one(static, *primals)
  norm = Extended(value, unit)
  wide = _power_sums.accumulator(matrix.dtype)
  usable = jnp.isfinite(value)
  decided = _is_decided(static, norm, limit, matrix.dtype)
  whole, change = (
    real(_view.gathered(x, static.view)).astype(wide) for x in (matrix, dot_matrix)
  )
  # Units in which no square leaves the range; any will do for the derivative.
  unit_of = _extended.power_of_two(jnp.where(usable & (value > 0), value, 1))
  safe = jnp.where(usable, whole, 0) / unit_of.astype(wide) / unit.astype(wide)
  near = (limit / unit / unit_of).astype(wide)
  near = jnp.where(jnp.isfinite(near), near, jnp.finfo(wide).max)
  turns = whole.shape[0] > whole.shape[1]
  turned = [x.T if turns else x for x in (safe, change)]
  shape = _slope.soft if static.soft else _slope.hard
  dot = _slope.along(shape, turned[0], near, turned[1], dot_limit.astype(wide))
  dot = _like(dot.T if turns else dot, static.view.shape, matrix.dtype)
  dot = _view.scattered(dot, matrix, static.view)
  dot = jnp.where(decided, dot_matrix, dot)
  return found, (dot, jnp.zeros_like(value), jnp.zeros_like(unit))


def real(x: Array) -> Array:
  """Writes a complex matrix as a real one of twice the rows and columns.

  Its singular values are the same, each twice.
  """
  if not jnp.iscomplexobj(x):
    return x
  re, im = x.real, x.imag
  return jnp.block([[re, -im], [im, re]])


def _like(x: Array, shape: tuple[int, int], dtype: Any) -> Array:
  """Inverts `_real`, and casts to the leaf's dtype."""
  if not jnp.issubdtype(dtype, jnp.complexfloating):
    return x.astype(dtype)
  rows, columns = shape
  part = jnp.finfo(dtype).dtype
  return lax.complex(x[:rows, :columns].astype(part), x[rows:, :columns].astype(part))


def _exponent(power: Array) -> Array:
  """Returns n of ``2 ** n``."""
  return jnp.frexp(power)[1] - 1


def _power(exponent: Array, dtype: Any) -> Array:
  """Returns ``2 ** exponent``, within the normal floats."""
  info = jnp.finfo(dtype)
  bounded = jnp.clip(exponent, int(info.minexp), int(info.maxexp) - 1)
  return jnp.ldexp(jnp.ones((), dtype), bounded)


def _scaled(x: Array, exponent: Array) -> Array:
  """Multiplies by ``2 ** exponent``, in two steps, as one may leave the range."""
  half = exponent // 2
  return x * _power(half, x.dtype) * _power(exponent - half, x.dtype)
