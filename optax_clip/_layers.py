"""Which norms concern which layer: for measures of layers, of parts, and of many."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_clip import _groups
from optax_clip import _mesh
from optax_clip import _moments
from optax_clip._core import Layers
from optax_clip._core import Measure

Array = jax.Array
Reduce = Callable[..., Array]


def own(
  stacked: _groups.Stacked,
  specs: Any,
  elements: Callable[[Any], list[float]] | None = None,
) -> Layers:
  """Layers of a measure whose norms are each of one layer, or of a part of one."""

  def count(tree: Any) -> list[int]:
    return stacks(tree, stacked, specs)

  def rows(reduce: Reduce, tree: Any, updates: Any) -> Array:
    if not isinstance(tree, list):
      return tree  # A vector of one norm for each leaf.
    axes = _groups.layer_axes(updates, stacked)
    parts = []
    for x, layer in zip(tree, axes, strict=True):
      others = tuple(i for i in range(x.ndim) if i != layer)
      parts.append(reduce(_mesh.replicated(x), axis=others).ravel())
    dtype = _moments.accumulator(*(x.dtype for x in parts))
    return jnp.concatenate([jnp.zeros(0, dtype), *(x.astype(dtype) for x in parts)])

  return Layers(count, rows, elements)


def of_many(finer: Measure, rows: Callable[[Reduce, Any, Any], Array]) -> Layers:
  """Layers of a measure whose norms are of several layers each."""

  def none(tree: Any) -> list[int]:
    return [0] * len(jax.tree.leaves(tree))

  return Layers(none, rows, finer=finer)


def stacks(tree: Any, stacked: _groups.Stacked, specs: Any) -> list[int]:
  """For each leaf how many layers are stacked in it, on all devices; or 0."""
  axes = _groups.layer_axes(tree, stacked)
  shapes = _mesh.whole_shapes(tree, specs)
  return [0 if a is None else shape[a] for a, shape in zip(axes, shapes, strict=True)]
