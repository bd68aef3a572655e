"""How a sum of squares avoids overflow and underflow: one form for each backend.

A sum of squares of float32 values over- and underflows for values beyond about 1e19
and below about 1e-19. Measuring the largest element first would be a second read at
every step. Which form costs nothing instead depends on the compiler:

* CPU, `rescued`: the plain sum; and *only if it left the safe range*, a sum in float64
  replaces it (`lax.cond`). XLA:CPU vectorises the sum of ``x * x`` and of little else,
  and pays nothing for a branch that it does not take, but the time to compile it: one
  sum takes half of what two in units of the largest element take.
* GPU of NVIDIA or AMD, `doubled`: the sum in float64, whose range no square of a
  float32 leaves. It reads elements in their own dtype. A `cond` would copy its
  predicate to the host and stop it in every step (and XLA runs both branches of some).
  Float64 runs at half the float32 rate on data-centre cards, much faster than their
  memory delivers elements. Other cards have 1/32 or 1/64 of it and sum whole arrays
  `tripled`: ``benchmarks/NOTES.md`` estimates why. Along an axis `rows` comes first.
* TPU, and GPU of Intel, `tripled`: three sums with constant units, from one read; one
  is chosen. A TPU has no float64, nor have some GPUs of Intel. On a TPU this compiles
  to fewer kernels than a plain sum with a branch.

Powers above 2 leave any range, which one read cannot prevent: `scaled` reads twice on
every backend, first for the largest element.

All forms agree with the sum in float64 to 1e-6, relative.
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
from optax_clip._norms import rows as _rows
from optax_clip._norms import scalars as _scalars
from optax_clip._norms.bundles import Bundle
from optax_clip._norms.bundles import Reduction
from optax_clip._norms.extended import Extended
from optax_clip._norms.joint import Joint
from optax_clip._types import DType

Array = jax.Array


class _How(NamedTuple):
  """Says how a backend adds up.

  Attributes:
    products: whether small arrays are summed by a dot product.
    is_single: whether float64 is missing, or no wider than the norms.
    sums: how many sums along an axis at once are enough, for `rows`; 0: any number.
    pairs: whether arithmetic on single numbers is done `_scalars.in_pairs`.
  """

  products: bool
  is_single: bool
  sums: int
  pairs: bool


def norms(reduction: Reduction, ord: float) -> list[Extended]:
  """Computes the norms of each block, in the form of the target backend."""
  square = ord == 2
  if ord == math.inf:
    cpu = gpu = tpu = oneapi = _peaks
  elif ord > 2:
    cpu = gpu = tpu = oneapi = _scaled
  elif ord >= 1 and all(dtype == jnp.float16 for dtype in reduction.dtypes):
    # No sum of these leaves the range of float32.
    cpu = gpu = tpu = oneapi = _plain
  else:
    cpu = _rescued
    tpu = _tripled if square else _rescued
    # Without float64, which those of Intel may not have.
    oneapi = gpu = _tripled if square else _scaled
    if reduction.dtype != jnp.float64:
      slow = square and reduction.is_whole and not _backend.has_fast_float64()
      gpu = _tripled if slow else _doubled
  forms = {"cpu": cpu, "gpu": gpu, "rocm": gpu, "oneapi": oneapi, "tpu": tpu}
  kinds = {name: (form, _how(name, reduction)) for name, form in forms.items()}
  # One function for like kinds: JAX traces a function once.
  made = {
    kind: functools.partial(kind[0], reduction, ord, kind[1]) for kind in kinds.values()
  }
  return _backend.by_backend(**{name: made[kind] for name, kind in kinds.items()})


def _how(backend: str, reduction: Reduction) -> _How:
  # On a GPU a dot product would be a library call. (A forced form runs on a CPU, whose
  # short sums are serial.)
  products = backend == "cpu" or _backend.forced() is not None
  is_single = backend != "cpu" or reduction.dtype == jnp.float64
  sums = 0 if reduction.is_whole else _rows.SUMS.get(backend, 0)
  if backend == "gpu" and _backend.has_fast_float64():
    # In float32 XLA squares and adds in one kernel there.
    sums *= any(dtype.itemsize == 2 for dtype in reduction.dtypes)
  return _How(products, is_single, sums, backend == "tpu")


def _peaks(reduction: Reduction, ord: float, how: _How) -> list[Extended]:
  del ord, how
  return [_extended.of(x) for x in _largest(reduction)]


def _plain(reduction: Reduction, ord: float, how: _How) -> list[Extended]:
  moments = _moments(reduction, ord, how)
  return [_root(x, jnp.ones_like(x), ord) for x in moments]


def _scaled(
  reduction: Reduction,
  ord: float,
  how: _How,
  joined: Callable[[list[Array]], list[Array]] = list,
) -> list[Extended]:
  moments, units = map(joined, _in_units(reduction, ord, how))
  return [_root(*x, ord) for x in zip(moments, units, strict=True)]


def _rescued(reduction: Reduction, ord: float, how: _How) -> list[Extended]:
  moments = _moments(reduction, ord, how)
  # Few results of a branch are compiled fast, if what takes them apart is, too.
  joint = _side_by_side(moments) if _backend.keeps_functions() else None

  def joined(blocks: list[Array]) -> list[Array]:
    return [lax.optimization_barrier(joint.joined(blocks))] if joint else blocks

  def rescue() -> list[Extended]:
    # XLA runs both branches where one holds only reductions and arithmetic, unless a
    # barrier hides what it returns.
    again = _scaled if how.is_single else _widened
    return list(lax.optimization_barrier(again(reduction, ord, how, joined)))

  def keep() -> list[Extended]:
    return [_root(x, jnp.ones_like(x), ord) for x in vectors]

  vectors, elements = joined(moments), reduction.elements
  if joint:
    elements = [max(np.max(x) for x in elements)]
  found = list(lax.cond(_out_of_range(vectors, elements), rescue, keep))
  return joint.split_tree(*found) if joint else found


def _widened(
  reduction: Reduction,
  ord: float,
  how: _How,
  joined: Callable[[list[Array]], list[Array]],
) -> list[Extended]:
  """Sums in float64: on a CPU slower to run, and faster to compile, than two sums."""
  with jax.enable_x64(True):
    moments = joined(_moments_in_float64(reduction, ord, how, once=True))
    return [_narrowed(x, reduction.dtype, ord) for x in moments]


def _doubled(reduction: Reduction, ord: float, how: _How) -> list[Extended]:
  with jax.enable_x64(True):
    moments = _moments_in_float64(reduction, ord, how)

    def of_one(x: Array) -> Extended:
      found = _narrowed(x, reduction.dtype, ord)
      # Else XLA:GPU fuses the sums of all leaves into the kernel of the coefficients,
      # which then repeats its arithmetic for each leaf: 300 KB of code, and most of the
      # time to compile a step.
      return _scalars.written(found) if x.ndim == 1 and x.size > 1 else found

    joint = _side_by_side(moments)
    if joint is None:
      return [of_one(x) for x in moments]
    return joint.split_tree(of_one(joint.joined(moments)))


def _side_by_side(blocks: Sequence[Array]) -> Joint | None:
  """Lays several blocks of one device side by side, to make few kernels of them."""
  if len(blocks) == 1 or not _mesh.on_one_device(blocks):
    return None
  return Joint.of([x.shape for x in blocks])


def _moments_in_float64(
  reduction: Reduction, ord: float, how: _How, *, once: bool = False
) -> list[Array]:
  def local(bundle: Bundle, unit: Any) -> list[Array]:
    del unit
    powers = [_power_sums.power(x, ord, jnp.dtype(jnp.float64)) for x in bundle.arrays]
    sums = [_total(x, bundle.dims, how) for x in powers]
    return [functools.reduce(jnp.add, sums)]

  (moments,) = reduction.run(local, lax.psum, _sum, None, once=once)
  return moments


def _narrowed(moment: Array, dtype: DType, ord: float) -> Extended:
  """Takes the root of a moment in float64."""
  return _extended.from_float(_power_sums.root(moment, ord), dtype)


def _tripled(reduction: Reduction, ord: float, how: _How) -> list[Extended]:
  dtype = reduction.dtype
  info = jnp.finfo(dtype)
  # 2^-90 and 2^70 for float32: no square of an element leaves the range in all three
  # units, and where one sum is unsafe, its neighbour is safe.
  down, up = 2.0 ** -(info.maxexp * 45 // 64), 2.0 ** (info.maxexp * 35 // 64)

  def local(bundle: Bundle, unit: Any) -> list[Array]:
    del unit
    sums = [_three_sums(x, dtype, bundle.dims, down, up, how) for x in bundle.arrays]
    return [functools.reduce(jnp.add, column) for column in zip(*sums, strict=True)]

  def merge(sums: Array) -> Array:
    # Without the barrier XLA adds scalar to scalar, each in a kernel on a TPU.
    return _sum(lax.optimization_barrier(sums))

  def chosen(least: Array, x: Array, small: Array, large: Array) -> Extended:
    too_large = ~(x <= float(info.max) / 2)
    too_small = x < least
    moment = jnp.where(too_large, small, jnp.where(too_small, large, x))
    unit = jnp.where(too_large, 1 / down, jnp.where(too_small, 1 / up, 1))
    return _root(moment, unit.astype(dtype), 2)

  def of_sums(count: Any, *sums: Array) -> Extended:
    found = functools.partial(chosen, _least(dtype, count))
    is_single = how.pairs and sums[0].size == 1
    return (_scalars.in_pairs(found) if is_single else found)(*sums)

  columns = reduction.run(local, lax.psum, merge, None)
  # Sums that come in two rounds would hold those of the first for all leaves at once.
  joint = None if how.sums else _side_by_side(columns[0])
  if joint is None:
    rows = zip(reduction.elements, *columns, strict=True)
    return [of_sums(count, *sums) for count, *sums in rows]
  counts = joint.joined(list(map(jnp.asarray, reduction.elements)))
  return joint.split_tree(of_sums(counts, *map(joint.joined, columns)))


def _three_sums(
  x: Array,
  dtype: Any,
  dims: tuple[int, ...] | None,
  down: float,
  up: float,
  how: _How,
) -> list[Array]:
  """Sums the squares of ``|x|``, as it is and in two scales; XLA reads x once."""
  # Not one reduction with three results: XLA would gather an x that is sharded along a
  # reduced dimension.
  parts = (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)

  def total(scaled: Callable[[Array], Array]) -> Array:
    wide = [scaled(y.astype(dtype)) for y in parts]
    if how.products and dims is None:
      return functools.reduce(
        jnp.add, [_power_sums.power_sum(y, 2, dtype) for y in wide]
      )
    return _total(functools.reduce(jnp.add, map(jnp.square, wide)), dims, how)

  # The bounds change no sum that is chosen. They keep XLA from squaring first and
  # multiplying by the square of the scale, which is out of range.
  return [
    total(lambda y: y),
    total(lambda y: jnp.maximum(jnp.abs(y) * down, down)),
    total(lambda y: jnp.minimum(jnp.abs(y) * up, up)),
  ]


def _moments(
  reduction: Reduction, ord: float, how: _How, units: Any = None
) -> list[Array]:
  def local(bundle: Bundle, unit: Array | None) -> list[Array]:
    def total(x: Array) -> Array:
      if how.products and bundle.dims is None:
        return _power_sums.power_sum(x, ord, reduction.dtype, unit)
      return _total(_power_sums.power(x, ord, reduction.dtype, unit), bundle.dims, how)

    return [functools.reduce(jnp.add, map(total, bundle.arrays))]

  (moments,) = reduction.run(local, lax.psum, _sum, units)
  return moments


def _in_units(
  reduction: Reduction, ord: float, how: _How
) -> tuple[list[Array], list[Array]]:
  """Returns the moments in units of the largest elements, and these units."""
  units = [_extended.power_of_two(x) for x in _largest(reduction)]
  return _moments(reduction, ord, how, units), units


def _largest(reduction: Reduction) -> list[Array]:
  def local(bundle: Bundle, unit: Any) -> list[Array]:
    del unit
    peaks = [
      _power_sums.over_axes(
        jnp.max, _power_sums.modulus(x, reduction.dtype), bundle.dims
      )
      for x in bundle.arrays
    ]
    return [functools.reduce(jnp.maximum, peaks)]

  merge = functools.partial(jnp.max, axis=0)
  (peaks,) = reduction.run(local, lax.pmax, merge, None)
  return peaks


def _total(power: Array, dims: tuple[int, ...] | None, how: _How) -> Array:
  if how.sums and dims is not None:
    return _rows.total(power, dims, how.sums)
  return _power_sums.over_axes(jnp.sum, power, dims)


_sum = functools.partial(jnp.sum, axis=0)


def _root(moment: Array, unit: Array, ord: float) -> Extended:
  return Extended(*_power_sums.root_and_unit(moment, unit, ord))


def _least(dtype: DType, elements: Any) -> Array:
  """Returns the bound below which a sum of powers loses precision to underflow.

  Every term may lose up to the smallest normal float. At the bound, all of these
  losses together are one rounding error of the sum.
  """
  info = jnp.finfo(dtype)
  return jnp.asarray(elements, dtype) * (info.tiny / info.eps)


def _out_of_range(moments: Sequence[Array], elements: Sequence[Any]) -> Array:
  """Returns whether a moment overflowed, or is so small that it lost precision.

  A zero beside nonzero moments counts as a true zero (an expert that no token reached,
  a dead unit), not as an underflow, which hides elements below about 1e-19 at most.
  If all are zero, they count as out of range, for a second measurement.
  """
  if len(moments) > 1 and _mesh.on_one_device(moments):
    # Side by side: XLA compiles few kernels, and not some for each.
    joined = jnp.concatenate([x.ravel() for x in moments])
    moments = [lax.optimization_barrier(joined)]
    elements = [max(np.max(x) for x in elements)]
  strayed, zero = [jnp.asarray(False)], []
  for moment, count in zip(moments, elements, strict=True):
    if moment.size:
      low = (moment > 0) & (moment < _least(moment.dtype, count))
      strayed.append(jnp.any(~jnp.isfinite(moment) | low))
      zero.append(jnp.all(moment == 0))
  nothing = jnp.all(jnp.stack(zero)) if zero else jnp.asarray(False)
  return jnp.any(jnp.stack(strayed)) | nothing
