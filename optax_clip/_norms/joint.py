"""How arrays are laid side by side in one vector, and how it is taken apart."""

from collections.abc import Sequence
import itertools
import math
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

Array = jax.Array


class Joint(NamedTuple):
  """Lays arrays side by side in one vector, and takes such a vector apart.

  XLA makes nothing of a vector that is taken apart and joined again.

  Attributes:
    shapes: those of the arrays.
    order: their indices in the order of the vector: by shape.
  """

  shapes: list[tuple[int, ...]]
  order: list[int]

  @classmethod
  def of(cls, shapes: Sequence[tuple[int, ...]]) -> "Joint":
    """Lays out arrays of these shapes."""
    return cls(list(shapes), sorted(range(len(shapes)), key=lambda i: shapes[i]))

  def starts(self) -> dict[int, int]:
    """Returns for each array where it begins."""
    sizes = [math.prod(self.shapes[i]) for i in self.order]
    begins = itertools.accumulate(sizes, initial=0)
    return dict(zip(self.order, begins, strict=False))

  def joined(self, arrays: Sequence[Array]) -> Array:
    """Joins arrays, each of which broadcasts to its shape."""
    rows = [jnp.broadcast_to(arrays[i], self.shapes[i]) for i in self.order]
    return lax.concatenate([lax.reshape(x, (x.size,)) for x in rows], 0)

  def split(self, vector: Array) -> list[Array]:
    """Inverts `joined`."""
    starts = self.starts()

    def own(i: int, shape: tuple[int, ...]) -> Array:
      stop = starts[i] + math.prod(shape)
      return lax.reshape(lax.slice(vector, (starts[i],), (stop,)), shape)

    return [own(i, shape) for i, shape in enumerate(self.shapes)]

  def split_tree(self, tree: Any) -> list[Any]:
    """Takes each vector of a tree apart, into trees of the parts."""
    vectors, treedef = jax.tree.flatten(tree)
    rows = zip(*map(self.split, vectors), strict=True)
    return [jax.tree.unflatten(treedef, row) for row in rows]
