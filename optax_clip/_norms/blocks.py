"""How norms are looked at: by leaf, by layer, and as the one table of a threshold.

`Norms` carry their layout, which is made once a trace.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from optax_clip._norms import extended as _extended
from optax_clip._norms import mesh as _mesh
from optax_clip._norms import power_sums as _power_sums
from optax_clip._norms import scalars as _scalars
from optax_clip._norms.extended import Extended
from optax_clip._norms.layout import Layout
from optax_clip._norms.layout import Place

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Norms:
  """Carries norms together with their layout.

  Attributes:
    blocks: for each block of the layout an `Extended`; or another tree of arrays in
      its shape, or of scalars, for `spread`.
    layout: which leaf they concern.
  """

  blocks: Sequence[Any]
  layout: Layout

  @functools.cached_property
  def values(self) -> list[Array]:
    """Returns the norms as floats, in blocks."""
    return _scalars.each(_extended.as_float, [(x,) for x in self.blocks])

  def table(self, blocks: Sequence[Array] | None = None) -> Array:
    """Joins all norms to what thresholds see: one array, in the order of the leaves.

    Without norms it holds one that is 0, from which no threshold learns: checkpointers
    refuse arrays of size 0.

    Args:
      blocks: other arrays in the shapes of the blocks.
    """
    blocks, layout = self.values if blocks is None else blocks, self.layout
    if len(blocks) == 1 and (
      not blocks[0].ndim or all(p.entry is not None for p in layout.places)
    ):
      return blocks[0]
    dtype = _power_sums.accumulator(*(block.dtype for block in layout.blocks))
    flat = [_mesh.replicated(x).ravel().astype(dtype) for x in blocks]
    parts = [
      flat[p.block] if p.entry is None else flat[p.block][p.entry : p.entry + 1]
      for p in layout.places
    ]
    padding = 0 if any(x.size for x in parts) else 1
    return jnp.concatenate([jnp.zeros(padding, dtype), *parts])

  def split(self, table: Array) -> list[Array]:
    """Inverts `table`: takes limits apart, into blocks of the norms' dtypes.

    Args:
      table: limits in the shape of the table, or one scalar for all.
    """
    if not table.ndim:
      return [table.astype(block.dtype) for block in self.layout.blocks]
    like = [norm.value for norm in self.blocks]
    if len(like) == 1 and like[0].shape == table.shape:
      return [table.astype(like[0].dtype)]
    members: list[list[Array]] = [[] for _ in like]
    start = 0
    for p in self.layout.places:
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

  def spread(self, *others: Sequence[Array]) -> list[Any]:
    """Gives each leaf its norms, in a shape that broadcasts to it.

    Args:
      *others: arrays for each block, in its shape or scalars; each leaf then gets a
        tuple of its norms and of its parts of these.
    """
    blocks = list(zip(self.blocks, *others, strict=True)) if others else self.blocks
    scalars = {i: _scalars_of(blocks[i]) for i in self.layout.vectors()}

    def own(p: Place) -> Any:
      if p.entry is not None:
        return scalars[p.block](p.entry)
      if not p.cut.between:
        return blocks[p.block]
      return jax.tree.map(
        lambda x: _mesh.local(x, p.cut) if x.ndim else x, blocks[p.block]
      )

    return list(map(own, self.layout.places))

  def gathered(self, own: Sequence[Extended]) -> "Norms":
    """Inverts `spread`: the larger one where several leaves share an entry.

    Args:
      own: for each leaf its norms, in the shape that `spread` gave them.
    """
    found: dict[tuple[int, int | None], Any] = {}
    for p, x in zip(self.layout.places, own, strict=True):
      whole = jax.tree.map(lambda y, cut=p.cut: _mesh.whole(y, cut), x)
      key = p.block, p.entry
      last = found.get(key)
      found[key] = whole if last is None else jax.tree.map(jnp.maximum, last, whole)

    def joined(i: int, block: Extended) -> Extended:
      if i not in self.layout.vectors():
        return found.get((i, None), block)
      # Entries without a leaf stay.
      entries = [
        found.get((i, j), jax.tree.map(lambda y, j=j: y[j], block))
        for j in range(self.layout.blocks[i].shape[0])
      ]
      return jax.tree.map(lambda *y: jnp.stack(y), *entries) if entries else block

    blocks = [joined(i, block) for i, block in enumerate(self.blocks)]
    return Norms(blocks, self.layout)

  def by_layer(self, fold: Callable[..., Array], blocks: Sequence[Array]) -> Array:
    """Reduces arrays to one entry for each layer: ``[layers]``.

    Args:
      fold: reduces the axes of a layer that has several norms.
      blocks: one array for each block, in its shape.
    """
    places = self.layout.places
    if len(blocks) == 1 and not blocks[0].ndim:
      return jnp.broadcast_to(blocks[0], len(places))
    if len(blocks) == 1 and self.layout.vectors():
      index = [p.entry for p in places]
      if index == list(range(self.layout.blocks[0].shape[0])):
        return blocks[0]
      return blocks[0][np.asarray(index, np.int32)]
    parts = []
    for p in places:
      x = blocks[p.block]
      if p.entry is not None:
        parts.append(x[p.entry : p.entry + 1])
        continue
      others = tuple(i for i in range(x.ndim) if i not in p.layers)
      parts.append(fold(_mesh.replicated(x), axis=others).ravel())
    dtype = _power_sums.accumulator(*(x.dtype for x in parts))
    return jnp.concatenate([jnp.zeros(0, dtype), *(x.astype(dtype) for x in parts)])


def blank(layout: Layout) -> Array:
  """Returns the table before the first measurement: zeros."""
  zeros = [jnp.zeros(*block) for block in layout.blocks]
  return Norms(zeros, layout).table(zeros)


def _scalars_of(block: Any) -> Callable[[int], Any]:
  """Returns a function from an entry of a vector block to the scalars there."""
  arrays, treedef = jax.tree.flatten(block)
  rows = _scalars.columns([x for x in arrays if x.ndim])

  def at(entry: int) -> Any:
    row = iter(rows[entry])
    return jax.tree.unflatten(treedef, [next(row) if x.ndim else x for x in arrays])

  return at
