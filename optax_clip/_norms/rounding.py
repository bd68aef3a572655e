"""Casts that round toward zero, so that no norm grows by them."""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

Array = jax.Array


def cast(x: Array, dtype: Any, *, toward_zero: bool) -> Array:
  """Casts `x` to a dtype of at most its precision, to nearest or toward zero."""
  if not toward_zero:
    return x.astype(dtype)
  if shares_range(dtype, x.dtype):
    # No norm has counted subnormals, and no relative margin covers their errors.
    x = jnp.where(jnp.abs(x) < jnp.finfo(x.dtype).tiny, jnp.zeros_like(x), x)
  if dtype == x.dtype:
    return x  # The product rounded it, which the margin of `strict` covers.
  return _toward_zero(dtype, x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _toward_zero(dtype: Any, x: Array) -> Array:
  """Casts `x`, rounding toward zero; the derivative is that of ``x.astype(dtype)``."""
  result = x.astype(dtype)
  # The next value toward zero has the bit pattern that is smaller by one.
  carrier = jnp.dtype(f"uint{jnp.finfo(dtype).bits}")
  below = lax.bitcast_convert_type(
    lax.bitcast_convert_type(result, carrier) - carrier.type(1), dtype
  )
  away = jnp.abs(result).astype(x.dtype) > jnp.abs(x)
  return jnp.where(away, below, result)


@_toward_zero.defjvp
def _toward_zero_jvp(
  dtype: Any, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
  return _toward_zero(dtype, *primals), tangents[0].astype(dtype)


@jax.custom_jvp
def next_below(limit: Array) -> Array:
  """Returns the next float toward zero; its derivative is 1.

  The limit was rounded to the nearest float, which may lie above the exact one.
  """
  below = jnp.nextafter(limit, jnp.zeros_like(limit))
  return jnp.where(jnp.isfinite(limit), below, limit)


@next_below.defjvp
def _next_below_jvp(
  primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
  return next_below(*primals), tangents[0]


def shares_range(dtype: Any, wide: Any) -> bool:
  """Returns whether a dtype's subnormals are subnormal in the wide one as well."""
  return bool(jnp.finfo(dtype).tiny <= jnp.finfo(wide).tiny)
