"""Rules that learn running averages of norms: each is one paper's equation.

The functions are public as `optax_clip.thresholds`. What all of them share
(forgetting, dtypes, counting, noise) is in `_memory`.
"""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_clip import _extended
from optax_clip import _memory
from optax_clip import _validate
from optax_clip._core import Threshold

Array = jax.Array

_INF = float("inf")
_TINY = float(jnp.finfo(jnp.float32).tiny)


class MomentsMemory(NamedTuple):
  """What `zscore` remembers.

  Attributes:
    mean: f32[norms], the running mean; the plain mean during warm-up.
    std: f32[norms], the root of the running variance.
  """

  mean: Array
  std: Array


class BoundMemory(NamedTuple):
  """What `adagc` remembers.

  Attributes:
    gamma: f32[norms], the running mean of clipped norms; during warm-up their
      least.
    calmest: f32[norms], the least global norm of the warm-up.
  """

  gamma: Array
  calmest: Array


class AverageMemory(NamedTuple):
  """What `average` remembers.

  Attributes:
    mean: f32[norms], the bias-corrected running mean.
  """

  mean: Array


class RatioMemory(NamedTuple):
  """What `mean_over_rms` remembers.

  Attributes:
    mean: f32[norms], the bias-corrected running mean.
    rms: f32[norms], the root of the bias-corrected running mean of squares.
  """

  mean: Array
  rms: Array


def zscore(
  z_threshold: Any = 2.5,
  decay: Any = 0.97,
  warmup: Any = 25,
  mode: str = "adaptive_scaling",
  clip_factor: Any = 1.0,
  skip_update_on_spike: bool = False,
  eps: Any = 0.0,
) -> Threshold:
  r"""A z-score by the moments of clipped norms (ZClip); may lock on a rise.

  With "adaptive_scaling" and "mean" it does not follow a rise of more than
  `z_threshold` deviations: what it clips to the mean it remembers as the mean.
  Such a level locks it for thousands of steps, or for ever. "percentile" follows.

  .. math::
      z_t = \frac{n_t - \mu}{\sigma + \epsilon}, \quad L_t = f \cdot \begin{cases}
      \mu + z \sigma \cdot z / z_t & \text{adaptive\_scaling} \\
      \mu & \text{mean} \\
      \mu + z \sigma & \text{percentile} \end{cases}
      \quad \text{if } z_t > z

  ("percentile" compares without :math:`\epsilon`). Then, with :math:`x = L_t` if
  it was a spike, else :math:`n_t`: :math:`\mu \leftarrow \alpha \mu + (1 - \alpha)
  x`, :math:`\sigma^2 \leftarrow \alpha \sigma^2 + (1 - \alpha) (x - \mu)^2`.
  Where there is no spike the limit is the norm from which there would be one.

  Args:
    z_threshold: z >= 0, in standard deviations.
    decay: alpha, from 0 to below 1.
    warmup: how many norms at first are learned from without a limit; at least 1.
    mode: what a spike is limited to: "adaptive_scaling", "mean", "percentile".
    clip_factor: f > 0, multiplies the limit of a spike.
    skip_update_on_spike: whether a spike is not remembered at all.
    eps: epsilon >= 0, in the units of the norms. The paper has 1e-6.

  All numbers may be traced.
  """
  _validate.nonnegative(z_threshold=z_threshold, eps=eps)
  _validate.fraction(decay=decay)
  _validate.positive(warmup=warmup, clip_factor=clip_factor)
  _validate.choice(("adaptive_scaling", "mean", "percentile"), mode=mode)
  z, alpha, factor, eps, warmup = map(
    _memory.number, (z_threshold, decay, clip_factor, eps, warmup)
  )

  def start(norms: Array) -> MomentsMemory:
    return MomentsMemory(jnp.zeros_like(norms), jnp.zeros_like(norms))

  def rule(
    n: Array, memory: MomentsMemory, count: Array
  ) -> tuple[Array, MomentsMemory]:
    mean, std = memory
    before = count.astype(jnp.float32)
    warm = before < jnp.maximum(warmup, 1)
    level = mean + z * (std if mode == "percentile" else std + eps)
    spike = (n > level) & ~warm

    if mode == "adaptive_scaling":
      # z / z_t, which is below 1 where there is a spike.
      shrink = z * (std + eps) / jnp.where(spike, n - mean, 1)
      limit = mean + z * std * jnp.where(spike, shrink, 1)
    else:
      limit = mean if mode == "mean" else level
    limit = jnp.minimum(limit * factor, _memory.LARGEST)

    # Plain mean and variance of the first norms, then running ones: Welford's
    # recurrence and that of the paper differ in the weight of the new value, and
    # in whether its deviation is from the mean before it or after.
    first, restart = _memory.plausible(n, mean, count)
    x = jnp.where(warm, first, jnp.where(spike, limit, n))
    weight = jnp.where(warm, 1 / (before + 1), 1 - alpha)
    weight = jnp.where(warm & restart, 1, weight)
    new_mean = mean + weight * (x - mean)
    deviation = jnp.where(
      warm & ~restart,
      jnp.abs(x - mean) * jnp.sqrt(before / (before + 1)),
      jnp.abs(x - new_mean),
    )
    new = MomentsMemory(new_mean, _memory.root_mean(weight, std, deviation))
    if skip_update_on_spike:
      new = jax.tree.map(lambda a, b: jnp.where(spike, b, a), new, memory)
    limits = jnp.where(spike, limit, level)
    return jnp.where(warm, _INF, limits), new

  return _memory.remembering(start, rule)


def adagc(
  ratio: Any = 1.05,
  decay: Any = 0.98,
  warmup: Any = 100,
  warmup_norm: Any = None,
  ord: float | None = None,
) -> Threshold:
  r"""A little above the running mean of each entry's clipped norms (AdaGC).

  .. math::
      L_i = \lambda_{rel} \gamma_i, \quad
      \gamma_i \leftarrow \beta \gamma_i + (1 - \beta) \min(n_i, L_i)

  after `warmup` norms, during which :math:`\gamma_i` is the least of the norms of its
  entry; with a `warmup_norm` all entries together are clipped to that until then.

  Args:
    ratio: lambda_rel > 1; at 1 or below limits can only fall.
    decay: beta, from 0 to below 1.
    warmup: how many norms at first are learned from in this way; at least 1. The paper
      counts steps from 1, its T_start is ``warmup + 1``.
    warmup_norm: lambda_abs > 0, in the units of the norms; the paper has 1. `None`:
      nothing is clipped in the warm-up.
    ord: the order of the measure's norms, to take the global norm of them.

  All numbers but `ord` may be traced.
  """
  _validate.positive(ratio=ratio, warmup=warmup)
  if warmup_norm is not None:
    _validate.positive(warmup_norm=warmup_norm)
  _validate.fraction(decay=decay)
  p = _validate.order(ord)
  most = None if warmup_norm is None else _memory.number(warmup_norm)
  ratio, beta, warmup = map(_memory.number, (ratio, decay, warmup))

  def start(norms: Array) -> BoundMemory:
    return BoundMemory(
      jnp.full_like(norms, _memory.LARGEST),
      jnp.full_like(norms, _memory.LARGEST),
    )

  def rule(n: Array, memory: BoundMemory, count: Array) -> tuple[Array, BoundMemory]:
    gamma, calmest = memory
    warm = count.astype(jnp.float32) < jnp.maximum(warmup, 1)
    total = jnp.minimum(_total(n, p), _memory.LARGEST)
    # n first: most / total may be too small for a float.
    total = jnp.where(total > 0, total, 1)
    # In a unit that cancels: the derivative of n / total may not be a float.
    unit = jax.lax.stop_gradient(total)
    share = jnp.where(n > 0, (n / unit) / (total / unit), 1)
    early = _INF if most is None else share * most
    limits = jnp.where(warm, early, ratio * gamma)
    clipped = jnp.maximum(jnp.minimum(n, limits), _TINY)

    # A spike in the warm-up would leave all other entries a bound near 0.
    spike = total > _memory.LEAP * calmest
    after_spikes = calmest > _memory.LEAP * total
    least = jnp.where(
      spike,
      gamma,
      jnp.where(after_spikes, clipped, jnp.minimum(gamma, clipped)),
    )
    return limits, BoundMemory(
      jnp.where(warm, least, gamma + (1 - beta) * (clipped - gamma)),
      jnp.where(warm, jnp.minimum(calmest, total), calmest),
    )

  return _memory.remembering(start, rule)


def average(decay: Any = 0.999) -> Threshold:
  r"""The bias-corrected running mean of all norms, this one included.

  .. math::
      T \leftarrow \beta T + (1 - \beta) n_t, \quad L_t = T / (1 - \beta^t)

  Args:
    decay: beta, from 0 to below 1. A float or a traced scalar.
  """
  _validate.fraction(decay=decay)
  beta = _memory.number(decay)

  def rule(
    n: Array, memory: AverageMemory, count: Array
  ) -> tuple[Array, AverageMemory]:
    x, restart = _memory.plausible(n, memory.mean, count)
    weight = jnp.where(restart, 1, _memory.debiasing(beta, count))
    mean = memory.mean + weight * (x - memory.mean)
    known = jnp.where(n > 0, mean, memory.mean)
    unknown = (count == 0) & (n == 0)
    return jnp.where(unknown, _INF, known), AverageMemory(mean)

  return _memory.remembering(lambda n: AverageMemory(jnp.zeros_like(n)), rule)


def mean_over_rms(
  decay_mean: Any = 0.7, decay_square: Any = 0.9, eps: Any = 0.0
) -> Threshold:
  r"""The ratio of a running mean to a running root mean square (AdaGN).

  .. math::
      a \leftarrow \gamma_1 a + (1 - \gamma_1) n, \quad
      b \leftarrow \gamma_2 b + (1 - \gamma_2) n^2, \quad
      L = \hat a / (\sqrt{\hat b} + \epsilon)

  A number around 1, whatever the units of the norms: it is for
  `optax_clip.actions.normalize`, as updates have no units after it.

  Args:
    decay_mean: gamma_1, from 0 to below 1.
    decay_square: gamma_2, from 0 to below 1.
    eps: epsilon >= 0, in the units of the norms. The paper has 1e-8.

  All numbers may be traced.
  """
  _validate.fraction(decay_mean=decay_mean, decay_square=decay_square)
  _validate.nonnegative(eps=eps)
  decays = [_memory.number(x) for x in (decay_mean, decay_square)]
  eps = _memory.number(eps)

  def start(norms: Array) -> RatioMemory:
    return RatioMemory(jnp.zeros_like(norms), jnp.zeros_like(norms))

  def rule(n: Array, memory: RatioMemory, count: Array) -> tuple[Array, RatioMemory]:
    x, restart = _memory.plausible(n, memory.rms, count)
    first, second = (
      jnp.where(restart, 1, _memory.debiasing(decay, count)) for decay in decays
    )
    mean = memory.mean + first * (x - memory.mean)
    rms = _memory.root_mean(second, memory.rms, x)
    known = rms > 0
    # Its derivative squares nothing, however small the norms are.
    ratio = _extended.quotient(mean, jnp.where(known, rms, 1) + eps)
    limits = jnp.where(known, _extended.as_float(ratio), 1)
    return limits, RatioMemory(mean, rms)

  return _memory.remembering(start, rule)


def _total(norms: Array, ord: float) -> Array:
  """The norm of all entries together, from their norms."""
  if not norms.size:
    return jnp.zeros((), norms.dtype)
  if ord == _INF:
    return jnp.max(norms)
  # The unit cancels, and its derivative is left out.
  largest = jax.lax.stop_gradient(jnp.max(norms))
  unit = jnp.where(largest > 0, largest, 1)
  share = norms / unit
  # The largest share is 1, which keeps the root's derivative finite.
  present = share > 0
  moment = jnp.sum(jnp.where(present, jnp.where(present, share, 1) ** ord, 0))
  root = jnp.where(largest > 0, moment, 1) ** (1 / ord)
  return jnp.where(largest > 0, unit * root, 0)
