"""How large the largest singular value of each matrix is: proven, and never less."""

from collections.abc import Callable
from collections.abc import Hashable
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from optax_clip._algebra.types import ByLayout
from optax_clip._algebra.types import Measure
from optax_clip._matrices import certificate as _certificate
from optax_clip._matrices import units as _units
from optax_clip._matrices import view as _view
from optax_clip._matrices.certificate import dot
from optax_clip._norms import extended as _extended
from optax_clip._norms import layout as _layout
from optax_clip._norms import mesh as _mesh
from optax_clip._norms import norm as _norm
from optax_clip._norms.blocks import Norms
from optax_clip._norms.extended import Extended
from optax_clip._norms.layout import Layout
from optax_clip._trees import axes as _axes
from optax_clip._trees import leaves as _leaves
from optax_clip._trees import paths as _paths
from optax_clip._types import AxisName
from optax_clip._types import ExtraArgs
from optax_clip._types import Params
from optax_clip._types import Specs
from optax_clip._types import Updates

Array = jax.Array
# By how much the bound may exceed the truth.
TOLERANCE = 1e-3
# Columns and degree of the estimate at which the bound is proven.
_COLUMNS = 8
_DEGREE = 32


def spectral_norm(
  *,
  axis: Any = None,
  axis_name: AxisName = "auto",
  specs: Specs = None,
  stacked: _axes.Stacked = None,
) -> Measure:
  """Measures the largest singular value of each matrix, by a proven upper bound.

  The bound is at most 1e-3 above the truth, and never below it; by matmuls, without a
  state. Vectors and scalars have their 2-norm. Leaves of higher rank are matrices as
  AGC has units: `axis` counts rows, all else columns.

  Args:
    axis: which axes of a leaf count the rows of its matrix: by rank if `None`, axis 0
      of rank 2 and 3, all but the last of convolution kernels. Or a pair of rows and
      columns, as `optax.contrib.MuonDimensionNumbers`: the other axes count matrices.
      Or a mapping from regular expressions of paths, or a function from path and leaf,
      to either or `None`, as for ``stacked``. In a stacked leaf these are the axes of
      one layer.
    axis_name: see the module's docstring.
    specs: see there.
    stacked: which leaves hold many layers, see there.

  The norms have the shape ``[layers]``; with more matrices in a layer, one entry each.
  """
  layout = matrix_layout(axis, axis_name, specs, stacked)
  return Measure(
    layout, _Measured("spectral", (axis, axis_name, specs, stacked), layout)
  )


def matrix_norm(
  *,
  axis: Any = None,
  axis_name: AxisName = "auto",
  specs: Specs = None,
  stacked: _axes.Stacked = None,
) -> Measure:
  """Measures the 2-norm of each matrix that `spectral_norm` measures, for nothing."""
  layout = matrix_layout(axis, axis_name, specs, stacked)
  return Measure(layout, _Measured("matrix", (axis, axis_name, specs, stacked), layout))


def matrix_layout(
  axis: Any, axis_name: AxisName, specs: Specs, stacked: _axes.Stacked
) -> Callable[[Updates], Layout]:
  """Returns the function from updates to the layout of the norms of their matrices."""
  _axes.checked_stacked(stacked)

  def layout(updates: Updates) -> Layout:
    shapes = _mesh.whole_shapes(updates, specs)
    layers = _axes.layer_axes(updates, stacked)
    given = [axis] * len(shapes)
    is_pair = hasattr(axis, "reduction_axis")
    if not is_pair and _paths.is_by_path(axis):
      given = _paths.by_path(updates, axis, "axis")
    found = [
      _matrix_axes(shape, own, layer)
      for shape, own, layer in zip(shapes, given, layers, strict=True)
    ]
    rows = [rows for rows, _ in found]
    dims = [tuple(sorted({*rows, *columns})) for rows, columns in found]
    return _layout.of_leaves(updates, dims, layers, axis_name, specs, rows)

  return layout


def _matrix_axes(
  shape: tuple[int, ...], axis: Any, layers: tuple[int, ...] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns the axes of a leaf that count rows, and those that count columns."""
  rest = _axes.stacked_axes(shape, layers or ())
  own = [shape[i] for i in rest]
  rows, columns = axis, None
  if hasattr(axis, "reduction_axis"):
    rows, columns = axis.reduction_axis, axis.output_axis
  elif isinstance(axis, tuple) and any(isinstance(x, tuple) for x in axis):
    rows, columns = axis
  if rows is None:
    rows = _view.default_rows(own)
  rows = _axes.distinct(rows, own, "axis", "a leaf")
  if columns is None:
    columns = [i for i in range(len(own)) if i not in rows]
  both = _axes.distinct((*rows, *_each(columns)), own, "axis", "a leaf")
  first = tuple(rest[i] for i in both[: len(rows)])
  return first, tuple(rest[i] for i in both[len(rows) :])


def _each(axes: Any) -> tuple[int, ...]:
  return (axes,) if isinstance(axes, int) else tuple(axes)


@dataclasses.dataclass(frozen=True)
class _Measured(ByLayout):
  """Measures matrices; two are equal if they measure the same.

  Attributes:
    kind: "matrix" for the 2-norm of all entries, "spectral" for the largest singular
      value.
    key: all that the layout depends on beside the updates.
    layout: from updates to the layout of their norms.
  """

  kind: str
  key: Hashable
  layout: Callable[[Updates], Layout] = dataclasses.field(compare=False)

  def by(
    self, layout: Layout, updates: Updates, params: Params, extra_args: ExtraArgs
  ) -> Norms:
    del params, extra_args
    leaves = _leaves.floating_leaves(updates)
    norms = _norm.of_layout(leaves, layout, 2.0)
    if self.kind == "matrix":
      return norms
    own = norms.spread()
    for i, (leaf, place) in enumerate(zip(leaves, layout.places, strict=True)):
      view = _view.of(leaf, place) if leaf.size else None
      if view is not None and not view.is_vector():
        own[i] = _bounded(view, leaf, own[i])
    return norms.gathered(own)


# As in `_norms.norm`: eager callers compile it once; inside `jit` it is inlined.
@functools.partial(jax.jit, static_argnums=(0,), inline=True)
def _bounded(view: _view.View, leaf: Array, norm: Extended) -> Extended:
  """Bounds the largest singular value of each matrix, given their 2-norms."""

  def of_one(matrix: Array, value: Array, unit: Array) -> tuple[Array, ...]:
    return matrix, _bound(view, matrix, value, unit), unit

  _, value, unit = _view.over_matrices(of_one, view, leaf, *norm)
  return Extended(value, unit)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _bound(view: _view.View, matrix: Array, value: Array, unit: Array) -> Array:
  """Bounds the largest singular value of one matrix, in the unit of its 2-norm."""
  wide = value.dtype
  usable = jnp.isfinite(value) & (value > 0)
  scale = _extended.power_of_two(jnp.where(usable, value, 1))
  square = dot(*_turned(view, matrix, unit, scale, wide))
  # Where nothing is measured the estimate must be a number, too.
  estimate = jnp.where(usable, _estimate(square), 1)
  # Near its largest value no doubling ends early: without a conditional for it.
  look = _certificate.look_at(square, estimate, TOLERANCE, fixed=True)
  bound = look.bound * estimate * scale
  # The 2-norm is a bound as well, but for its own rounding. NaN comes of no finite one.
  most = value * (1 + 16 * float(jnp.finfo(wide).eps))
  return jnp.where(bound < most, bound, jnp.where(usable, most, value))


@_bound.defjvp
def _bound_jvp(
  view: _view.View, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
  matrix, value, unit = primals
  usable = jnp.isfinite(value) & (value > 0)
  scale = _extended.power_of_two(jnp.where(usable, value, 1))
  whole, other = _turned(view, matrix, unit, scale, value.dtype)
  change, _ = _turned(view, tangents[0], unit, jnp.ones_like(scale), value.dtype)
  _, back = jnp.linalg.eigh(
    dot(jnp.where(usable, whole, 0), jnp.where(usable, other, 0))
  )
  left = back[:, -1:]
  right = dot(other, left)
  size = _certificate.frobenius(right)
  slope = dot(dot(left.T, change), right)[0, 0] / jnp.where(size > 0, size, 1)
  return _bound(view, *primals), jnp.where(usable & (size > 0), slope, 0)


def _turned(
  view: _view.View, matrix: Array, unit: Array, scale: Array, wide: Any
) -> tuple[Array, Array]:
  """Returns the whole matrix with at most as many rows as columns; and transposed."""
  whole = _units.real(_view.gathered(matrix, view)).astype(wide) / unit / scale
  return (whole, whole.T) if whole.shape[0] <= whole.shape[1] else (whole.T, whole)


def _estimate(square: Array) -> Array:
  """Estimates the largest singular value from ``W Wᵀ``: from below, to about 1e-4.

  A few random columns pass the Chebyshev filter that a shorter look has found.
  """
  dtype = square.dtype
  zero = jnp.zeros((), jnp.int32)
  columns = _certificate.columns(square.shape[0], _COLUMNS, zero, dtype)

  def largest(columns: Array) -> tuple[Array, Array]:
    columns = columns / jnp.maximum(_sizes(columns), jnp.finfo(dtype).tiny)
    new = dot(square, columns)
    # The largest of the Rayleigh quotients: the norm of a step is at least as large.
    return jnp.max(jnp.sum(columns * new, axis=0)), new

  for _ in range(3):
    eigenvalue, columns = largest(columns)
  edge = jnp.where(eigenvalue > 0, eigenvalue, 1)

  def step(i: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
    del i
    last, now = pair
    later = 4 / edge * dot(square, now) - 2 * now - last
    size = jnp.maximum(_sizes(later), 1)
    return now / size, later / size

  start = columns / jnp.maximum(_sizes(columns), jnp.finfo(dtype).tiny)
  first = 2 / edge * dot(square, start) - start
  _, columns = lax.fori_loop(0, _DEGREE, step, (start, first))
  better, _ = largest(columns)
  return jnp.sqrt(jnp.maximum(better, edge))


def _sizes(columns: Array) -> Array:
  return jnp.sqrt(jnp.sum(jnp.square(columns), axis=0, keepdims=True))
