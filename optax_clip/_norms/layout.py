"""Where each leaf finds its norms: in which entry of which array.

A measure keeps its norms in a few arrays, the *blocks*. One block holds all norms of
whole leaves, so that arithmetic on them runs on a vector: with a scalar for each leaf
a TPU would launch a kernel for each operation on each. A leaf that has several norms
gets a block of its own, which stays where the leaf is sharded. A `Layout` maps leaves
to entries of blocks. It holds no arrays, and is made from shapes alone, once a trace:
`Norms` carry it to whoever asks which leaf a norm is of.

Thresholds see none of this: for them all norms are one array, the *table*.
"""

from collections.abc import Sequence
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_clip._norms import mesh as _mesh
from optax_clip._norms import power_sums as _power_sums
from optax_clip._trees import leaves as _leaves
from optax_clip._types import AxisName
from optax_clip._types import DType
from optax_clip._types import Specs
from optax_clip._types import Updates

Array = jax.Array
Axes = tuple[int, ...]


class Place(NamedTuple):
  """Locates the norms of one leaf, and says what they measure.

  Attributes:
    block: the index of the block.
    entry: the index of the norm in the block; `None` for all its norms.
    dims: the leaf's dimensions that one norm reduces; `None` for all.
    cut: how a mesh divides the leaf's norms.
    elements: how many elements one norm measures, on all devices.
    stack: how many layers the leaf stacks along each dimension of `layers`, on all
      devices; empty if it is not a stack.
    layers: the dimensions that count the layers.
    scaled: whether the clip scales the leaf by its norms, or only counts it in them.
    shape: the shape of the leaf, on all devices; `None` if nobody asked.
    rows: the dimensions that count the rows of a matrix, which the other ones of `dims`
      complete; `None`: by rank.
    pieces: how a mesh divides the leaf itself, in all its dimensions.
  """

  block: int
  entry: int | None
  dims: Axes | None
  cut: _mesh.Cut
  elements: int
  stack: Axes = ()
  layers: Axes = ()
  scaled: bool = True
  shape: tuple[int, ...] | None = None
  rows: Axes | None = None
  pieces: _mesh.Cut = _mesh.Cut()


class Block(NamedTuple):
  """Describes an array of norms by its shape and dtype."""

  shape: tuple[int, ...]
  dtype: DType


class Layout(NamedTuple):
  """Locates the norms of all leaves; hashable.

  Attributes:
    places: where each leaf's norms are.
    blocks: the shape and dtype of each block.
  """

  places: tuple[Place, ...]
  blocks: tuple[Block, ...]

  def positions(self) -> list[tuple[int, int | None]]:
    """Returns each leaf's block and its entry in it."""
    return [(p.block, p.entry) for p in self.places]

  def stacks(self) -> list[tuple[int, ...]]:
    """Returns how many layers each leaf stacks, by axis; empty if it is not a stack."""
    return [p.stack for p in self.places]

  def scaled_layers(self) -> list[bool]:
    """Returns for each layer whether it is clipped by its norms."""
    return [p.scaled for p in self.places for _ in range(math.prod(p.stack))]

  def elements(self) -> list[Any]:
    """Counts the elements behind each entry: for each block a number, or a vector."""
    found: list[Any] = [[] for _ in self.blocks]
    for p in self.places:
      found[p.block].append(p.elements)
    vectors = self.vectors()
    return [
      np.asarray(x, np.float64) if i in vectors else float(x[0])
      for i, x in enumerate(found)
    ]

  def per_layer(self, values: Sequence[float]) -> list[float]:
    """Repeats the value of each leaf for each of its layers."""
    return [
      value
      for value, p in zip(values, self.places, strict=True)
      for _ in range(math.prod(p.stack))
    ]

  def is_shared(self) -> bool:
    """Returns whether any norm is shared by several leaves."""
    entries = self.positions()
    scalar = any(not block.shape for block in self.blocks)
    return scalar or len(set(entries)) < len(entries)

  def vectors(self) -> set[int]:
    """Returns the blocks that places index by entry."""
    return {p.block for p in self.places if p.entry is not None}


def whole(
  count: int,
  dtype: DType,
  indices: Sequence[int | None],
  cuts: Sequence[_mesh.Cut],
  scaled: Sequence[bool] | None = None,
) -> Layout:
  """Lays out norms that each measure one or more whole leaves.

  Args:
    count: the number of norms; 0 for a single one, as a scalar.
    dtype: the dtype of the norms.
    indices: for each leaf the index of its norm; `None` for the single one.
    cuts: how a mesh divides each leaf.
    scaled: for each leaf whether it is scaled; all are if `None`.
  """
  scaled = [True] * len(indices) if scaled is None else scaled
  places = [
    Place(0, index, None, cut, 0, scaled=clipped)
    for index, cut, clipped in zip(indices, cuts, scaled, strict=True)
  ]
  shape = (count,) if count else ()
  return Layout(tuple(places), (Block(shape, jnp.dtype(dtype)),))


def of_leaves(
  updates: Updates,
  dims: Sequence[Axes | None],
  layers: Sequence[Axes | None],
  axis_name: AxisName,
  specs: Specs,
  rows: Sequence[Axes | None] | None = None,
) -> Layout:
  """Lays out norms that each measure one leaf, or a part of one, wherever they are.

  Args:
    updates: a tree of arrays, or of shapes and dtypes.
    dims: for each leaf the dimensions that one norm reduces; `None` for all.
    layers: for each leaf the dimensions that count its layers, or `None`.
    axis_name: as in `optax_clip.measures`.
    specs: as there.
    rows: as in `Place`, for each leaf.
  """
  leaves = _leaves.floating_leaves(updates)
  cuts = _mesh.cuts(updates, dims, axis_name, specs)
  shapes = _mesh.whole_shapes(updates, specs)
  pieces = [_mesh.Cut()] * len(leaves)
  if specs is not None:
    pieces = _mesh.cuts(updates, [()] * len(leaves), axis_name, specs)
  rows = [None] * len(leaves) if rows is None else rows
  places: list[Place] = []
  blocks: list[Block] = []
  vectors: dict[Any, int] = {}
  counts: dict[int, int] = {}
  every = zip(leaves, dims, cuts, layers, shapes, rows, pieces, strict=True)
  for x, over, cut, layer, shape, own_rows, piece in every:
    dtype = _power_sums.accumulator(x.dtype)
    reduced = [n for i, n in enumerate(x.shape) if over is None or i in over]
    elements = max(math.prod(reduced), 1) * _mesh.devices(cut.within)
    whole_shape = _mesh.whole_shape(x.shape, cut)
    stack = tuple(whole_shape[i] for i in layer or ())
    if 0 in stack:
      # A stack without layers is one layer without elements.
      stack, layer = (), ()
    about: dict[str, Any] = {"shape": shape, "rows": own_rows, "pieces": piece}
    if over is None or (layer is None and len(over) == len(x.shape)):
      # One vector for norms that vary over different mesh axes would make all of them
      # vary over all axes.
      key = dtype, frozenset(_mesh.varying_axes(x)) - set(cut.axes)
      if key not in vectors:
        vectors[key] = len(blocks)
        blocks.append(Block((0,), dtype))
      block = vectors[key]
      entry = counts.get(block, 0)
      places.append(Place(block, entry, None, cut, elements, **about))
      counts[block] = entry + 1
      continue
    kept = [1 if i in over else n for i, n in enumerate(x.shape)]
    place = Place(len(blocks), None, over, cut, elements, stack, layer or (), **about)
    places.append(place)
    blocks.append(Block(_mesh.whole_shape(kept, cut), dtype))
  sized = [
    block._replace(shape=(counts[i],)) if i in counts else block
    for i, block in enumerate(blocks)
  ]
  return Layout(tuple(places), tuple(sized))
