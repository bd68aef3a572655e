"""Which rule applies to a leaf, by its path or the names of its axes."""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_clip._trees import functions as _functions
from optax_clip._types import PyTree

# What holds one array calls it so: Flax's variables and boxes, penzai's named arrays.
_FIELDS = ("value", "raw_value", "data_array")


def is_by_path(rules: PyTree) -> bool:
  """Returns whether an argument differs by path: it is not one value for all."""
  return (
    isinstance(rules, Mapping)
    or _functions.is_function(rules)
    or _functions.is_node(rules)
  )


def by_path(tree: Any, rules: PyTree, what: str) -> list[Any]:
  """Returns for each leaf the value of the first rule found in its path, or `None`.

  Args:
    tree: parameters or updates.
    rules: a mapping from regular expressions to values. The first expression that is
      found in a path, such as ``blocks/attention/kernel``, counts; whether the path
      names the field of a box, as ``kernel/value`` in Flax, or not, see `every_name`.
      Or a function from that name and a leaf to a value; a tree like `tree` of a class
      of someone's own, with a value for each leaf; or `None`, for no rules.
    what: the name of the argument, for errors.

  Raises:
    ValueError: if an expression is found in no path; lists the paths.
  """
  names = every_name(tree)
  if rules is None:
    return [None] * len(names)
  if _functions.is_function(rules):
    leaves = jax.tree.leaves(tree)
    return [rules(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
  if not isinstance(rules, Mapping):
    return _each_leafs(tree, rules, what)
  spellings = list(zip(names, every_path(tree), strict=True))

  def is_found(pattern: str, paths: tuple[str, str]) -> bool:
    return any(re.search(pattern, path) for path in paths)

  for pattern in rules:
    if names and not any(is_found(pattern, paths) for paths in spellings):
      raise ValueError(
        f"{what}: {pattern!r} is found in no path. The paths are {', '.join(names)}."
      )
  return [
    next((value for pattern, value in rules.items() if is_found(pattern, paths)), None)
    for paths in spellings
  ]


def _each_leafs(tree: Any, rules: PyTree, what: str) -> list[Any]:
  """Returns what stands in a tree of rules where another tree has its leaves."""
  treedef: Any = jax.tree.structure(tree)
  try:
    return list(treedef.flatten_up_to(rules))
  except ValueError as error:
    raise ValueError(
      f"{what} must map regular expressions of paths to values, or be a function from"
      f" path and leaf, or a tree like the updates, got {jax.tree.structure(rules)} for"
      f" updates of structure {treedef}."
    ) from error


def unit_axes_by_name(
  names: Any, outputs: Collection[str]
) -> Callable[[str, Any], tuple[int, ...] | None]:
  """Finds the axes of units by the names that a model gives its axes.

  A unit is what feeds one output: its weights lie along all axes but those that count
  outputs. Ranks can only guess which axes these are; names say it.

  Args:
    names: a tree of `PartitionSpec` that hold names of axes, logical or of a mesh, as
      ``nnx.get_partition_spec(nnx.state(model, nnx.Param))`` and Linen's
      ``nn.get_partition_spec(variables)`` return it.
    outputs: the names of axes that count outputs, as ``{"mlp", "heads"}``.

  Returns:
    A function for the ``axis`` of `adaptive_grad_clip` and `measures.unit_norm`. Leaves
    without names, and biases and gains, go by rank.

  Raises:
    ValueError: if a name of `outputs` is nowhere in `names`.

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> from jax.sharding import PartitionSpec as P
    >>> names = {"embedding": P("vocab", "embed"), "up": P("embed", "mlp")}
    >>> axis = optax_clip.unit_axes_by_name(names, outputs={"vocab", "mlp"})
    >>> print(axis("embedding", jnp.ones((9, 4))), axis("up", jnp.ones((4, 8))))
    (1,) (0,)
    >>> tx = optax_clip.adaptive_grad_clip(0.01, axis=axis)
  """
  if isinstance(outputs, str):
    raise TypeError(f"outputs must be a collection of names, got {outputs!r}.")

  specs = jax.tree.leaves(names, is_leaf=is_spec)
  found = {
    name: tuple(spec)
    for name, spec in zip(every_name(names, is_spec), specs, strict=True)
    if is_spec(spec)
  }
  known = {name for spec in found.values() for entry in spec for name in _each(entry)}
  if missing := sorted(set(outputs) - known):
    raise ValueError(
      f"outputs: {', '.join(missing)} is the name of no axis. The names are"
      f" {', '.join(sorted(known))}."
    )

  def axis(path: str, leaf: Any = None) -> tuple[int, ...] | None:
    _functions.not_a_count(path, "unit_axes_by_name", "axis")
    spec = found.get(path, ())
    rank = jnp.ndim(leaf)
    if rank <= 1 or not any(map(_each, spec)):
      return None
    entries = (*spec, *[None] * (rank - len(spec)))
    return tuple(i for i in range(rank) if not {*_each(entries[i])} & {*outputs})

  return axis


def is_spec(node: object) -> bool:
  """Returns whether a node of a tree is a `PartitionSpec`, which may be a tuple."""
  return isinstance(node, jax.sharding.PartitionSpec)


def checked_patterns(rules: PyTree, what: str) -> None:
  """Raises, at construction, if a key of the mapping is not a regular expression."""
  for pattern in rules:
    try:
      re.compile(pattern)
    except (re.error, TypeError) as error:
      raise ValueError(
        f"{what}: {pattern!r} is not a regular expression: {error}."
      ) from error


def every_path(tree: Any) -> list[str]:
  """Returns the path of each leaf, as ``blocks/attention/kernel``."""
  return [_key(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def every_name(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
  """Returns what people call each leaf: its path without fields of boxes.

  A box holds nothing but one array: a variable of Flax, a named array of haliax
  (``/0``) or penzai (``/value/data_array``). Names are right for any tree: where a
  node has a second child, also if that is `None`, it is not a box.
  """
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf)]
  if not any(path and _is_field(path[-1]) for path in paths):
    return list(map(_key, paths))

  def is_child(node: Any) -> bool:
    absent = node is None or isinstance(node, optax.MaskedNode)
    return absent or (is_leaf is not None and is_leaf(node))

  children: dict[str, set[str]] = {}
  for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_child):
    for depth, key in enumerate(path):
      children.setdefault(_exact(path[:depth]), set()).add(str(key))

  def named(path: Any) -> str:
    depth = len(path)
    # The whole tree may be a box.
    while depth > 1 and _is_field(path[depth - 1]):
      if len(children[_exact(path[: depth - 1])]) > 1:
        break
      depth -= 1
    return _key(path[:depth])

  return list(map(named, paths))


def _is_field(key: Any) -> bool:
  """Returns whether a key may be the field of a box."""
  if isinstance(key, jax.tree_util.FlattenedIndexKey):
    return True  # The class does not name its fields.
  return isinstance(key, jax.tree_util.GetAttrKey) and key.name in _FIELDS


def _exact(path: Any) -> str:
  return jax.tree_util.keystr(path)


def _each(entry: Any) -> tuple[str, ...]:
  """Returns the names in one entry of a `PartitionSpec`."""
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _key(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
