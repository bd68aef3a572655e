"""Which arrays reduce together, and how their sums become blocks of norms.

Each array reduces on its own, results are collected over devices with one collective
for each set of mesh axes, and merged over the arrays of one norm.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_clip import _backend
from optax_clip._norms import mesh as _mesh
from optax_clip._norms import power_sums as _power_sums
from optax_clip._norms import scalars as _scalars
from optax_clip._norms.blocks import Norms
from optax_clip._norms.layout import Layout
from optax_clip._norms.layout import Place

Array = jax.Array
# Arrays of at most this many elements are concatenated before they are reduced.
_SMALL = 1 << 14
# The most elements of one concatenation, which may need a temporary (256 KiB).
_BUCKET = 1 << 16


class Bundle(NamedTuple):
  """Holds arrays that reduce together, to one entry of a block or to all of it.

  Attributes:
    arrays: all real, or all complex.
    dims: the dimensions to reduce, which stay with size 1; `None` reduces all, to a
      scalar.
  """

  arrays: Sequence[Array]
  dims: tuple[int, ...] | None


class Member(NamedTuple):
  """Pairs arrays that reduce together with the place of their result."""

  bundle: Bundle
  place: Place


# From a bundle and its unit, or `None`, to one array or several of one shape.
Local = Callable[[Bundle, Array | None], Sequence[Array]]


class Reduction(NamedTuple):
  """Says how bundles become blocks of norms.

  Attributes:
    run: ``run(local, collective, merge, units)`` returns, for each array that
      ``local`` returns, its blocks: merged over bundles, and collected over the mesh.
      ``units`` is `None`, or a block of units for each block. ``once`` as in `run`.
    elements: for each block the number of elements behind an entry.
    dtypes: the dtypes of the arrays.
    dtype: the dtype of the norms, float32 or float64.
    is_whole: whether every bundle reduces to a scalar.
  """

  run: Callable[..., list[list[Array]]]
  elements: Sequence[Any]
  dtypes: Sequence[Any]
  dtype: Any
  is_whole: bool


def reduction(
  arrays: Sequence[Array], layout: Layout, *, concatenate: bool
) -> Reduction:
  """Says how arrays become the blocks of a layout.

  Args:
    arrays: floating or complex arrays.
    layout: where their norms are stored.
    concatenate: whether small arrays may be moved side by side.
  """
  dtype = _power_sums.accumulator(*(x.dtype for x in arrays))
  members = _bundled(arrays, layout.places, dtype, concatenate)
  return Reduction(
    run=functools.partial(run, layout, members),
    elements=_elements(arrays, layout),
    dtypes=[x.dtype for x in arrays],
    dtype=dtype,
    is_whole=all(p.dims is None for p in layout.places),
  )


def _bundled(
  arrays: Sequence[Array], places: Sequence[Place], dtype: Any, concatenate: bool
) -> list[Member]:
  """Bundles arrays: each large one alone, small ones of one norm concatenated.

  XLA compiles a norm over 2,000 small arrays in 20 seconds, worse than linear in
  their number; over a few concatenations it takes two. Arrays that may be sharded
  (`concatenate=False`) stay apart: concatenating could move them between devices.
  """
  found: list[Member] = []
  buckets: dict[Any, list[tuple[Array, Place]]] = {}

  def close(key: Any) -> None:
    small, ((_, place), *_) = [x for x, _ in buckets[key]], buckets[key]
    del buckets[key]
    if concatenate and len(small) > 1:
      small = [jnp.concatenate([_power_sums.widened(x, dtype).ravel() for x in small])]
    found.append(Member(Bundle(small, None), place))

  for x, place in zip(arrays, places, strict=True):
    if x.size > _SMALL or place.dims is not None:
      found.append(Member(Bundle([x], place.dims), place))
      continue
    key = (place.block, place.entry, place.cut, jnp.iscomplexobj(x))
    if sum(y.size for y, _ in buckets.get(key, ())) + x.size > _BUCKET:
      close(key)
    buckets.setdefault(key, []).append((x, place))
  for key in list(buckets):
    close(key)
  # In this order `segment` has nothing to do where each entry is one bundle.
  return sorted(found, key=lambda m: (m.place.block, m.place.entry or 0))


def run(
  layout: Layout,
  members: Sequence[Member],
  local: Local,
  collective: Callable[..., Array],
  merge: Callable[..., Array],
  units: Sequence[Array] | None,
  *,
  once: bool = False,
) -> list[list[Array]]:
  """Reduces each bundle, with one collective for each set of mesh axes.

  Args:
    layout: where norms are stored.
    members: the bundles.
    local, collective, merge, units: as in `Reduction`.
    once: whether XLA:CPU compiles `local` once for all bundles of like shapes.

  Returns:
    For each array that `local` returns, its blocks.
  """
  own: Sequence[Array | None] = [None] * len(members)
  if units is not None:
    by_place = dict(zip(layout.places, Norms(units, layout).spread(), strict=True))
    own = _apart([by_place[m.place] for m in members])
  reduced = {
    dims: (_backend.compiled_once if once else _backend.traced_once)(
      lambda arrays, unit, dims=dims: local(Bundle(arrays, dims), unit)
    )
    for dims in {m.bundle.dims for m in members}
  }
  rows = zip([m.bundle for m in members], own, strict=True)
  results = [reduced[dims](list(arrays), unit) for (arrays, dims), unit in rows]
  places = [m.place for m, result in zip(members, results, strict=True) for _ in result]
  flat = [
    _mesh.placed(x, place.cut)
    for x, place in zip([x for result in results for x in result], places, strict=True)
  ]
  flat = _mesh.collect_each(flat, [place.cut.axes for place in places], collective)
  count = len(results[0])
  columns = []
  for column in range(count):
    found: list[list[tuple[Array, int | None]]] = [[] for _ in layout.blocks]
    for x, m in zip(flat[column::count], members, strict=True):
      found[m.place.block].append((x, m.place.entry))
    pairs = zip(found, layout.blocks, strict=True)
    columns.append([_joined(x, block.shape, merge) for x, block in pairs])
  return columns


def _apart(units: Sequence[Array]) -> list[Array]:
  """Gives each bundle a scalar unit of its own where several share one.

  XLA:CPU writes a shared one to memory, at the size of the array that it divides.
  """
  scalars = [unit for unit in units if not unit.ndim]
  if len({id(unit) for unit in scalars}) == len(scalars):
    return list(units)
  own = iter(_scalars.columns([jnp.stack(scalars)]))
  return [unit if unit.ndim else next(own)[0] for unit in units]


def _joined(
  values: Sequence[tuple[Array, int | None]],
  shape: tuple[int, ...],
  merge: Callable[..., Array],
) -> Array:
  """Joins the results of the parts to their block."""
  arrays = [x for x, _ in values]
  if any(index is not None for _, index in values):
    index = [i or 0 for _, i in values]
    return _power_sums.segment(merge, jnp.stack(arrays), index, shape[0])
  return arrays[0] if len(arrays) == 1 else merge(jnp.stack(arrays))


def _elements(arrays: Sequence[Array], layout: Layout) -> list[Any]:
  """Counts the elements behind each entry of each block, on all devices."""
  found: list[Any] = [
    [0] * block.shape[0] if len(block.shape) == 1 else 0 for block in layout.blocks
  ]
  for x, p in zip(arrays, layout.places, strict=True):
    kept = [n for i, n in enumerate(x.shape) if p.dims is None or i in p.dims]
    elements = math.prod(kept) * _mesh.devices(p.cut.within)
    if p.entry is None:
      previous = found[p.block] if not layout.blocks[p.block].shape else 0
      found[p.block] = previous + elements
    else:
      found[p.block][p.entry] += elements
  # As floats: there may be more elements than an int32 counts.
  return [np.asarray(x, np.float64) for x in found]
