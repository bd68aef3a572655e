"""Norms on their way from whoever measured updates to what stands inside.

A guard measures the updates, and a clip inside it would measure them again. Between
the two there may be transformations of anyone, which refuse a keyword that their user
did not pass. So norms travel beside the call, in a scope that is open only while what
stands inside is called. Leaving the scope forgets them, and an inner scope shadows the
outer one.

Norms belong to arrays, which are recognised by identity: a transformation between that
changes the updates makes others, and so does an entry into `jax.jit` or into a branch.
Those are measured again.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import contextvars
import operator
from typing import Any
from typing import NamedTuple

import jax

from optax_clip._norms.extended import Extended
from optax_clip._types import Params
from optax_clip._types import Updates

Blocks = list[Extended]


class Known(NamedTuple):
  """Holds norms, and the very arrays that they are of.

  Attributes:
    updates: the tree that was measured.
    params: the parameters beside it.
    norms: pairs of what measured and what it found.
  """

  updates: Updates = None
  params: Params = None
  norms: Sequence[tuple[Callable[..., Any], Blocks]] = ()

  def find(
    self, measuring: Callable[..., Any], updates: Updates, params: Params
  ) -> Blocks | None:
    """Returns what was measured by this function of these very arrays, if it was."""
    for known, blocks in self.norms:
      is_same = known is measuring or (
        type(known) is type(measuring) and bool(known == measuring)
      )
      if is_same and _identical(self.updates, updates):
        uses_params = getattr(measuring, "uses_params", True)
        if not uses_params or _identical(self.params, params):
          return blocks
    return None

  def moved(
    self,
    new: Updates,
    params: Params,
    change: Callable[[Blocks], Blocks] = lambda blocks: blocks,
  ) -> "Known":
    """Carries norms over to a copy of the updates, or to the same in other units."""
    return Known(new, params, [(x, change(blocks)) for x, blocks in self.norms])


_NOTHING = Known()
_scope = contextvars.ContextVar("optax_clip.handed", default=_NOTHING)


@contextlib.contextmanager
def scope(known: Known) -> Iterator[None]:
  """Hands norms to all that is called within."""
  token = _scope.set(known)
  try:
    yield
  finally:
    _scope.reset(token)


def at_hand() -> Known:
  """Returns what the innermost scope holds; outside of all, nothing."""
  return _scope.get()


def _identical(a: Any, b: Any) -> bool:
  """Returns whether two trees have the same structure and the very same leaves."""
  structures: list[Any] = [jax.tree.structure(x) for x in (a, b)]
  same = all(map(operator.is_, jax.tree.leaves(a), jax.tree.leaves(b)))
  return same and bool(structures[0] == structures[1])
