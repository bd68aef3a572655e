"""How a norm beyond the range of float32 is stored: as ``value * unit``.

The norm of finite float32 values may exceed the largest float32, and a coefficient
that brings it to a small limit may lie below the smallest. So both are two floats,
and the unit is a power of two, usually 1. The few operations that actions need stand
here, so that an action reads as its formula.
"""

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

Array = jax.Array


class Extended(NamedTuple):
  """Stores non-negative numbers of extended range: ``value * unit``.

  Attributes:
    value: f32 or f64, of any shape. A norm has NaN or inf here if and only if an
      element is NaN or inf.
    unit: a power of two, in the shape and dtype of the value; 1 unless the number is
      near the ends of the dtype's range or beyond them. The unit `beyond` marks a
      number larger than any: a quotient by it is 0.
  """

  value: Array
  unit: Array


def of(x: Array | Extended) -> Extended:
  """Converts a float to `Extended`; leaves an `Extended` as it is."""
  return x if isinstance(x, Extended) else Extended(x, jnp.ones_like(x))


def as_float(x: Extended) -> Array:
  """Converts to one float; a finite number stays finite, as it saturates."""
  most = jnp.finfo(x.value.dtype).max
  saturated = jnp.minimum(x.value * x.unit, most)
  return jnp.where(jnp.isfinite(x.value), saturated, x.value)


def plus(x: Extended, addend: Any) -> Extended:
  """Returns ``x + addend``."""
  if isinstance(addend, float) and addend == 0:
    return x
  return Extended(x.value + jnp.asarray(addend, x.value.dtype) / x.unit, x.unit)


def exceeds(x: Extended, limit: Array) -> Array:
  """Returns ``x > limit``, exactly; NaN exceeds everything."""
  return ~(x.value <= limit / x.unit)


def where(condition: Array, x: Extended, y: Any) -> Extended:
  """Selects ``x`` where the condition holds, elsewhere ``y``, a float or an array."""
  return Extended(jnp.where(condition, x.value, y), jnp.where(condition, x.unit, 1))


def quotient(numerator: Array | Extended, denominator: Array | Extended) -> Extended:
  """Returns ``numerator / denominator``, whatever their sizes; both have one dtype.

  It divides the mantissas and subtracts the exponents. A value of 1 always means that
  nothing is scaled: where the unit is not 1, the value is near ``2 ** 16`` or its
  inverse, or beyond these if the unit cannot hold the quotient. Below ``2 ** -250``
  quotients are 0. The derivative is that of the mantissas, which squares nothing
  large or small.
  """
  numerator, denominator = of(numerator), of(denominator)
  info = jnp.finfo(numerator.value.dtype)
  (top, high), (bottom, low) = _pairwise(_split, numerator.value, denominator.value)
  more, less = _pairwise(_exponent, numerator.unit, denominator.unit)
  exponent = high - low + more - less
  near = jnp.clip(exponent, -16, 16)
  rest = jnp.clip(exponent - near, info.minexp, info.maxexp - 2)
  # The value holds what the unit cannot; what neither can hold is 0.
  near = jnp.minimum(exponent - rest, info.maxexp - 4)
  nothing = (near < info.minexp + 2) | (denominator.unit == beyond(top.dtype))
  near = jnp.maximum(near, info.minexp + 2)
  power = functools.partial(_power, dtype=top.dtype)
  factor, unit = _pairwise(power, near, rest)
  return Extended(jnp.where(nothing, 0, top / bottom) * factor, unit)


def beyond(dtype: Any) -> float:
  """Returns the unit that marks a number larger than any; no other number has it."""
  return float(2.0 ** (jnp.finfo(dtype).maxexp - 1))


def divided(x: Extended, y: Array) -> Extended:
  """Divides a norm by ``y``, with less arithmetic than `quotient` and any unit.

  A norm's value may exceed ``2 ** 62`` where its unit is 1; elsewhere it is near 1.
  A quotient by 0, or out of range, is `beyond`; 0 divided by 0 is 0.
  """
  dtype = x.value.dtype
  info = jnp.finfo(dtype)
  most, high = float(2.0 ** (info.maxexp - 2)), float(2.0 ** (info.maxexp // 2 - 2))

  def scale(z: Array) -> Array:
    return jnp.where(z > high, 0.5 / high, jnp.where(z < 1 / high, 2 * high, 1))

  positive = y > 0
  y = jnp.where(positive, y, 1)
  above, below = (lax.stop_gradient(scale(z)) for z in (x.value, y))
  value = x.value * above / (y * below)
  # The unit takes as much as it can hold, and the value takes the rest.
  factor, unit = below / above, lax.stop_gradient(x.unit)
  held = jnp.clip(factor, 1 / most / unit, most / unit)
  value = value * (factor / held)
  far = (value > most) | (~positive & (x.value > 0))
  far = far & jnp.isfinite(x.value)
  return Extended(jnp.where(far, 1, value), jnp.where(far, beyond(dtype), unit * held))


def from_float(x: Array, dtype: Any) -> Extended:
  """Converts a float64 to another dtype, exactly but for rounding.

  Args:
    x: the float; if finite, at most ``2 ** 250``.
    dtype: float32, or float64 itself.
  """
  if dtype == x.dtype:
    return of(x)
  info = jnp.finfo(dtype)
  power = 2.0 ** (info.maxexp - 2)
  large, small = x > power, x < 1 / power

  def choice(down: float, up: float, dtype: Any) -> Array:
    return jnp.where(large, down, jnp.where(small, up, 1.0)).astype(dtype)

  value = x * choice(1 / power, power, x.dtype)
  return Extended(value.astype(dtype), choice(power, 1 / power, dtype))


def power_of_two(x: Array) -> Array:
  """Returns ``2 ** floor(log2(x))``: x with its mantissa cleared.

  The result and its inverse stay normal floats: XLA divides by a scalar by
  multiplying with its inverse, and CPUs flush subnormal inverses to zero.
  """
  exponent = jnp.where(jnp.isfinite(x) & (x > 0), _exponent(x), 0)
  info = jnp.finfo(x.dtype)
  return _power(jnp.clip(exponent, info.minexp, info.maxexp - 2), x.dtype)


def _pairwise(f: Callable[[Array], Any], x: Array, y: Array) -> tuple[Any, Any]:
  """Returns ``f(x), f(y)``; stacks scalars: on a TPU each operation is a kernel."""
  if x.ndim or y.ndim:
    return f(x), f(y)
  both = f(jnp.stack([x, y]))
  return jax.tree.map(lambda z: z[0], both), jax.tree.map(lambda z: z[1], both)


def _split(x: Array) -> tuple[Array, Array]:
  """Splits floats into mantissas, from 1 to below 4, and exponents."""
  info = jnp.finfo(x.dtype)
  exponent = jnp.clip(_exponent(x), info.minexp, info.maxexp - 2)
  return x * _power(-exponent, x.dtype), exponent


def _exponent(x: Array) -> Array:
  """Reads the exponent from the bits of a float, as i32."""
  info = jnp.finfo(x.dtype)
  carrier = jnp.dtype(f"int{info.bits}")
  bits = lax.bitcast_convert_type(lax.stop_gradient(x), carrier)
  exponent = (bits >> info.nmant) & carrier.type((1 << info.nexp) - 1)
  return exponent.astype(jnp.int32) - (info.maxexp - 1)


def _power(exponent: Array, dtype: Any) -> Array:
  """Returns ``2 ** exponent`` for exponents of normal floats."""
  info = jnp.finfo(dtype)
  carrier = jnp.dtype(f"int{info.bits}")
  bits = (exponent.astype(carrier) + carrier.type(info.maxexp - 1)) << info.nmant
  return lax.bitcast_convert_type(bits, jnp.dtype(dtype))
