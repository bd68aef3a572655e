"""What the state records about each layer, for `layer_metrics`."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip._algebra.record import counted
from optax_clip._algebra.record import single

Array = jax.Array
# Follows a record's name in the key of its record of layers.
LAYERS = "/layers"


class LayerRecord(NamedTuple):
  """Records what clipping did to each layer; `layer_metrics` names them.

  A layer is a leaf, or one layer of a stacked leaf; layers stand in the order of the
  leaves. Fields are vectors, since a state of thousands of scalars is slow to pass
  around.

  Attributes:
    stacks: i32[leaves], how many layers a leaf stacks; 0 if it is not a stack. Where a
      leaf stacks them along several axes, i32[leaves, axes], filled up with 0. [-1] if
      there are no leaves, and one layer stands for none. Constant.
    norm: f32[layers], in the last step, before clipping; with several norms (units),
      the largest.
    limit: f32[layers], the limit of the layer, or of its group, in the last step.
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


def blank(stacks: list[tuple[int, ...]]) -> LayerRecord:
  """Makes the record of layers before the first step.

  Args:
    stacks: for each leaf how many layers it stacks along each of its axes of layers.
  """
  # Checkpointers refuse arrays of size 0.
  count = max(sum(map(math.prod, stacks)), 1)
  depth = max(map(len, stacks), default=0)
  rows = [[*stack, *[0] * (depth - len(stack))] for stack in stacks]
  sizes = jnp.asarray(rows if depth else [0 for _ in stacks] or [-1], jnp.int32)
  return LayerRecord(
    stacks=sizes[:, 0] if depth == 1 else sizes,
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


def noted(
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
