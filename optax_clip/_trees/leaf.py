"""How a leaf keeps its weak type, and a gate its derivatives finite."""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def keep_weak_type(old: Array, new: Array) -> Array:
  """Makes the new array weakly typed if the old one is."""
  # A scalar that became strongly typed would make `jit` compile the step twice.
  return old.at[...].set(new) if jax.typeof(old).weak_type else new


def gate(x: Any, take: Array) -> Any:
  """Returns `x`, but lets derivatives through only if the condition holds.

  A selection alone multiplies the derivatives of dropped values by 0, which keeps NaN.
  """
  if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
    return x
  return _passed(x, take)


@jax.custom_jvp
def _passed(x: Array, take: Array) -> Array:
  del take
  return x


@_passed.defjvp
def _passed_jvp(
  primals: tuple[Array, Array], tangents: tuple[Array, Any]
) -> tuple[Array, Array]:
  x, take = primals
  dot = tangents[0]
  return _passed(x, take), jnp.where(take, dot, jnp.zeros_like(dot))
