"""Moments: the arithmetic below the norms, in the accumulator's dtype.

A moment is a sum of ``|x|^ord``. On CPU, XLA vectorises a reduction of
``x * x`` and of little else: adding one comparison to it makes it eight times
slower. Keep the plain path plain.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from optax_clip import _mesh

Array = jax.Array

# Arrays below this many elements are summed together, see `parts`.
_SMALL = 1 << 14
# Units stay below this, a power of two.
_HIGH = 2.0**126
# Elements of one concatenation: bounds the temporary it may need (256 KiB).
_BUCKET = 1 << 16


def accumulator(*dtypes: Any) -> Any:
  """The dtype that sums of these dtypes are kept in: float64 or float32."""
  double = any(jnp.finfo(d).dtype == jnp.float64 for d in dtypes)
  return jnp.dtype(jnp.float64 if double else jnp.float32)


class Part(NamedTuple):
  """Arrays of one group and one set of mesh axes that share one moment."""

  arrays: list[Array]
  group: int
  axes: tuple[str, ...]


def parts(
  arrays: Sequence[Array],
  groups: Sequence[int],
  axes: Sequence[tuple[str, ...]],
  dtype: Any,
  concatenate: bool,
) -> list[Part]:
  """Each large array is a part of its own, small ones of a group share some.

  XLA compiles a norm over 2,000 small arrays in 20 seconds, worse than linear
  in their number; over a few concatenations of them it takes two. Where the
  arrays may be sharded (`concatenate=False`) they are kept apart, since laying
  them side by side could move them between devices.
  """
  result: list[Part] = []
  buckets: dict[tuple[int, tuple[str, ...], bool], list[Array]] = {}

  def close(key: tuple[int, tuple[str, ...], bool]) -> None:
    group, names, is_complex = key
    small = buckets.pop(key)
    if concatenate and len(small) > 1:
      # Complex arrays stay complex: |z|^ord is not a sum over re and im.
      wide = _complex(dtype) if is_complex else dtype
      small = [jnp.concatenate([x.ravel().astype(wide) for x in small])]
    result.append(Part(small, group, names))

  for x, group, names in zip(arrays, groups, axes, strict=True):
    if x.size > _SMALL:
      result.append(Part([x], group, names))
      continue
    key = (group, names, jnp.iscomplexobj(x))
    if sum(y.size for y in buckets.get(key, ())) + x.size > _BUCKET:
      close(key)
    buckets.setdefault(key, []).append(x)
  for key in list(buckets):
    close(key)
  # Where each group is one array, `segment` has nothing to do.
  return sorted(result, key=lambda part: part.group)


def _complex(dtype: Any) -> Any:
  return jnp.complex128 if dtype == jnp.float64 else jnp.complex64


def moment(
  ord: float, dtype: Any, arrays: Sequence[Array], unit: Array | None = None
) -> Array:
  """Sum (|x| / unit)^ord over all elements of some arrays."""
  sums = [power_sum(x, ord, dtype, unit) for x in arrays]
  if len(sums) == 1:
    return sums[0]
  return jnp.sum(jnp.stack(sums))


def power_sum(
  x: Array,
  ord: float,
  dtype: Any,
  unit: Array | None = None,
  axes: tuple[int, ...] | None = None,
) -> Array:
  """Sum (|x| / unit)^ord over some axes, which stay with size 1, or over all.

  XLA's CPU backend adds up to a thousand elements of a small array one after the
  other, which costs a digit. A product of vectors does not, and unlike `ravel` it
  moves no data of a sharded array. (With explicit sharding it may be refused.)
  """
  small = axes is None and 1 < x.size <= _SMALL
  if ord != 2 or not small or _mesh.is_explicitly_sharded(x):
    return over_axes(jnp.sum, power(x, ord, dtype, unit), axes)
  if jnp.iscomplexobj(x):
    re, im = (power_sum(part, ord, dtype, unit) for part in (x.real, x.imag))
    return re + im
  x = x.astype(dtype)
  x = x if unit is None else x / unit
  every = tuple(range(x.ndim))
  return lax.dot_general(
    x, x, ((every, every), ((), ())), precision=lax.Precision.HIGHEST
  )


def largest(dtype: Any, arrays: Sequence[Array]) -> Array:
  """Max |x| over all elements of some arrays; NaN if one is NaN."""
  peaks = [jnp.max(modulus(x, dtype)) for x in arrays]
  return peaks[0] if len(peaks) == 1 else jnp.max(jnp.stack(peaks))


def over_axes(
  reduce: Callable[..., Array], x: Array, axes: tuple[int, ...] | None
) -> Array:
  # Zero-size leaves have the norm 0; all moduli and powers are at least that.
  return reduce(x, axis=axes, keepdims=axes is not None, initial=0)


def modulus(x: Array, dtype: Any) -> Array:
  return jnp.abs(x).astype(dtype)


def power(x: Array, ord: float, dtype: Any, unit: Array | None = None) -> Array:
  """(|x| / unit)^ord, elementwise, differentiable at zero."""
  if ord != 2:
    x = modulus(x, dtype)
  elif jnp.iscomplexobj(x):
    # |z|^2 without the square root and its derivative.
    re, im = (power(part, ord, dtype, unit) for part in (x.real, x.imag))
    return re + im
  x = x.astype(dtype)
  if unit is not None:
    x = x / unit
  if ord == 1:
    return x
  if ord == 2:
    return x * x
  zero = x == 0
  return jnp.where(zero, 0, jnp.where(zero, 1, x) ** ord)


def root(moment: Array, ord: float) -> Array:
  """moment^(1/ord), with derivative 0 (not inf) at 0."""
  if ord == 1:
    return moment
  zero = moment == 0
  safe = jnp.where(zero, 1, moment)
  root = jnp.sqrt(safe) if ord == 2 else safe ** (1 / ord)
  return jnp.where(zero, 0, root)


def root_and_unit(moment: Array, unit: Array, ord: float) -> tuple[Array, Array]:
  """The norm of a moment in units, as value and unit."""
  if ord >= 1:
    return root(moment, ord), unit
  # The root is a power above 1 here, and need not be a float: its own root is.
  half = root(moment, 2 * ord)
  size = jnp.minimum(power_of_two(half), _HIGH / unit)
  size = jnp.where(half > 0, size, 1)
  return half * (half / size), unit * size


def segment(
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
  return jnp.stack(
    [
      reduce(values[jnp.asarray(m)]) if m else jnp.zeros((), values.dtype)
      for m in members
    ]
  )


def power_of_two(x: Array) -> Array:
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


def can_leave_range(ord: float, arrays: Sequence[Array]) -> bool:
  """Whether a sum of |x|^ord can over- or underflow: not for float16, ord 2."""
  return ord < 1 or any(x.dtype != jnp.float16 for x in arrays)


def out_of_range(moments: Sequence[Array], sizes: Sequence[Any]) -> Array:
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
