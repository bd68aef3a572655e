"""Floats of extended range: what norms and coefficients are.

The norm of finite float32 values may exceed the largest float32, and a coefficient
that brings it to a small limit may be below the smallest. So both are two floats,
``value * unit``, of which the unit is a power of two and usually 1. The few
operations that actions need stand here, so that an action reads as its formula.
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
  """A non-negative number, or an array of them: ``value * unit``.

  Attributes:
    value: f32, or f64. Of norms, NaN or inf when an element is NaN or inf, and only
      then.
    unit: of the same shape and dtype; a power of two, and 1 unless the number is
      near the ends of the dtype's range or beyond them. That of `beyond` stands for
      a number larger than any: what is divided by it is 0.
  """

  value: Array
  unit: Array


def is_extended(node: Any) -> bool:
  """Whether a node of a tree is one number of extended range."""
  return isinstance(node, Extended)


def of(x: Array | Extended) -> Extended:
  """A float as `Extended`; what is `Extended` stays as it is."""
  return x if isinstance(x, Extended) else Extended(x, jnp.ones_like(x))


def as_float(x: Extended) -> Array:
  """The number as one float. A finite one stays finite: it saturates."""
  most = jnp.finfo(x.value.dtype).max
  saturated = jnp.minimum(x.value * x.unit, most)
  return jnp.where(jnp.isfinite(x.value), saturated, x.value)


def plus(x: Extended, addend: Any) -> Extended:
  """``x + addend``."""
  if isinstance(addend, float) and addend == 0:
    return x
  return Extended(x.value + jnp.asarray(addend, x.value.dtype) / x.unit, x.unit)


def exceeds(x: Extended, limit: Array) -> Array:
  """``x > limit``, exactly; NaN exceeds everything."""
  return ~(x.value <= limit / x.unit)


def where(condition: Array, x: Extended, y: Any) -> Extended:
  """``x`` where the condition holds, elsewhere ``y``, a float or an array."""
  return Extended(jnp.where(condition, x.value, y), jnp.where(condition, x.unit, 1))


def quotient(numerator: Array | Extended, denominator: Array | Extended) -> Extended:
  """``numerator / denominator``, whatever their sizes; both of one dtype.

  The mantissas are divided, and the exponents subtracted. Where the result's unit is
  not 1, its value is near ``2 ** 16`` or its inverse, or beyond these for quotients
  that one unit does not hold: a value of 1 says that nothing is scaled. Below
  ``2 ** -250`` they are 0. The derivative is that of the mantissas, which squares
  nothing that is large or small.
  """
  numerator, denominator = of(numerator), of(denominator)
  info = jnp.finfo(numerator.value.dtype)
  (top, high), (bottom, low) = _pairwise(_split, numerator.value, denominator.value)
  more, less = _pairwise(_exponent, numerator.unit, denominator.unit)
  exponent = high - low + more - less
  near = jnp.clip(exponent, -16, 16)
  rest = jnp.clip(exponent - near, info.minexp, info.maxexp - 2)
  # What the unit does not hold, the value does; what neither does is 0.
  near = jnp.minimum(exponent - rest, info.maxexp - 4)
  nothing = (near < info.minexp + 2) | (denominator.unit == beyond(top.dtype))
  near = jnp.maximum(near, info.minexp + 2)
  power = functools.partial(_power, dtype=top.dtype)
  factor, unit = _pairwise(power, near, rest)
  return Extended(jnp.where(nothing, 0, top / bottom) * factor, unit)


def beyond(dtype: Any) -> float:
  """The unit of a number larger than any. No other number has it."""
  return float(2.0 ** (jnp.finfo(dtype).maxexp - 1))


def divided(x: Extended, y: Array) -> Extended:
  """``x / y`` for a norm: less arithmetic than `quotient`, and a unit that may be any.

  A value beyond ``2 ** 62`` is ordinary: where the unit is not 1, it is near 1. By 0,
  and where the quotient is not in the range, it is `beyond`; 0 divided by 0 is 0.
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
  # As much as the unit holds goes there, the rest into the value.
  factor, unit = below / above, lax.stop_gradient(x.unit)
  held = jnp.clip(factor, 1 / most / unit, most / unit)
  value = value * (factor / held)
  far = (value > most) | (~positive & (x.value > 0))
  far = far & jnp.isfinite(x.value)
  return Extended(jnp.where(far, 1, value), jnp.where(far, beyond(dtype), unit * held))


def from_float(x: Array, like: Array, dtype: Any) -> Extended:
  """A float64 in another dtype; exact but for rounding.

  Args:
    x: the float, if it is finite at most ``2 ** 250``.
    like: the same, to choose the unit by.
    dtype: float32, or float64 itself.
  """
  if dtype == x.dtype:
    return of(x)
  info = jnp.finfo(dtype)
  power = 2.0 ** (info.maxexp - 2)
  large, small = like > power, like < 1 / power

  def choice(down: float, up: float, dtype: Any) -> Array:
    return jnp.where(large, down, jnp.where(small, up, 1.0)).astype(dtype)

  value = x * choice(1 / power, power, x.dtype)
  return Extended(value.astype(dtype), choice(power, 1 / power, dtype))


def power_of_two(x: Array) -> Array:
  """2^floor(log2 x): x with its mantissa cleared.

  Held where both it and its inverse are normal floats: XLA divides by a scalar
  by multiplying with its inverse, and CPUs flush subnormal inverses to zero.
  """
  exponent = jnp.where(jnp.isfinite(x) & (x > 0), _exponent(x), 0)
  info = jnp.finfo(x.dtype)
  return _power(jnp.clip(exponent, info.minexp, info.maxexp - 2), x.dtype)


def _pairwise(f: Callable[[Array], Any], x: Array, y: Array) -> tuple[Any, Any]:
  """``f(x), f(y)``, of scalars at once: on a TPU each operation on one is a kernel."""
  if x.ndim or y.ndim:
    return f(x), f(y)
  both = f(jnp.stack([x, y]))
  return jax.tree.map(lambda z: z[0], both), jax.tree.map(lambda z: z[1], both)


def _split(x: Array) -> tuple[Array, Array]:
  """The mantissa, from 1 to below 4, and the exponent."""
  info = jnp.finfo(x.dtype)
  exponent = jnp.clip(_exponent(x), info.minexp, info.maxexp - 2)
  return x * _power(-exponent, x.dtype), exponent


def _exponent(x: Array) -> Array:
  """The exponent in the bits of a float; i32."""
  info = jnp.finfo(x.dtype)
  carrier = jnp.dtype(f"int{info.bits}")
  bits = lax.bitcast_convert_type(lax.stop_gradient(x), carrier)
  exponent = (bits >> info.nmant) & carrier.type((1 << info.nexp) - 1)
  return exponent.astype(jnp.int32) - (info.maxexp - 1)


def _power(exponent: Array, dtype: Any) -> Array:
  """``2 ** exponent``, of exponents of normal floats."""
  info = jnp.finfo(dtype)
  carrier = jnp.dtype(f"int{info.bits}")
  bits = (exponent.astype(carrier) + carrier.type(info.maxexp - 1)) << info.nmant
  return lax.bitcast_convert_type(bits, jnp.dtype(dtype))
