"""Thresholds: how large updates may be.

Each function returns a `Threshold` for `optax_clip.clip_with`: a pair of pure
functions, shaped like a gradient transformation but acting on norms.
"""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip import _validate
from optax_clip._core import Threshold

Array = jax.Array


class ScheduleState(NamedTuple):
  """The state of `scheduled`.

  Attributes:
    step: i32[], the steps taken; grows by one at every update.
  """

  step: Array


def constant(limit: Any) -> Threshold:
  """The same limit at every step.

  Args:
    limit: a non-negative float, or an array that broadcasts to the norms. It
      may be traced; a negative traced value counts as 0.
  """
  _validate.nonnegative(limit=limit)

  def update(norms: Any, state: Any, **extra_args: Any) -> tuple[Any, Any]:
    del extra_args
    return _filled(norms, limit), state

  return Threshold(lambda norms: optax.EmptyState(), update)


def scheduled(schedule: optax.Schedule) -> Threshold:
  """A limit that is a function of the step.

  Args:
    schedule: from the number of steps taken, i32[], to a limit.
  """

  def init(norms: Any) -> ScheduleState:
    del norms
    return ScheduleState(jnp.zeros((), jnp.int32))

  def update(
      norms: Any, state: ScheduleState, **extra_args: Any
  ) -> tuple[Any, ScheduleState]:
    del extra_args
    limits = _filled(norms, schedule(state.step))
    return limits, ScheduleState(optax.safe_increment(state.step))

  return Threshold(init, update)


def per_group(limits: Sequence[Any]) -> Threshold:
  """One limit, a number or a schedule, for each group of a measure.

  Args:
    limits: as many as the measure has norms, in their order.
  """
  if not any(callable(limit) for limit in limits):
    _validate.nonnegative(**{f"limits[{i}]": x for i, x in enumerate(limits)})
    return constant(_stacked(limits))
  return scheduled(
      lambda count: _stacked([
          limit(count) if callable(limit) else limit for limit in limits
      ])
  )


def of(limit: Any) -> Threshold:
  """The threshold for what users pass: a number, an array or a schedule."""
  return scheduled(limit) if callable(limit) else constant(limit)


def _stacked(limits: Sequence[Any]) -> Any:
  return jnp.stack([jnp.asarray(limit) for limit in limits])


def _filled(norms: Any, limit: Any) -> Any:
  """`limit` in the dtype and shape of each norm; never below 0."""

  def fill(norm: Array) -> Array:
    # Cast late: a Python float keeps its precision for float64 norms.
    exact = jnp.maximum(jnp.asarray(limit, norm.dtype), 0)
    return jnp.broadcast_to(exact, norm.shape)

  return jax.tree.map(fill, norms)
