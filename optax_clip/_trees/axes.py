"""Which axes of a leaf belong to a unit; which axis of a stacked leaf is a layer."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_clip._trees import paths as _paths
from optax_clip._types import PyTree
from optax_clip._types import UnitAxis

# Of one leaf: the axis of its layers, or several, as of layers and of experts.
Axes = int | Sequence[int]
# Path regex to axes, or a function from a leaf's name and itself to axes or `None`.
Stacked = Mapping[str, Axes] | Callable[[str, Any], Axes | None] | None


def unit_axes(shape: Sequence[int], axis: UnitAxis) -> tuple[int, ...]:
  """Returns the axes that one unit's weights span, by the rule of optax and NFNets.

  Args:
    shape: the shape of a leaf.
    axis: these axes; or `None`, to go by rank: all axes of scalars, vectors and
      leaves with one axis longer than 1; axis 0 for rank 2 and 3; all but the last
      for rank 4 (HWIO) and 5 (DHWIO).
  """
  rank = len(shape)
  if axis is not None:
    return tuple(sorted(distinct(axis, shape, "axis", "a leaf")))
  if sum(n != 1 for n in shape) <= 1:
    return tuple(range(rank))
  if rank <= 3:
    return (0,)
  if rank <= 5:
    return tuple(range(rank - 1))
  raise ValueError(
    f"A leaf of shape {tuple(shape)} has rank {rank}; units are known up to"
    " rank 5. Pass axis= to say which axes belong to one unit."
  )


def distinct(
  axis: int | Sequence[int], shape: Sequence[int], name: str, leaf: str
) -> tuple[int, ...]:
  """Returns axes counted from the front, in their order.

  Raises:
    ValueError: if one is out of range, or named twice.
  """
  if isinstance(axis, jax.Array):
    raise TypeError(
      f"{name} must be one or more Python integers, as it decides what is compiled, got"
      f" {axis!r}. With optax.inject_hyperparams, pass static_args=({name!r},)."
    )
  axes, rank = (axis,) if isinstance(axis, int) else tuple(axis), len(shape)
  if not all(-rank <= a < rank for a in axes):
    raise ValueError(
      f"{name}={axis!r} is out of range for {leaf}, which has the shape {tuple(shape)}."
    )
  found = tuple(a % rank for a in axes)
  if len(set(found)) < len(found):
    raise ValueError(f"{name}={axis!r} names an axis of {leaf} twice.")
  return found


def layer_axes(tree: PyTree, stacked: Stacked) -> list[tuple[int, ...] | None]:
  """Returns for each leaf the axes that count its stacked layers, or `None`.

  Args:
    tree: parameters or updates.
    stacked: rules for axes, as in `paths.by_path`.

  Raises:
    ValueError: if an expression is found in no path, or an axis is out of range or
      named twice.
  """
  axes = _paths.by_path(tree, stacked, "stacked")
  rows = zip(_paths.every_name(tree), jax.tree.leaves(tree), axes, strict=True)
  return [
    None
    if axis is None
    else tuple(sorted(distinct(axis, jnp.shape(leaf), "stacked", name)))
    for name, leaf, axis in rows
  ]


def stacked_axes(shape: Sequence[int], layers: Sequence[int]) -> tuple[int, ...]:
  """Returns the axes of one layer: all but those that count layers."""
  return tuple(i for i in range(len(shape)) if i not in layers)


def stacked_unit_axes(
  shape: Sequence[int], axis: UnitAxis, layers: Sequence[int] | None
) -> tuple[int, ...]:
  """Returns the `unit_axes` of one layer in a stack, as axes of the stack."""
  if layers is None:
    return unit_axes(shape, axis)
  rest = stacked_axes(shape, layers)
  return tuple(rest[i] for i in unit_axes([shape[i] for i in rest], axis))


def checked_stacked(stacked: PyTree) -> None:
  """Raises, at construction, unless `stacked` can say axes of layers."""
  if stacked is None:
    return
  if _paths.is_by_path(stacked) and not isinstance(stacked, Mapping):
    return
  if not isinstance(stacked, Mapping):
    raise TypeError(
      "stacked must map path regexes to axes, as in {'blocks/': 0} or {'experts': (0,"
      f" 1)}}, or be a function from path and leaf to these or None, got {stacked!r}."
    )
  _paths.checked_patterns(stacked, "stacked")
  for pattern, axis in stacked.items():
    axes = axis if isinstance(axis, (tuple, list)) and axis else (axis,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in axes):
      raise TypeError(
        f"stacked[{pattern!r}] must be an integer, or several as (0, 1), got {axis!r}."
      )
