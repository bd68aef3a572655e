"""What the state records about each layer, for `layer_metrics`."""

import math

import jax
import jax.numpy as jnp
import optax

from optax_clip._algebra.record import LayerRecord
from optax_clip._algebra.record import counted
from optax_clip._algebra.record import single

Array = jax.Array


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
