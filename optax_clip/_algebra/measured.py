"""Where norms come from: measured here, unless someone outside has measured them."""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_clip._algebra import handed as _handed
from optax_clip._algebra.handed import Known
from optax_clip._algebra.types import Measure
from optax_clip._norms import extended as _extended
from optax_clip._norms import scalars as _scalars
from optax_clip._norms.extended import Extended
from optax_clip._norms.layout import Layout
from optax_clip._types import Params
from optax_clip._types import Updates

Array = jax.Array


class Norms(NamedTuple):
  """Holds the norms that were measured.

  Attributes:
    blocks: the norms, one `Extended` for each block of the layout.
    layout: which leaf they concern.
  """

  blocks: list[Extended]
  layout: Layout

  def sizes(self) -> list[Array]:
    """Returns the norms as floats."""
    return _scalars.each(_extended.as_float, [(x,) for x in self.blocks])

  def largest(self) -> Array:
    """Returns each layer's norm, or the largest where it has several."""
    return self.layout.rows(largest, self.sizes())


def measured(
  measure: Measure,
  by_layer: bool,
  updates: Updates,
  params: Params,
  extra_args: dict[str, Any],
) -> tuple[Norms, Norms | None]:
  """Returns norms by a measure and, if asked, those of each layer from the same read.

  Measures only what was not handed on.
  """
  at_hand = _handed.at_hand()

  def known(measure: Measure) -> list[Extended] | None:
    return at_hand.find(measure.measure, updates, params)

  def by(measure: Measure) -> list[Extended]:
    blocks = known(measure)
    if blocks is None:
      found = measure.measure(updates, params, **extra_args)
      blocks = as_blocks(found, measure.layout(updates))
    return blocks

  layout, parts = measure.layout(updates), measure.parts
  if parts is None or not (by_layer or known(parts.measure)):
    norms = Norms(by(measure), layout)
    return norms, norms if by_layer else None
  layers = by(parts.measure)
  blocks = known(measure)
  if blocks is None and parts.combine is not None:
    blocks = list(parts.combine(layers, updates))
  norms = Norms(by(measure) if blocks is None else blocks, layout)
  return norms, Norms(layers, parts.measure.layout(updates)) if by_layer else None


def known_of(
  measure: Measure, updates: Updates, params: Params, norms: Norms, layers: Norms | None
) -> Known:
  """Wraps what `measured` found, to be handed on."""
  entries = [(measure.measure, norms.blocks)]
  if layers is not None and measure.parts is not None:
    entries.append((measure.parts.measure.measure, layers.blocks))
  return Known(updates, params, entries)


def known(
  measure: Measure, updates: Updates, params: Params, norms: list[Extended] | Extended
) -> Known:
  """Wraps norms that were found otherwise, to be handed on.

  Raises:
    ValueError: if the shape of `norms` does not fit the measure.
  """
  blocks = as_blocks(norms, measure.layout(updates))
  return Known(updates, params, [(measure.measure, blocks)])


def of_layers(measure: Measure, tree: Any) -> Measure:
  """Returns the measure by layer that goes with a measure.

  Raises:
    ValueError: if a norm covers several leaves and the measure has no `Parts`.
  """
  if measure.parts is not None:
    return measure.parts.measure
  if measure.layout(tree).is_shared():
    raise ValueError(
      "record='layers' needs the norms of each layer, but this measure has norms of"
      " several layers without Parts. All in optax_clip.measures have Parts. Give"
      " yours one, or pass record=True."
    )
  return measure


def as_blocks(norms: Any, layout: Layout) -> list[Extended]:
  """Splits what a measure returned: an `Extended` for each block.

  Raises:
    ValueError: if the shapes do not fit.
  """
  if isinstance(norms, Extended) or not isinstance(norms, (list, tuple)):
    table = _extended.of(norms if isinstance(norms, Extended) else jnp.asarray(norms))
    blank = layout.blank()
    if table.value.shape != blank.shape:
      raise ValueError(
        f"norms must have the shape {list(blank.shape)}, one entry for each norm of the"
        f" measure, got {list(table.value.shape)}. For several in blocks, pass a list."
      )
    like = [jnp.zeros(*block) for block in layout.blocks]
    columns = [layout.untabled(x, like) for x in table]
    return [Extended(*pair) for pair in zip(*columns, strict=True)]
  found = [_extended.of(x) for x in norms]
  shapes = [jnp.shape(x.value) for x in found]
  if shapes != [block.shape for block in layout.blocks]:
    raise ValueError(
      f"norms must be arrays of the shapes {[list(b.shape) for b in layout.blocks]},"
      f" one for each block of the measure's layout, got {[list(s) for s in shapes]}."
    )
  return found


class LayerNorms(NamedTuple):
  """Holds what one read says about each layer; both f32 or f64 ``[layers]``.

  Attributes:
    norm: the layer's norm, or its largest where it has several.
    size: the norm for one element, which compares layers.
  """

  norm: Array
  size: Array

  def divided(self, scale: Array) -> "LayerNorms":
    """Divides both, as if the updates were divided."""
    return LayerNorms(*(x / scale.astype(x.dtype) for x in self))


def layer_norms(measure: Measure, layers: Norms) -> LayerNorms:
  """Makes what a record keeps for each layer from the layers' norms."""
  norm = layers.largest()
  ord = measure.parts.measure.ord if measure.parts else measure.ord
  if ord is None:
    return LayerNorms(norm, norm)
  powers = [p.size ** (1 / ord) for p in layers.layout.places]
  elements = layers.layout.per_layer(powers)
  return LayerNorms(norm, norm / jnp.asarray(elements, norm.dtype))


# A layer without elements has no norm: it counts as 0, which no limit clips.
largest = functools.partial(jnp.max, initial=0)
