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
from optax_clip._matrices import units as _units
from optax_clip._matrices import view as _view
from optax_clip._norms import extended as _extended
from optax_clip._norms import power_sums as _power_sums
from optax_clip._norms.extended import Extended
from optax_clip._norms.layout import Place

Array = jax.Array


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
  flat = functools.partial(_flat, static)
  new, size = _backend.by_backend(
    *(matrix, value, unit, limit),
    cpu=functools.partial(_nested, static),
    gpu=flat,
    tpu=flat,
  )
  return new, size, unit


def _nested(
  static: _Static, matrix: Array, value: Array, unit: Array, limit: Array
) -> tuple[Array, Array]:
  """Clips a matrix, by branches within branches: each takes the shortest way."""
  norm = Extended(value, unit)

  def keep(matrix: Array) -> tuple[Array, Array]:
    return matrix, value

  def work(matrix: Array) -> tuple[Array, Array]:
    units = _units.of(static.view, matrix.dtype, norm, limit, strict=static.strict)
    whole = units.inside(matrix)
    clipped = _soft.clipped if static.soft else _hard.clipped
    new, bound = clipped(whole, units.goal, units.aim, units.rounded, units.least)
    new = units.outside(jnp.where(limit > 0, new, 0), matrix)
    if not static.soft:
      new = jnp.where(_passes(units, bound, limit), matrix, new)
    return new, _largest(static, units, norm, limit, bound)

  return lax.cond(_is_decided(static, norm, limit, matrix.dtype), keep, work, matrix)


def _flat(
  static: _Static, matrix: Array, value: Array, unit: Array, limit: Array
) -> tuple[Array, Array]:
  """Clips a matrix by one choice and one loop, of at most one turn.

  A GPU's host waits wherever a condition decides what runs next: at a branch once, at a
  loop once for each turn and once more. Here it waits twice for what is not clipped.
  The choice makes a number, and a loop leaves its array in place: no way writes, or
  holds, a copy of what passes. Without a condition each matrix would take the longest
  way in each step, some fifty matmuls.
  """
  norm = Extended(value, unit)
  decided = _is_decided(static, norm, limit, matrix.dtype)
  units = _units.of(static.view, matrix.dtype, norm, limit, strict=static.strict)
  actions = _soft if static.soft else _hard

  def look(matrix: Array) -> Array:
    bound = actions.first(units.inside(matrix), units.goal, units.aim, units.rounded)
    return jnp.where(value >= 0, bound, bound)  # Varies over a mesh as the norm does.

  def act(matrix: Array) -> Array:
    whole = units.inside(matrix)
    new = actions.once(whole, bound, units.goal, units.aim, units.rounded, units.least)
    return units.outside(jnp.where(limit > 0, new, 0), matrix)

  bound = lax.cond(decided, lambda _: jnp.zeros_like(units.goal), look, matrix)
  passes = decided
  if not static.soft:
    passes = decided | _passes(units, bound, limit)
  new = _hard.in_place(act, matrix, ~passes)
  largest = _largest(static, units, norm, limit, bound)
  return new, jnp.where(decided, value, largest)


def _passes(units: _units.Units, bound: Array, limit: Array) -> Array:
  """Returns whether a matrix is proven to be within its limit, in float32's range."""
  return _hard.within(bound, units.aim) & (limit > 0) & (units.raised == 0)


def _largest(
  static: _Static, units: _units.Units, norm: Extended, limit: Array, bound: Array
) -> Array:
  """Returns a bound of the largest singular value in the norm's unit, and dtype."""
  value, unit = (x.astype(bound.dtype) for x in norm)
  largest = bound * units.goal / units.size * value
  if not static.soft:
    # A matrix that passes exceeds its limit by the tolerance of the proof at most.
    most = jnp.minimum(largest, limit.astype(bound.dtype) / unit)
    largest = jnp.where(_passes(units, bound, limit), most, largest)
  # The norm is a bound, too; NaN comes of no finite matrix.
  largest = jnp.where(largest < value, largest, value)
  return largest.astype(norm.value.dtype)


def _is_decided(static: _Static, norm: Extended, limit: Array, dtype: Any) -> Array:
  """Returns whether the norm says enough: all is within the limit, or not finite."""
  eps = float(jnp.finfo(_power_sums.accumulator(dtype)).eps)
  if static.strict:
    limit = limit * (1 - _units.NORM_EPSILONS * eps)
  if static.soft:
    # Far below the limit the change is below half an epsilon.
    limit = limit * eps**0.5
  return ~_extended.exceeds(norm, limit) | ~jnp.isfinite(norm.value)


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
    _units.real(_view.gathered(x, static.view)).astype(wide)
    for x in (matrix, dot_matrix)
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
  dot = _units.complex_like(dot.T if turns else dot, static.view.shape, matrix.dtype)
  dot = _view.scattered(dot, matrix, static.view)
  dot = jnp.where(decided, dot_matrix, dot)
  return found, (dot, jnp.zeros_like(value), jnp.zeros_like(unit))
