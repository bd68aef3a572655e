"""Which limits learn nothing: constants, schedules, groups, caps and warm-ups.

The functions are public as `optax_clip.thresholds`.
"""

from collections.abc import Callable
from collections.abc import Sequence
import math
from typing import Any
from typing import NamedTuple
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from optax_clip import _validate
from optax_clip._algebra import handed as _handed
from optax_clip._algebra.types import Threshold
from optax_clip._matrices import view as _view
from optax_clip._thresholds import memory as _memory
from optax_clip._types import OptState
from optax_clip._types import Scalar
from optax_clip._types import ScalarOrSchedule

Array = jax.Array
# What users may pass as a limit.
Limit: TypeAlias = ScalarOrSchedule | Threshold


class ScheduleState(NamedTuple):
  """Holds the state of `scheduled`.

  Attributes:
    step: i32[], how many steps were taken; each update adds one. `skip_spikes` keeps it
      where it makes a threshold start afresh.
  """

  step: Array


class PairState(NamedTuple):
  """Holds the state of `at_most`.

  Attributes:
    threshold: the state of the threshold.
    cap: the state of the cap.
  """

  threshold: Any
  cap: Any


class WarmupState(NamedTuple):
  """Holds the state of `warmup`.

  Attributes:
    seen: i32[norms], how many norms each entry has seen; stands still where the
      norm is 0, and everywhere if one is not finite.
    threshold: the state of the threshold.
    limit: the state of the limit during the warm-up.
  """

  seen: Array
  threshold: Any
  limit: Any


class EarlyState(NamedTuple):
  """Holds the state of `until_learned`.

  Attributes:
    threshold: the state of the threshold.
    early: the state of the limit until then.
  """

  threshold: Any
  early: Any


def constant(limit: ScalarOrSchedule) -> Threshold:
  """Sets the same limit at every step.

  Args:
    limit: a non-negative float, or an array that broadcasts to the norms. It
      may be traced; a negative traced value counts as 0.
  """
  _validate.nonnegative(limit=limit)

  def update(norms: Array, state: OptState, **extra_args: object) -> tuple[Array, Any]:
    del extra_args
    return _filled(norms, limit), state

  return Threshold(lambda norms: optax.EmptyState(), update)


def scheduled(schedule: optax.Schedule) -> Threshold:
  """Sets the limit by a schedule of the step.

  Args:
    schedule: from the number of steps taken, i32[], to a limit.
  """
  kind = _validate.Kind("this threshold")

  def init(norms: Array) -> ScheduleState:
    del norms
    return ScheduleState(jnp.zeros((), jnp.int32))

  def update(
    norms: Array, state: ScheduleState, **extra_args: object
  ) -> tuple[Array, ScheduleState]:
    kind.check(state, lambda: init(norms))
    del extra_args
    limits = _filled(norms, schedule(state.step))
    return limits, ScheduleState(optax.safe_increment(state.step))

  return Threshold(init, update)


def per_group(limits: Sequence[Any]) -> Threshold:
  """Sets one limit, a number or a schedule, for each group of a measure.

  Args:
    limits: as many as the measure has norms, in their order. `None` is off.
  """
  limits = [math.inf if limit is None else limit for limit in limits]
  if not any(callable(limit) for limit in limits):
    _validate.nonnegative(**{f"limits[{i}]": x for i, x in enumerate(limits)})
    return constant(_stacked(limits))
  return scheduled(
    lambda count: _stacked(
      [limit(count) if callable(limit) else limit for limit in limits]
    )
  )


def by_shape(limit: Limit) -> Threshold:
  r"""Multiplies a limit by a function of each matrix's shape.

  .. math::
      L_l = c \, \sqrt{\max(1, \text{fan}_\text{out} / \text{fan}_\text{in})}

  Muon and SPECTRA scale their updates by this factor. It is 1 for vectors and scalars,
  and for matrices that have no more outputs than inputs. Rows are inputs, as in Flax;
  `measures.spectral_norm` says which axes these are.

  Args:
    limit: c: a non-negative float, a schedule, a traced scalar or a `Threshold`.

  Raises:
    ValueError: in ``update``, if a norm covers several leaves, or the threshold is
      asked by something else than `clip_with`, as a guard.
  """
  base = of(limit)

  def update(norms: Array, state: OptState, **extra_args: object) -> tuple[Array, Any]:
    limits, state = base.update(norms, state, **extra_args)
    factors = jnp.asarray(_factors(), norms.dtype).reshape(norms.shape)
    return limits * factors, state

  return Threshold(base.init, update)


def _factors() -> list[float]:
  """Returns the factor of each norm that a threshold is being asked about."""
  layout = _handed.layout.get()
  places = () if layout is None else layout.places
  if layout is None or layout.is_shared() or any(p.shape is None for p in places):
    raise ValueError(
      "thresholds.by_shape needs norms of single matrices, in clip_with: use it with"
      " measures.layer_norm() or measures.spectral_norm(), or in spectral_clip."
    )
  found: list[float] = []
  for place in places:
    shape = _view.of(jax.ShapeDtypeStruct(place.shape, jnp.float32), place).shape
    factor = math.sqrt(max(1.0, shape[1] / max(shape[0], 1)))
    count = math.prod(layout.blocks[place.block].shape)
    found += [factor] * (count if place.entry is None else 1)
  return found or [1.0]  # Without leaves the table has one norm.


def at_most(threshold: Threshold, cap: Limit) -> Threshold:
  """Takes the smaller of two limits; the threshold does not learn of the cap.

  Args:
    threshold: any threshold.
    cap: a non-negative float, a schedule, a traced scalar or a `Threshold`.
  """
  return _beside(threshold, cap, PairState, jnp.minimum)


def warmup(threshold: Threshold, steps: Scalar, limit: Limit = math.inf) -> Threshold:
  """Sets another limit, or none, for the first steps; the threshold still learns.

  Args:
    threshold: any threshold.
    steps: how many; an integer, which may be traced. Steps that are not finite,
      and norms of 0, do not count.
    limit: for the first steps: a non-negative float, a schedule, a traced scalar
      or a `Threshold`. None by default.
  """
  _validate.steps(steps=steps)
  steps = _memory.number(steps)
  first = of(limit)

  kind = _validate.Kind("this threshold")

  def init(norms: Array) -> WarmupState:
    seen = jnp.zeros_like(norms.ravel(), jnp.int32)
    return WarmupState(seen, threshold.init(norms), first.init(norms))

  def update(
    norms: Array, state: WarmupState, **extra_args: object
  ) -> tuple[Array, WarmupState]:
    kind.check(state, lambda: init(norms))
    later, memory = threshold.update(norms, state.threshold, **extra_args)
    early, other = first.update(norms, state.limit, **extra_args)
    warm = state.seen.astype(jnp.float32) < steps
    limits = jnp.where(warm.reshape(norms.shape), early, later)
    more = _memory.learned(norms.ravel())
    seen = jnp.where(more, optax.safe_increment(state.seen), state.seen)
    return limits, WarmupState(seen, memory, other)

  return Threshold(init, update)


def restarted(threshold: Threshold, norms: Array, old: OptState) -> Any:
  """Makes a memory that has learned nothing yet; schedules stay at their step.

  Args:
    threshold: any threshold.
    norms: as its `init` takes them.
    old: its state.
  """
  return jax.tree.map(
    lambda new, last: last if isinstance(last, ScheduleState) else new,
    threshold.init(norms),
    old,
    is_leaf=lambda node: isinstance(node, ScheduleState),
  )


def until_learned(threshold: Threshold, limit: Limit) -> Threshold:
  """Sets another limit as long as the threshold has none; both learn all the time.

  Unlike `warmup` it counts no steps: a limit of inf says that there is none yet.

  Args:
    threshold: one that learns, and whose limit is inf until it has.
    limit: until then: a non-negative float, a schedule, a traced scalar or a
      `Threshold`, as `geometric`, which has a limit from the second norm on.
  """

  def joined(limits: Array, early: Array) -> Array:
    return jnp.where(jnp.isinf(limits), early, limits)

  return _beside(threshold, limit, EarlyState, joined)


def _beside(
  threshold: Threshold,
  limit: Limit,
  state: Callable[[Any, Any], Any],
  joined: Callable[[Array, Array], Array],
) -> Threshold:
  """Joins two limits, which learn each on its own; the state holds both of theirs."""
  other = of(limit)
  kind = _validate.Kind("this threshold")

  def init(norms: Array) -> Any:
    return state(threshold.init(norms), other.init(norms))

  def update(norms: Array, states: OptState, **extra_args: object) -> tuple[Array, Any]:
    kind.check(states, lambda: init(norms))
    mine, theirs = states
    limits, mine = first(norms, mine, **extra_args)
    others, theirs = second(norms, theirs, **extra_args)
    return joined(limits, others), state(mine, theirs)

  if _memory.is_arithmetic(threshold, other):
    first, second = map(_memory.plain, (threshold, other))
    return Threshold(init, _memory.Arithmetic(update))
  first, second = threshold.update, other.update
  return Threshold(init, update)


def of(limit: Limit | None) -> Threshold:
  """Makes a threshold of what users pass: a number, an array or a schedule.

  Args:
    limit: any of these, or a `Threshold`, which stays as it is. `None` is no
      limit: norms are measured, and nothing is clipped.
  """
  if limit is None:
    return constant(math.inf)
  if isinstance(limit, Threshold):
    return limit
  return scheduled(limit) if callable(limit) else constant(limit)


def _stacked(limits: Sequence[Any]) -> Any:
  # The default float: in strict mode several dtypes have no common one.
  dtype = jnp.result_type(float)
  return jnp.stack([jnp.asarray(limit).astype(dtype) for limit in limits])


def _filled(norms: Array, limit: ScalarOrSchedule) -> Array:
  """Casts a limit to the dtype of the norms, at least 0. A scalar stays a scalar."""
  # Cast late: a Python float keeps its precision for float64 norms.
  exact = jnp.maximum(jnp.asarray(limit, norms.dtype), 0)
  return jnp.broadcast_to(exact, norms.shape) if exact.ndim else exact
