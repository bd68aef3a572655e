"""Where norms come from: measured here, unless someone outside has measured them."""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_clip._algebra import handed as _handed
from optax_clip._algebra.handed import Known
from optax_clip._algebra.types import ByLayout
from optax_clip._algebra.types import Measure
from optax_clip._norms import blocks as _blocks
from optax_clip._norms import extended as _extended
from optax_clip._norms.blocks import Norms
from optax_clip._norms.extended import Extended
from optax_clip._norms.layout import Layout
from optax_clip._types import ExtraArgs
from optax_clip._types import Params
from optax_clip._types import Updates

Array = jax.Array
# What a measure may return: norms in blocks, or all of them as one array.
Found = Sequence[Array | Extended] | Array | Extended


def measured(
  measure: Measure,
  by_layer: bool,
  updates: Updates,
  params: Params,
  extra_args: ExtraArgs,
) -> tuple[Norms, Norms | None]:
  """Returns norms by a measure and, if asked, those of each layer from the same read.

  Measures only what was not handed on.
  """
  at_hand, parts = _handed.scope.get(), measure.parts
  asked = updates, params, extra_args

  def known(measure: Measure) -> Norms | None:
    return at_hand.find(measure.measure, updates, params)

  if parts is None or not (by_layer or known(parts.measure) is not None):
    norms = measured_by(measure, *asked)
    return norms, norms if by_layer else None
  layers, whole = measured_by(parts.measure, *asked), known(measure)
  if whole is None and parts.combine is not None:
    found = parts.combine(layers, updates)
    is_laid = isinstance(found, Norms)
    whole = found if is_laid else as_norms(found, measure.layout(updates))
  whole = measured_by(measure, *asked) if whole is None else whole
  return whole, layers if by_layer else None


def measured_by(
  measure: Measure,
  updates: Updates,
  params: Params,
  extra_args: ExtraArgs,
  layout: Layout | None = None,
) -> Norms:
  """Measures, unless it is known; makes the layout unless it is given."""
  known = _handed.scope.get().find(measure.measure, updates, params)
  if known is not None:
    return known
  layout = measure.layout(updates) if layout is None else layout
  if isinstance(measure.measure, ByLayout):
    return measure.measure.by(layout, updates, params, extra_args)
  return as_norms(measure.measure(updates, params, **extra_args), layout)


def known_of(
  measure: Measure, updates: Updates, params: Params, norms: Norms, layers: Norms | None
) -> Known:
  """Wraps what `measured` found, to be handed on."""
  entries = [(measure.measure, norms)]
  if layers is not None and measure.parts is not None:
    entries.append((measure.parts.measure.measure, layers))
  return Known(updates, params, entries)


def known(measure: Measure, updates: Updates, norms: Found) -> Known:
  """Wraps norms that were found otherwise, to be handed on.

  Raises:
    ValueError: if the shape of `norms` does not fit the measure.
  """
  entries = [(measure.measure, as_norms(norms, measure.layout(updates)))]
  return Known(updates, None, entries)


def of_layers(measure: Measure, tree: Updates) -> Layout:
  """Returns the layout of the norms by layer that go with a measure.

  Raises:
    ValueError: if a norm covers several leaves and the measure has no `Parts`.
  """
  if measure.parts is not None:
    return measure.parts.measure.layout(tree)
  layout = measure.layout(tree)
  if layout.is_shared():
    raise ValueError(
      "record='layers' needs the norms of each layer, but this measure has norms of"
      " several layers without Parts. All in optax_clip.measures have Parts. Give"
      " yours one, or pass record=True."
    )
  return layout


def as_norms(found: Found, layout: Layout) -> Norms:
  """Splits the result of a measure: an `Extended` for each block.

  Raises:
    ValueError: if the shapes do not fit.
  """
  if isinstance(found, Extended) or not isinstance(found, (list, tuple)):
    table = _extended.of(found if isinstance(found, Extended) else jnp.asarray(found))
    blank = _blocks.blank(layout)
    if table.value.shape != blank.shape:
      raise ValueError(
        f"norms must have the shape {list(blank.shape)}, one entry for each norm of the"
        f" measure, got {list(table.value.shape)}. For several in blocks, pass a list."
      )
    zeros = [jnp.zeros(*block) for block in layout.blocks]
    like = Norms([Extended(x, x) for x in zeros], layout)
    columns = [like.split(x) for x in table]
    return Norms([Extended(*x) for x in zip(*columns, strict=True)], layout)
  blocks = [_extended.of(x) for x in found]
  shapes = [jnp.shape(x.value) for x in blocks]
  if shapes != [block.shape for block in layout.blocks]:
    raise ValueError(
      f"norms must be arrays of the shapes {[list(b.shape) for b in layout.blocks]},"
      f" one for each block of the measure's layout, got {[list(s) for s in shapes]}."
    )
  return Norms(blocks, layout)


class LayerNorms(NamedTuple):
  """Holds what one read says about each layer; both f32 or f64 ``[layers]``.

  Attributes:
    norm: the layer's norm, or its largest where it has several.
    per_element: the norm for one element, which compares layers.
  """

  norm: Array
  per_element: Array

  def divided(self, scale: Array) -> "LayerNorms":
    """Divides both, as if the updates were divided."""
    return LayerNorms(*(x / scale.astype(x.dtype) for x in self))


def layer_norms(measure: Measure, layers: Norms) -> LayerNorms:
  """Makes the entries of a record of layers from the layers' norms."""
  norm = layers.by_layer(largest, layers.values)
  ord = measure.parts.measure.ord if measure.parts else measure.ord
  if ord is None:
    return LayerNorms(norm, norm)
  roots = [p.elements ** (1 / ord) for p in layers.layout.places]
  elements = layers.layout.per_layer(roots)
  return LayerNorms(norm, norm / jnp.asarray(elements, norm.dtype))


# A layer without elements has no norm: it counts as 0, which no limit clips.
largest = functools.partial(jnp.max, initial=0)
