"""What a guard notes about a step, and which of it shows skipped steps as well."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip._algebra import layers as _layers
from optax_clip._algebra import record as _record
from optax_clip._algebra.record import counted
from optax_clip._algebra.slots import Slots
from optax_clip._guards.verdict import SkipReason
from optax_clip._guards.verdict import Verdict
from optax_clip._norms import scalars as _scalars

Array = jax.Array


class SkipRecord(NamedTuple):
  """Records what a guard did; an inner one counts steps that the outer let through.

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

  def entries(self) -> dict[str, Array]:
    """Names the entries; of a stack of records, the stacks."""
    return _SLOTS.entries(self)


_SLOTS = Slots(
  shown=("norm", "limit"),
  kept=("skip_rate", "nonfinite_step_loss", "spike_norm", "spike_loss"),
  counts=(
    *("skipped", "reason", "consecutive", "steps", "steps_skipped"),
    *("steps_nan", "steps_inf", "steps_spike", "last_nonfinite", "last_spike"),
  ),
)


def blank() -> SkipRecord:
  """Makes the record before the first step."""
  return SkipRecord(**_SLOTS.blank(limit=jnp.inf))


def noted(last: Any, verdict: Verdict, loss: Array) -> Any:
  """Notes one more step in one of the records."""
  if isinstance(last, SkipRecord):
    take, reason, norm, limit, is_nan, *_ = verdict
    seen = {"norm": norm, "limit": limit, "loss": loss, "is_nan": is_nan}
    entries = _scalars.paired(_entries)(last.entries(), take, reason, seen)
    return SkipRecord(**_SLOTS.joined(entries))
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


def _entries(
  old: dict[str, Array], take: Array, reason: Array, seen: dict[str, Array]
) -> dict[str, Array]:
  """Returns the entries of the record after one more step."""
  norm, loss, skipped = _record.single(seen["norm"]), seen["loss"], ~take
  steps = optax.safe_increment(old["steps"])
  is_spike = reason >= SkipReason.NORM_SPIKE
  spike, nonfinite = skipped & is_spike, skipped & ~is_spike
  nan, inf = nonfinite & seen["is_nan"], nonfinite & ~seen["is_nan"]
  return {
    "skipped": skipped.astype(jnp.int32),
    "reason": jnp.where(skipped, reason, old["reason"]),
    "consecutive": jnp.where(skipped, optax.safe_increment(old["consecutive"]), 0),
    "steps": steps,
    "steps_skipped": counted(skipped, old["steps_skipped"]),
    "steps_nan": counted(nan, old["steps_nan"]),
    "steps_inf": counted(inf, old["steps_inf"]),
    "steps_spike": counted(spike, old["steps_spike"]),
    "last_nonfinite": jnp.where(nonfinite, steps, old["last_nonfinite"]),
    "last_spike": jnp.where(spike, steps, old["last_spike"]),
    "skip_rate": _record.rate(old["skip_rate"], skipped),
    "nonfinite_step_loss": jnp.where(nonfinite, loss, old["nonfinite_step_loss"]),
    "spike_norm": jnp.where(spike, norm, old["spike_norm"]),
    "spike_loss": jnp.where(spike, loss, old["spike_loss"]),
    "norm": norm,
    "limit": _record.single(seen["limit"]),
  }


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
  _record.Record: ("shown",),
  _layers.LayerRecord: ("norm", "limit", "coefficient", "size"),
  SkipRecord: ("shown",),
}
