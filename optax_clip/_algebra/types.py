"""Which three parts make a clipping method, and what each must provide."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax

from optax_clip._norms.blocks import Norms
from optax_clip._norms.extended import Extended
from optax_clip._norms.layout import Layout
from optax_clip._types import ExtraArgs
from optax_clip._types import Params
from optax_clip._types import Updates

Array = jax.Array


class Parts(NamedTuple):
  """Makes norms over many layers from each layer's, for ``record="layers"``.

  Attributes:
    measure: measures each layer.
    combine: ``combine(norms, updates)``: makes the norms of the whole, in any form that
      a measure may return, from the layers' norms: ``norms.table()`` is one array of
      them. `None` if only the updates can tell.
  """

  measure: "Measure"
  combine: Callable[[Norms, Updates], Any] | None


class Measure(NamedTuple):
  """Measures how large updates are.

  Attributes:
    layout: ``layout(updates)``: says which norms there are and which leaf they
      concern, from shapes alone. For a measure of your own, take it from one in
      `optax_clip.measures`, as in ``measures.layer_norm()._replace(measure=mine)``.
    measure: ``measure(updates, params, **extra_args)``: returns the norms: a float
      array with one entry for each norm, an `Extended`, or a list with one for each
      block of the layout. Two measures are the same if these functions are equal.
    parts: where a norm covers several layers, how to take each layer's norm from the
      same read; `None` if that cannot be said.
    ord: the order by which a layer's norm grows with its size; `None` if it does not.
  """

  layout: Callable[[Updates], Layout]
  measure: Callable[..., Any]
  parts: Parts | None = None
  ord: float | None = None


class ByLayout:
  """Measures by a layout that its caller has made, so that it is made once a trace.

  Called as the ``measure`` of a `Measure`, it makes the layout itself.

  Attributes:
    layout: as in `Measure`.
  """

  layout: Callable[[Updates], Layout]
  uses_params = False

  def by(
    self, layout: Layout, updates: Updates, params: Params, extra_args: ExtraArgs
  ) -> Norms:
    """Measures, given the layout."""
    raise NotImplementedError

  def __call__(
    self, updates: Updates, params: Params = None, **extra_args: Any
  ) -> list[Extended]:
    """Measures."""
    return list(self.by(self.layout(updates), updates, params, extra_args).blocks)


class Threshold(NamedTuple):
  """Says how large updates may be, as a gradient transformation on norms.

  Attributes:
    init: ``init(norms)``: returns the state, or `optax.EmptyState` without one.
      `norms` are zeros: one array, of shape ``[]`` or ``[norms]``, with one
      norm at least: without leaves it is 0 in every step.
    update: ``update(norms, state, **extra_args)``: returns limits that broadcast to
      `norms`, of their dtype, and the new state.
  """

  init: Callable[[Array], Any]
  update: Callable[..., tuple[Array, Any]]


class Action(NamedTuple):
  """Changes an update, given its norm and its limit.

  Attributes:
    weigh: ``weigh(norm, limit)``: returns the coefficient, an `Extended`; elementwise.
      A value of 1, which has the unit 1, leaves the update as it is, bit for bit.
    apply: ``apply(leaf, coefficient, limit)``: returns the new leaf, of equal dtype.
    settle: ``settle(leaf, place, norm, limit)``: for an action that looks at a leaf
      again: returns the new leaf and the norm that it found, no larger than `norm` and
      in its shape; or `None` where `apply` serves.
  """

  weigh: Callable[[Extended, Array], Extended]
  apply: Callable[[Array, Extended, Array], Array]
  settle: Callable[..., tuple[Array, Extended] | None] | None = None
