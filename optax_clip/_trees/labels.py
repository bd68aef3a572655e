"""Which group a leaf belongs to, by its path, and whether it counts in its norm."""

from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax

from optax_clip._trees import functions as _functions
from optax_clip._trees import paths as _paths
from optax_clip._types import PyTree

# A tree of labels, a prefix of one, or a function from updates to one.
Labels = Any | Callable[[Any], Any]


def labels_by_path(rules: Mapping[str, Hashable]) -> Callable[[Any], Any]:
  """Labels leaves by regular expressions of their paths.

  It serves `clip_by_group_norm`, `optax.multi_transform` and `optax.masked`.

  Args:
    rules: a mapping from regular expressions to labels. The first expression that is
      found in a path, such as ``blocks/attention/kernel``, counts, so that a last
      ``""`` labels all other leaves. In Flax NNX, paths are those of
      ``nnx.state(model, nnx.Param)``. Fields of boxes that hold one array may stand
      in a path or not: ``kernel$`` and ``kernel/value$`` both find a kernel of Flax.

  Returns:
    A function from a tree of parameters or updates to a tree of labels.

  Raises:
    ValueError: if `rules` is empty or a key is not a regular expression; by the
      function, if one is found in no path, or none is found in a path. Lists the paths.

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> labels = optax_clip.labels_by_path({"bias|scale": "small", "": "rest"})
    >>> print(labels({"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}))
    {'dense': {'bias': 'small', 'kernel': 'rest'}}
  """
  if not isinstance(rules, Mapping) or not rules:
    raise ValueError(
      "rules must map regular expressions of paths to labels, as in {'^head/': 'head',"
      f" '': 'body'}}, got {rules!r}."
    )
  _paths.checked_patterns(rules, "rules")

  def labels(tree: Any) -> Any:
    _functions.not_a_count(tree, "labels_by_path", "labels")
    found = _paths.by_path(
      tree, {pattern: (rules[pattern],) for pattern in rules}, "rules"
    )
    missing = [
      p
      for p, label in zip(_paths.every_name(tree), found, strict=True)
      if label is None
    ]
    if missing:
      raise ValueError(
        f"rules: no regular expression is found in {', '.join(missing)}. Add one, or ''"
        " as the last, which is found in all paths."
      )
    return jax.tree.unflatten(jax.tree.structure(tree), [label for (label,) in found])

  return labels


def checked_labels(labels: Labels, names: Sequence[Hashable]) -> None:
  """Raises, at construction, for labels that can never work."""
  if _functions.is_function(labels):
    return
  found = _hashable(labels, "labels")
  if not found:
    raise ValueError(
      f"labels={labels!r} holds no label. Pass a tree (or a prefix of one)"
      " of labels, or a function from updates to one."
    )
  _all_known(found, names)


def label_ids(labels: Labels, names: Sequence[Hashable], tree: PyTree) -> list[int]:
  """Returns for each leaf of `tree` the index of its label in `names`."""
  found = each_leaf(labels, tree, "labels")
  _hashable(found, "labels")
  _all_known(set(found), names)
  index = {name: i for i, name in enumerate(names)}
  return [index[label] for label in found]


def flags(tree: PyTree, **values: PyTree) -> list[bool]:
  """Returns for each leaf the flag of the one named value; True if that is `None`."""
  ((what, given),) = values.items()
  if given is None:
    return [True] * len(jax.tree.leaves(tree))
  found = each_leaf(given, tree, what)
  for value in found:
    if not isinstance(value, bool):
      raise TypeError(f"{what} must hold True and False, got {value!r}.")
  return found


def each_leaf(given: PyTree, tree: PyTree, what: str) -> list[Any]:
  """Broadcasts a tree, a prefix of one, or the result of a function, to the leaves."""
  if not jax.tree.leaves(tree):
    return []  # optax.tree_map_params initialises with a stand-in for all parameters.
  return broadcast(given(tree) if _functions.is_function(given) else given, tree, what)


def broadcast(prefix: PyTree, tree: PyTree, what: str) -> list[Any]:
  """Broadcasts a tree, or a prefix of one, to the leaves."""
  try:
    return jax.tree.leaves(jax.tree.broadcast(prefix, tree))
  except ValueError as error:
    raise ValueError(
      f"{what} must be a tree prefix of the updates, got"
      f" {jax.tree.structure(prefix)} for updates of structure"
      f" {jax.tree.structure(tree)}."
    ) from error


def _hashable(labels: PyTree, what: str) -> set[Any]:
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
  """Checks the limits of groups; returns their names in a stable order."""
  if not isinstance(max_norms, Mapping):
    raise TypeError(
      "max_norms must map labels to limits, as in {'encoder': 1.0, 'head': 0.1}, got"
      f" {max_norms!r}."
    )
  for label in max_norms:
    if not jax.tree_util.all_leaves([label]):
      raise TypeError(
        f"The labels of max_norms must be strings, or other leaves of a tree, got the"
        f" {type(label).__name__} {label!r}: a tree of labels takes it for several."
      )
  if not max_norms:
    raise ValueError(
      "max_norms is empty: pass one limit for each label, as in"
      " {'encoder': 1.0, 'head': 0.1}."
    )
  return sorted(max_norms, key=repr)
