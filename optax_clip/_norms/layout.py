"""Where the norms of each leaf stand.

A measure keeps its norms in a few arrays, the *blocks*: one for all norms of whole
leaves, so that arithmetic on them is done on a vector (one scalar for each leaf is
one kernel for each operation on a TPU), and one for each leaf that has several
norms, which stay where the leaf is sharded. A `Layout` says which entry of which
block concerns which leaf. It holds no arrays, and is made of shapes alone.

Thresholds see none of this: for them all norms are one array, the *table*.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from optax_clip._norms import mesh as _mesh
from optax_clip._norms import moments as _moments
from optax_clip._norms import scalars as _scalars

Array = jax.Array


class Place(NamedTuple):
  """Where the norms of one leaf stand, and what they are of.

  Attributes:
    block: the number of the block.
    entry: which of its norms; `None`: all of them.
    dims: the dimensions of the leaf that one norm is of; `None`: all.
    cut: how the norms of the leaf lie on a mesh.
    size: of how many elements one norm is, on all devices.
    stack: how many layers are stacked in the leaf, on all devices; 0: it is no stack.
    layer: the dimension they are stacked along.
    scaled: whether the leaf is clipped by its norms, and not only counted in them.
  """

  block: int
  entry: int | None
  dims: tuple[int, ...] | None
  cut: _mesh.Cut
  size: int
  stack: int = 0
  layer: int | None = None
  scaled: bool = True


class Block(NamedTuple):
  """The shape and dtype of an array of norms."""

  shape: tuple[int, ...]
  dtype: Any


class Layout(NamedTuple):
  """Where the norms of all leaves stand; hashable.

  Attributes:
    places: one for each leaf.
    blocks: one for each block.
  """

  places: tuple[Place, ...]
  blocks: tuple[Block, ...]

  def positions(self) -> list[tuple[int, int | None]]:
    """For each leaf the block and the entry in it."""
    return [(p.block, p.entry) for p in self.places]

  def blank(self) -> Array:
    """The table before anything was measured: zeros."""
    return self.table([jnp.zeros(*block) for block in self.blocks])

  def table(self, blocks: Sequence[Array]) -> Array:
    """All norms as thresholds see them: one array, in the order of the leaves."""
    if len(blocks) == 1 and (
      not blocks[0].ndim or all(p.entry is not None for p in self.places)
    ):
      return blocks[0]
    dtype = _moments.accumulator(*(block.dtype for block in self.blocks))
    flat = [_mesh.replicated(x).ravel().astype(dtype) for x in blocks]
    parts = [
      flat[p.block] if p.entry is None else flat[p.block][p.entry : p.entry + 1]
      for p in self.places
    ]
    return jnp.concatenate([jnp.zeros(0, dtype), *parts])

  def untabled(self, table: Array, like: Sequence[Array]) -> list[Array]:
    """The inverse of `table`: limits of one array as they are of blocks.

    Args:
      table: of the shape of the table, or a scalar, which is the same for all.
      like: the blocks of norms, whose dtypes and shardings the result has.
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
    """For each leaf what of a tree of blocks concerns it, to be broadcast to it.

    Args:
      blocks: for each block a tree of arrays of its shape, or of scalars.
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

  def rows(self, reduce: Callable[..., Array], blocks: Sequence[Array]) -> Array:
    """What concerns each layer: ``[layers]``, of one array of each block.

    Args:
      reduce: folds the axes of an array where a layer has several norms.
      blocks: arrays of the blocks' shapes.
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
      others = tuple(i for i in range(x.ndim) if i != p.layer)
      parts.append(reduce(_mesh.replicated(x), axis=others).ravel())
    dtype = _moments.accumulator(*(x.dtype for x in parts))
    return jnp.concatenate([jnp.zeros(0, dtype), *(x.astype(dtype) for x in parts)])

  def stacks(self) -> list[int]:
    """For each leaf how many layers are stacked in it; 0 if it is no stack."""
    return [p.stack for p in self.places]

  def scaled_layers(self) -> list[bool]:
    """For each layer whether it is clipped by its norms."""
    return [p.scaled for p in self.places for _ in range(max(p.stack, 1))]

  def sizes(self) -> list[Any]:
    """For each block of how many elements its entries are: a number, or a vector."""
    found: list[Any] = [[] for _ in self.blocks]
    for p in self.places:
      found[p.block].append(p.size)
    vectors = self._vectors()
    return [
      np.asarray(x, np.float64) if i in vectors else float(x[0])
      for i, x in enumerate(found)
    ]

  def per_layer(self, values: Sequence[float]) -> list[float]:
    """Values of leaves, for each of their layers."""
    return [
      value
      for value, p in zip(values, self.places, strict=True)
      for _ in range(max(p.stack, 1))
    ]

  def is_shared(self) -> bool:
    """Whether norms are of several leaves each."""
    entries = [(p.block, p.entry) for p in self.places]
    scalar = any(not block.shape for block in self.blocks)
    return scalar or len(set(entries)) < len(entries)

  def _vectors(self) -> set[int]:
    """The blocks whose entries stand for themselves."""
    return {p.block for p in self.places if p.entry is not None}

  def _scalars(self, block: Any) -> Callable[[int], Any]:
    """From an entry of a vector block to its scalars."""
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
  """The layout of norms of whole leaves, or of several.

  Args:
    count: how many norms there are; 0: one, as a scalar.
    dtype: of the norms.
    indices: which of them each leaf belongs to; `None` where there is one.
    cuts: how each leaf lies on a mesh.
    scaled: for each leaf whether it is clipped; all are if `None`.
  """
  scaled = [True] * len(indices) if scaled is None else scaled
  places = [
    Place(0, index, None, cut, 0, scaled=clipped)
    for index, cut, clipped in zip(indices, cuts, scaled, strict=True)
  ]
  shape = (count,) if count else ()
  return Layout(tuple(places), (Block(shape, jnp.dtype(dtype)),))


def leaf_by_leaf(
  leaves: Sequence[Any],
  dims: Sequence[tuple[int, ...] | None],
  cuts: Sequence[_mesh.Cut],
  layers: Sequence[int | None],
  kinds: Sequence[Any],
) -> Layout:
  """The layout of norms that are each of one leaf, or of a part of one.

  Args:
    leaves: arrays, or shapes and dtypes.
    dims: for each leaf the dimensions that one norm is of; `None`: all of them.
    cuts: how its norms lie on a mesh.
    layers: the dimension along which layers are stacked in it, or `None`.
    kinds: norms of whole leaves share a vector if these are equal.
  """
  places: list[Place] = []
  blocks: list[Block] = []
  vectors: dict[Any, int] = {}
  counts: dict[int, int] = {}
  for x, over, cut, layer, kind in zip(leaves, dims, cuts, layers, kinds, strict=True):
    dtype = _moments.accumulator(x.dtype)
    shape = [n for i, n in enumerate(x.shape) if over is None or i in over]
    size = max(int(np.prod(shape)), 1) * _mesh.devices(cut.within)
    stack = 0 if layer is None else _mesh.whole_shape(x.shape, cut)[layer]
    if over is None or (layer is None and len(over) == len(x.shape)):
      if (dtype, kind) not in vectors:
        vectors[dtype, kind] = len(blocks)
        blocks.append(Block((0,), dtype))
      block = vectors[dtype, kind]
      places.append(Place(block, counts.get(block, 0), None, cut, size, stack))
      counts[block] = counts.get(block, 0) + 1
      continue
    kept = [1 if i in over else n for i, n in enumerate(x.shape)]
    places.append(Place(len(blocks), None, over, cut, size, stack, layer))
    blocks.append(Block(_mesh.whole_shape(kept, cut), dtype))
  sized = [
    block._replace(shape=(counts[i],)) if i in counts else block
    for i, block in enumerate(blocks)
  ]
  return Layout(tuple(places), tuple(sized))
