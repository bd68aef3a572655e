"""Reads a state of an optimizer by the paths of its leaves.

A checkpoint that was restored without a target has no types: its NamedTuples are
dictionaries, its tuples lists, or dictionaries of digits. A path in any of them, such
as ``.inner[1][0].mu['w']``, is cut in two::

    .inner [1] [0]      where: chains and wrappers, which a new chain may change
    .mu ['w']           what: a value in the state of one transformation

The values of one place are a part.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from optax_clip._types import OptState
from optax_clip._types import PyTree

Names = tuple[str, ...]

# Fields that hold the state of an inner transformation.
_AROUND = frozenset(
  {
    *("inner", "inner_state", "inner_opt_state", "opt_state", "seen", "clip"),
    *("base_optimizer_state", "fast_state"),
  }
)
# Those of several: which one, says the field, or the label that follows.
_SEVERAL = {"adv_state": 1, "inner_states": 2}
# Fields of `optax.inject_hyperparams`: each value, and each schedule, is a part.
_INJECTED = {"hyperparams": "hyperparameter", "hyperparams_states": "schedule"}
# Fields of our states that are parts of their own.
_MEMORIES = ("threshold", "memory")
_RECORD = "record"
# The dtypes of counters and flags.
_COUNTING = (jnp.integer, jnp.bool_)
# Flax NNX stores an array as the value of a variable.
_VALUES = ("value", "raw_value")


@dataclasses.dataclass
class Part:
  """Holds the values that one transformation keeps in one place.

  Attributes:
    where: the names on the path to it.
    scope: those that it cannot leave: labels, and names in a chain.
    kind: "state", "threshold", "memory", "record", "hyperparameter", "schedule", or
      "injected" for what else `optax.inject_hyperparams` keeps.
    name: of the record or the hyperparameter, if it is one.
    path: to it, as it is printed.
    values: for the names that follow, the number of the leaf.
  """

  where: Names
  scope: Names
  kind: str
  name: str
  path: str
  values: dict[Names, int]

  def named(self) -> dict[Names, int]:
    """Returns the values, without a name that a user may have changed."""
    # Some memories stand under the name of their transformation.
    is_named = self.kind in _MEMORIES and all(len(x) > 1 for x in self.values)
    if is_named and len({x[0] for x in self.values}) == 1:
      return {names[1:]: i for names, i in self.values.items()}
    return self.values

  def key(self) -> Any:
    """Returns the key by which parts of two states are matched."""
    return self.scope, self.kind, self.name, tuple(sorted(self.named()))

  def fields(self) -> list[str]:
    """Returns the first of the names."""
    return list(dict.fromkeys(names[0] if names else "" for names in self.values))

  def split(self, leaves: frozenset[int]) -> tuple["Part", "Part"]:
    """Splits the part: without some leaves, and with these alone."""
    without = {names: i for names, i in self.values.items() if i not in leaves}
    of_these = {names: i for names, i in self.values.items() if i in leaves}
    replaced = dataclasses.replace
    return replaced(self, values=without), replaced(self, values=of_these)


class State:
  """Holds the leaves of a state, and its parts in their order."""

  def __init__(self, state: OptState, chained: frozenset[str]) -> None:
    """Cuts each path, see the module's docstring; `chained`: see `chained_names`."""
    pairs = jax.tree_util.tree_leaves_with_path(state)
    self.paths = [path for path, _ in pairs]
    self.leaves = [leaf for _, leaf in pairs]
    self.names = [names_of(path) for path in self.paths]
    self.state = state
    found: dict[Names, Part] = {}
    for i, names in enumerate(self.names):
      if not math.prod(jnp.shape(self.leaves[i])):
        continue  # It holds nothing: it is lost by nobody, and made anew.
      depth, scope, kind, name = _cut(names, chained)
      where, path = names[:depth], jax.tree_util.keystr(self.paths[i][:depth])
      part = Part(where, scope, kind, name, path, {})
      found.setdefault(where, part).values[names[depth:]] = i
    for part in list(found.values()):
      if part.kind == "hyperparameter" and part.where[:-2] in found:
        found[part.where[:-2]].kind = "injected"
    self.parts = sorted(found.values(), key=lambda part: [*map(_order, part.where)])
    self.wrappers = {
      names[:i]
      for names in self.names
      for i, name in enumerate(names)
      if name in _AROUND or name in _SEVERAL
    }

  def only_counts(self, part: Part) -> bool:
    """Returns whether a part holds only the counters of a wrapper."""
    where = part.where[:-1] if part.kind == "memory" else part.where
    leaves = [self.leaves[i] for i in part.values.values()]
    return where in self.wrappers and all(
      not jnp.shape(x) and any(jnp.issubdtype(_dtype(x), t) for t in _COUNTING)
      for x in leaves
    )

  def places(self, part: Part) -> list[str]:
    """Returns the paths that stand for a part alone, as they are printed."""
    if not any(
      part.where == other.where[: len(part.where)]
      for other in self.parts
      if other is not part
    ):
      return [part.path]
    depth = len(part.where) + 1
    paths = (self.paths[i][:depth] for i in part.values.values())
    return list(dict.fromkeys(map(jax.tree_util.keystr, paths)))

  def above(self, part: Part) -> str:
    """Returns the path that a part shares with those beside it, as it is printed."""
    first = next(iter(part.values.values()))
    return jax.tree_util.keystr(self.paths[first][: len(part.where) - 1])

  def below(self, path: str) -> frozenset[int]:
    """Returns the leaves that a printed path stands for."""
    paths = map(jax.tree_util.keystr, self.paths)
    return frozenset(
      i
      for i, x in enumerate(paths)
      if x.startswith(path) and x[len(path) :][:1] in ("", ".", "[")
    )

  def text(self, i: int) -> str:
    """Writes a leaf by its path and type."""
    return f"{jax.tree_util.keystr(self.paths[i])} is {type_of(self.leaves[i])}"

  def content(self, part: Part) -> str:
    """Writes the first of a part's names; of one array its value, or else its type."""
    names = ", ".join(filter(None, part.fields()))
    if names or len(part.values) != 1:
      return names
    (leaf,) = (self.leaves[i] for i in part.values.values())
    return f"{np.asarray(leaf).item():.6g}" if _is_known(leaf) else type_of(leaf)


def _cut(names: Names, chained: frozenset[str]) -> tuple[int, Names, str, str]:
  """Counts the names that lead to a part; also finds its scope, kind and name."""
  i, last = 0, len(names) - 1
  scope: list[str] = []
  if not names:
    return 0, (), "state", ""  # The whole state is one array.
  while i < last:
    several = 1 if names[i] in chained else _SEVERAL.get(names[i], 0)
    if several and i + several <= last:
      scope += names[i : i + several]
      i += several
    elif names[i].isdigit() or names[i] in _AROUND:
      i += 1
    else:
      break
  if i == last and names[i].isdigit():
    return i + 1, tuple(scope), "state", ""
  if names[i] == _RECORD and i + 1 < last:
    return i + 2, tuple(scope), "record", names[i + 1]
  if names[i] in _INJECTED and i < last:
    return i + 2, tuple(scope), _INJECTED[names[i]], names[i + 1]
  kind = "state"
  if names[i] in _MEMORIES and i < last:
    kind = names[i]
    i += 1
    # A threshold within another one.
    while names[i] == "threshold" and i < last:
      i += 1
  return i, tuple(scope), kind, ""


def chained_names(shapes: PyTree) -> frozenset[str]:
  """Finds the names in states of `optax.named_chain`, above all fields of states."""
  found = set()
  for path, _ in jax.tree_util.tree_leaves_with_path(shapes):
    above = iter(path[:-1])
    for key in above:
      name = _name(key)
      if name == "inner_states":
        next(above)
      elif name in _AROUND or name.isdigit():
        continue
      elif isinstance(key, jax.tree_util.DictKey):
        found.add(name)
      else:
        break
  return frozenset(found)


def _name(key: Any) -> str:
  for attribute in ("key", "idx", "name"):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)


def names_of(path: Any) -> Names:
  """Returns the keys of a path as text, in whatever container they stand."""
  names = tuple(map(_name, path))
  return names[:-1] if names and names[-1] in _VALUES else names


def _order(name: str) -> tuple[int, int, str]:
  """Sorts numbers as numbers, whether they were written as text or not."""
  return (0, int(name), "") if name.isdigit() else (1, 0, name)


def _dtype(x: ArrayLike) -> Any:
  return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)


def _is_known(x: ArrayLike) -> bool:
  """Returns whether it is a number whose value can be read here."""
  if isinstance(x, (jax.core.Tracer, jax.ShapeDtypeStruct)) or jnp.shape(x):
    return False
  return not isinstance(x, jax.Array) or x.is_fully_replicated


def type_of(x: ArrayLike) -> str:
  """Writes a dtype and a shape, as ``float32[3]``."""
  return f"{_dtype(x)}{list(jnp.shape(x))}"
