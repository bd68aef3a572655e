"""How norms, root mean squares and ratios of norms are measured, by a given layout."""

from collections.abc import Callable
from collections.abc import Hashable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from optax_clip._algebra import measured as _measured
from optax_clip._algebra.types import ByLayout
from optax_clip._algebra.types import Measure
from optax_clip._norms import extended as _extended
from optax_clip._norms import norm as _norm
from optax_clip._norms import scalars as _scalars
from optax_clip._norms.blocks import Norms
from optax_clip._norms.extended import Extended
from optax_clip._norms.layout import Layout
from optax_clip._trees import leaves as _leaves
from optax_clip._types import ExtraArgs
from optax_clip._types import Params
from optax_clip._types import Scalar
from optax_clip._types import Updates

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Norm(ByLayout):
  """Measures norms of updates; two are equal if they measure the same.

  Attributes:
    kind: what one norm measures, by name.
    ord: the order of the norms.
    key: all that the layout depends on beside the updates.
    layout: from updates to the layout of their norms.
    counts: for each leaf whether it counts; all do if `None`.
  """

  kind: str
  ord: float
  key: Hashable
  layout: Callable[[Updates], Layout] = dataclasses.field(compare=False)
  counts: Callable[[Updates], list[bool]] | None = dataclasses.field(
    default=None, compare=False
  )

  def by(
    self, layout: Layout, updates: Updates, params: Params, extra_args: ExtraArgs
  ) -> Norms:
    del params, extra_args
    leaves = _leaves.floating_leaves(updates)
    if self.counts is None:
      return _norm.of_layout(leaves, layout, self.ord)
    rows = zip(leaves, layout.places, self.counts(updates), strict=True)
    kept = [(x, place) for x, place, counts in rows if counts]
    places = tuple(place for _, place in kept)
    found = _norm.of_layout(
      [x for x, _ in kept], layout._replace(places=places), self.ord
    )
    return Norms(found.blocks, layout)


@dataclasses.dataclass(frozen=True)
class _Of(ByLayout):
  """Measures by another measure, whose layout it has; two are equal if these are.

  Attributes:
    of: the other measure.
    key: what it is known by.
  """

  of: Measure = dataclasses.field(compare=False)
  key: Any = dataclasses.field(init=False)

  def __post_init__(self) -> None:
    object.__setattr__(self, "key", self.of.measure)
    object.__setattr__(self, "layout", self.of.layout)


@dataclasses.dataclass(frozen=True)
class Rms(_Of):
  """Measures the root mean squares of layers."""

  def by(
    self, layout: Layout, updates: Updates, params: Params, extra_args: ExtraArgs
  ) -> Norms:
    norms = _measured.measured_by(self.of, updates, params, extra_args, layout)
    blocks = [
      norm._replace(value=norm.value / jnp.sqrt(jnp.asarray(count, norm.value.dtype)))
      for norm, count in zip(norms.blocks, layout.elements(), strict=True)
    ]
    return Norms(blocks, layout)


@dataclasses.dataclass(frozen=True)
class Ratio(_Of):
  """Measures updates in units of the same measure of the parameters."""

  floor: Scalar

  uses_params = True

  def by(
    self, layout: Layout, updates: Updates, params: Params, extra_args: ExtraArgs
  ) -> Norms:
    _leaves.same_structure(updates, params)
    # Where updates and parameters have the same types, they have the same layout.
    alike = _leaves.types(updates) == _leaves.types(params)
    own = layout if alike else self.of.layout(params)
    above = _measured.measured_by(self.of, updates, None, extra_args, layout)
    below = _measured.measured_by(self.of, params, None, extra_args, own)
    weights = below.values
    if (own.blocks, own.positions()) != (layout.blocks, layout.positions()):
      # Dtypes decide which block holds a norm, and parameters may have others.
      weights = above.split(below.table())
    pairs = list(zip(above.blocks, weights, strict=True))
    return Norms(_scalars.each(self._ratio, pairs, write=True), layout)

  def _ratio(self, update: Extended, weight: Array) -> Extended:
    floor = jnp.maximum(weight, jnp.asarray(self.floor, weight.dtype))
    return _extended.divided(update, floor.astype(update.value.dtype))
