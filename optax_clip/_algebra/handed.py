"""What travels beside a call: norms on their way inside, and what they are of.

A guard measures the updates, and a clip inside it would measure them again. Between
the two there may be transformations of anyone, which refuse a keyword that their user
did not pass. So norms travel in a scope that is open only while what stands inside is
called. Leaving the scope forgets them, and an inner scope shadows the outer one.

Norms belong to arrays, which are recognised by identity: a transformation between that
changes the updates makes others, and so does an entry into `jax.jit` or into a branch.
Those are measured again.

A threshold sees norms as one array. One that goes by shapes finds their layout here.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import contextvars
import dataclasses
import operator
from typing import Generic
from typing import NamedTuple
from typing import TypeVar

import jax

from optax_clip._norms.blocks import Norms
from optax_clip._norms.extended import Extended
from optax_clip._norms.layout import Layout
from optax_clip._types import Params
from optax_clip._types import Updates

Value = TypeVar("Value")
Measuring = Callable[..., Sequence[Extended]]


class Known(NamedTuple):
  """Holds norms, and the very arrays that they are of.

  Attributes:
    updates: the tree that was measured.
    params: the parameters beside it.
    norms: pairs of a measuring function and the norms that it found.
  """

  updates: Updates = None
  params: Params = None
  norms: Sequence[tuple[Measuring, Norms]] = ()

  def find(
    self, measuring: Measuring, updates: Updates, params: Params
  ) -> Norms | None:
    """Returns the norms that this function found of these very arrays, if it did."""
    for known, norms in self.norms:
      is_same = known is measuring or (
        type(known) is type(measuring) and bool(known == measuring)
      )
      if is_same and _identical(self.updates, updates):
        uses_params = getattr(measuring, "uses_params", True)
        if not uses_params or _identical(self.params, params):
          return norms
    return None

  def moved(
    self,
    new: Updates,
    params: Params,
    change: Callable[[Extended], Extended] = lambda block: block,
  ) -> "Known":
    """Carries norms over to a copy of the updates, or to the same in other units."""
    pairs = [
      (x, dataclasses.replace(norms, blocks=list(map(change, norms.blocks))))
      for x, norms in self.norms
    ]
    return Known(new, params, pairs)


class Scope(Generic[Value]):
  """Holds a value for all that is called within; an inner scope shadows the outer."""

  def __init__(self, default: Value) -> None:
    """Sets the value outside of all scopes."""
    self._held = contextvars.ContextVar("optax_clip", default=default)

  @contextlib.contextmanager
  def __call__(self, value: Value) -> Iterator[None]:
    """Hands the value to all that is called within."""
    token = self._held.set(value)
    try:
      yield
    finally:
      self._held.reset(token)

  def get(self) -> Value:
    """Returns the value of the innermost scope."""
    return self._held.get()


# The norms that are known; the layout of the norms that a threshold is asked about.
scope = Scope(Known())
layout: Scope[Layout | None] = Scope(None)


def _identical(a: Updates, b: Updates) -> bool:
  """Returns whether two trees have the same structure and the very same leaves."""
  same = all(map(operator.is_, jax.tree.leaves(a), jax.tree.leaves(b)))
  ours: object = jax.tree.structure(a)
  return same and ours == jax.tree.structure(b)
