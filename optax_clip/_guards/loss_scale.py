"""How float16 gradients neither underflow nor end a run: loss scaling."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_clip import _validate
from optax_clip._algebra.types import Measure
from optax_clip._guards.guard import divided
from optax_clip._guards.guard import guarded
from optax_clip._guards.judge import Judge
from optax_clip._guards.judge import LossScale
from optax_clip._guards.measuring import Measuring
from optax_clip._guards.record import SkipRecord
from optax_clip._guards.verdict import SkipReason
from optax_clip._guards.verdict import Verdict
from optax_clip._repr import named
from optax_clip._types import GuardRecording
from optax_clip._types import Params
from optax_clip._types import Scalar
from optax_clip._types import Updates

Array = jax.Array
# Beyond this, a scale's inverse is not a normal float, and unscaled updates are 0.
_LARGEST = 2.0**126


@named
def dynamic_loss_scale(
  inner: optax.GradientTransformation,
  init_scale: Scalar = 2.0**15,
  *,
  growth_interval: Scalar = 2000,
  growth_factor: Scalar = 2.0,
  backoff_factor: Scalar = 0.5,
  min_scale: Scalar = 1.0,
  max_scale: Scalar = 2.0**24,
  measure: Measure | None = None,
  record: GuardRecording = True,
  name: str = "dynamic_loss_scale",
) -> optax.GradientTransformationExtraArgs:
  r"""Undoes a loss scale, skips steps that overflowed, and adapts the scale.

  With :math:`g` the gradient of :math:`S \cdot \text{loss}`:

  .. math::
      u, S \leftarrow \begin{cases} \text{inner}(g / S),\ S & \|g\|,\ \|g / S\|
      \text{ finite} \\
      \text{inner}(g / S),\ \min(2 S, S_{max}) & \text{... for the 2000th time in a
      row} \\ 0,\ S & \text{only } \|g\| \text{ finite} \\ 0,\ \max(S / 2, S_{min})
      & \text{else} \end{cases}

  float16 holds nothing between 6e-8 and 0, so differentiate the loss times a large
  number: ``loss * loss_scale(state)``. In one pass over the gradients this unscales
  them, measures, clips (in `inner`, by limits in the units of the unscaled gradients),
  and skips. The norm is the scaled gradients' norm divided by the scale, so that no
  float16 is rounded for it.

  Keep parameters in float32 and cast them to float16 in the forward pass, as usual in
  mixed precision: gradients are then float32 here. This unscales float16 gradients in
  float32 and rounds them back, which may lose what the scale has saved.

  Put it outermost. Other guards and `observe` may also stand directly around it: they
  see unscaled norms either way, and guards judge only steps that did not overflow. A
  clip or `optax.MultiSteps` goes inside, so that a microbatch that overflows is skipped
  before it is accumulated; between a guard and a loss scale, ``init`` refuses it.
  Around a loss scale `optax.MultiSteps` and `optax.apply_if_finite` keep it from
  falling, and the run stops.

  Args:
    inner: as in `skip_nonfinite`.
    init_scale: the first scale, from 2^-126 to 2^126. Powers of two, here and below,
      are exact.
    growth_interval: number of finite steps in a row after which the scale grows.
    growth_factor: how many times it grows, at least 1.
    backoff_factor: multiplies the scale on a step that is not finite; in (0, 1].
    min_scale: the scale never falls below this, or 2^-126 if that is more. Persistent
      NaNs drive it here. At this bound a step that overflows is skipped again and
      again: if ``scale`` in `metrics` stays here while ``consecutive`` grows, and
      ``steps_inf`` with it, the unscaled gradients overflow inside the forward or
      backward pass, and a lower bound, as 2^-14, lets them through. Below 1 the
      unscaled gradients are measured too, in one more read, as they may be too large
      for their dtype; then the step is skipped and the scale stays.
    max_scale: the scale never grows beyond this, or 2^126 if that is less.
    measure: as in `skip_nonfinite`. It must be homogeneous and read the updates alone,
      as all in `optax_clip.measures` but `relative` do.
    record: as in `skip_nonfinite`.
    name: as in `skip_nonfinite`; `LossScale` lists two more fields.

  All numbers may be traced.

  Returns:
    An `optax.GradientTransformationExtraArgs`; its state is a `GuardState`. It passes
    extra arguments on to `inner`; a ``loss`` among them must be unscaled.

  Raises:
    TypeError: if `inner` is not a transformation.
    ValueError: if a number is outside its range; in ``init`` of what stands around it,
      if there is something between the two.

  Example:
    >>> import jax, jax.numpy as jnp, optax, optax_clip
    >>> tx = optax_clip.dynamic_loss_scale(
    ...     optax.chain(optax_clip.clip_by_global_norm(1.0), optax.sgd(0.1))
    ... )
    >>> params = {"w": jnp.ones(2)}
    >>> state = tx.init(params)
    >>> def loss(params, x):
    ...   half = jax.tree.map(lambda p: p.astype(jnp.float16), params)
    ...   return jnp.sum(half["w"] * x).astype(jnp.float32)
    >>> @jax.jit
    ... def step(params, state, x):
    ...   grads = jax.grad(lambda p: loss(p, x) * optax_clip.loss_scale(state))(params)
    ...   return optax_clip.guarded_step(tx, grads, state, params)
    >>> params, state = step(params, state, jnp.array([0.5, 0.5], jnp.float16))
    >>> print(params["w"], optax_clip.loss_scale(state))
    [0.95 0.95] 32768.0

  References:
    Micikevicius et al., Mixed Precision Training, 2018, arXiv:1710.03740.
  """
  _validate.positive(init_scale=init_scale, min_scale=min_scale, max_scale=max_scale)
  _validate.within(1 / _LARGEST, _LARGEST, init_scale=init_scale)
  _validate.steps(least=1, growth_interval=growth_interval)
  if isinstance(min_scale, (int, float)) and isinstance(max_scale, (int, float)):
    _validate.within(min_scale, max_scale, init_scale=init_scale)
  _validate.within(1, float("inf"), growth_factor=growth_factor)
  _validate.positive(backoff_factor=backoff_factor)
  _validate.within(0, 1, backoff_factor=backoff_factor)
  measuring = Measuring.of(measure, record)
  # A division by less than 1 may make a finite number infinite: see `judge`.
  lowest = (init_scale, min_scale)
  enlarges = not all(isinstance(x, (int, float)) and x >= 1 for x in lowest)

  def init(params: Params) -> dict[str, LossScale]:
    del params
    scale = jnp.clip(jnp.array(init_scale, jnp.float32), 1 / _LARGEST, _LARGEST)
    return {name: LossScale(scale, jnp.zeros((), jnp.int32))}

  def judge(
    updates: Updates,
    params: Params,
    memory: dict[str, LossScale],
    record: SkipRecord,
    extra_args: dict[str, Any],
  ) -> Verdict:
    del record
    ((key, (scale, finite_steps)),) = memory.items()
    seen = measuring.measured(updates, params, extra_args)
    layers = None if seen.layers is None else seen.layers.divided(scale)
    finite = jnp.all(jnp.isfinite(seen.sizes))
    take = finite
    if enlarges:
      # A lower scale would not help: these gradients are too large for their dtype.
      again = measuring._replace(by_layer=False)
      unscaled = divided(updates, scale)
      sizes = again.measured(unscaled, params, extra_args).sizes
      take = finite & jnp.all(jnp.isfinite(sizes))

    steps = jnp.where(take, optax.safe_increment(finite_steps), 0)
    grow = steps >= growth_interval
    larger = jnp.minimum(scale * growth_factor, jnp.minimum(max_scale, _LARGEST))
    smaller = jnp.maximum(scale * backoff_factor, jnp.maximum(min_scale, 1 / _LARGEST))
    new_scale = jnp.where(finite, jnp.where(grow, larger, scale), smaller)
    norm = jnp.max(seen.sizes, initial=0)
    return Verdict(
      take=take,
      reason=jnp.where(take, SkipReason.NONE, SkipReason.NONFINITE_NORM),
      norm=norm / scale.astype(norm.dtype),
      limit=jnp.full((), jnp.inf, jnp.float32),
      is_nan=jnp.isnan(norm),
      memory={key: LossScale(new_scale, jnp.where(grow, 0, steps))},
      known=seen.known,
      layers=layers,
      scale=scale,
    )

  return guarded(inner, Judge(name, init, judge, measuring.stacks, scales=True))
