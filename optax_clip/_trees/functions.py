"""Which arguments are functions, and which are trees that can be called."""

import jax
import jax.numpy as jnp

from optax_clip._types import PyTree


def is_function(given: object) -> bool:
  """Returns whether what may be a function or a tree is to be called.

  A module of Equinox, haliax or penzai can be called, and is a tree. So a tree with
  leaves is a tree, unless it says which function it wraps or binds to its leaves:
  `jax.tree_util.Partial`, and of Equinox a method or what `equinox.filter_jit` returns.
  """
  if not callable(given):
    return False
  if isinstance(given, jax.tree_util.Partial):
    return True
  if hasattr(given, "__wrapped__") or hasattr(given, "__func__"):
    return True
  return all(map(callable, jax.tree.leaves(given)))


def is_node(given: object) -> bool:
  """Returns whether a value is a tree of a class of someone's own, to be walked."""
  builtin = (type(None), tuple, list, dict)
  return not (
    isinstance(given, builtin)
    or is_function(given)
    or jax.tree_util.all_leaves([given])
  )


def not_a_count(tree: PyTree, name: str, argument: str) -> None:
  """Raises if a function of trees is called as a schedule, with a step.

  Args:
    tree: what the function got.
    name: of what made the function.
    argument: which argument it is meant for.
  """
  dtype = getattr(tree, "dtype", None)
  if dtype is not None and jnp.ndim(tree) == 0 and jnp.issubdtype(dtype, jnp.integer):
    raise TypeError(
      f"{name} made a function of trees, and it was called with a step:"
      " optax.inject_hyperparams takes every function for a schedule. Pass"
      f" static_args=({argument!r},), or the names of all arguments that are"
      " functions or structure."
    )
