"""How the leaves of a tree become norms: reduce, merge, collect, take one root.

A norm here is a monoid: it reduces each array on its own, merges the partial results
over arrays, collects them over devices, and finishes with one root::

    arrays --local--> moments --merge, collect--> blocks --root--> norms

What makes it right in every dtype lives here, in `power_sums` and in `sums_by_backend`:

* *Accumulation.* Moments are float32 or better (float64 for float64 arrays), within
  an array and across arrays. No sum is ever bfloat16 or float16.
* *Range.* Squares of float32 values over- and underflow: `sums_by_backend` says how
  each prevents it with one read.
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

from optax_clip import _backend
from optax_clip._norms import bundles as _bundles
from optax_clip._norms import extended as _extended
from optax_clip._norms import mesh as _mesh
from optax_clip._norms import power_sums as _power_sums
from optax_clip._norms import sums_by_backend as _sums
from optax_clip._norms.blocks import Norms
from optax_clip._norms.bundles import Bundle
from optax_clip._norms.bundles import Member
from optax_clip._norms.extended import Extended
from optax_clip._norms.layout import Block
from optax_clip._norms.layout import Layout
from optax_clip._norms.layout import Place

Array = jax.Array


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
  reduction = _bundles.reduction(arrays, layout, concatenate=concatenate)
  found = _sums.norms(reduction, ord)
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
      Member(Bundle([x], p.dims), p) for x, p in zip(terms, layout.places, strict=True)
    ]

    def local(bundle: Bundle, unit: Any) -> list[Array]:
      del unit
      return [_power_sums.over_axes(jnp.sum, bundle.arrays[0], bundle.dims)]

    merge = functools.partial(jnp.sum, axis=0)
    (blocks,) = _bundles.run(layout, members, local, lax.psum, merge, None)
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
  wide = _power_sums.widened(x, norm.value.dtype)
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
