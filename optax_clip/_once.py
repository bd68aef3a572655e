"""Norms that are already known, so that no update is read twice.

A wrapper that decides whether a step is taken measures the updates before the
transformation inside it does. Under `jit` XLA would merge two equal
measurements, but not into or out of the branch of a `lax.cond`, which is where
the second one stands. So the wrapper notes what it measured (`noting`), and
within `reusing` the same measurement *of the very same arrays* gives the noted
result. Arrays are compared by identity: what was changed in between (by a
transformation that comes first in a chain) is measured anew.

Nothing is noted beyond the two `with` blocks, which a wrapper opens and closes
while it is traced.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import contextvars
import functools
from typing import Any
from typing import NamedTuple

import jax

Array = jax.Array


class Known(NamedTuple):
  """One measurement: of which arrays, of what kind, and its result."""

  leaves: tuple[Array, ...]
  kind: tuple[Any, ...]
  norms: Any


_noted: contextvars.ContextVar[list[Known] | None] = contextvars.ContextVar(
  "noted", default=None
)
_reused: contextvars.ContextVar[tuple[Known, ...]] = contextvars.ContextVar(
  "reused", default=()
)


@contextlib.contextmanager
def noting() -> Iterator[list[Known]]:
  """Collects the measurements that are made within it; so do those around it."""
  found: list[Known] = []
  outer = _noted.get()
  token = _noted.set(found)
  try:
    yield found
  finally:
    _noted.reset(token)
    if outer is not None:
      outer.extend(found)


@contextlib.contextmanager
def reusing(known: Sequence[Known]) -> Iterator[None]:
  """Within it these measurements are not made again, nor are those around it."""
  token = _reused.set((*known, *_reused.get()))
  try:
    yield
  finally:
    _reused.reset(token)


def moved(
  known: Sequence[Known],
  old: Any,
  new: Any,
  change: Callable[[Any], Any] = lambda norms: norms,
) -> list[Known]:
  """What is known of the leaves of a tree, said of those of what was made of it.

  Args:
    known: measurements; those of other leaves (norms of parameters) are left out.
    old: the tree they are of.
    new: a tree of the same structure: a copy, or the same in other units.
    change: from norms of old leaves to those of new ones.
  """
  place = dict(zip(map(id, jax.tree.leaves(old)), jax.tree.leaves(new), strict=True))
  return [
    entry._replace(
      leaves=tuple(place[id(x)] for x in entry.leaves), norms=change(entry.norms)
    )
    for entry in known
    if all(id(x) in place for x in entry.leaves)
  ]


def measured_once(measure: Callable[..., Any]) -> Callable[..., Any]:
  """Makes ``measure(leaves, *kind)`` note its results and use noted ones."""

  @functools.wraps(measure)
  def wrapped(leaves: Sequence[Array], *kind: Any) -> Any:
    key = (measure.__name__, *map(_hashable, kind))
    norms = _looked_up(leaves, key)
    if norms is None:
      norms = measure(leaves, *kind)
    found = _noted.get()
    if found is not None:
      found.append(Known(tuple(leaves), key, norms))
    return norms

  return wrapped


def known(measure: Callable[..., Any]) -> list[Known]:
  """What may be used of a measurement here, of whatever leaves."""
  return [entry for entry in _reused.get() if entry.kind[0] == measure.__name__]


def _looked_up(leaves: Sequence[Array], kind: tuple[Any, ...]) -> Any:
  for known in _reused.get():
    same = len(known.leaves) == len(leaves) and all(
      a is b for a, b in zip(known.leaves, leaves, strict=True)
    )
    if same and known.kind == kind:
      return known.norms
  return None


def _hashable(argument: Any) -> Any:
  return tuple(argument) if isinstance(argument, list) else argument
