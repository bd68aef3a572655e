"""What the state records about each step, with arithmetic that clipping does anyway."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from optax_clip._norms import mesh as _mesh

Array = jax.Array
# Over about how many steps a rate is taken.
_RATE_STEPS = 100

# Follows a record's name in the key of its record of layers.
LAYERS = "/layers"


class Record(NamedTuple):
  """Records what clipping did; with several norms, the worst of them.

  Attributes:
    norm: f32[], the largest norm of the last step, before clipping.
    limit: f32[], the smallest limit of the last step.
    coefficient: f32[], the smallest factor that the last step applied.
    clipped_fraction: f32[], the share of norms above their limit.
    norm_after: f32[], the largest norm of the last step, after clipping.
    clip_rate: f32[], the share of clipped steps among the last 100 or so: the mean of
      the first 100 steps, then a running average that forgets 1% in each step.
    steps: i32[], how many updates came in.
    steps_clipped: i32[], in how many steps a norm was above its limit.
    steps_nonfinite: i32[], in how many steps a norm was NaN or inf.
    last_clipped: i32[], the last step that clipped, counted from 1; 0 before.
    last_nonfinite: i32[], the last step with a NaN or an inf; 0 before.
    clipped: i32[], 1 if the last step clipped, else 0.
    nonfinite: i32[], 1 if the last step had a NaN or an inf, else 0.
  """

  norm: Array
  limit: Array
  coefficient: Array
  clipped_fraction: Array
  norm_after: Array
  clip_rate: Array
  steps: Array
  steps_clipped: Array
  steps_nonfinite: Array
  last_clipped: Array
  last_nonfinite: Array
  clipped: Array
  nonfinite: Array


class LayerRecord(NamedTuple):
  """Records what clipping did to each layer; `layer_metrics` names them.

  A layer is a leaf, or one layer of a stacked leaf; layers stand in the order of the
  leaves. Fields are vectors, since a state of thousands of scalars is slow to pass
  around.

  Attributes:
    stacks: i32[leaves], how many layers a leaf stacks; 0 if it is no stack. Constant.
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

  Attributes:
    norm: f32[], the (largest) norm in the last step, skipped or not.
    limit: f32[], the (smallest) limit of these norms; inf if there is none.
    skipped: i32[], 1 if the last step was skipped, else 0.
    reason: i32[], why the last skipped step was skipped, a `SkipReason`.
    consecutive: i32[], how many steps in a row, up to the last one, were skipped.
    steps: i32[], how many steps there were.
    steps_skipped: i32[], how many were skipped.
    skip_rate: f32[], the share of skipped steps among the last 100 or so, as
      ``clip_rate`` in `Record`.
    last_nonfinite: i32[], the last step that was skipped because the norm or the loss
      was not finite, counted from 1; 0 before.
    nonfinite_loss: f32[], the ``loss=`` of that step; NaN if none was passed.
    last_spike: i32[], the last step that was skipped as a spike; 0 before.
    spike_norm: f32[], the norm of that step.
    spike_loss: f32[], the ``loss=`` of that step; NaN if none was passed.
  """

  norm: Array
  limit: Array
  skipped: Array
  reason: Array
  consecutive: Array
  steps: Array
  steps_skipped: Array
  skip_rate: Array
  last_nonfinite: Array
  nonfinite_loss: Array
  last_spike: Array
  spike_norm: Array
  spike_loss: Array


def blank() -> Record:
  """Makes the record before the first step."""
  # Separate arrays: a donated state may not hold one buffer twice.
  floats = [jnp.zeros((), jnp.float32) for _ in range(6)]
  counts = [jnp.zeros((), jnp.int32) for _ in range(7)]
  return Record(*floats, *counts)._replace(coefficient=jnp.ones((), jnp.float32))


def noted(
  last: Record,
  sizes: Sequence[Array],
  limits: Sequence[Array],
  factors: Sequence[Array],
  after: Sequence[Array],
  finite: Array,
) -> Record:
  """Notes one more step in a record.

  Args:
    last: the record before it.
    sizes: the norms as floats, in arrays.
    limits: for each of these arrays its limits, which broadcast to it.
    factors: for each array what its updates were multiplied by, in its shape.
    after: for each array the norms after that, in its shape.
    finite: bool[], whether all norms are finite.
  """
  count = sum(x.size for x in sizes)
  if not count:
    return last._replace(steps=optax.safe_increment(last.steps))
  together = _mesh.on_one_device([*sizes, *limits, *factors, *after])
  if any(x.ndim for x in limits):
    pairs = zip(sizes, limits, strict=True)
    whole = [jnp.broadcast_to(x, n.shape) for n, x in pairs]
    limits = _side_by_side(whole, together)
  sizes, factors, after = (_side_by_side(x, together) for x in (sizes, factors, after))
  # A limit that is the same for all norms is one scalar.
  each = limits if len(limits) == len(sizes) else [limits[0]] * len(sizes)
  above = [n > x.astype(n.dtype) for n, x in zip(sizes, each, strict=True)]
  number_above = _fold(jnp.sum, [x.astype(jnp.float32) for x in above])
  # With one norm this needs no other comparison.
  clipped = above[0].reshape(()) if count == 1 else number_above > 0
  # Side by side: arithmetic on a scalar is a kernel for each operation on a TPU.
  happened = jnp.stack([jnp.asarray(True), finite & clipped, ~finite])
  counts = counted(
    happened, jnp.stack([last.steps, last.steps_clipped, last.steps_nonfinite])
  )
  steps = counts[0]
  latest = jnp.stack([last.last_clipped, last.last_nonfinite])
  latest = jnp.where(happened[1:], steps, latest)
  flags = happened.astype(jnp.int32)
  return Record(
    norm=single(_fold(jnp.max, sizes)),
    limit=single(_fold(jnp.min, [x.astype(sizes[0].dtype) for x in limits])),
    coefficient=single(_fold(jnp.min, factors)),
    clipped_fraction=number_above / count,
    norm_after=single(_fold(jnp.max, after)),
    clip_rate=rate(last.clip_rate, happened[1], steps),
    steps=steps,
    steps_clipped=counts[1],
    steps_nonfinite=counts[2],
    last_clipped=latest[0],
    last_nonfinite=latest[1],
    clipped=flags[1],
    nonfinite=flags[2],
  )


def rate(last: Array, happened: Array, steps: Array) -> Array:
  """Updates the share of steps in which something happened, over the last 100 or so.

  Args:
    last: the share before this step.
    happened: bool[], whether it happened in this step.
    steps: how many steps there were, this one included.
  """
  weight = 1 / jnp.minimum(steps, _RATE_STEPS).astype(jnp.float32)
  return last + weight * (happened.astype(jnp.float32) - last)


def blank_layers(stacks: list[int]) -> LayerRecord:
  """Makes the record of layers before the first step."""
  count = sum(max(n, 1) for n in stacks)
  return LayerRecord(
    stacks=jnp.asarray(stacks, jnp.int32),
    norm=jnp.zeros(count, jnp.float32),
    limit=jnp.zeros(count, jnp.float32),
    coefficient=jnp.ones(count, jnp.float32),
    size=jnp.zeros(count, jnp.float32),
    steps=jnp.zeros((), jnp.int32),
    steps_clipped=jnp.zeros(count, jnp.int32),
    nonfinite_layer=jnp.full((), -1, jnp.int32),
    nonfinite_step=jnp.zeros((), jnp.int32),
    usual=jnp.zeros(count, jnp.float32),
    spike_layer=jnp.full((), -1, jnp.int32),
    spike_step=jnp.zeros((), jnp.int32),
    spike_growth=jnp.ones((), jnp.float32),
  )


def noted_layers(
  last: LayerRecord,
  norm: Array,
  size: Array,
  limit: Array,
  coefficient: Array,
  clipped: Array,
  skipped: Array | None = None,
) -> LayerRecord:
  """Notes one more step in a record of layers.

  Args:
    last: the record before it.
    norm: f[layers], as the next four are.
    size: the norm for one element.
    limit: the largest norm allowed.
    coefficient: the factor applied.
    clipped: whether the norm was above its limit.
    skipped: bool[], whether a guard skipped the step; `None`: there is no guard.
  """
  steps = optax.safe_increment(last.steps)
  if not norm.size:
    return last._replace(steps=steps)
  wrong = ~jnp.isfinite(norm)
  finite = ~jnp.any(wrong)
  exact = single(norm)
  later = LayerRecord(
    stacks=last.stacks,
    norm=exact,
    limit=single(limit),
    coefficient=coefficient.astype(jnp.float32),
    size=single(size),
    steps=steps,
    steps_clipped=counted(clipped & finite, last.steps_clipped),
    nonfinite_layer=jnp.where(
      finite, last.nonfinite_layer, jnp.argmax(wrong).astype(jnp.int32)
    ),
    nonfinite_step=jnp.where(finite, last.nonfinite_step, steps),
    usual=last.usual,
    spike_layer=last.spike_layer,
    spike_step=last.spike_step,
    spike_growth=last.spike_growth,
  )
  if skipped is None:
    return later
  # A layer that did not move before has no growth.
  known = last.usual > 0
  growth = jnp.where(known, exact / jnp.where(known, last.usual, 1), 1)
  spike = skipped & finite
  return later._replace(
    usual=jnp.where(finite & ~skipped, exact, last.usual),
    spike_layer=jnp.where(
      spike, jnp.argmax(growth).astype(jnp.int32), last.spike_layer
    ),
    spike_step=jnp.where(spike, steps, last.spike_step),
    spike_growth=jnp.where(spike, jnp.max(growth), last.spike_growth),
  )


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
  Record: ("norm", "limit", "coefficient", "clipped_fraction", "norm_after"),
  LayerRecord: ("norm", "limit", "coefficient", "size"),
  SkipRecord: ("norm", "limit"),
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


def all_finite(sizes: Sequence[Array]) -> Array:
  """Returns whether all norms are finite; true if there are none."""
  if not any(x.size for x in sizes):
    return jnp.asarray(True)
  # The record needs the largest anyway, and NaN is larger than all.
  return jnp.isfinite(_fold(jnp.max, _side_by_side(sizes, _mesh.on_one_device(sizes))))


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
