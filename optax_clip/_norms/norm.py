"""How the leaves of a tree become norms: reduce, merge, collect, take one root.

A norm here is a monoid: it reduces each array on its own, merges the partial results
over arrays, collects them over devices, and finishes with one root::

    arrays --local--> moments --merge, collect--> blocks --root--> norms

What makes it right in every dtype lives here, in `power_sums` and in `range`:

* *Accumulation.* Moments are float32 or better (float64 for float64 arrays), within
  an array and across arrays. No sum is ever bfloat16 or float16.
* *Range.* Squares of float32 values over- and underflow: `range` says how each backend
  prevents it with one read.
* *Wide results.* The 2-norm of finite float32 values may itself exceed the largest
  float32: a norm is an `Extended`.
* *Derivatives.* They are the norm's, however it was computed: x / n, and 0 where n is
  0 or not finite.

Precision relies on XLA's blocked reductions, which keep the relative error of 1e8
float32 squares below 1e-7 (measured; a test and a benchmark watch it).
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import math
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from optax_clip import _backend
from optax_clip._norms import extended as _extended
from optax_clip._norms import mesh as _mesh
from optax_clip._norms import power_sums as _power_sums
from optax_clip._norms import range as _range
from optax_clip._norms import scalars as _scalars
from optax_clip._norms.blocks import Norms
from optax_clip._norms.extended import Extended
from optax_clip._norms.layout import Block
from optax_clip._norms.layout import Layout
from optax_clip._norms.layout import Place

Array = jax.Array
# Arrays of at most this many elements are concatenated before they are reduced.
_SMALL = 1 << 14
# The most elements of one concatenation, which may need a temporary (256 KiB).
_BUCKET = 1 << 16


def plain(leaves: Sequence[Array], layout: Layout, ord: float) -> list[Array]:
  """Is this module where nothing over- or underflows, on one device."""
  found = [jnp.zeros(*block) for block in layout.blocks]
  for x, place in zip(leaves, layout.places, strict=True):
    moduli = jnp.abs(x).astype(found[place.block].dtype)
    over, entry = place.dims, () if place.entry is None else place.entry
    if ord == math.inf:
      largest = jnp.max(moduli, axis=over, keepdims=over is not None)
      found[place.block] = found[place.block].at[entry].max(largest)
    else:
      moment = jnp.sum(moduli**ord, axis=over, keepdims=over is not None)
      found[place.block] = found[place.block].at[entry].add(moment)
  return found if ord == math.inf else [moment ** (1 / ord) for moment in found]


class _Static(NamedTuple):
  """Holds all that decides the program beside its inputs; hashable."""

  layout: Layout
  ord: float
  concatenate: bool
  forms: tuple[str | None, bool]


class _Member(NamedTuple):
  """Pairs arrays that reduce together with the place of their result."""

  bundle: _range.Bundle
  place: Place


def of_layout(leaves: Sequence[Array], layout: Layout, ord: float) -> Norms:
  """Measures leaves.

  Args:
    leaves: floating or complex arrays.
    layout: where their norms are stored; an entry without a leaf is 0.
    ord: any positive real, or `math.inf`.
  """
  if not leaves:
    nothing = [_extended.of(jnp.zeros(*block)) for block in layout.blocks]
    return Norms(nothing, layout)
  # Asked here: inside `jit` arrays do not know their devices.
  concatenate = _mesh.on_one_device(leaves)
  static = _Static(layout, ord, concatenate, _backend.forms())
  return Norms(_compiled(tuple(leaves), static=static), layout)


def over_dims(
  leaves: Sequence[Array], dims: Sequence[tuple[int, ...]], ord: float = 2.0
) -> list[Extended]:
  """Measures each leaf over some dimensions, which stay with size 1."""
  places, blocks = [], []
  for i, (x, over) in enumerate(zip(leaves, dims, strict=True)):
    places.append(Place(i, None, over, _mesh.Cut(), 0))
    kept = tuple(1 if d in over else n for d, n in enumerate(x.shape))
    blocks.append(Block(kept, _power_sums.accumulator(x.dtype)))
  return list(of_layout(leaves, Layout(tuple(places), tuple(blocks)), ord).blocks)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def merged(norms: Extended, ord: float) -> Extended:
  """Merges the norms of parts, along axis 0, into the norm of the whole; ord >= 1."""
  unit = jnp.max(jnp.where(norms.value > 0, norms.unit, 0), axis=0, keepdims=True)
  unit = jnp.where(unit > 0, unit, 1)
  scaled = norms.value * (norms.unit / unit)
  largest = jnp.max(scaled, axis=0, initial=0)
  if ord == math.inf:
    return Extended(largest, unit[0])
  # The values of plain norms go from 1e-37 to 1e38, whose squares leave the range:
  # take them in units of the largest.
  peak = jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1)
  power = _power_sums.power(scaled / peak[None], ord, scaled.dtype)
  moment = jnp.sum(power, axis=0)
  return Extended(_power_sums.root(moment, ord) * peak, unit[0])


@merged.defjvp
def _merged_jvp(
  ord: float, primals: tuple[Extended], tangents: tuple[Extended]
) -> tuple[Extended, Extended]:
  (norms,), (dots,) = primals, tangents
  total = merged(norms, ord)
  # In units of the total, so that all stay in range.
  relative = norms.unit / total.unit[None]
  value = jnp.broadcast_to(total.value[None], norms.value.shape)
  share = _slope(norms.value * relative, _extended.of(value), ord)
  slope = jnp.sum(share * dots.value * relative, axis=0)
  return total, Extended(slope, jnp.zeros_like(total.unit))


# `jit` so that eager callers compile it once, not at every call. Inside another `jit`
# it is inlined and leaves no trace.
@functools.partial(jax.jit, static_argnames=("static",), inline=True)
def _compiled(arrays: tuple[Array, ...], *, static: _Static) -> list[Extended]:
  return _measured(static, arrays)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _measured(static: _Static, arrays: tuple[Array, ...]) -> list[Extended]:
  layout, ord, concatenate, _ = static
  dtype = _power_sums.accumulator(*(x.dtype for x in arrays))
  members = _members(arrays, layout.places, dtype, concatenate)
  reduction = _range.Reduction(
    run=functools.partial(_run, layout, members),
    elements=_elements(arrays, layout),
    dtypes=[x.dtype for x in arrays],
    dtype=dtype,
    is_whole=all(p.dims is None for p in layout.places),
  )
  found = _range.norms(reduction, ord)
  return [
    Extended(*(x.astype(block.dtype) for x in norm))
    for norm, block in zip(found, layout.blocks, strict=True)
  ]


@_measured.defjvp
def _measured_jvp(
  static: _Static, primals: tuple[Any], tangents: tuple[Any]
) -> tuple[list[Extended], list[Extended]]:
  (arrays,), (dots,) = primals, tangents
  layout, ord, *_ = static
  norms = _measured(static, arrays)

  def summed(term: Callable[[Array, Array, Extended], Array]) -> list[Array]:
    terms = [
      term(x, dot, norm)
      for x, dot, norm in zip(arrays, dots, Norms(norms, layout).spread(), strict=True)
    ]
    members = [
      _Member(_range.Bundle([x], p.dims), p)
      for x, p in zip(terms, layout.places, strict=True)
    ]

    def local(bundle: _range.Bundle, unit: Any) -> list[Array]:
      del unit
      return [_power_sums.over_axes(jnp.sum, bundle.arrays[0], bundle.dims)]

    merge = functools.partial(jnp.sum, axis=0)
    (blocks,) = _run(layout, members, local, lax.psum, merge, None)
    return blocks

  slopes = summed(lambda x, dot, norm: _along(_slope(x, norm, ord), dot))
  if ord == math.inf:
    # Elements that tie for the largest share the derivative.
    counts = summed(lambda x, dot, norm: _is_largest(x, norm).astype(norm.value.dtype))
    slopes = [
      s / jnp.maximum(count, 1) for s, count in zip(slopes, counts, strict=True)
    ]
  return norms, [
    Extended(slope.astype(norm.value.dtype) / norm.unit, jnp.zeros_like(norm.unit))
    for slope, norm in zip(slopes, norms, strict=True)
  ]


def _slope(x: Array, norm: Extended, ord: float) -> Array:
  """Differentiates a norm by an element: ``sign(x) (|x| / n) ** (ord - 1)``."""
  usable = jnp.isfinite(norm.value) & (norm.value > 0)
  wide = _wide(x, norm.value.dtype)
  safe = jnp.where(usable, wide, jnp.zeros_like(wide))
  unit, value = (jnp.where(usable, y, 1).astype(wide.dtype) for y in reversed(norm))
  share = safe / unit / value
  if ord == 2:
    return share
  modulus = jnp.abs(share)
  present = modulus > 0
  sign = share / jnp.where(present, modulus, 1).astype(share.dtype)
  if ord == math.inf:
    weight = (_is_largest(x, norm) & present).astype(modulus.dtype)
  else:
    weight = jnp.where(present, jnp.where(present, modulus, 1) ** (ord - 1), 0)
  return sign * weight.astype(share.dtype)


def _is_largest(x: Array, norm: Extended) -> Array:
  return _power_sums.modulus(x, norm.value.dtype) == norm.value


def _along(slope: Array, dot: Array) -> Array:
  if jnp.iscomplexobj(slope):
    # JAX's tangents of complex numbers are complex, but this derivative is real.
    return slope.real * dot.real.astype(slope.real.dtype) + slope.imag * (
      dot.imag.astype(slope.imag.dtype)
    )
  return slope * dot.astype(slope.dtype)


def _wide(x: Array, dtype: Any) -> Array:
  """Casts an array to the precision of a dtype; a complex one stays complex."""
  if not jnp.iscomplexobj(x):
    return x.astype(dtype)
  return x.astype(jnp.complex128 if dtype == jnp.float64 else jnp.complex64)


def _members(
  arrays: Sequence[Array], places: Sequence[Place], dtype: Any, concatenate: bool
) -> list[_Member]:
  """Bundles arrays: each large one alone, small ones of one norm concatenated.

  XLA compiles a norm over 2,000 small arrays in 20 seconds, worse than linear in
  their number; over a few concatenations it takes two. Arrays that may be sharded
  (`concatenate=False`) stay apart: concatenating could move them between devices.
  """
  found: list[_Member] = []
  buckets: dict[Any, list[tuple[Array, Place]]] = {}

  def close(key: Any) -> None:
    small, ((_, place), *_) = [x for x, _ in buckets[key]], buckets[key]
    del buckets[key]
    if concatenate and len(small) > 1:
      small = [jnp.concatenate([_wide(x, dtype).ravel() for x in small])]
    found.append(_Member(_range.Bundle(small, None), place))

  for x, place in zip(arrays, places, strict=True):
    if x.size > _SMALL or place.dims is not None:
      found.append(_Member(_range.Bundle([x], place.dims), place))
      continue
    key = (place.block, place.entry, place.cut, jnp.iscomplexobj(x))
    if sum(y.size for y, _ in buckets.get(key, ())) + x.size > _BUCKET:
      close(key)
    buckets.setdefault(key, []).append((x, place))
  for key in list(buckets):
    close(key)
  # In this order `segment` has nothing to do where each entry is one bundle.
  return sorted(found, key=lambda m: (m.place.block, m.place.entry or 0))


def _run(
  layout: Layout,
  members: Sequence[_Member],
  local: _range.Local,
  collective: Callable[..., Array],
  merge: Callable[..., Array],
  units: Sequence[Array] | None,
) -> list[list[Array]]:
  """Reduces each bundle, with one collective for each set of mesh axes.

  Returns:
    For each array that `local` returns, its blocks.
  """
  own: Sequence[Array | None] = [None] * len(members)
  if units is not None:
    by_place = dict(zip(layout.places, Norms(units, layout).spread(), strict=True))
    own = _apart([by_place[m.place] for m in members])
  reduced = {
    dims: _backend.traced_once(
      lambda arrays, unit, dims=dims: local(_range.Bundle(arrays, dims), unit)
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

  XLA:CPU materialises a shared one at the size of what it divides.
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
