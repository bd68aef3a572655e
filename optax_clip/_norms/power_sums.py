"""How a bfloat16 norm is summed: as powers of elements, in float32 or better.

A *moment* is a sum of ``|x| ** ord``. On CPU, XLA vectorises a reduction of ``x * x``
and of little else: one more comparison makes it eight times slower. Keep the plain
path plain.
"""

from collections.abc import Callable
from collections.abc import Sequence

import jax
from jax import lax
import jax.numpy as jnp

from optax_clip._norms import extended as _extended
from optax_clip._norms import mesh as _mesh
from optax_clip._types import DType

Array = jax.Array
# Arrays of at most this many elements are summed by a dot product.
_SMALL = 1 << 14
# An upper bound of units, a power of two.
_HIGH = 2.0**126


def accumulator(*dtypes: DType) -> DType:
  """Returns the dtype in which these dtypes are summed: float64 or float32."""
  double = any(jnp.finfo(d).dtype == jnp.float64 for d in dtypes)
  return jnp.dtype(jnp.float64 if double else jnp.float32)


def power_sum(x: Array, ord: float, dtype: DType, unit: Array | None = None) -> Array:
  """Sums ``(|x| / unit) ** ord``.

  XLA:CPU adds up to a thousand elements of a small array one after the other, which
  costs a digit. A dot product does not, and unlike `ravel` it moves no data of a
  sharded array. (JAX may refuse it with explicit sharding.)
  """
  small = 1 < x.size <= _SMALL
  if ord != 2 or not small or _mesh.is_explicitly_sharded(x):
    return over_axes(jnp.sum, power(x, ord, dtype, unit), None)
  if jnp.iscomplexobj(x):
    re, im = (power_sum(part, ord, dtype, unit) for part in (x.real, x.imag))
    return re + im
  x = x.astype(dtype)
  x = x if unit is None else x / unit
  every = tuple(range(x.ndim))
  return lax.dot_general(
    x, x, ((every, every), ((), ())), precision=lax.Precision.HIGHEST
  )


def over_axes(
  reduce: Callable[..., Array], x: Array, axes: tuple[int, ...] | None
) -> Array:
  # Leaves of size zero have the norm 0; no modulus or power is below it.
  return reduce(x, axis=axes, keepdims=axes is not None, initial=0)


def modulus(x: Array, dtype: DType) -> Array:
  return jnp.abs(x).astype(dtype)


def widened(x: Array, dtype: DType) -> Array:
  """Casts an array to the precision of a dtype; a complex one stays complex."""
  if not jnp.iscomplexobj(x):
    return x.astype(dtype)
  return x.astype(jnp.complex128 if dtype == jnp.float64 else jnp.complex64)


def power(x: Array, ord: float, dtype: DType, unit: Array | None = None) -> Array:
  """Returns ``(|x| / unit) ** ord``, elementwise."""
  if ord != 2:
    x = modulus(x, dtype)
  elif jnp.iscomplexobj(x):
    # |z|^2 without the square root.
    re, im = (power(part, ord, dtype, unit) for part in (x.real, x.imag))
    return re + im
  x = x.astype(dtype)
  if unit is not None:
    x = x / unit
  if ord == 1:
    return x
  return x * x if ord == 2 else x**ord


def root(moment: Array, ord: float) -> Array:
  """Returns ``moment ** (1 / ord)``."""
  if ord == 1:
    return moment
  return jnp.sqrt(moment) if ord == 2 else moment ** (1 / ord)


def as_unit(largest: Array) -> Array:
  """Makes a unit of the largest value; 1 of 0. It cancels: its derivative is 0."""
  largest = lax.stop_gradient(largest)
  return jnp.where(largest > 0, largest, 1)


def root_and_unit(moment: Array, unit: Array, ord: float) -> tuple[Array, Array]:
  """Turns a moment in units into a norm, as value and unit."""
  if ord >= 1:
    return root(moment, ord), unit
  # Here the root is a power above 1, which may overflow: its square root does not.
  half = root(moment, 2 * ord)
  size = jnp.minimum(_extended.power_of_two(half), _HIGH / unit)
  size = jnp.where(half > 0, size, 1)
  return half * (half / size), unit * size


def segment(
  reduce: Callable[[Array], Array],
  values: Array,
  index: Sequence[int],
  count: int,
) -> Array:
  """Merges each group's values along axis 0: blocked reductions, no scatter."""
  if list(index) == list(range(count)):
    return values
  if count == 1:
    return reduce(values)[None]
  members: list[list[int]] = [[] for _ in range(count)]
  for position, group in enumerate(index):
    members[group].append(position)
  return jnp.stack(
    [
      reduce(values[jnp.asarray(m)]) if m else jnp.zeros_like(values[0])
      for m in members
    ]
  )
