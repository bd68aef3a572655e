"""Skipping: steps that are not finite, or are spikes, are not taken."""

from typing import Any
from typing import NamedTuple
from typing import cast

import jax
import jax.numpy as jnp
import optax

from optax_clip import _core
from optax_clip import _guard
from optax_clip import _memory
from optax_clip import _mesh
from optax_clip import _norms
from optax_clip import _once
from optax_clip import _validate
from optax_clip import measures
from optax_clip import thresholds
from optax_clip._core import LayerNorms
from optax_clip._core import Layers
from optax_clip._core import Measure
from optax_clip._core import Threshold
from optax_clip._guard import SkipReason
from optax_clip._record import counted

Array = jax.Array


class SpikeMemory(NamedTuple):
  """What `skip_spikes` remembers.

  Attributes:
    threshold: the memory of the threshold; changes with steps taken.
    learnt: i32[], steps taken since the start, or since it started afresh.
    spikes: i32[], how many spikes were skipped since the last step taken.
    calm: i32[], for how many more steps nothing counts as a spike.
  """

  threshold: Any
  learnt: Array
  spikes: Array
  calm: Array


def skip_nonfinite(
  inner: optax.GradientTransformation,
  max_consecutive: Any = None,
  *,
  measure: Measure | None = None,
  record: bool | str = True,
  name: str = "skip_nonfinite",
) -> optax.GradientTransformationExtraArgs:
  r"""Takes no step whose gradient has a NaN or an inf.

  .. math::
      (u, s) \leftarrow \begin{cases} \text{inner}(g, s) & \text{if } \|g\| \text{
      is finite} \\ (0, s) & \text{else} \end{cases}

  On a step that is not taken updates are zero and nothing in the state of `inner`
  changes: no moment, no step count, no memory of a threshold. The run goes on as
  if the step had not been. A norm of finite gradients is never inf here, so that
  no finite step is lost, whatever its size.

  The test costs no read of its own: a clip inside that measures what `measure`
  measures, and stands first in its chain, takes over the norm. On CPU a jitted AdamW
  step takes 2.0 times as long as with the clip alone, and a copy of the gradients,
  with `optax.apply_if_finite` 2.3 times and a copy; with `guarded_step` as long as
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
    A `optax.GradientTransformationExtraArgs`; its state is a `GuardState`. Extra
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
  measure = checked_measure(measure)
  layers = recorded_layers(measure, record)

  def judge(
    updates: Any,
    params: Any,
    memory: Any,
    record: _guard.SkipRecord,
    extra_args: dict[str, Any],
  ) -> _guard.Verdict:
    seen = measured(measure, layers, updates, params, extra_args)
    finite = jnp.all(jnp.isfinite(seen.sizes))
    take = finite
    if max_consecutive is not None:
      take = finite | (record.consecutive >= max_consecutive)
    return _guard.Verdict(
      take=take,
      reason=jnp.where(finite, SkipReason.NONE, SkipReason.NONFINITE_NORM),
      norm=jnp.max(seen.sizes, initial=0),
      limit=jnp.full((), jnp.inf),
      memory=memory,
      known=seen.known,
      layers=seen.layers,
    )

  return _guard.guarded(inner, _guard.Judge(lambda params: (), judge, layers), name)


def skip_spikes(
  inner: optax.GradientTransformation,
  threshold: Threshold | None = None,
  *,
  signals: tuple[str, ...] = ("norm",),
  factor: Any = 1.0,
  warmup: Any = 0,
  cooldown: Any = 0,
  max_consecutive: Any = 20,
  measure: Measure | None = None,
  record: bool | str = True,
  name: str = "skip_spikes",
) -> optax.GradientTransformationExtraArgs:
  r"""Takes no step whose gradient norm, or loss, is a spike or not finite.

  .. math::
      (u, s) \leftarrow \begin{cases} \text{inner}(g, s) & \text{if } x \le f L
      \text{ for each signal } x \\ (0, s) & \text{else} \end{cases}

  with the limit :math:`L` that the threshold learnt from the steps *taken*. By
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
      or `guarded_step` as ``loss=``, unscaled and averaged over devices. One that
      is not positive is never a spike.
    factor: f > 0, how many times its limit a signal may be.
    warmup: so many steps at first, and after each fresh start, are no spikes
      (and are learnt from). Thresholds that need values to begin with have no limit
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
    A `optax.GradientTransformationExtraArgs`; its state is a `GuardState`. Extra
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
  threshold = thresholds.history(sigmas=6.0) if threshold is None else threshold
  _validate.instance(Threshold, "optax_clip.thresholds", threshold=threshold)
  measure = checked_measure(measure)
  layers = recorded_layers(measure, record)

  def init(params: Any) -> SpikeMemory:
    parts = []
    if "norm" in signals:
      parts.append(_memory.flat(measure.like(params)))
    if "loss" in signals:
      parts.append(jnp.zeros(1))
    counts = [jnp.zeros((), jnp.int32) for _ in range(3)]
    return SpikeMemory(threshold.init(_joined(parts)), *counts)

  def judge(
    updates: Any,
    params: Any,
    memory: SpikeMemory,
    record: _guard.SkipRecord,
    extra_args: dict[str, Any],
  ) -> _guard.Verdict:
    del record
    sizes, known, by_layer = measured(measure, layers, updates, params, extra_args)
    norms = sizes if "norm" in signals else sizes[:0]
    losses = _loss(extra_args) if "loss" in signals else sizes[:0]
    values = _joined([norms, losses])
    finite_norm = jnp.all(jnp.isfinite(sizes))
    finite = finite_norm & jnp.all(jnp.isfinite(losses))

    limits, later = threshold.update(values, memory.threshold)
    limits = limits * jnp.asarray(factor, limits.dtype)
    above = values > limits
    judged = finite & (memory.learnt >= warmup) & (memory.calm == 0)
    norm_spike = judged & jnp.any(above[: norms.size])
    loss_spike = judged & jnp.any(above[norms.size :])
    spike = norm_spike | loss_spike
    shift = jnp.asarray(False)
    if max_consecutive is not None:
      shift = spike & (memory.spikes >= max_consecutive)
    skipped = spike & ~shift
    take = finite & ~skipped

    def afresh() -> Any:
      return threshold.update(values, threshold.init(jnp.zeros_like(values)))[1]

    def onwards() -> Any:
      return jax.tree.map(
        lambda new, old: jnp.where(take, new, old), later, memory.threshold
      )

    return _guard.Verdict(
      take=take,
      reason=jnp.select(
        [~finite_norm, ~finite, norm_spike, loss_spike],
        [
          jnp.asarray(reason, jnp.int32)
          for reason in (
            SkipReason.NONFINITE_NORM,
            SkipReason.NONFINITE_LOSS,
            SkipReason.NORM_SPIKE,
            SkipReason.LOSS_SPIKE,
          )
        ],
        jnp.asarray(SkipReason.NONE, jnp.int32),
      ),
      norm=jnp.max(values if not norms.size else norms, initial=0),
      limit=jnp.min(limits[: norms.size or None], initial=jnp.inf),
      memory=SpikeMemory(
        threshold=jax.lax.cond(shift, afresh, onwards),
        learnt=jnp.where(shift, 1, counted(take, memory.learnt)),
        spikes=jnp.where(take, 0, counted(skipped, memory.spikes)),
        calm=jnp.where(
          skipped,
          jnp.asarray(cooldown, jnp.int32),
          jnp.maximum(memory.calm - finite.astype(jnp.int32), 0),
        ),
      ),
      known=known,
      layers=by_layer,
    )

  return _guard.guarded(inner, _guard.Judge(init, judge, layers), name)


def checked_measure(measure: Any) -> Measure:
  """A measure; the global norm if it is `None`."""
  if measure is None:
    return measures.global_norm()
  _validate.instance(Measure, "optax_clip.measures", measure=measure)
  return cast(Measure, measure)


def recorded_layers(measure: Measure, record: Any) -> Layers | None:
  """The layers that a guard records; its own record it always needs."""
  _validate.choice((True, "layers"), record=record)
  return _core.layers_of(measure, record)


class Seen(NamedTuple):
  """What a guard measured.

  Attributes:
    sizes: f[norms], all norms of its measure.
    known: what need not be measured again.
    layers: the norms of layers, if these are recorded.
  """

  sizes: Array
  known: list[_once.Known]
  layers: LayerNorms | None


def measured(
  measure: Measure,
  layers: Layers | None,
  updates: Any,
  params: Any,
  extra_args: dict[str, Any],
) -> Seen:
  """Measures the updates, once for the guard and for what stands in it."""
  with _once.noting() as known:
    norms, by_layer = _core.measured(measure, layers, updates, params, extra_args)
  sizes = _norms.magnitudes(_norms.joined(norms))
  return Seen(_memory.flat(sizes), known, by_layer)


def _loss(extra_args: dict[str, Any]) -> Array:
  loss = extra_args.get("loss")
  if loss is None:
    raise TypeError(
      "The loss is one of the signals: pass it, as in tx.update(grads, state,"
      " params, loss=loss)."
    )
  loss = jnp.asarray(loss).astype(jnp.float32)
  if loss.ndim:
    raise ValueError(f"loss must be a scalar, got shape {loss.shape}: average it.")
  axes = _mesh.varying_axes(loss)
  return jax.lax.pmean(loss, axes)[None] if axes else loss[None]


def _joined(parts: list[Array]) -> Array:
  dtype = jnp.result_type(*parts) if parts else jnp.float32
  return jnp.concatenate([x.astype(dtype) for x in parts])
