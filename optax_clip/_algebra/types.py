"""The three parts of a clipping method."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax

from optax_clip._norms.extended import Extended
from optax_clip._norms.layout import Layout

Array = jax.Array


class Parts(NamedTuple):
  """How norms of many layers are made of those of each, for ``record="layers"``.

  Attributes:
    measure: the measure of each layer.
    combine: ``combine(norms, updates)``: the norms of the whole, of those of the
      layers; `None` if only the updates can tell.
  """

  measure: "Measure"
  combine: Callable[[Sequence[Extended], Any], Sequence[Extended]] | None


class Measure(NamedTuple):
  """How large updates are.

  Attributes:
    layout: ``layout(updates)``: which norms there are and which leaf they concern,
      from shapes alone. One of `optax_clip.measures` has it; take it from there for
      a measure of your own, as in ``measures.layer_norm()._replace(measure=mine)``.
    measure: ``measure(updates, params, **extra_args)``: the norms. A float array with
      one entry for each norm, an `Extended`, or a list with one for each block of the
      layout. Two measures are the same if these are equal.
    parts: where norms are of several layers each, how to have those of the layers
      from the same read; `None` if that cannot be said.
    ord: the order of the norms of each layer, by which they grow with its size;
      `None` if they do not.
  """

  layout: Callable[[Any], Layout]
  measure: Callable[..., Any]
  parts: Parts | None = None
  ord: float | None = None


class Threshold(NamedTuple):
  """How large updates may be: a gradient transformation, but on norms.

  Attributes:
    init: ``init(norms)``: the state; `optax.EmptyState` when there is none. `norms`
      are zeros: one array, of shape ``[]`` or ``[norms]``.
    update: ``update(norms, state, **extra_args)``: limits that broadcast to `norms`,
      of their dtype, and the new state.
  """

  init: Callable[[Any], Any]
  update: Callable[..., tuple[Any, Any]]


class Action(NamedTuple):
  """What happens to an update, given its norm and its limit.

  Attributes:
    weigh: ``weigh(norm, limit)``: the coefficient, an `Extended`; elementwise. A
      value of 1, which has the unit 1, leaves the update as it is, bit for bit.
    apply: ``apply(leaf, coefficient, limit)``: the new leaf, of equal dtype.
  """

  weigh: Callable[[Extended, Array], Extended]
  apply: Callable[[Array, Extended, Array], Array]
