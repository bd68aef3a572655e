"""Which leaves of a tree are clipped: floats, and no integers, flags or keys."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_clip._types import Params
from optax_clip._types import Updates

Array = jax.Array


def floats_only(tree: Any) -> Any:
  """Replaces leaves that get no updates by `None`: integers, flags and keys.

  A leaf that is not an array stays, for an error that names it.
  """
  return _without(tree, lambda dtype: not jnp.issubdtype(dtype, jnp.inexact))


def with_values(updates: Updates) -> Any:
  """Replaces float0 leaves, which JAX has for those of integers, by `None`."""
  return _without(updates, lambda dtype: dtype == jax.dtypes.float0)


def restored(new: Any, updates: Updates) -> Any:
  """Puts float0 leaves back where `with_values` replaced them."""
  leaves, treedef = jax.tree.flatten(updates)
  if not any(map(_is_float0, leaves)):
    return new
  values = iter(jax.tree.leaves(new))
  return jax.tree.unflatten(
    treedef, [x if _is_float0(x) else next(values) for x in leaves]
  )


def applied(params: Params, updates: Updates) -> Any:
  """Adds updates to parameters; leaves without one, float0 or `None`, stay."""

  def new(param: Any, update: Any) -> Any:
    if update is None or _is_float0(update):
      return param
    return optax.apply_updates(param, update)

  return jax.tree.map(new, params, updates, is_leaf=lambda node: node is None)


def _is_float0(leaf: Any) -> bool:
  return bool(getattr(leaf, "dtype", None) == jax.dtypes.float0)


def _without(tree: Any, leaves_out: Callable[[Any], bool]) -> Any:
  def goes(leaf: Any) -> bool:
    if isinstance(leaf, (bool, int)):
      return leaves_out(jnp.result_type(leaf))
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and leaves_out(dtype)

  leaves, treedef = jax.tree.flatten(tree)
  marks = [goes(x) for x in leaves]
  if not any(marks):
    return tree
  kept = [None if gone else x for x, gone in zip(leaves, marks, strict=True)]
  return jax.tree.unflatten(treedef, kept)


def floating_leaves(tree: Any) -> list[Array]:
  """Returns the leaves of a tree as arrays.

  Raises:
    TypeError: if a leaf is neither floating nor complex; names its path.
  """
  leaves = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    # Optimizers may be initialised with a `ShapeDtypeStruct`, too.
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
      leaf = _as_array(path, leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
      raise TypeError(
        f"updates{jax.tree_util.keystr(path)} has dtype {leaf.dtype}, which"
        " cannot be clipped. Only floating and complex leaves can: leave the"
        " others out with optax.masked."
      )
    leaves.append(leaf)
  return leaves


def types(tree: Any) -> list[Any]:
  """Returns the types of the leaves of a tree, which say all that layouts go by."""
  return [jax.typeof(x) for x in floating_leaves(tree)]


def _as_array(path: Any, leaf: Any) -> Array:
  try:
    return jnp.asarray(leaf)
  except (TypeError, ValueError) as error:
    raise TypeError(
      f"updates{jax.tree_util.keystr(path)} is {leaf!r}, which is not an array and"
      " cannot be clipped: leave it out with optax.masked, or with equinox.filter."
    ) from error


def same_structure(updates: Updates, params: Params) -> None:
  """Raises unless updates and parameters match in structure and shapes."""
  if params is None:
    raise ValueError(
      "params is None, and this transformation compares updates with parameters, as"
      " adaptive_grad_clip does: pass them, as in tx.update(updates, state, params)."
    )
  ours: Any = jax.tree.structure(updates)
  theirs: Any = jax.tree.structure(params)
  if ours != theirs:
    raise ValueError(
      f"updates and params must have the same tree structure, got {ours} and {theirs}."
    )
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(updates),
    jax.tree.leaves(params),
    strict=True,
  )
  for (path, update), param in pairs:
    if jnp.shape(update) != jnp.shape(param):
      raise ValueError(
        "updates and params must have the same shapes, got"
        f" {jnp.shape(update)} and {jnp.shape(param)} at"
        f" updates{jax.tree_util.keystr(path)}."
      )
