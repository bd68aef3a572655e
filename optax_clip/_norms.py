"""Norms: how large, exactly, in every dtype and over the whole range of floats.

A norm here is a monoid. Each array is reduced on its own, the partial results
are merged over arrays and collected over devices, and one root finishes it::

    array --local--> moment --merge, collect--> moment --root--> Norm

What makes it right in every dtype lives in this file and nowhere else:

* *Accumulation.* Moments are float32 or better (float64 for float64 arrays),
  within an array and across arrays. A bfloat16 or float16 sum never exists.
* *Range.* A plain sum of squares over- or underflows for values beyond about
  1e19 and below about 1e-19. Measuring the largest element first would cost a
  second read every step. Instead the plain sum is taken, and *only if it left
  the safe range* a second measurement, in units of a power of two near the
  largest element, replaces it (`lax.cond`: the branch not taken costs nothing).
* *Wide results.* The 2-norm of finite float32 values may itself exceed the
  largest float32. A `Norm` is therefore ``value * unit``.

Precision of the plain sum relies on XLA's reductions being blocked, which
keeps the relative error of 1e8 float32 squares below 1e-7 (measured; a test
and a benchmark watch it).

On CPU, XLA vectorises a reduction of ``x * x`` and of little else: adding one
comparison to it makes it eight times slower. Keep the plain path plain.
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

Array = jax.Array

# Arrays below this many elements are summed together, see `_parts`.
_SMALL = 1 << 14
# Elements of one concatenation: bounds the temporary it may need (256 KiB).
_BUCKET = 1 << 16


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


def plain(value: Array) -> Norm:
  """The norm whose float value is already known."""
  value = value.astype(accumulator(value.dtype))
  return Norm(value, jnp.ones_like(value))


def merged(norms: Norm) -> Norm:
  """The 2-norm over axis 0 of norms that are themselves 2-norms of parts."""
  unit = jnp.max(jnp.where(norms.value > 0, norms.unit, 0), axis=0)
  unit = jnp.where(unit > 0, unit, 1)
  scaled = norms.value * (norms.unit / unit)
  peak = jax.lax.stop_gradient(jnp.max(scaled, axis=0))
  # The values of plain norms go up to 1e19 and down to 1e-19: squares may not
  # be floats, so they are taken in units of their largest.
  peak = jnp.where(jnp.isfinite(peak) & (peak > 0), peak, 1)
  moment = jnp.sum(jnp.square(scaled / peak), axis=0)
  return Norm(_root(moment, 2) * peak, unit)


def joined(norms: Any) -> Any:
  """Norms as thresholds see them: a list of scalars becomes one vector."""
  if not _are_scalars(norms):
    return norms
  dtype = accumulator(*(norm.value.dtype for norm in norms))
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


def accumulator(*dtypes: Any) -> Any:
  """The dtype that sums of these dtypes are kept in: float64 or float32."""
  double = any(jnp.finfo(d).dtype == jnp.float64 for d in dtypes)
  return jnp.dtype(jnp.float64 if double else jnp.float32)


def group_norms(
    leaves: Sequence[Array],
    groups: Sequence[int],
    count: int,
    ord: float,
    axis_name: Any,
) -> Norm:
  """One norm for each group of arrays.

  Args:
    leaves: floating or complex arrays.
    groups: for each leaf, the index of its group.
    count: how many groups there are; a group without elements has norm 0.
    ord: 1, 2, ..., `math.inf`; any positive real.
    axis_name: the mesh axes to collect over, as in `optax_clip.clip_with`.

  Returns:
    A `Norm` of shape ``[count]``.
  """
  dtype = accumulator(*(x.dtype for x in leaves))
  # Arrays are grouped into parts outside of `jit`, where concrete arrays can
  # still be asked for their devices.
  kept = [(x, g) for x, g in zip(leaves, groups, strict=True) if x.size]
  if not kept:
    return plain(jnp.zeros(count, dtype))
  arrays, group_of = zip(*kept, strict=True)
  return _group_norms(
      arrays,
      groups=group_of,
      count=count,
      ord=ord,
      dtype=dtype,
      axes=tuple(_mesh.collected_axes(x, axis_name) for x in arrays),
      concatenate=_mesh.on_one_device(arrays),
  )


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
  parts = _parts(arrays, groups, axes, dtype, concatenate)
  index = [part.group for part in parts]

  def per_part(local: Callable[..., Array], collect: Any, *units: Any) -> Array:
    """Reduces each part, with one collective for each set of mesh axes."""
    values = [
        local(part.arrays, *(unit[i] for unit in units))
        for i, part in enumerate(parts)
    ]
    return _mesh.collect(values, [part.axes for part in parts], collect)

  def largest() -> Array:
    return per_part(_largest, lax.pmax)

  if ord == math.inf:
    return plain(_segment(jnp.max, largest(), index, count))

  moments = _segment(
      jnp.sum, per_part(functools.partial(_moment, ord), lax.psum), index, count
  )
  size = [0] * count
  for part in parts:
    size[part.group] += sum(x.size for x in part.arrays)

  def keep() -> tuple[Array, Array]:
    return moments, jnp.ones_like(moments)

  def rescale() -> tuple[Array, Array]:
    units = _power_of_two(largest())
    scaled = per_part(functools.partial(_moment, ord), lax.psum, units)
    unit = _segment(jnp.max, units, index, count)
    share = (units / unit[jnp.asarray(index)]) ** ord
    return _segment(jnp.sum, scaled * share, index, count), unit

  if not _can_leave_range(ord, arrays):
    return Norm(_root(moments, ord), jnp.ones_like(moments))
  unsafe = _out_of_range([moments], [jnp.asarray(size, dtype)])
  moments, unit = lax.cond(unsafe, rescale, keep)
  return Norm(_root(moments, ord), unit)


def leaf_norms(
    leaves: Sequence[Array],
    axes: Sequence[tuple[int, ...] | None],
    ord: float,
    axis_name: Any = (),
) -> list[Norm]:
  """One norm, or an array of them, for each leaf.

  A list of scalars rather than a vector: XLA compiles one kernel for all leaves
  that are scaled by a scalar, but one for each that is scaled by an element of
  a vector, which takes ten times longer with 300 leaves. What looks at many
  norms at once looks at the vector that `joined` makes of them.

  Args:
    leaves: floating or complex arrays.
    axes: for each leaf the axes of one unit, which stay with size 1; or `None`
      for one norm of the whole leaf, of shape ``[]``.
    ord: 1, 2, ..., `math.inf`; any positive real.
    axis_name: the mesh axes to collect over, as in `optax_clip.measures`.
  """
  return _leaf_norms(
      tuple(leaves),
      axes=tuple(axes),
      ord=ord,
      mesh_axes=tuple(_mesh.collected_axes(x, axis_name) for x in leaves),
  )


@functools.partial(
    jax.jit, static_argnames=("axes", "ord", "mesh_axes"), inline=True
)
def _leaf_norms(
    leaves: tuple[Array, ...],
    *,
    axes: tuple[tuple[int, ...] | None, ...],
    ord: float,
    mesh_axes: tuple[tuple[str, ...], ...],
) -> list[Norm]:
  over = list(zip(leaves, axes, strict=True))

  def largest() -> list[Array]:
    peaks = [_reduce(jnp.max, _modulus(x, _dtype(x)), a) for x, a in over]
    return _mesh.collect_each(peaks, mesh_axes, lax.pmax)

  def moment(units: Sequence[Array | None]) -> list[Array]:
    sums = [
        _reduce(jnp.sum, _power(x, ord, _dtype(x), unit), a)
        for (x, a), unit in zip(over, units, strict=True)
    ]
    return _mesh.collect_each(sums, mesh_axes, lax.psum)

  if ord == math.inf:
    return [plain(m) for m in largest()]

  moments = moment([None] * len(leaves))
  units = [jnp.ones_like(m) for m in moments]

  def rescale() -> tuple[list[Array], list[Array]]:
    units = [_power_of_two(m) for m in largest()]
    return moment(units), units

  if not _can_leave_range(ord, leaves) or not any(x.size for x in leaves):
    return [Norm(_root(m, ord), u) for m, u in zip(moments, units, strict=True)]
  # How many elements each norm is of.
  sizes = [
      x.size // max(m.size, 1) for x, m in zip(leaves, moments, strict=True)
  ]
  if all(m.ndim == 0 for m in moments):
    # As one vector: arithmetic on 300 scalars takes seconds to compile.
    dtype = accumulator(*(m.dtype for m in moments))
    table = jnp.stack([m.astype(dtype) for m in moments])
    unsafe = _out_of_range([table], [jnp.asarray(sizes, dtype)])
  else:
    unsafe = _out_of_range(moments, sizes)
  moments, units = lax.cond(unsafe, rescale, lambda: (moments, units))
  return [Norm(_root(m, ord), u) for m, u in zip(moments, units, strict=True)]


class _Part(NamedTuple):
  """Arrays of one group and one set of mesh axes that share one moment."""

  arrays: list[Array]
  group: int
  axes: tuple[str, ...]


def _parts(
    arrays: Sequence[Array],
    groups: Sequence[int],
    axes: Sequence[tuple[str, ...]],
    dtype: Any,
    concatenate: bool,
) -> list[_Part]:
  """Each large array is a part of its own, small ones of a group share some.

  XLA compiles a norm over 2,000 small arrays in 20 seconds, worse than linear
  in their number; over a few concatenations of them it takes two. Where the
  arrays may be sharded (`concatenate=False`) they are kept apart, since laying
  them side by side could move them between devices.
  """
  parts: list[_Part] = []
  buckets: dict[tuple[int, tuple[str, ...], bool], list[Array]] = {}

  def close(key: tuple[int, tuple[str, ...], bool]) -> None:
    group, names, is_complex = key
    small = buckets.pop(key)
    if concatenate and len(small) > 1:
      # Complex arrays stay complex: |z|^ord is not a sum over re and im.
      wide = jnp.result_type(dtype, jnp.complex64) if is_complex else dtype
      small = [jnp.concatenate([x.ravel().astype(wide) for x in small])]
    parts.append(_Part(small, group, names))

  for x, group, names in zip(arrays, groups, axes, strict=True):
    if x.size > _SMALL:
      parts.append(_Part([x], group, names))
      continue
    key = (group, names, jnp.iscomplexobj(x))
    if sum(y.size for y in buckets.get(key, ())) + x.size > _BUCKET:
      close(key)
    buckets.setdefault(key, []).append(x)
  for key in list(buckets):
    close(key)
  return parts


def _moment(
    ord: float, arrays: Sequence[Array], unit: Array | None = None
) -> Array:
  """Sum (|x| / unit)^ord over all elements of some arrays."""
  dtype = accumulator(*(x.dtype for x in arrays))
  sums = [jnp.sum(_power(x, ord, dtype, unit)) for x in arrays]
  return sums[0] if len(sums) == 1 else jnp.sum(jnp.stack(sums))


def _largest(arrays: Sequence[Array]) -> Array:
  """Max |x| over all elements of some arrays; NaN if one is NaN."""
  dtype = accumulator(*(x.dtype for x in arrays))
  peaks = [jnp.max(_modulus(x, dtype)) for x in arrays]
  return peaks[0] if len(peaks) == 1 else jnp.max(jnp.stack(peaks))


def _reduce(
    reduce: Callable[..., Array], x: Array, axes: tuple[int, ...] | None
) -> Array:
  # Zero-size leaves have the norm 0; all moduli and powers are at least that.
  return reduce(x, axis=axes, keepdims=axes is not None, initial=0)


def _dtype(x: Array) -> Any:
  return accumulator(x.dtype)


def _modulus(x: Array, dtype: Any) -> Array:
  return jnp.abs(x).astype(dtype)


def _power(
    x: Array, ord: float, dtype: Any, unit: Array | None = None
) -> Array:
  """(|x| / unit)^ord, elementwise, differentiable at zero."""
  if ord != 2:
    x = _modulus(x, dtype)
  elif jnp.iscomplexobj(x):
    # |z|^2 without the square root and its derivative.
    parts = [_power(part, ord, dtype, unit) for part in (x.real, x.imag)]
    return parts[0] + parts[1]
  x = x.astype(dtype)
  if unit is not None:
    x = x / unit
  if ord == 1:
    return x
  if ord == 2:
    return x * x
  zero = x == 0
  return jnp.where(zero, 0, jnp.where(zero, 1, x) ** ord)


def _root(moment: Array, ord: float) -> Array:
  """moment^(1/ord), with derivative 0 (not inf) at 0."""
  if ord == 1:
    return moment
  zero = moment == 0
  safe = jnp.where(zero, 1, moment)
  root = jnp.sqrt(safe) if ord == 2 else safe ** (1 / ord)
  return jnp.where(zero, 0, root)


def _segment(
    reduce: Callable[[Array], Array],
    values: Array,
    index: Sequence[int],
    count: int,
) -> Array:
  """Merges the values of each group: blocked reductions, no scatter."""
  if list(index) == list(range(count)):
    return values
  if count == 1:
    return reduce(values)[None]
  members: list[list[int]] = [[] for _ in range(count)]
  for position, group in enumerate(index):
    members[group].append(position)
  return jnp.stack([
      reduce(values[jnp.asarray(m)]) if m else jnp.zeros((), values.dtype)
      for m in members
  ])


def _power_of_two(x: Array) -> Array:
  """2^floor(log2 x): x with its mantissa cleared.

  Held where both it and its inverse are normal floats: XLA divides by a scalar
  by multiplying with its inverse, and CPUs flush subnormal inverses to zero.
  """
  x = lax.stop_gradient(x)
  info = jnp.finfo(x.dtype)
  carrier = jnp.dtype(f"uint{info.bits}")
  exponent = ((1 << info.nexp) - 1) << info.nmant
  bits = lax.bitcast_convert_type(x, carrier) & carrier.type(exponent)
  unit = lax.bitcast_convert_type(bits, x.dtype)
  unit = jnp.clip(unit, info.tiny, 1 / info.tiny)
  return jnp.where(jnp.isfinite(x), unit, 1)


def _can_leave_range(ord: float, arrays: Sequence[Array]) -> bool:
  """Whether a sum of |x|^ord can over- or underflow: not for float16, ord 2."""
  return ord > 2 or ord < 1 or any(x.dtype != jnp.float16 for x in arrays)


def _out_of_range(moments: Sequence[Array], sizes: Sequence[Any]) -> Array:
  """Whether any moment overflowed, or is so small that it lost precision.

  Every term may have lost up to `tiny` to underflow; ``size * tiny / eps`` makes
  that loss at most one rounding error of the sum.

  A zero beside moments that are not zero is taken for a true zero (an expert
  that no token reached, a dead unit), not for an underflow: it stands for
  elements below about 1e-19 at most. When all are zero, it is looked into.
  """
  strayed, zero = [], []
  for moment, size in zip(moments, sizes, strict=True):
    if not moment.size:
      continue
    info = jnp.finfo(moment.dtype)
    small = jnp.asarray(size, moment.dtype) * (info.tiny / info.eps)
    low = (moment > 0) & (moment < small)
    strayed.append(jnp.any(~jnp.isfinite(moment) | low))
    zero.append(jnp.all(moment == 0))
  return jnp.any(jnp.stack(strayed)) | jnp.all(jnp.stack(zero))
