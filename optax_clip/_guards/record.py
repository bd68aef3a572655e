"""What a guard notes about a step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_clip._algebra import record as _record
from optax_clip._algebra.record import SkipRecord
from optax_clip._algebra.record import counted
from optax_clip._guards.judge import SkipReason
from optax_clip._guards.judge import Verdict
from optax_clip._norms import mesh as _mesh
from optax_clip._norms import moments as _moments

Array = jax.Array


def recorded_loss(extra_args: dict[str, Any]) -> Array:
  """Returns the ``loss=`` for the record: f32[], NaN if none was passed.

  A loss that differs over a mesh does not count: with it the state would differ, too.
  """
  loss = extra_args.get("loss")
  loss = jnp.asarray(jnp.nan if loss is None else loss)
  is_number = loss.size == 1 and jnp.issubdtype(loss.dtype, jnp.floating)
  if not is_number or _mesh.varying_axes(loss):
    return jnp.full((), jnp.nan, jnp.float32)
  return _record.single(loss.reshape(()).astype(_moments.accumulator(loss.dtype)))


def blank() -> SkipRecord:
  # Separate arrays: a donated state may not hold one buffer twice.
  numbers: dict[str, Any] = {
    "norm": 0.0,
    "limit": jnp.inf,
    "skip_rate": 0.0,
    "nonfinite_loss": jnp.nan,
    "spike_norm": 0.0,
    "spike_loss": jnp.nan,
  }
  fields = {
    name: jnp.full((), numbers.get(name, 0), "float32" if name in numbers else "int32")
    for name in SkipRecord._fields
  }
  return SkipRecord(**fields)


def noted(last: Any, verdict: Verdict, loss: Array) -> Any:
  """Notes one more step in one of the records."""
  if isinstance(last, SkipRecord):
    return _skip_noted(last, verdict, loss)
  if verdict.layers is None:
    return last  # From a guard with record="layers", which this one is not.
  norm, size = verdict.layers
  return _record.noted_layers(
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
  steps = optax.safe_increment(last.steps)
  is_spike = verdict.reason >= SkipReason.NORM_SPIKE
  spike, nonfinite = skipped & is_spike, skipped & ~is_spike
  return SkipRecord(
    norm=norm,
    limit=_record.single(verdict.limit),
    skipped=skipped.astype(jnp.int32),
    reason=jnp.where(skipped, verdict.reason, last.reason),
    consecutive=jnp.where(skipped, optax.safe_increment(last.consecutive), 0),
    steps=steps,
    steps_skipped=counted(skipped, last.steps_skipped),
    skip_rate=_record.rate(last.skip_rate, skipped, steps),
    last_nonfinite=jnp.where(nonfinite, steps, last.last_nonfinite),
    nonfinite_loss=jnp.where(nonfinite, loss, last.nonfinite_loss),
    last_spike=jnp.where(spike, steps, last.last_spike),
    spike_norm=jnp.where(spike, norm, last.spike_norm),
    spike_loss=jnp.where(spike, loss, last.spike_loss),
  )
