"""Skipping: steps that are not finite, or are spikes, are not taken."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip import _validate
from optax_clip._algebra import record as _record
from optax_clip._algebra.given import Given
from optax_clip._algebra.record import SkipRecord
from optax_clip._algebra.record import counted
from optax_clip._algebra.types import Measure
from optax_clip._algebra.types import Threshold
from optax_clip._guards.guard import guarded
from optax_clip._guards.judge import Judge
from optax_clip._guards.judge import SkipReason
from optax_clip._guards.judge import Verdict
from optax_clip._guards.measuring import Measuring
from optax_clip._norms import mesh as _mesh
from optax_clip._repr import named
from optax_clip._thresholds import memory as _memory
from optax_clip._thresholds import window as _window
from optax_clip._types import GuardRecording
from optax_clip._types import Params
from optax_clip._types import Scalar
from optax_clip._types import Updates

Array = jax.Array


class SpikeMemory(NamedTuple):
  """What `skip_spikes` remembers.

  Attributes:
    threshold: the memory of the threshold, or a `LossMemory` if the loss is a signal;
      changes with steps taken.
    learnt: i32[], steps taken since the start, or since it started afresh.
    spikes: i32[], how many spikes were skipped since the last step taken.
    calm: i32[], for how many more steps nothing counts as a spike.
  """

  threshold: Any
  learnt: Array
  spikes: Array
  calm: Array


class LossMemory(NamedTuple):
  """What `skip_spikes` remembers if the loss is a signal.

  Attributes:
    threshold: the memory of the threshold; for the loss it learns distances from the
      level.
    level: f32[], the bias-corrected running mean of the losses of steps taken.
  """

  threshold: Any
  level: Array


# The level of the loss is its mean over about the last 100 steps taken.
_LEVEL_DECAY = 0.99
# The smallest normal float32.
_LEAST_DISTANCE = 2.0**-126


@named
def skip_nonfinite(
  inner: optax.GradientTransformation,
  max_consecutive: Scalar | None = None,
  *,
  measure: Measure | None = None,
  record: GuardRecording = True,
  name: str = "skip_nonfinite",
) -> optax.GradientTransformationExtraArgs:
  r"""Takes no step whose gradient has a NaN or an inf.

  .. math::
      (u, s) \leftarrow \begin{cases} \text{inner}(g, s) & \text{if } \|g\| \text{
      is finite} \\ (0, s) & \text{else} \end{cases}

  On a step that is not taken updates are zero and nothing in the state of `inner`
  changes: no moment, no step count, no memory of a threshold; only what `metrics`
  calls ``norm``, ``limit``, ``coefficient`` and ``clipped_fraction`` is of the last
  step, taken or not. The run goes on as if the step had not been. A norm of finite
  gradients is never inf here, so that no finite step is lost, whatever its size.

  The test costs no read of its own: a clip inside that measures what `measure`
  measures, and stands first in its chain, takes over the norm. On CPU a jitted AdamW
  step takes 2.0 times as long as with the clip alone, and a copy of the gradients,
  with `optax.apply_if_finite` 2.4 times and a copy; with `guarded_step` as long as
  with the clip alone, and no copy.

  Args:
    inner: the transformation, usually a chain of a clip and an optimizer.
    max_consecutive: `None`: a step that is not finite is never taken. A number:
      after so many in a row the next one is, NaN and all, as with
      `optax.apply_if_finite`, so that the run fails visibly. To stop by yourself
      instead, read ``metrics(state)["skip_nonfinite/consecutive"]``.
    measure: what is measured, the global norm by default. Pass the measure of the
      clip inside, as `measures.layer_norm()` for `clip_by_layer_norm`, or one with
      ``axis_name`` for `jax.pmap`.
    record: `True`, or ``"layers"``: also the norm of each layer, from the same read,
      for `layer_metrics`, which names the layer that was not finite; there
      ``clipped`` are skipped steps.
    name: the prefix of the metrics' keys: those of `SkipRecord`.

  Returns:
    An `optax.GradientTransformationExtraArgs`; its state is a `GuardState`. Extra
    arguments are passed on to `inner`.

  Raises:
    TypeError: if `inner` is not a transformation.
    ValueError: if `max_consecutive` is negative.

  Example:
    >>> import jax.numpy as jnp, optax, optax_clip
    >>> tx = optax_clip.skip_nonfinite(
    ...     optax.chain(optax_clip.clip_by_global_norm(1.0), optax.adamw(1e-3))
    ... )
    >>> params = {"w": jnp.ones(2)}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": jnp.array([jnp.inf, 1.0])}, state, params)
    >>> print(updates["w"], optax_clip.metrics(state)["skip_nonfinite/skipped"])
    [0. 0.] 1
  """
  if max_consecutive is not None:
    _validate.nonnegative(max_consecutive=max_consecutive)
  measuring = Measuring.of(measure, record)

  def judge(
    updates: Updates,
    params: Params,
    memory: Any,
    record: SkipRecord,
    known: Given,
    extra_args: dict[str, Any],
  ) -> Verdict:
    seen = measuring.measured(updates, params, known, extra_args)
    finite = jnp.all(jnp.isfinite(seen.sizes))
    take = finite
    if max_consecutive is not None:
      take = finite | (_record.entries(record)["consecutive"] >= max_consecutive)
    return Verdict(
      take=take,
      reason=jnp.where(finite, SkipReason.NONE, SkipReason.NONFINITE_NORM),
      norm=jnp.max(seen.sizes, initial=0),
      limit=jnp.full((), jnp.inf, jnp.float32),
      memory=memory,
      known=seen.known,
      layers=seen.layers,
    )

  return guarded(inner, Judge(name, lambda params: (), judge, measuring.stacks))


@named
def skip_spikes(
  inner: optax.GradientTransformation,
  threshold: Threshold | None = None,
  *,
  signals: tuple[str, ...] = ("norm",),
  factor: Scalar = 1.0,
  warmup: Scalar = 0,
  cooldown: Scalar = 0,
  max_consecutive: Scalar = 20,
  measure: Measure | None = None,
  record: GuardRecording = True,
  name: str = "skip_spikes",
) -> optax.GradientTransformationExtraArgs:
  r"""Takes no step whose gradient norm, or loss, is a spike or not finite.

  .. math::
      (u, s) \leftarrow \begin{cases} \text{inner}(g, s) & \text{if } x \le f L
      \text{ for each signal } x \\ (0, s) & \text{else} \end{cases}

  with the limit :math:`L` that the threshold learned from the steps *taken*. By
  default that is the mean and 6 standard deviations of the last 128 norms, as
  soon as there are 64 of them (as OLMo, MaxText and Levanter have it, there with
  the skipped steps among them). What is skipped is skipped whole, as in
  `skip_nonfinite`, whose test is part of this one.

  A lasting rise of the level looks like spikes that do not end. After
  `max_consecutive` of them the threshold therefore starts afresh, with no memory
  but of the step at hand, which is taken. From a burst that is longer than that,
  and finite, only the clip inside protects.

  Args:
    inner: the transformation, usually a chain of a clip and an optimizer.
    threshold: what judges, from `optax_clip.thresholds`: one that learns, or a
      constant. Its limit should be one that ordinary steps do not exceed: a high
      percentile, or a low one with a `factor`.
    signals: ``("norm",)``, ``("loss",)`` or both. The loss is passed to ``update``
      or `guarded_step` as ``loss=``, unscaled and averaged over devices. It may be
      of any sign: what is judged, and learned, is its distance from the mean of about
      the last 100 losses of steps taken, and a loss below that is never a spike.
    factor: f > 0, how many times its limit a signal may be.
    warmup: so many steps at first, and after each fresh start, are no spikes
      (and are learned from). Thresholds that need values to begin with have no limit
      before that, whatever this is.
    cooldown: so many steps after a spike are no spikes: at most every
      ``cooldown + 1``-th step is skipped.
    max_consecutive: after so many skipped spikes without a step taken the threshold
      starts afresh; steps that are not finite neither count nor interrupt. `None`:
      never, which skips a risen level for as long as it lasts.
    measure: what is measured, the global norm by default; see `skip_nonfinite`. Of
      several norms each is judged by its own limit, and one spike suffices.
    record: `True`, or ``"layers"``: also the norm of each layer, from the same read,
      for `layer_metrics`, which names the layer that was not finite; there
      ``clipped`` are skipped steps.
    name: the prefix of the metrics' keys: those of `SkipRecord`, where ``norm`` and
      ``limit`` are of the loss if that is the only signal.

  All numbers may be traced.

  Returns:
    An `optax.GradientTransformationExtraArgs`; its state is a `GuardState`. Extra
    arguments are passed on to `inner`.

  Raises:
    TypeError: if `inner` is not a transformation; in ``update``, if ``loss`` is a
      signal and was not passed.
    ValueError: for an unknown signal, or a number out of its range.

  Example:
    >>> import jax.numpy as jnp, optax, optax_clip
    >>> from optax_clip import thresholds
    >>> tx = optax_clip.skip_spikes(
    ...     optax.sgd(0.1), thresholds.history(sigmas=6, window=4)
    ... )
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for g in (1.0, 1.1, 0.9, 50.0):
    ...   updates, state = tx.update({"w": jnp.array([g])}, state)
    >>> print(updates["w"], optax_clip.metrics(state)["skip_spikes/steps_skipped"])
    [0.] 1
  """
  unknown = [s for s in signals if s not in ("norm", "loss")]
  if isinstance(signals, str) or unknown or not signals:
    raise ValueError(
      f"signals must be ('norm',), ('loss',) or ('norm', 'loss'), got {signals!r}."
    )
  _validate.positive(factor=factor)
  _validate.nonnegative(warmup=warmup, cooldown=cooldown)
  if max_consecutive is not None:
    _validate.nonnegative(max_consecutive=max_consecutive)
  threshold = _window.history(sigmas=6.0) if threshold is None else threshold
  _validate.instance(Threshold, "optax_clip.thresholds", threshold=threshold)
  measuring = Measuring.of(measure, record)
  by_norm, by_loss = "norm" in signals, "loss" in signals

  def init(params: Params) -> SpikeMemory:
    values = measuring.measure.layout(params).blank().ravel()
    values = values if by_norm else values[:0]
    if by_loss:
      values = jnp.concatenate([values, jnp.zeros(1, values.dtype)])
    counts = [jnp.zeros((), jnp.int32) for _ in range(3)]
    start = threshold.init(values)
    if by_loss:
      start = LossMemory(start, jnp.zeros((), jnp.float32))
    return SpikeMemory(start, *counts)

  def judge(
    updates: Updates,
    params: Params,
    memory: SpikeMemory,
    record: SkipRecord,
    known: Given,
    extra_args: dict[str, Any],
  ) -> Verdict:
    del record
    seen = measuring.measured(updates, params, known, extra_args)
    finite_norm = jnp.all(jnp.isfinite(seen.sizes))
    finite, values = finite_norm, seen.sizes if by_norm else seen.sizes[:0]
    count = values.size
    old, level, new_level = memory.threshold, jnp.zeros(()), jnp.zeros(())
    signs = jnp.ones_like(values)
    if by_loss:
      old, level = memory.threshold
      loss = _loss(extra_args)
      finite &= jnp.isfinite(loss)
      loss = _record.single(loss)
      # Half of the range, so that a difference of two is a float.
      bounded = jnp.clip(loss, -_memory.LARGEST / 2, _memory.LARGEST / 2)
      # Any sign, any offset: what is judged is the distance from the level.
      distance = jnp.where(memory.learnt > 0, bounded - level, 0)
      # At least what rounding makes of it: a distance of 0 would not be learned.
      least = jnp.maximum(_memory.NOISE * jnp.abs(level), _LEAST_DISTANCE)
      size = jnp.maximum(jnp.abs(distance), jnp.where(memory.learnt > 0, least, 0))
      weight = _memory.debiasing(_LEVEL_DECAY, memory.learnt)
      new_level = level + weight * (bounded - level)
      values = jnp.concatenate([values, size[None].astype(values.dtype)])
      signs = jnp.concatenate([signs, jnp.sign(distance)[None].astype(values.dtype)])

    # By what was learned before this step. Nothing is learned from a 0, so that it is
    # the memory alone that answers.
    limits, _ = threshold.update(jnp.zeros_like(values), old)
    limits = jnp.broadcast_to(limits, values.shape)
    limits = limits * jnp.asarray(factor, limits.dtype)
    above = (values > limits * (1 + _memory.NOISE)) & (signs > 0)
    judged = finite & (memory.learnt >= warmup) & (memory.calm == 0)
    norm_spike = judged & jnp.any(above[:count])
    loss_spike = judged & jnp.any(above[count:])
    spike = norm_spike | loss_spike
    shift = jnp.asarray(False)
    if max_consecutive is not None:
      shift = spike & (memory.spikes >= max_consecutive)
    skipped = spike & ~shift
    take = finite & ~skipped

    _, later = threshold.update(values, old)
    # After a lasting shift: no memory but of this step.
    blank = jnp.zeros_like(values)
    _, afresh = threshold.update(values, threshold.init(blank))
    learnt = jax.tree.map(
      lambda new, now, old: jnp.where(shift, new, jnp.where(take, now, old)),
      afresh,
      later,
      old,
    )
    if by_loss:
      now = jnp.where(shift, bounded, jnp.where(take, new_level, level))
      learnt = LossMemory(learnt, now)
    reasons = (
      (~finite_norm, SkipReason.NONFINITE_NORM),
      (~finite, SkipReason.NONFINITE_LOSS),
      (norm_spike, SkipReason.NORM_SPIKE),
      (loss_spike, SkipReason.LOSS_SPIKE),
    )
    if count:
      norm, limit = jnp.max(values[:count]), jnp.min(limits[:count])
    else:
      norm, limit = loss, level + limits[0]
    return Verdict(
      take=take,
      reason=jnp.select(
        [condition for condition, _ in reasons],
        [jnp.asarray(reason, jnp.int32) for _, reason in reasons],
        jnp.asarray(SkipReason.NONE, jnp.int32),
      ),
      norm=norm,
      limit=limit,
      memory=SpikeMemory(
        threshold=learnt,
        learnt=jnp.where(shift, 1, counted(take, memory.learnt)),
        spikes=jnp.where(take, 0, counted(skipped, memory.spikes)),
        calm=jnp.where(
          skipped,
          jnp.asarray(cooldown, jnp.int32),
          jnp.maximum(memory.calm - finite.astype(jnp.int32), 0),
        ),
      ),
      known=seen.known,
      layers=seen.layers,
    )

  return guarded(inner, Judge(name, init, judge, measuring.stacks))


def _loss(extra_args: dict[str, Any]) -> Array:
  loss = extra_args.get("loss")
  if loss is None:
    raise TypeError(
      "The loss is one of the signals: pass it, as in tx.update(grads, state,"
      " params, loss=loss)."
    )
  loss = jnp.asarray(loss)
  if loss.ndim:
    raise ValueError(f"loss must be a scalar, got shape {loss.shape}: average it.")
  if not jnp.issubdtype(loss.dtype, jnp.floating):
    loss = loss.astype(jnp.float32)
  axes = _mesh.varying_axes(loss)
  return jax.lax.pmean(loss, axes) if axes else loss
