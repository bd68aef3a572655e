"""How a leaf keeps its weak type, and a gate the derivatives of leaves finite."""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def keep_weak_type(old: Array, new: Array) -> Array:
  """Makes the new array weakly typed if the old one is."""
  # A scalar that became strongly typed would make `jit` compile the step twice.
  return old.at[...].set(new) if jax.typeof(old).weak_type else new


def gate(tree: Any, take: Array) -> Any:
  """Returns the arrays, but lets derivatives through only if the condition holds.

  A selection alone multiplies the derivatives of dropped values by 0, which keeps NaN.
  """
  leaves, treedef = jax.tree.flatten(tree)
  gated = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves]
  # At once: JAX traces a function with a derivative of its own anew at each call.
  passed = iter(_passed([x for x, own in zip(leaves, gated, strict=True) if own], take))
  rows = zip(leaves, gated, strict=True)
  return jax.tree.unflatten(treedef, [next(passed) if own else x for x, own in rows])


@jax.custom_jvp
def _passed(leaves: list[Array], take: Array) -> list[Array]:
  del take
  return leaves


@_passed.defjvp
def _passed_jvp(
  primals: tuple[list[Array], Array], tangents: tuple[list[Array], Any]
) -> tuple[list[Array], list[Array]]:
  leaves, take = primals
  dots = [jnp.where(take, dot, jnp.zeros_like(dot)) for dot in tangents[0]]
  return _passed(leaves, take), dots
