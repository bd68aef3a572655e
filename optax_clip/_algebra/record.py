"""What the state records about each step, with arithmetic that clipping does anyway."""

from collections.abc import Callable
from collections.abc import Sequence
import math
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from optax_clip._norms import extended as _extended
from optax_clip._norms import mesh as _mesh
from optax_clip._norms.extended import Extended

Array = jax.Array
# How much of a rate is of the last step.
_RATE_WEIGHT = 0.01

# Follows a record's name in the key of its record of layers.
LAYERS = "/layers"


class Record(NamedTuple):
  """Records what clipping did; with several norms, the worst of them.

  It has vectors, and no scalar for each entry: a TPU has a kernel for each operation on
  a scalar, and every leaf of a state costs time at each call of a step. `metrics` takes
  them apart.

  Attributes:
    shown: f32[5], of the last step: the largest ``norm`` before clipping; the smallest
      ``limit``; the smallest ``coefficient``; ``norm_after``, the largest norm after
      clipping; ``clipped_fraction``, the share of norms above their limit.
    rates: f32[2], ``clip_rate`` and ``nonfinite_rate``, the shares of steps that
      clipped, and that had a NaN or an inf: running averages that start at 0 and forget
      1% in each step. `reported` divides them by what the weights of all steps add up
      to, so that the share is that of all steps at first, of the last 100 or so later.
    counts: i32[7], ``steps``; ``steps_clipped`` and ``steps_nonfinite``, how many of
      them there were; ``last_clipped`` and ``last_nonfinite``, the last one, counted
      from 1, or 0; ``clipped`` and ``nonfinite``, 1 if the last step was one, else 0.
  """

  shown: Array
  rates: Array
  counts: Array


class LayerRecord(NamedTuple):
  """Records what clipping did to each layer; `layer_metrics` names them.

  A layer is a leaf, or one layer of a stacked leaf; layers stand in the order of the
  leaves. Fields are vectors, since a state of thousands of scalars is slow to pass
  around.

  Attributes:
    stacks: i32[leaves], how many layers a leaf stacks; 0 if it is no stack. Where a
      leaf stacks them along several axes, i32[leaves, axes], filled up with 0. [-1] if
      there are no leaves, and one layer stands for none. Constant.
    norm: f32[layers], in the last step, before clipping; with several norms (units),
      the largest.
    limit: f32[layers], what the last step allowed the layer, or its group.
    coefficient: f32[layers], the smallest factor that the last step applied to it.
    size: f32[layers], the norm for one element, which compares layers.
    steps: i32[], how many updates came in.
    steps_clipped: i32[layers], how many steps clipped it.
    nonfinite_layer: i32[], the first layer that was not finite in the last such step;
      -1 before.
    nonfinite_step: i32[], which step that was, counted from 1; 0 before.
    usual: f32[layers], the norms in the last step that was finite and taken.
    spike_layer: i32[], the layer that grew most, compared with `usual`, in the last
      step that a guard skipped as a spike; -1 before.
    spike_step: i32[], which step that was; 0 before.
    spike_growth: f32[], by what factor that layer grew.
  """

  stacks: Array
  norm: Array
  limit: Array
  coefficient: Array
  size: Array
  steps: Array
  steps_clipped: Array
  nonfinite_layer: Array
  nonfinite_step: Array
  usual: Array
  spike_layer: Array
  spike_step: Array
  spike_growth: Array


class SkipRecord(NamedTuple):
  """Records what a guard did; an inner guard counts the steps that the outer let by.

  It has vectors, as `Record`.

  Attributes:
    shown: f32[2], the (largest) ``norm`` of the last step, skipped or not, and the
      (smallest) ``limit`` of these norms; inf if there is none.
    kept: f32[4], ``skip_rate``, as ``clip_rate`` in `Record`;
      ``nonfinite_step_loss``, the loss, finite or not, of the last step that was
      skipped because it was not finite; ``spike_norm`` and ``spike_loss`` of the last
      one that was skipped as a spike. 0 until there was one, and where no loss was
      passed. A loss of NaN is kept as inf: the state of a healthy step has no NaN.
    counts: i32[10], ``skipped``, 1 if the last step was skipped, else 0; ``reason``,
      the `SkipReason` of the last skipped step; ``consecutive``, how many steps up to
      the last one were skipped; ``steps``; ``steps_skipped``, the sum of ``steps_nan``,
      ``steps_inf`` and ``steps_spike``, skipped for a NaN, an inf without a NaN, and a
      spike; ``last_nonfinite`` and ``last_spike``, the last steps that were skipped as
      such, counted from 1, or 0.
  """

  shown: Array
  kept: Array
  counts: Array


# What the entries of the vectors are called.
_ENTRIES: dict[type, tuple[tuple[str, ...], ...]] = {
  Record: (
    ("norm", "limit", "coefficient", "norm_after", "clipped_fraction"),
    ("clip_rate", "nonfinite_rate"),
    (
      *("steps", "steps_clipped", "steps_nonfinite", "last_clipped", "last_nonfinite"),
      *("clipped", "nonfinite"),
    ),
  ),
  SkipRecord: (
    ("norm", "limit"),
    ("skip_rate", "nonfinite_step_loss", "spike_norm", "spike_loss"),
    (
      *("skipped", "reason", "consecutive", "steps", "steps_skipped"),
      *("steps_nan", "steps_inf", "steps_spike", "last_nonfinite", "last_spike"),
    ),
  ),
}


def entries(record: Record | SkipRecord) -> dict[str, Array]:
  """Names the entries of a record; of a stack of records, the stacks."""
  return {
    name: vector[..., i]
    for names, vector in zip(_ENTRIES[type(record)], record, strict=True)
    for i, name in enumerate(names)
  }


def reported(record: Record | SkipRecord) -> dict[str, Array]:
  """Names the entries of a record for users, with rates that know when they began."""
  found = {name: jnp.asarray(x) for name, x in entries(record).items()}
  steps = jnp.maximum(found["steps"], 1).astype(jnp.float32)
  # What all weights add up to: 1 - 0.99^steps.
  weights = -jnp.expm1(steps * math.log1p(-_RATE_WEIGHT))
  return {
    name: jnp.minimum(x / weights, 1) if name.endswith("_rate") else x
    for name, x in found.items()
  }


class Effect(NamedTuple):
  """Holds what the norms of a block were multiplied with, and the norms after that.

  Attributes:
    both: two arrays; for a scalar norm one array of both: on a TPU every operation on a
      scalar is a kernel.
  """

  both: Array | tuple[Array, Array]

  def factor(self) -> Array:
    """Returns what the norms were multiplied with."""
    return self.both[0]

  def zeroed(self, finite: Array) -> "Effect":
    """Makes the norms after clipping those of zeros, unless the step is finite."""
    if isinstance(self.both, tuple):
      factor, after = self.both
      return Effect((factor, jnp.where(finite, after, jnp.zeros_like(after))))
    stays = jnp.stack([jnp.asarray(True), finite])
    return Effect(jnp.where(stays, self.both, jnp.zeros_like(self.both)))


def effect(norm: Extended, coefficient: Extended) -> Effect:
  """Says what a coefficient does to the norms of a block."""
  if norm.value.ndim:
    factor = coefficient.value * coefficient.unit
    return Effect((factor, _product(norm, coefficient)))
  beside = Extended(*(jnp.stack([jnp.ones_like(x), x]) for x in norm))
  return Effect(_product(beside, coefficient))


def _product(norm: Extended, coefficient: Extended) -> Array:
  """Multiplies two numbers; in this order nothing leaves the range on the way."""
  value, unit = norm.value * coefficient.unit, coefficient.value * norm.unit
  return _extended.as_float(Extended(value, unit))


def _worst(effects: Sequence[Effect], together: bool) -> Array:
  """Returns the smallest factor and the largest norm after clipping."""
  if len(effects) == 1 and not isinstance(effects[0].both, tuple):
    return effects[0].both
  rows = (_side_by_side([x.both[i] for x in effects], together) for i in range(2))
  folds = zip((jnp.min, jnp.max), rows, strict=True)
  return jnp.stack([_fold(fold, row) for fold, row in folds])


# Where a `Record` counts steps, keeps the last step of a kind, and flags this one.
_STEPS, _LAST_ONES, _COUNTS = slice(0, 3), slice(3, 5), 7


def blank() -> Record:
  """Makes the record before the first step."""
  return Record(
    jnp.asarray([0, 0, 1, 0, 0], jnp.float32),
    jnp.zeros(2, jnp.float32),
    jnp.zeros(_COUNTS, jnp.int32),
  )


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
    return last._replace(counts=last.counts + jnp.eye(_COUNTS, dtype=jnp.int32)[0])
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
  return last + _RATE_WEIGHT * (happened.astype(jnp.float32) - last)


def of_last_step(state: Any) -> list[bool]:
  """Marks the leaves of a state that show the last step, taken or skipped.

  These are the norms and what was done to them. Counters count steps taken.
  """

  def marks(node: Any) -> list[bool]:
    shown = _LAST.get(type(node))
    return [False] if shown is None else [field in shown for field in node._fields]

  nodes = jax.tree.leaves(state, is_leaf=lambda node: type(node) in _LAST)
  return [mark for node in nodes for mark in marks(node)]


_LAST = {
  Record: ("shown",),
  LayerRecord: ("norm", "limit", "coefficient", "size"),
  SkipRecord: ("shown",),
}


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
  # Sorted by shape: where arrays are slices of a stack, XLA takes the stack.
  arrays = sorted(arrays, key=lambda x: x.shape)
  # Without the barrier XLA reduces each on its own again.
  joined = jnp.concatenate([x.ravel() for x in arrays])
  return [lax.optimization_barrier(joined)]


def _fold(reduce: Callable[[Array], Array], arrays: Sequence[Array]) -> Array:
  """Reduces arrays to a scalar: each first, as their shardings may differ."""
  if len(arrays) == 1:
    return reduce(arrays[0])
  return reduce(jnp.stack([reduce(x) for x in arrays]))
