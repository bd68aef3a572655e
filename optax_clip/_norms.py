"""Norms: how large, exactly, in every dtype and over the whole range of floats.

A norm here is a monoid. Each array is reduced on its own, the partial results
are merged over arrays and collected over devices, and one root finishes it::

    array --local--> moment --merge, collect--> moment --root--> Norm

What makes it right in every dtype lives here and in `_moments`, nowhere else:

* *Accumulation.* Moments are float32 or better (float64 for float64 arrays),
  within an array and across arrays. A bfloat16 or float16 sum never exists.
* *Range.* A plain sum of squares over- or underflows for values beyond about
  1e19 and below about 1e-19. Measuring the largest element first would cost a
  second read every step. Instead the plain sum is taken, and *only if it left
  the safe range* a second measurement, in units of a power of two near the
  largest element, replaces it (`lax.cond`: the branch not taken costs nothing).
  Orders above 2, whose powers leave the range (and whose derivatives leave it
  sooner) for values that are not rare, always take the second way: two reads.
* *Wide results.* The 2-norm of finite float32 values may itself exceed the
  largest float32. A `Norm` is therefore ``value * unit``.

Precision of the plain sum relies on XLA's reductions being blocked, which
keeps the relative error of 1e8 float32 squares below 1e-7 (measured; a test
and a benchmark watch it).
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import math
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from optax_clip import _mesh
from optax_clip import _moments
from optax_clip import _once
from optax_clip import _scalars

Array = jax.Array


class Norm(NamedTuple):
  """A non-negative number, or a vector of them: ``value * unit``.

  Attributes:
    value: f32 (f64 where an input is float64). NaN or inf when the input has a
      NaN or an inf, and only then.
    unit: of the same shape and dtype; a power of two. It is 1 unless the plain
      measurement left the safe range of its dtype.
  """

  value: Array
  unit: Array


def is_norm(node: Any) -> bool:
  """Whether a node of a tree of norms is one `Norm`."""
  return isinstance(node, Norm)


def magnitude(norm: Norm) -> Array:
  """The norm as one float; a finite norm stays finite (it saturates)."""
  largest = jnp.finfo(norm.value.dtype).max
  return jnp.where(
    jnp.isfinite(norm.value),
    jnp.minimum(norm.value * norm.unit, largest),
    norm.value,
  )


def magnitudes(norms: Any) -> Any:
  """`magnitude` of each norm of a tree."""
  return jax.tree.map(magnitude, norms, is_leaf=is_norm)


def plain(value: Array) -> Norm:
  """The norm whose float value is already known."""
  value = value.astype(_moments.accumulator(value.dtype))
  return Norm(value, jnp.ones_like(value))


def merged(norms: Norm, ord: float = 2.0) -> Norm:
  """The norm over axis 0 of norms that are themselves norms of parts; ord >= 1."""
  unit = jnp.max(jnp.where(norms.value > 0, norms.unit, 0), axis=0, keepdims=True)
  unit = jnp.where(unit > 0, unit, 1)
  scaled = norms.value * (norms.unit / unit)
  largest = jnp.max(scaled, axis=0)
  if ord == math.inf:
    return Norm(largest, unit[0])
  peak = lax.stop_gradient(largest)
  # The values of plain norms go up to 1e19 and down to 1e-19: squares may not
  # be floats, so they are taken in units of their largest.
  peak = jnp.where(jnp.isfinite(peak) & (peak > 0), peak, 1)
  axes = None if scaled.ndim == 1 else (0,)
  moment = _moments.power_sum(scaled / peak[None], ord, scaled.dtype, axes=axes)
  return Norm(_moments.root(moment.reshape(peak.shape), ord) * peak, unit[0])


def joined(norms: Any) -> Any:
  """Norms as thresholds see them: a list of scalars becomes one vector."""
  if not _are_scalars(norms):
    return norms
  dtype = _moments.accumulator(*(norm.value.dtype for norm in norms))
  columns = zip(*norms, strict=True)
  return Norm(*(jnp.stack([x.astype(dtype) for x in c]) for c in columns))


def apart(limits: Any, norms: Any) -> Any:
  """The inverse of `joined`, for what is shaped like its result."""
  if not _are_scalars(norms):
    return limits
  return [limits[i].astype(norm.value.dtype) for i, norm in enumerate(norms)]


def _are_scalars(norms: Any) -> bool:
  return (
    isinstance(norms, list)
    and len(norms) > 0
    and all(norm.value.ndim == 0 for norm in norms)
  )


@_once.measured_once
def group_norms(
  leaves: Sequence[Array],
  groups: Sequence[int],
  count: int,
  ord: float,
  mesh_axes: Sequence[tuple[str, ...]],
) -> Norm:
  """One norm for each group of arrays.

  Args:
    leaves: floating or complex arrays.
    groups: for each leaf, the index of its group.
    count: how many groups there are; a group without elements has norm 0.
    ord: 1, 2, ..., `math.inf`; any positive real.
    mesh_axes: for each leaf the mesh axes to collect over.

  Returns:
    A `Norm` of shape ``[count]``.
  """
  dtype = _moments.accumulator(*(x.dtype for x in leaves))
  known = _from_parts(leaves, groups, count, ord, mesh_axes)
  if known is not None:
    return known
  # Arrays are grouped into parts outside of `jit`, where concrete arrays can
  # still be asked for their devices.
  kept = [e for e in zip(leaves, groups, mesh_axes, strict=True) if e[0].size]
  if not kept:
    return plain(jnp.zeros(count, dtype))
  arrays, group_of, names = zip(*kept, strict=True)
  return _group_norms(
    arrays,
    groups=group_of,
    count=count,
    ord=ord,
    dtype=dtype,
    axes=names,
    concatenate=_mesh.on_one_device(arrays),
  )


def _from_parts(
  leaves: Sequence[Array],
  groups: Sequence[int],
  count: int,
  ord: float,
  mesh_axes: Sequence[tuple[str, ...]],
) -> Norm | None:
  """The same norms, if those of all leaves or of parts of them are known."""
  if ord < 1 or not leaves:
    # Below 1 the norm of many parts need not be a float where theirs are.
    return None
  for known in _once.known(leaf_norms):
    _, _, known_ord, cuts = known.kind
    place = {id(x): i for i, x in enumerate(known.leaves)}
    if known_ord != ord or not all(id(x) in place for x in leaves):
      continue
    found = [place[id(x)] for x in leaves]
    if [set(cuts[i].axes) for i in found] != [set(names) for names in mesh_axes]:
      continue
    if is_norm(known.norms):
      value, unit = (x[jnp.asarray(found)] for x in known.norms)
      index = list(groups)
    else:
      members = [known.norms[i] for i in found]
      value, unit = (_side_by_side(x) for x in zip(*members, strict=True))
      index = [
        group
        for norm, group in zip(members, groups, strict=True)
        for _ in range(norm.value.size)
      ]
    rows = [
      jnp.asarray([i for i, g in enumerate(index) if g == k]) for k in range(count)
    ]
    blank = plain(jnp.zeros((), value.dtype))
    each = [merged(Norm(value[r], unit[r]), ord) if r.size else blank for r in rows]
    return Norm(*(jnp.stack(x) for x in zip(*each, strict=True)))
  return None


def _side_by_side(arrays: Sequence[Array]) -> Array:
  dtype = _moments.accumulator(*(x.dtype for x in arrays))
  return jnp.concatenate([_mesh.replicated(x).ravel().astype(dtype) for x in arrays])


# `jit` so that eager callers compile the `cond` once, not at every call. Inside
# another `jit` it is inlined and leaves no trace.
@functools.partial(
  jax.jit,
  static_argnames=("groups", "count", "ord", "dtype", "axes", "concatenate"),
  inline=True,
)
def _group_norms(
  arrays: tuple[Array, ...],
  *,
  groups: tuple[int, ...],
  count: int,
  ord: float,
  dtype: Any,
  axes: tuple[tuple[str, ...], ...],
  concatenate: bool,
) -> Norm:
  parts = _moments.parts(arrays, groups, axes, dtype, concatenate)
  index = [part.group for part in parts]

  def per_part(local: Callable[..., Array], collect: Any, *units: Any) -> Array:
    """Reduces each part, with one collective for each set of mesh axes."""
    columns = _scalars.columns(units) if units else [[]] * len(parts)
    values = [
      local(part.arrays, *column) for part, column in zip(parts, columns, strict=True)
    ]
    return _mesh.collect(values, [part.axes for part in parts], collect)

  def largest() -> Array:
    return per_part(functools.partial(_moments.largest, dtype), lax.pmax)

  def moment(*units: Array) -> Array:
    local = functools.partial(_moments.moment, ord, dtype)
    return per_part(local, lax.psum, *units)

  if ord == math.inf:
    return plain(_moments.segment(jnp.max, largest(), index, count))

  def keep() -> tuple[Array, Array]:
    return moments, jnp.ones_like(moments)

  def rescale() -> tuple[Array, Array]:
    units = _moments.power_of_two(largest())
    unit = _moments.segment(jnp.max, units, index, count)
    share = (units / unit[jnp.asarray(index)]) ** ord
    return _moments.segment(jnp.sum, moment(units) * share, index, count), unit

  if ord > 2:
    return _finished(ord, *rescale())
  moments = _moments.segment(jnp.sum, moment(), index, count)
  if not _moments.can_leave_range(ord, arrays):
    return _finished(ord, *keep())
  size = [0] * count
  for part in parts:
    elements = sum(x.size for x in part.arrays)
    size[part.group] += elements * _mesh.devices(part.axes)
  unsafe = _moments.out_of_range([moments], [jnp.asarray(size, dtype)])
  return _finished(ord, *lax.cond(unsafe, rescale, keep))


def _finished(ord: float, moment: Array, unit: Array) -> Norm:
  return Norm(*_moments.root_and_unit(moment, unit, ord))


@_once.measured_once
def leaf_norms(
  leaves: Sequence[Array],
  axes: Sequence[tuple[int, ...] | None],
  ord: float,
  cuts: Sequence[_mesh.Cut] | None = None,
) -> Any:
  """One norm, or an array of them, for each leaf.

  Args:
    leaves: floating or complex arrays.
    axes: for each leaf the axes of one unit, which stay with size 1; or `None`
      for one norm of the whole leaf, of shape ``[]``.
    ord: 1, 2, ..., `math.inf`; any positive real.
    cuts: how the norms of each leaf lie on a mesh; on none if `None`.

  Returns:
    A list of `Norm`, one for each leaf; or one `Norm` of shape ``[leaves]`` if
    all are of whole leaves and of one type. XLA compiles arithmetic on a vector
    in no time, and on 300 scalars in seconds.
  """
  cuts = [_mesh.Cut()] * len(leaves) if cuts is None else cuts
  mesh_axes = [cut.axes for cut in cuts]
  if leaves and all(a is None for a in axes) and _of_one_type(leaves, mesh_axes):
    return group_norms(leaves, range(len(leaves)), len(leaves), ord, mesh_axes)
  return _leaf_norms(tuple(leaves), axes=tuple(axes), ord=ord, cuts=tuple(cuts))


def _of_one_type(leaves: Sequence[Array], mesh_axes: Sequence[tuple[str, ...]]) -> bool:
  """Whether the norms of whole leaves have one dtype, and vary over the same axes.

  A vector of others would round a margin in float32 to that of float64, and make
  the norm of a replicated leaf vary over the mesh.
  """
  types = {
    (_moments.accumulator(x.dtype), frozenset(_mesh.varying_axes(x)) - set(names))
    for x, names in zip(leaves, mesh_axes, strict=True)
  }
  return len(types) == 1


@functools.partial(jax.jit, static_argnames=("axes", "ord", "cuts"), inline=True)
def _leaf_norms(
  leaves: tuple[Array, ...],
  *,
  axes: tuple[tuple[int, ...] | None, ...],
  ord: float,
  cuts: tuple[_mesh.Cut, ...],
) -> list[Norm]:
  over = [
    (x, a, _moments.accumulator(x.dtype)) for x, a in zip(leaves, axes, strict=True)
  ]

  def collected(values: list[Array], collective: Callable[..., Array]) -> list[Array]:
    values = [_mesh.placed(x, cut) for x, cut in zip(values, cuts, strict=True)]
    return _mesh.collect_each(values, [cut.axes for cut in cuts], collective)

  def largest() -> list[Array]:
    peaks = [
      _moments.over_axes(jnp.max, _moments.modulus(x, dtype), a) for x, a, dtype in over
    ]
    return collected(peaks, lax.pmax)

  def moment(units: Sequence[Array | None]) -> list[Array]:
    sums = [
      _moments.power_sum(
        x, ord, dtype, unit if unit is None else _mesh.local(unit, cut), a
      )
      for (x, a, dtype), unit, cut in zip(over, units, cuts, strict=True)
    ]
    return collected(sums, lax.psum)

  if ord == math.inf:
    return [plain(m) for m in largest()]

  def rescale() -> tuple[list[Array], list[Array]]:
    units = [_moments.power_of_two(m) for m in largest()]
    return moment(units), units

  def finished(moments: list[Array], units: list[Array]) -> list[Norm]:
    pairs = zip(moments, units, strict=True)
    return [_finished(ord, m, unit) for m, unit in pairs]

  if ord > 2:
    return finished(*rescale())
  moments = moment([None] * len(leaves))
  units = [jnp.ones_like(m) for m in moments]
  if not _moments.can_leave_range(ord, leaves) or not any(x.size for x in leaves):
    return finished(moments, units)
  # How many elements each norm is of.
  sizes = [
    x.size // max(m.size, 1) * _mesh.devices(cut.axes)
    for x, m, cut in zip(leaves, moments, cuts, strict=True)
  ]
  unsafe = _moments.out_of_range(moments, sizes)
  return finished(*lax.cond(unsafe, rescale, lambda: (moments, units)))
