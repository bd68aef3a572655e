"""Which leaf, or part of a leaf, belongs to which norm."""

from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_clip import _paths

Array = jax.Array

# A tree of labels, a prefix of one, or a function from updates to one.
Labels = Any | Callable[[Any], Any]

# Path regex to axis, or a function from path and leaf to an axis or `None`.
Stacked = Mapping[str, int] | Callable[[str, Any], int | None] | None


def floats_only(tree: Any) -> Any:
  """A tree with `None` for leaves that get no updates: integers, flags and keys.

  What is no array at all stays, for an error that says so.
  """
  return _without(tree, lambda dtype: not jnp.issubdtype(dtype, jnp.inexact))


def with_values(updates: Any) -> Any:
  """Updates with `None` for leaves of float0, which JAX has for those of integers."""
  return _without(updates, lambda dtype: dtype == jax.dtypes.float0)


def restored(new: Any, updates: Any) -> Any:
  """What became of `with_values`, with the leaves of float0 where they were."""
  leaves, treedef = jax.tree.flatten(updates)
  if not any(map(_is_float0, leaves)):
    return new
  values = iter(jax.tree.leaves(new))
  return jax.tree.unflatten(
    treedef, [x if _is_float0(x) else next(values) for x in leaves]
  )


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
  """The leaves of a tree as arrays.

  Raises:
    TypeError: if a leaf is neither floating nor complex; names its path.
  """
  leaves = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    # Without values too: optimizers are initialised with shapes and dtypes.
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


def _as_array(path: Any, leaf: Any) -> Array:
  try:
    return jnp.asarray(leaf)
  except (TypeError, ValueError) as error:
    raise TypeError(
      f"updates{jax.tree_util.keystr(path)} is {leaf!r}, which is no array and cannot"
      " be clipped: leave it out with optax.masked, or with equinox.filter."
    ) from error


def same_structure(updates: Any, params: Any) -> None:
  """Raises unless two trees match."""
  if params is None:
    raise ValueError(
      "This transformation compares updates with parameters: pass them, as"
      " in tx.update(updates, state, params)."
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


def unit_axes(shape: Sequence[int], axis: Any) -> tuple[int, ...]:
  """The axes over which a unit's weights lie, by the rule of optax and NFNets.

  Args:
    shape: the shape of a leaf.
    axis: these axes; or `None`, to go by rank: all axes of scalars, vectors
      and what has one axis longer than 1; axis 0 for rank 2 and 3; all but the
      last for rank 4 (HWIO) and 5 (DHWIO).
  """
  rank = len(shape)
  if axis is not None:
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if not all(-rank <= a < rank for a in axes):
      raise ValueError(
        f"axis={axis!r} is out of range for a leaf of shape {tuple(shape)}."
      )
    distinct = {a % rank for a in axes}
    if len(distinct) < len(axes):
      raise ValueError(f"axis={axis!r} names an axis twice.")
    return tuple(sorted(distinct))
  if sum(n != 1 for n in shape) <= 1:
    return tuple(range(rank))
  if rank <= 3:
    return (0,)
  if rank <= 5:
    return tuple(range(rank - 1))
  raise ValueError(
    f"A leaf of shape {tuple(shape)} has rank {rank}; units are known up to"
    " rank 5. Pass axis= to say which axes belong to one unit."
  )


def layer_axes(tree: Any, stacked: Stacked) -> list[int | None]:
  """For each leaf of a tree the axis along which layers are stacked in it.

  Args:
    tree: parameters or updates.
    stacked: rules as of `_paths.by_path`, to axes.

  Raises:
    ValueError: if an expression is found in no path, or an axis is out of range.
  """
  leaves = jax.tree.leaves(tree)
  axes = _paths.by_path(tree, stacked, "stacked")
  for path, leaf, axis in zip(_paths.every_path(tree), leaves, axes, strict=True):
    rank = jnp.ndim(leaf)
    if axis is not None and not -rank <= axis < rank:
      raise ValueError(
        f"stacked: axis {axis} is out of range for {path}, which has the shape"
        f" {jnp.shape(leaf)}."
      )
  return [
    axis if axis is None else axis % jnp.ndim(leaf)
    for axis, leaf in zip(axes, leaves, strict=True)
  ]


def stacked_axes(shape: Sequence[int], layer: int) -> tuple[int, ...]:
  """The axes of one layer: all but the one along which they are stacked."""
  return tuple(i for i in range(len(shape)) if i != layer)


def stacked_unit_axes(
  shape: Sequence[int], axis: Any, layer: int | None
) -> tuple[int, ...]:
  """`unit_axes` of what one layer of a stack is, as axes of the stack."""
  if layer is None:
    return unit_axes(shape, axis)
  rest = stacked_axes(shape, layer)
  return tuple(rest[i] for i in unit_axes([shape[i] for i in rest], axis))


def checked_stacked(stacked: Any) -> None:
  """Raises, at construction, for what can never be layer axes."""
  if stacked is None or callable(stacked):
    return
  if not isinstance(stacked, Mapping):
    raise TypeError(
      "stacked must map path regexes to axes, as in {'blocks/': 0}, or be a"
      f" function from path and leaf to an axis or None, got {stacked!r}."
    )
  _paths.checked_patterns(stacked, "stacked")
  for pattern, axis in stacked.items():
    if not isinstance(axis, int) or isinstance(axis, bool):
      raise TypeError(f"stacked[{pattern!r}] must be an integer, got {axis!r}.")


def checked_labels(labels: Labels, names: Sequence[Hashable]) -> None:
  """Raises, at construction, for labels that can never work."""
  if callable(labels):
    return
  found = _hashable(labels, "labels")
  if not found:
    raise ValueError(
      f"labels={labels!r} holds no label. Pass a tree (or a prefix of one)"
      " of labels, or a function from updates to one."
    )
  _all_known(found, names)


def label_ids(labels: Labels, names: Sequence[Hashable], tree: Any) -> list[int]:
  """For each leaf of `tree`, the index of its label in `names`."""
  found = _each_leaf(labels, tree, "labels")
  _hashable(found, "labels")
  _all_known(set(found), names)
  index = {name: i for i, name in enumerate(names)}
  return [index[label] for label in found]


def counted_leaves(counted: Any, tree: Any) -> list[bool]:
  """For each leaf of `tree` whether its elements count in the norm of its group."""
  if counted is None:
    return [True] * len(jax.tree.leaves(tree))
  found = _each_leaf(counted, tree, "counted")
  for value in found:
    if not isinstance(value, bool):
      raise TypeError(f"counted must hold True and False, got {value!r}.")
  return found


def _each_leaf(given: Any, tree: Any, what: str) -> list[Any]:
  """What a tree, a prefix of one, or a function to either says of each leaf."""
  resolved = given(tree) if callable(given) else given
  try:
    return jax.tree.leaves(jax.tree.broadcast(resolved, tree))
  except ValueError as error:
    raise ValueError(
      f"{what} must be a tree prefix of the updates, got"
      f" {jax.tree.structure(resolved)} for updates of structure"
      f" {jax.tree.structure(tree)}."
    ) from error


def _hashable(labels: Any, what: str) -> set[Any]:
  for path, label in jax.tree_util.tree_leaves_with_path(labels):
    if not isinstance(label, Hashable):
      raise TypeError(
        f"{what}{jax.tree_util.keystr(path)} must be a string or another hashable"
        f" label, got {label!r}."
      )
  return set(jax.tree.leaves(labels))


def _all_known(found: set[Any], names: Sequence[Hashable]) -> None:
  unknown = sorted(map(repr, found - set(names)))
  if unknown:
    raise ValueError(
      f"max_norms has no limit for the labels {', '.join(unknown)}; it has"
      f" {', '.join(sorted(map(repr, names)))}. Use float('inf') for a group"
      " that is never clipped."
    )


def named_limits(max_norms: Mapping[Hashable, Any]) -> list[Hashable]:
  """The names of the groups, in a stable order."""
  if not isinstance(max_norms, Mapping):
    raise TypeError(
      "max_norms must map labels to limits, as in {'encoder': 1.0, 'head': 0.1}, got"
      f" {max_norms!r}."
    )
  for label in max_norms:
    if not jax.tree_util.all_leaves([label]):
      raise TypeError(
        f"The labels of max_norms must be strings, or other leaves of a tree, got the"
        f" {type(label).__name__} {label!r}: in a tree of labels it would be several."
      )
  if not max_norms:
    raise ValueError(
      "max_norms is empty: pass one limit for each label, as in"
      " {'encoder': 1.0, 'head': 0.1}."
    )
  return sorted(max_norms, key=repr)
