"""What a guard notes about a step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_clip._algebra import layers as _layers
from optax_clip._algebra import record as _record
from optax_clip._algebra.record import SkipRecord
from optax_clip._algebra.record import counted
from optax_clip._guards.judge import SkipReason
from optax_clip._guards.judge import Verdict

Array = jax.Array


def blank() -> SkipRecord:
  """Makes the record before the first step."""
  return SkipRecord(
    shown=jnp.asarray([0, jnp.inf], jnp.float32),
    kept=jnp.zeros(4, jnp.float32),
    counts=jnp.zeros(10, jnp.int32),
  )


def noted(last: Any, verdict: Verdict, loss: Array) -> Any:
  """Notes one more step in one of the records."""
  if isinstance(last, SkipRecord):
    return _skip_noted(last, verdict, loss)
  if verdict.layers is None:
    return last  # From a guard with record="layers", which this one is not.
  norm, size = verdict.layers
  return _layers.noted(
    last,
    norm,
    size,
    limit=jnp.broadcast_to(verdict.limit, norm.shape),
    coefficient=jnp.broadcast_to(verdict.take.astype(norm.dtype), norm.shape),
    clipped=jnp.broadcast_to(~verdict.take, norm.shape),
    skipped=~verdict.take,
  )


def _skip_noted(last: SkipRecord, verdict: Verdict, loss: Array) -> SkipRecord:
  norm, skipped = _record.single(verdict.norm), ~verdict.take
  old = _record.entries(last)
  steps = optax.safe_increment(old["steps"])
  is_spike = verdict.reason >= SkipReason.NORM_SPIKE
  spike, nonfinite = skipped & is_spike, skipped & ~is_spike
  nan, inf = nonfinite & verdict.is_nan, nonfinite & ~verdict.is_nan
  counts = [
    skipped.astype(jnp.int32),
    jnp.where(skipped, verdict.reason, old["reason"]),
    jnp.where(skipped, optax.safe_increment(old["consecutive"]), 0),
    steps,
    counted(skipped, old["steps_skipped"]),
    counted(nan, old["steps_nan"]),
    counted(inf, old["steps_inf"]),
    counted(spike, old["steps_spike"]),
    jnp.where(nonfinite, steps, old["last_nonfinite"]),
    jnp.where(spike, steps, old["last_spike"]),
  ]
  kept = [
    _record.rate(old["skip_rate"], skipped),
    jnp.where(nonfinite, loss, old["nonfinite_step_loss"]),
    jnp.where(spike, norm, old["spike_norm"]),
    jnp.where(spike, loss, old["spike_loss"]),
  ]
  shown = [norm, _record.single(verdict.limit)]
  return SkipRecord(*map(jnp.stack, (shown, kept, counts)))
