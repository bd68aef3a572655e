"""Where norms come from: measured once, then handed on to whoever needs them."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

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


@jax.tree_util.register_pytree_node_class
class Given:
  """Holds norms that are known already, and for which arrays; made by `given`.

  It recognises its arrays by identity. An array that enters `jax.jit`, or a branch,
  becomes another one: on its way in a `Given` forgets all, and the clip inside
  measures again.
  """

  def __init__(
    self,
    leaves: Sequence[Any] = (),
    params: Sequence[Any] = (),
    entries: Sequence[tuple[Callable[..., Any], list[Extended]]] = (),
  ):
    """Takes the leaves of updates and parameters, and for each measure its norms."""
    self._leaves, self._params = tuple(leaves), tuple(params)
    self._entries = tuple(entries)

  def find(
    self, measure: Measure, updates: Updates, params: Params
  ) -> list[Extended] | None:
    """Returns the norms by a measure, if they are known for these very arrays."""
    if not self._entries or not _identical(self._leaves, updates):
      return None
    for measuring, blocks in self._entries:
      if _equal(measuring, measure.measure):
        uses_params = getattr(measuring, "uses_params", True)
        if not uses_params or _identical(self._params, params):
          return blocks
    return None

  def moved(
    self,
    old: Any,
    new: Any,
    params: Params,
    change: Callable[[list[Extended]], list[Extended]] = lambda blocks: blocks,
  ) -> "Given":
    """Carries what is known over to updates with the same values.

    Args:
      old: the updates that this is for; for others the result knows nothing.
      new: a copy, or the same updates in other units; of the same structure.
      params: the parameters beside them.
      change: from the old norms to the new ones.
    """
    if not self._entries or not _identical(self._leaves, old):
      return Given()
    entries = [(measuring, change(blocks)) for measuring, blocks in self._entries]
    return Given(jax.tree.leaves(new), jax.tree.leaves(params), entries)

  def tree_flatten(self) -> tuple[tuple[()], None]:
    """Returns nothing: see the class."""
    return (), None

  @classmethod
  def tree_unflatten(cls, aux: None, children: Any) -> "Given":
    """Makes one that knows nothing: see the class."""
    del aux, children
    return cls()


def measured(
  measure: Measure,
  by_layer: bool,
  updates: Updates,
  params: Params,
  known: Given | None,
  extra_args: dict[str, Any],
) -> tuple[Norms, Norms | None]:
  """Returns norms by a measure and, if asked, those of each layer from the same read.

  Measures only what is not known.
  """
  known = Given() if known is None else known

  def by(measure: Measure) -> list[Extended]:
    blocks = known.find(measure, updates, params)
    if blocks is None:
      found = measure.measure(updates, params, **extra_args)
      blocks = as_blocks(found, measure.layout(updates))
    return blocks

  layout, parts = measure.layout(updates), measure.parts
  if parts is None or not (by_layer or known.find(parts.measure, updates, params)):
    norms = Norms(by(measure), layout)
    return norms, norms if by_layer else None
  layers = by(parts.measure)
  blocks = known.find(measure, updates, params)
  if blocks is None and parts.combine is not None:
    blocks = list(parts.combine(layers, updates))
  norms = Norms(by(measure) if blocks is None else blocks, layout)
  return norms, Norms(layers, parts.measure.layout(updates)) if by_layer else None


def known_of(
  measure: Measure, updates: Updates, params: Params, norms: Norms, layers: Norms | None
) -> Given:
  """Wraps what `measured` found, to be handed on."""
  entries = [(measure.measure, norms.blocks)]
  if layers is not None and measure.parts is not None:
    entries.append((measure.parts.measure.measure, layers.blocks))
  return Given(jax.tree.leaves(updates), jax.tree.leaves(params), entries)


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
  """Splits what a measure returned, or a caller knows: an `Extended` for each block.

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


def _identical(leaves: Sequence[Any], tree: Any) -> bool:
  """Returns whether the leaves of a tree are these very objects."""
  others = jax.tree.leaves(tree)
  return len(leaves) == len(others) and all(
    x is y for x, y in zip(leaves, others, strict=True)
  )


def _equal(a: Any, b: Any) -> bool:
  return a is b or (type(a) is type(b) and bool(a == b))
