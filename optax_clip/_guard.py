"""Guards: whether a step is taken at all, decided before it is.

A guard is a transformation around another one. Its *judge* measures the updates
and decides; the transformation inside runs in one branch of a `lax.cond`, and in
the other nothing changes: no update, no moment, no counter, no memory of a
threshold. Nothing is ever multiplied with zero to be forgotten, which would keep
NaN, and nothing is selected elementwise, which would keep two copies::

    updates, params, loss
          |  judge          sees what the clip sees, and reads it once (`_once`)
          v
       verdict              take it or not, and why
          |  lax.cond
          v
    inner.update, and with `guarded_step` also the addition to the parameters

Updates that leave a branch are a buffer of their own, as large as the gradients.
Parameters and state that leave it are written in place of the old ones. Hence
the two ways to take a guarded step: as any optax transformation, or whole.
"""

from collections.abc import Callable
import dataclasses
import enum
import functools
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from optax_clip import _norms
from optax_clip import _once
from optax_clip import _record
from optax_clip import _validate
from optax_clip._core import LayerNorms
from optax_clip._core import Layers
from optax_clip._record import counted

Array = jax.Array


class SkipReason(enum.IntEnum):
  """Why a step was not taken, as in ``metrics(...)["<name>/reason"]``."""

  NONE = 0
  NONFINITE_NORM = 1
  NONFINITE_LOSS = 2
  NORM_SPIKE = 3
  LOSS_SPIKE = 4


class SkipRecord(NamedTuple):
  """What a guard did.

  Attributes:
    norm: f32[], the (largest) norm of the last step, taken or not.
    limit: f32[], the (smallest) limit of these norms; inf if there is none.
    skipped: i32[], 1 if the last step was not taken, else 0.
    reason: i32[], the `SkipReason` of the last step that was not taken.
    consecutive: i32[], how many steps up to the last one were not taken.
    steps: i32[], how many steps were seen.
    steps_skipped: i32[], how many of them were not taken.
  """

  norm: Array
  limit: Array
  skipped: Array
  reason: Array
  consecutive: Array
  steps: Array
  steps_skipped: Array


class GuardState(NamedTuple):
  """The state of a guard.

  Attributes:
    inner: the state of the transformation inside; changes with steps taken.
    memory: what the judge remembers.
    record: ``{name: SkipRecord}``; with ``record="layers"`` also
      ``{name/layers: LayerRecord}``, of all steps.
  """

  inner: Any
  memory: Any
  record: dict[str, Any]


class Verdict(NamedTuple):
  """What a judge says of a step.

  Attributes:
    take: bool[], whether it is taken.
    reason: i32[], why not; NONE if it is.
    norm: f32[], for the record.
    limit: f32[], for the record.
    memory: of the judge, after the step.
    known: what was measured of the updates.
    layers: what of each layer, if that is recorded.
    scale: `None`, or f32[]: what the transformation inside is given is the updates
      divided by it.
  """

  take: Array
  reason: Array
  norm: Array
  limit: Array
  memory: Any
  known: list[_once.Known]
  layers: LayerNorms | None = None
  scale: Array | None = None


class Judge(NamedTuple):
  """What decides whether a step is taken.

  Attributes:
    init: ``init(params)``: the memory before the first step.
    layers: the layers that are recorded, or `None`.
    judge: ``judge(updates, params, memory, record, extra_args)``: a `Verdict`.
  """

  init: Callable[[Any], Any]
  judge: Callable[[Any, Any, Any, SkipRecord, dict[str, Any]], Verdict]
  layers: Layers | None = None


@dataclasses.dataclass(frozen=True)
class Guard:
  """The `update` of a guarded transformation, which can also take a whole step."""

  inner: Any
  judge: Judge
  name: str

  def init(self, params: Any) -> GuardState:
    record: dict[str, Any] = {self.name: _blank()}
    if self.judge.layers is not None:
      stacks = self.judge.layers.stacks(params)
      record[self.name + _record.LAYERS] = _record.blank_layers(stacks)
    return GuardState(self.inner.init(params), self.judge.init(params), record)

  def __call__(
    self, updates: Any, state: GuardState, params: Any = None, **extra_args: Any
  ) -> tuple[Any, GuardState]:
    return self.step(
      _unchanged, _zeros, updates, state, params, extra_args, _unprepared
    )

  def step(
    self,
    finish: Callable[[Any], Any],
    otherwise: Callable[[Callable[[], Any]], Any],
    updates: Any,
    state: GuardState,
    params: Any,
    extra_args: dict[str, Any],
    prepare: Callable[[Any], tuple[Any, list[_once.Known]]],
  ) -> tuple[Any, GuardState]:
    """One step.

    Args:
      finish: from updates to the result, in the branch that the updates come from.
      otherwise: the result of a step not taken; given a function that returns the
        shapes of the other result.
      updates: as for `__call__`, and so on.
      state: of this guard.
      params: or `None`.
      extra_args: for the transformation inside, and ``loss`` for the judge.
      prepare: from updates to what this guard is given, by the guards around it,
        and what they know of that.
    """
    record = next(x for x in state.record.values() if isinstance(x, SkipRecord))
    seen, known = prepare(updates)
    with _once.reusing(known):
      verdict = self.judge.judge(seen, params, state.memory, record, extra_args)

    def ready(updates: Any) -> tuple[Any, list[_once.Known]]:
      # Anew within the branch: XLA would hold what goes into it in a buffer.
      new = _divided(prepare(updates)[0], verdict.scale)
      change = functools.partial(_divided_norms, scale=verdict.scale)
      return new, _once.moved([*verdict.known, *known], seen, new, change)

    def take() -> tuple[Any, Any]:
      inside = self.inner.update
      if isinstance(inside, Guard):
        return inside.step(
          finish, otherwise, updates, state.inner, params, extra_args, ready
        )
      new, known = ready(updates)
      inner = optax.with_extra_args_support(self.inner)
      with _once.reusing(known):
        new, inner_state = inner.update(new, state.inner, params, **extra_args)
      return finish(new), inner_state

    def skip() -> tuple[Any, Any]:
      return otherwise(lambda: jax.eval_shape(take)[0]), state.inner

    result, inner_state = lax.cond(verdict.take, take, skip)
    noted = {key: _noted(entry, verdict) for key, entry in state.record.items()}
    return result, GuardState(inner_state, verdict.memory, noted)


def guarded(inner: Any, judge: Judge, name: str) -> Any:
  """The transformation that does what `inner` does when `judge` lets it.

  Args:
    inner: any transformation; a guard too.
    judge: what decides.
    name: the prefix of the metrics' keys.

  Returns:
    A `optax.GradientTransformationExtraArgs` that `guarded_step` accepts.
  """
  _validate.instance(
    optax.GradientTransformation, "optax, as optax.adamw(1e-3)", inner=inner
  )
  guard = Guard(inner, judge, name)
  return optax.GradientTransformationExtraArgs(guard.init, guard)


def guarded_step(
  tx: optax.GradientTransformation,
  grads: Any,
  state: GuardState,
  params: Any,
  **extra_args: Any,
) -> tuple[Any, GuardState]:
  r"""A whole step of a guarded optimizer: new parameters and state, or the old.

  .. math::
      (p, s) \leftarrow \begin{cases} (p + u, s') & \text{if the step is taken,
      with } u, s' = \text{tx.update}(g, s, p) \\ (p, s) & \text{else} \end{cases}

  The same as ``tx.update`` and `optax.apply_updates`, but in one branch: the updates
  never leave it. In a jitted AdamW step with donated parameters and state it holds
  and reads what clipping alone does, where ``tx.update`` of the same `tx` needs a
  temporary of the size of the gradients. Use ``tx.update`` where something stands
  between the two: a framework that calls it for you, `optax.MultiSteps` or another
  wrapper around `tx`.

  Args:
    tx: what `skip_nonfinite`, `skip_spikes` or `dynamic_loss_scale` returned.
      Guards directly inside one another are taken whole together.
    grads: as for ``tx.update``.
    state: as ``tx.init(params)`` returned it; the same as for ``tx.update``.
    params: the parameters.
    **extra_args: as for ``tx.update``, for example ``loss=``.

  Returns:
    The parameters, of the dtypes they had, and the state.

  Raises:
    TypeError: if `tx` is not a guard.

  Example:
    >>> import jax, jax.numpy as jnp, optax, optax_clip
    >>> tx = optax_clip.skip_nonfinite(
    ...     optax.chain(optax_clip.clip_by_global_norm(1.0), optax.sgd(0.1))
    ... )
    >>> params = {"w": jnp.ones(2)}
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def step(params, state, grads):
    ...   return optax_clip.guarded_step(tx, grads, state, params)
    >>> params, state = step(params, state, {"w": jnp.array([jnp.nan, 1.0])})
    >>> print(params["w"], optax_clip.metrics(state)["skip_nonfinite/skipped"])
    [1. 1.] 1
  """
  guard = getattr(tx, "update", None)
  if not isinstance(guard, Guard):
    raise TypeError(
      "tx must be what skip_nonfinite, skip_spikes or dynamic_loss_scale returned,"
      f" got {tx!r}. Put the guard outermost, as in"
      " skip_nonfinite(optax.chain(...))."
    )
  if params is None:
    raise ValueError("params must be the parameters that the step changes, got None.")

  def finish(updates: Any) -> Any:
    return optax.apply_updates(params, updates)

  return guard.step(
    finish, lambda _: params, grads, state, params, extra_args, _unprepared
  )


def _unchanged(updates: Any) -> Any:
  return updates


def _unprepared(updates: Any) -> tuple[Any, list[_once.Known]]:
  return updates, []


def _divided(updates: Any, scale: Array | None) -> Any:
  if scale is None:
    return updates

  def divided(x: Array) -> Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    inverse = (1 / scale).astype(jnp.finfo(wide).dtype)
    return (x.astype(wide) * inverse).astype(x.dtype)

  return jax.tree.map(divided, updates)


def _divided_norms(norms: Any, scale: Array | None) -> Any:
  if scale is None:
    return norms
  return jax.tree.map(
    lambda norm: norm._replace(value=norm.value / scale.astype(norm.value.dtype)),
    norms,
    is_leaf=_norms.is_norm,
  )


def _zeros(shapes: Callable[[], Any]) -> Any:
  # Of the same mesh axes too, which shapes know.
  return jax.tree.map(jnp.zeros_like, shapes())


def _blank() -> SkipRecord:
  # Separate arrays: a donated state may not hold one buffer twice.
  counts = [jnp.zeros((), jnp.int32) for _ in range(5)]
  return SkipRecord(
    jnp.zeros((), jnp.float32), jnp.full((), jnp.inf, jnp.float32), *counts
  )


def _noted(last: Any, verdict: Verdict) -> Any:
  """One of the records after one more step."""
  if isinstance(last, SkipRecord):
    return _skip_noted(last, verdict)
  if verdict.layers is None:
    return last  # The state is of a guard with record="layers", and this is not.
  norm, size = verdict.layers
  return _record.noted_layers(
    last,
    norm,
    size,
    limit=jnp.broadcast_to(verdict.limit, norm.shape),
    coefficient=jnp.broadcast_to(verdict.take.astype(norm.dtype), norm.shape),
    clipped=jnp.broadcast_to(~verdict.take, norm.shape),
  )


def _skip_noted(last: SkipRecord, verdict: Verdict) -> SkipRecord:
  skipped = (~verdict.take).astype(jnp.int32)
  return SkipRecord(
    norm=verdict.norm.astype(jnp.float32),
    limit=verdict.limit.astype(jnp.float32),
    skipped=skipped,
    reason=jnp.where(verdict.take, last.reason, verdict.reason),
    consecutive=jnp.where(verdict.take, 0, optax.safe_increment(last.consecutive)),
    steps=optax.safe_increment(last.steps),
    steps_skipped=counted(~verdict.take, last.steps_skipped),
  )
