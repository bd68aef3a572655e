"""Where each leaf finds its norms: in which entry of which array.

A measure keeps its norms in a few arrays, the *blocks*. One block holds all norms of
whole leaves, so that arithmetic on them runs on a vector: with a scalar for each leaf
a TPU would launch a kernel for each operation on each. A leaf that has several norms
gets a block of its own, which stays where the leaf is sharded. A `Layout` maps leaves
to entries of blocks. It holds no arrays, and is made from shapes alone.

Thresholds see none of this: for them all norms are one array, the *table*.
"""

from collections.abc import Callable
from collections.abc import Sequence
import math
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from optax_clip._norms import mesh as _mesh
from optax_clip._norms import power_sums as _power_sums
from optax_clip._norms import scalars as _scalars
from optax_clip._trees import leaves as _leaves
from optax_clip._types import AxisName
from optax_clip._types import Specs

Array = jax.Array


class Place(NamedTuple):
  """Locates the norms of one leaf, and says what they measure.

  Attributes:
    block: the index of the block.
    entry: the index of the norm in the block; `None` for all its norms.
    dims: the leaf's dimensions that one norm reduces; `None` for all.
    cut: how a mesh divides the leaf's norms.
    size: how many elements one norm measures, on all devices.
    stack: how many layers the leaf stacks along each dimension of `layers`, on all
      devices; empty if it is no stack.
    layers: the dimensions that count the layers.
    scaled: whether the clip scales the leaf by its norms, or only counts it in them.
    shape: the shape of the leaf, on all devices; `None` if nobody asked.
    rows: the dimensions that count the rows of a matrix, which the other ones of `dims`
      complete; `None`: by rank.
    pieces: how a mesh divides the leaf itself, in all its dimensions.
  """

  block: int
  entry: int | None
  dims: tuple[int, ...] | None
  cut: _mesh.Cut
  size: int
  stack: tuple[int, ...] = ()
  layers: tuple[int, ...] = ()
  scaled: bool = True
  shape: tuple[int, ...] | None = None
  rows: tuple[int, ...] | None = None
  pieces: _mesh.Cut = _mesh.Cut()


class Block(NamedTuple):
  """Describes an array of norms by its shape and dtype."""

  shape: tuple[int, ...]
  dtype: Any


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

  def blank(self) -> Array:
    """Returns the table before the first measurement: zeros."""
    return self.table([jnp.zeros(*block) for block in self.blocks])

  def table(self, blocks: Sequence[Array]) -> Array:
    """Joins all norms to what thresholds see: one array, in the order of the leaves.

    Without norms it holds one that is 0, from which no threshold learns: checkpointers
    refuse arrays of size 0.
    """
    if len(blocks) == 1 and (
      not blocks[0].ndim or all(p.entry is not None for p in self.places)
    ):
      return blocks[0]
    dtype = _power_sums.accumulator(*(block.dtype for block in self.blocks))
    flat = [_mesh.replicated(x).ravel().astype(dtype) for x in blocks]
    parts = [
      flat[p.block] if p.entry is None else flat[p.block][p.entry : p.entry + 1]
      for p in self.places
    ]
    padding = 0 if any(x.size for x in parts) else 1
    return jnp.concatenate([jnp.zeros(padding, dtype), *parts])

  def untabled(self, table: Array, like: Sequence[Array]) -> list[Array]:
    """Splits an array of limits into blocks: the inverse of `table`.

    Args:
      table: limits in the shape of the table, or one scalar for all.
      like: the blocks of norms, which set the dtypes and shardings.
    """
    if not table.ndim:
      return [table.astype(block.dtype) for block in self.blocks]
    if len(like) == 1 and like[0].shape == table.shape:
      return [table.astype(like[0].dtype)]
    members: list[list[Array]] = [[] for _ in self.blocks]
    start = 0
    for p in self.places:
      stop = start + (like[p.block].size if p.entry is None else 1)
      members[p.block].append(table[start:stop])
      start = stop
    # Without the barrier XLA reads each leaf's limit out of the table within the
    # kernel that scales the leaf, and compiles one such kernel for each leaf.
    joined = lax.optimization_barrier([jnp.concatenate(m) for m in members])
    return [
      _mesh.sharded_like(x.reshape(y.shape).astype(y.dtype), y)
      for x, y in zip(joined, like, strict=True)
    ]

  def spread(self, blocks: Sequence[Any]) -> list[Any]:
    """Gives each leaf its part of the blocks, in a shape that broadcasts to it.

    Args:
      blocks: for each block a tree of scalars, or of arrays in its shape.
    """
    vectors = self._vectors()
    scalars = {i: self._scalars(blocks[i]) for i in vectors}

    def own(p: Place) -> Any:
      if p.entry is not None:
        return scalars[p.block](p.entry)
      if not p.cut.between:
        return blocks[p.block]
      return jax.tree.map(
        lambda x: _mesh.local(x, p.cut) if x.ndim else x, blocks[p.block]
      )

    return [own(p) for p in self.places]

  def gathered(self, blocks: Sequence[Any], own: Sequence[Any]) -> list[Any]:
    """Inverts `spread`: the larger one where several leaves share an entry.

    Args:
      blocks: trees of arrays, whose entries without a leaf stay.
      own: for each leaf such a tree, in the shape that `spread` gave it.
    """
    found: dict[tuple[int, int | None], Any] = {}
    for p, x in zip(self.places, own, strict=True):
      whole = jax.tree.map(lambda y, cut=p.cut: _mesh.whole(y, cut), x)
      key = p.block, p.entry
      last = found.get(key)
      found[key] = whole if last is None else jax.tree.map(jnp.maximum, last, whole)

    def joined(i: int, block: Any) -> Any:
      if i not in self._vectors():
        return found.get((i, None), block)
      entries = [
        found.get((i, j), jax.tree.map(lambda y, j=j: y[j], block))
        for j in range(self.blocks[i].shape[0])
      ]
      return jax.tree.map(lambda *y: jnp.stack(y), *entries) if entries else block

    return [joined(i, block) for i, block in enumerate(blocks)]

  def rows(self, reduce: Callable[..., Array], blocks: Sequence[Array]) -> Array:
    """Reduces the blocks to one entry for each layer: ``[layers]``.

    Args:
      reduce: folds the axes of a layer that has several norms.
      blocks: one array for each block, in its shape.
    """
    if len(blocks) == 1 and not blocks[0].ndim:
      return jnp.broadcast_to(blocks[0], len(self.places))
    if len(blocks) == 1 and self._vectors():
      index = [p.entry for p in self.places]
      if index == list(range(self.blocks[0].shape[0])):
        return blocks[0]
      return blocks[0][np.asarray(index, np.int32)]
    parts = []
    for p in self.places:
      x = blocks[p.block]
      if p.entry is not None:
        parts.append(x[p.entry : p.entry + 1])
        continue
      others = tuple(i for i in range(x.ndim) if i not in p.layers)
      parts.append(reduce(_mesh.replicated(x), axis=others).ravel())
    dtype = _power_sums.accumulator(*(x.dtype for x in parts))
    return jnp.concatenate([jnp.zeros(0, dtype), *(x.astype(dtype) for x in parts)])

  def stacks(self) -> list[tuple[int, ...]]:
    """Returns how many layers each leaf stacks, by axis; empty if it is no stack."""
    return [p.stack for p in self.places]

  def scaled_layers(self) -> list[bool]:
    """For each layer whether it is clipped by its norms."""
    return [p.scaled for p in self.places for _ in range(math.prod(p.stack))]

  def sizes(self) -> list[Any]:
    """Counts the elements behind each entry: for each block a number, or a vector."""
    found: list[Any] = [[] for _ in self.blocks]
    for p in self.places:
      found[p.block].append(p.size)
    vectors = self._vectors()
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
    entries = [(p.block, p.entry) for p in self.places]
    scalar = any(not block.shape for block in self.blocks)
    return scalar or len(set(entries)) < len(entries)

  def _vectors(self) -> set[int]:
    """Returns the blocks that places index by entry."""
    return {p.block for p in self.places if p.entry is not None}

  def _scalars(self, block: Any) -> Callable[[int], Any]:
    """Returns a function from an entry of a vector block to the scalars there."""
    arrays, treedef = jax.tree.flatten(block)
    rows = _scalars.columns([x for x in arrays if x.ndim])

    def at(entry: int) -> Any:
      row = iter(rows[entry])
      return jax.tree.unflatten(treedef, [next(row) if x.ndim else x for x in arrays])

    return at


def whole(
  count: int,
  dtype: Any,
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
  updates: Any,
  dims: Sequence[tuple[int, ...] | None],
  layers: Sequence[tuple[int, ...] | None],
  axis_name: AxisName,
  specs: Specs,
  rows: Sequence[tuple[int, ...] | None] | None = None,
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
  # In one vector, norms that vary over unlike mesh axes would all vary over all.
  kinds = [
    frozenset(_mesh.varying_axes(x)) - set(cut.axes)
    for x, cut in zip(leaves, cuts, strict=True)
  ]
  found = leaf_by_leaf(leaves, dims, cuts, layers, kinds)
  shapes = _mesh.whole_shapes(updates, specs)
  pieces = [_mesh.Cut()] * len(leaves)
  if specs is not None:
    pieces = _mesh.cuts(updates, [()] * len(leaves), axis_name, specs)
  rows = [None] * len(leaves) if rows is None else rows
  places = [
    place._replace(shape=shape, rows=own, pieces=piece)
    for place, shape, own, piece in zip(found.places, shapes, rows, pieces, strict=True)
  ]
  return found._replace(places=tuple(places))


def leaf_by_leaf(
  leaves: Sequence[Any],
  dims: Sequence[tuple[int, ...] | None],
  cuts: Sequence[_mesh.Cut],
  layers: Sequence[tuple[int, ...] | None],
  kinds: Sequence[Any],
) -> Layout:
  """Lays out norms that each measure one leaf, or a part of one.

  Args:
    leaves: arrays, or shapes and dtypes.
    dims: for each leaf the dimensions that one norm reduces; `None` for all.
    cuts: how a mesh divides each leaf's norms.
    layers: for each leaf the dimensions that count its layers, or `None`.
    kinds: for each leaf a key; norms of whole leaves share a vector if it is equal.
  """
  places: list[Place] = []
  blocks: list[Block] = []
  vectors: dict[Any, int] = {}
  counts: dict[int, int] = {}
  for x, over, cut, layer, kind in zip(leaves, dims, cuts, layers, kinds, strict=True):
    dtype = _power_sums.accumulator(x.dtype)
    shape = [n for i, n in enumerate(x.shape) if over is None or i in over]
    size = max(int(np.prod(shape)), 1) * _mesh.devices(cut.within)
    every = _mesh.whole_shape(x.shape, cut)
    stack = () if layer is None else tuple(every[i] for i in layer)
    if 0 in stack:
      # A stack of no layers is one layer without elements.
      stack, layer = (), ()
    if over is None or (layer is None and len(over) == len(x.shape)):
      if (dtype, kind) not in vectors:
        vectors[dtype, kind] = len(blocks)
        blocks.append(Block((0,), dtype))
      block = vectors[dtype, kind]
      places.append(Place(block, counts.get(block, 0), None, cut, size))
      counts[block] = counts.get(block, 0) + 1
      continue
    kept = [1 if i in over else n for i, n in enumerate(x.shape)]
    places.append(Place(len(blocks), None, over, cut, size, stack, layer or ()))
    blocks.append(Block(_mesh.whole_shape(kept, cut), dtype))
  sized = [
    block._replace(shape=(counts[i],)) if i in counts else block
    for i, block in enumerate(blocks)
  ]
  return Layout(tuple(places), tuple(sized))
