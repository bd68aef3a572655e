"""What the state records about each step, with arithmetic that clipping does anyway."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from optax_clip._algebra.slots import RATE_WEIGHT
from optax_clip._algebra.slots import Slots
from optax_clip._norms import extended as _extended
from optax_clip._norms import mesh as _mesh
from optax_clip._norms.extended import Extended
from optax_clip._norms.joint import Joint

Array = jax.Array


class Record(NamedTuple):
  """Records what clipping did; with several norms, the worst of them.

  It has vectors in place of a scalar for each entry: a TPU has a kernel for each
  operation on a scalar, and every leaf of a state costs time at each call of a step.
  `metrics` takes them apart.

  Attributes:
    shown: f32[5], of the last step: the largest ``norm`` before clipping; the smallest
      ``limit``; the smallest ``coefficient``; ``norm_after``, the largest norm after
      clipping; ``clipped_fraction``, the share of norms above their limit.
    rates: f32[2], ``clip_rate`` and ``nonfinite_rate``, the shares of steps that
      clipped, and that had a NaN or an inf: running averages that start at 0 and forget
      1% in each step. `reported` divides them by the sum of all steps' weights, so that
      the share is that of all steps at first, and of the last 100 or so later.
    counts: i32[7], ``steps``; ``steps_clipped`` and ``steps_nonfinite``, how many of
      them there were; ``last_clipped`` and ``last_nonfinite``, the last one, counted
      from 1, or 0; ``clipped`` and ``nonfinite``, 1 if the last step was one, else 0.
  """

  shown: Array
  rates: Array
  counts: Array

  def entries(self) -> dict[str, Array]:
    """Names the entries; of a stack of records, the stacks."""
    return _SLOTS.entries(self)


_SLOTS = Slots(
  shown=("norm", "limit", "coefficient", "norm_after", "clipped_fraction"),
  rates=("clip_rate", "nonfinite_rate"),
  counts=(
    *("steps", "steps_clipped", "steps_nonfinite", "last_clipped", "last_nonfinite"),
    *("clipped", "nonfinite"),
  ),
)
# How often steps were of each kind, and the last one of a kind.
_STEPS = _SLOTS.span("steps", "steps_nonfinite")
_LAST_ONES = _SLOTS.span("last_clipped", "last_nonfinite")


def blank() -> Record:
  """Makes the record before the first step."""
  return Record(**_SLOTS.blank(coefficient=1))


class Effect(NamedTuple):
  """Holds the factors of a block's norms, and the norms after clipping.

  Attributes:
    both: two arrays; for a scalar norm one array of both: on a TPU every operation on a
      scalar is a kernel.
  """

  both: Array | tuple[Array, Array]

  def factor(self) -> Array:
    """Returns the factor of each norm."""
    return self.both[0]

  def zeroed(self, finite: Array) -> "Effect":
    """Makes the norms after clipping those of zeros, unless the step is finite."""
    if isinstance(self.both, tuple):
      factor, after = self.both
      return Effect((factor, jnp.where(finite, after, jnp.zeros_like(after))))
    stays = jnp.stack([jnp.asarray(True), finite])
    return Effect(jnp.where(stays, self.both, jnp.zeros_like(self.both)))


def effect(norm: Extended, coefficient: Extended) -> Effect:
  """Multiplies the norms of a block by their coefficients."""
  if norm.value.ndim:
    factor = coefficient.value * coefficient.unit
    return Effect((factor, _product(norm, coefficient)))
  beside = Extended(*(jnp.stack([jnp.ones_like(x), x]) for x in norm))
  return Effect(_product(beside, coefficient))


def _product(norm: Extended, coefficient: Extended) -> Array:
  """Multiplies two numbers, in an order in which no product leaves the range."""
  value, unit = norm.value * coefficient.unit, coefficient.value * norm.unit
  return _extended.as_float(Extended(value, unit))


def _worst(effects: Sequence[Effect], together: bool) -> Array:
  """Returns the smallest factor and the largest norm after clipping."""
  if len(effects) == 1 and not isinstance(effects[0].both, tuple):
    return effects[0].both
  rows = (_side_by_side([x.both[i] for x in effects], together) for i in range(2))
  folds = zip((jnp.min, jnp.max), rows, strict=True)
  return jnp.stack([_fold(fold, row) for fold, row in folds])


def noted(
  last: Record,
  norms: Sequence[Array],
  limits: Sequence[Array],
  effects: Sequence[Effect],
  finite: Array,
) -> Record:
  """Notes one more step in a record.

  Args:
    last: the record before it.
    norms: the norms as floats, in arrays.
    limits: for each of these arrays its limits, which broadcast to it.
    effects: for each of these arrays what became of it.
    finite: bool[], whether all norms are finite.
  """
  count = sum(x.size for x in norms)
  if not count:
    return last._replace(counts=last.counts + _SLOTS.blank(steps=1)["counts"])
  together = _mesh.on_one_device(jax.tree.leaves((norms, limits, effects)))
  # Where dtypes differ, each block has the limit as its dtype rounds it.
  if any(x.ndim for x in limits) or len({x.dtype for x in norms}) > 1:
    pairs = zip(norms, limits, strict=True)
    whole = [jnp.broadcast_to(x, n.shape) for n, x in pairs]
    limits = _side_by_side(whole, together)
  norms = _side_by_side(norms, together)
  # A limit that is the same for all norms is one scalar.
  each = limits if len(limits) == len(norms) else [limits[0]] * len(norms)
  above = [n > x.astype(n.dtype) for n, x in zip(norms, each, strict=True)]
  number_above = _fold(jnp.sum, [x.astype(jnp.float32) for x in above])
  # With one norm this needs no other comparison.
  clipped = above[0].reshape(()) if count == 1 else number_above > 0
  happened = jnp.stack([jnp.asarray(True), finite & clipped, ~finite])
  counts = counted(happened, last.counts[_STEPS])
  latest = jnp.where(happened[1:], counts[:1], last.counts[_LAST_ONES])
  flags = happened[1:].astype(jnp.int32)
  worst = _worst(effects, together)
  # In the order of their names.
  shown = [
    single(_fold(jnp.max, norms))[None],
    single(_fold(jnp.min, [x.astype(norms[0].dtype) for x in limits]))[None],
    single(worst),
    (number_above / count)[None],
  ]
  return Record(
    shown=jnp.concatenate(shown),
    rates=rate(last.rates, happened[1:]),
    counts=jnp.concatenate([counts, latest, flags]),
  )


def rate(last: Array, happened: Array) -> Array:
  """Averages whether something happened, from 0 on; see `reported`."""
  return last + RATE_WEIGHT * (happened.astype(jnp.float32) - last)


def single(x: Array) -> Array:
  """Converts to float32; a finite number, however large, does not become inf."""
  if x.dtype == jnp.float32:
    return x
  largest = float(jnp.finfo(jnp.float32).max)
  limited = jnp.clip(x, -largest, largest)
  return jnp.where(jnp.isfinite(x), limited, x).astype(jnp.float32)


def counted(happened: Array, counter: Array) -> Array:
  """Adds one to the counter if it happened."""
  grows = happened & (counter < jnp.iinfo(jnp.int32).max)
  return counter + grows.astype(counter.dtype)


def all_finite(norms: Sequence[Array]) -> Array:
  """Returns whether all norms are finite; true if there are none."""
  if not any(x.size for x in norms):
    return jnp.asarray(True)
  # The record needs the largest anyway, and NaN is larger than all.
  return jnp.isfinite(_fold(jnp.max, _side_by_side(norms, _mesh.on_one_device(norms))))


def _side_by_side(arrays: Sequence[Array], together: bool) -> list[Array]:
  """Joins arrays where that moves no data between devices, to make few kernels."""
  arrays = [x for x in arrays if x.size]
  if len({x.dtype for x in arrays}) > 1:
    arrays = [x.astype(jnp.float64) for x in arrays]
  if len(arrays) == 1 or not together:
    return arrays
  # In the order of other vectors: where arrays are parts of one, XLA takes it whole.
  joint = Joint.of([x.shape for x in arrays])
  # Without the barrier XLA reduces each on its own again.
  return [lax.optimization_barrier(joint.joined(arrays))]


def _fold(reduce: Callable[[Array], Array], arrays: Sequence[Array]) -> Array:
  """Reduces arrays to a scalar: each first, as their shardings may differ."""
  if len(arrays) == 1:
    return reduce(arrays[0])
  return reduce(jnp.stack([reduce(x) for x in arrays]))
