"""Skips the steps that are spikes, or not finite."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip import _backend
from optax_clip import _validate
from optax_clip._algebra.record import counted
from optax_clip._algebra.types import Measure
from optax_clip._algebra.types import Threshold
from optax_clip._guards import loss as _loss
from optax_clip._guards.guard import guarded
from optax_clip._guards.judge import Judge
from optax_clip._guards.measuring import Measuring
from optax_clip._guards.record import SkipRecord
from optax_clip._guards.verdict import SkipReason
from optax_clip._guards.verdict import Verdict
from optax_clip._norms import blocks as _blocks
from optax_clip._norms import scalars as _scalars
from optax_clip._repr import named
from optax_clip._thresholds import geometric as _geometric
from optax_clip._thresholds import limits as _limits
from optax_clip._thresholds import memory as _memory
from optax_clip._thresholds import window as _window
from optax_clip._types import GuardRecording
from optax_clip._types import Params
from optax_clip._types import Scalar
from optax_clip._types import Updates

Array = jax.Array


class SpikeMemory(NamedTuple):
  """Holds the memory of `skip_spikes`.

  Attributes:
    threshold: the memory of the threshold, or a `LossMemory` if the loss is a signal;
      changes with steps taken.
    learned: i32[], steps taken since the start, or since the last fresh start.
    spikes: i32[], how many spikes were skipped since the last step taken.
    calm: i32[], for how many more steps nothing counts as a spike.
  """

  threshold: Any
  learned: Array
  spikes: Array
  calm: Array


class LossMemory(NamedTuple):
  """Holds the memory of `skip_spikes` if the loss is a signal.

  Attributes:
    threshold: the memory of the threshold; for the loss it learns distances from the
      level.
    level: f32[], the bias-corrected running mean of the loss over steps taken.
  """

  threshold: Any
  level: Array


# Until the default judge has learned, a norm this many times the usual one is a spike.
_EARLY_FACTOR = 5.0


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
  r"""Skips every step whose gradient norm, or loss, is a spike or not finite.

  .. math::
      (u, s) \leftarrow \begin{cases} \text{inner}(g, s) & \text{if } x \le f L
      \text{ for each signal } x \\ (0, s) & \text{else} \end{cases}

  The threshold learns the limit :math:`L` from the steps *taken*: by default the mean
  plus 6 standard deviations of the last 128 norms, as soon as there are 64 (as in OLMo,
  MaxText and Levanter, which learn from skipped steps too). Until then it is 5 times
  the geometric mean of the norms, from the second step on; with the loss as a signal
  there is none. A step is skipped whole, as by `skip_nonfinite`, whose test is part of
  this one.

  A lasting rise of the level looks like spikes that do not end. After `max_consecutive`
  such spikes the threshold therefore starts afresh: it remembers only the step at hand,
  which is taken. Against a longer finite burst only the clip inside protects.

  Args:
    threshold: the judge, from `optax_clip.thresholds`: one that learns, or a constant.
      The default is ``until_learned(history(6), geometric(5))``, of these.
      Ordinary steps should stay below its limit: take a high percentile, or a low one
      with a `factor`.
    signals: ``("norm",)``, ``("loss",)`` or both. Pass the loss to ``update`` or
      `guarded_step` as ``loss=`` (or ``value=``, optax's name, where there is none),
      unscaled. A device may pass that of its own batch: devices whose gradients have
      the same norms, as copies of a model have, judge their mean loss. It may have any
      sign: the threshold learns and judges its distance from the mean loss over about
      the last 100 steps taken, and a loss below that mean is never a spike.
    factor: f > 0, how many times its limit a signal may be.
    warmup: number of steps, at the start and after each fresh start, in which nothing
      counts as a spike (but the threshold learns from them). Thresholds that need
      values to begin with have no limit before they have them, whatever this is.
    cooldown: number of steps after a spike in which nothing counts as a spike: at most
      every ``cooldown + 1``-th step is skipped.
    max_consecutive: how many spikes are skipped at most without a step taken: the next
      one is then taken, and the threshold starts afresh from it (schedules in it, which
      learn nothing, go on). Steps that are not
      finite are never taken, and neither count nor interrupt. (`skip_nonfinite` then
      takes the NaN.) `None`: a risen level is skipped for as long as it lasts.
    measure: as in `skip_nonfinite`. With several norms each has its own limit, and one
      spike suffices.
    inner, record: as in `skip_nonfinite`.
    name: as in `skip_nonfinite`; if the loss is the only signal, ``norm`` and ``limit``
      show the loss.

  All numbers may be traced.

  Returns:
    An `optax.GradientTransformationExtraArgs`; its state is a `GuardState`. It passes
    extra arguments on to `inner`.

  Raises:
    TypeError: if `inner` is not a transformation; in ``update``, if ``loss`` is a
      signal and was not passed.
    ValueError: if a signal is unknown, or a number is outside its range.

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
  _validate.steps(warmup=warmup, cooldown=cooldown)
  if max_consecutive is not None:
    _validate.steps(max_consecutive=max_consecutive)
  if threshold is None:
    threshold = _window.history(sigmas=6.0)
    # Distances of the loss have small ones among them by chance: no measure of others.
    if "loss" not in signals:
      threshold = _geometric.early(threshold, _EARLY_FACTOR)
  _validate.instance(Threshold, "optax_clip.thresholds", threshold=threshold)
  measuring = Measuring.of(measure, record)
  by_norm, by_loss = "norm" in signals, "loss" in signals
  is_arithmetic = _memory.is_arithmetic(threshold)
  update = _memory.plain(threshold)

  def init(params: Params) -> SpikeMemory:
    values = _blocks.blank(measuring.measure.layout(params)).ravel()
    values = values if by_norm else values[:0]
    if by_loss:
      values = jnp.concatenate([values, jnp.zeros(1, values.dtype)])
    counts = [jnp.zeros((), jnp.int32) for _ in range(3)]
    start = threshold.init(values)
    if by_loss:
      start = LossMemory(start, jnp.zeros((), jnp.float32))
    return SpikeMemory(start, *counts)

  def decided(sizes: Array, memory: SpikeMemory, loss: Array | None) -> dict[str, Any]:
    finite_norm = jnp.all(jnp.isfinite(sizes))
    finite, values = finite_norm, sizes if by_norm else sizes[:0]
    is_nan = jnp.any(jnp.isnan(sizes))
    count = values.size
    old, signs, seen = memory.threshold, jnp.ones_like(values), None
    if loss is not None:
      old, level = memory.threshold
      finite &= jnp.isfinite(loss)
      is_nan |= jnp.isnan(loss)
      seen = _loss.compared(loss, level, memory.learned)
      values = jnp.concatenate([values, seen.size[None].astype(values.dtype)])
      signs = jnp.concatenate([signs, seen.sign[None].astype(values.dtype)])

    # The limits from before this step: a 0 teaches nothing, so memory alone answers.
    limits, _ = update(jnp.zeros_like(values), old)
    limits = jnp.broadcast_to(limits, values.shape)
    limits = limits * jnp.asarray(factor, limits.dtype)
    above = (values > limits * (1 + _memory.NOISE)) & (signs > 0)
    judged = finite & (memory.learned >= warmup) & (memory.calm == 0)
    norm_spike = judged & jnp.any(above[:count])
    loss_spike = judged & jnp.any(above[count:])
    spike = norm_spike | loss_spike
    shift = jnp.asarray(False)
    if max_consecutive is not None:
      shift = spike & (memory.spikes >= max_consecutive)
    skipped = spike & ~shift
    take = finite & ~skipped

    _, later = update(values, old)
    afresh = later
    # After a lasting shift the memory holds this step alone. An eager step knows of it.
    if _backend.is_traced(shift) or shift:
      blank = _limits.restarted(threshold, jnp.zeros_like(values), old)
      _, afresh = update(values, blank)
    learned = jax.tree.map(
      lambda new, now, old: jnp.where(shift, new, jnp.where(take, now, old)),
      afresh,
      later,
      old,
    )
    if seen is not None:
      now = jnp.where(shift, seen.bounded, jnp.where(take, seen.level, level))
      learned = LossMemory(learned, now)
    reasons = (
      (~finite_norm, SkipReason.NONFINITE_NORM),
      (~finite, SkipReason.NONFINITE_LOSS),
      (norm_spike, SkipReason.NORM_SPIKE),
      (loss_spike, SkipReason.LOSS_SPIKE),
    )
    if seen is not None and not count:
      norm, limit = seen.loss, level + limits[0]
    else:
      norm, limit = jnp.max(values[:count]), jnp.min(limits[:count])
    return {
      "take": take,
      "reason": jnp.select(
        [condition for condition, _ in reasons],
        [jnp.asarray(reason, jnp.int32) for _, reason in reasons],
        jnp.asarray(SkipReason.NONE, jnp.int32),
      ),
      "norm": norm,
      "limit": limit,
      "is_nan": is_nan,
      "memory": SpikeMemory(
        threshold=learned,
        learned=jnp.where(shift, 1, counted(take, memory.learned)),
        spikes=jnp.where(take, 0, counted(skipped, memory.spikes)),
        calm=jnp.where(
          skipped,
          jnp.asarray(cooldown, jnp.int32),
          jnp.maximum(memory.calm - finite.astype(jnp.int32), 0),
        ),
      ),
    }

  def judge(
    updates: Updates,
    params: Params,
    memory: SpikeMemory,
    record: SkipRecord,
    extra_args: dict[str, Any],
  ) -> Verdict:
    del record
    seen = measuring.measured(updates, params, extra_args)
    loss = _loss.judged(extra_args, seen.sizes) if by_loss else None
    is_single = is_arithmetic and seen.sizes.size == 1
    decide = _scalars.paired(decided) if is_single else decided
    said = decide(seen.sizes, memory, loss)
    return Verdict(**said, known=seen.known, layers=seen.layers)

  return guarded(inner, Judge(name, init, judge, measuring.stacks))
