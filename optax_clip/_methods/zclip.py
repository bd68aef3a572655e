"""Clips norms with a high z-score (ZClip)."""

import math
from typing import Literal
from typing import NamedTuple
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from optax_clip import _validate
from optax_clip import actions
from optax_clip import measures
from optax_clip._algebra.clip_with import clip_with
from optax_clip._algebra.types import Threshold
from optax_clip._repr import named
from optax_clip._thresholds import geometric as _geometric
from optax_clip._thresholds import limits as _limits
from optax_clip._thresholds import memory as _memory
from optax_clip._types import AxisName
from optax_clip._types import Nonfinite
from optax_clip._types import Recording
from optax_clip._types import Scalar
from optax_clip._types import ScalarOrSchedule
from optax_clip._types import Specs

Array = jax.Array


Mode: TypeAlias = Literal["adaptive_scaling", "mean", "percentile"]


class MomentsMemory(NamedTuple):
  """Holds what `zscore` remembers.

  Attributes:
    mean: f32[norms], the running mean; the plain mean during warm-up.
    std: f32[norms], the root of the running variance.
  """

  mean: Array
  std: Array


def zscore(
  z_threshold: Scalar = 2.5,
  decay: Scalar = 0.97,
  warmup: Scalar = 25,
  mode: Mode = "adaptive_scaling",
  clip_factor: Scalar = 1.0,
  skip_update_on_spike: bool = False,
  eps: Scalar = 0.0,
) -> Threshold:
  r"""Limits norms with a high z-score (ZClip); may lock on a rise, as `zclip` says.

  .. math::
      z_t = \frac{n_t - \mu}{\sigma + \epsilon}, \quad L_t = f \cdot \begin{cases}
      \mu + z \sigma \cdot z / z_t & \text{adaptive\_scaling} \\
      \mu & \text{mean} \\
      \mu + z \sigma & \text{percentile} \end{cases}
      \quad \text{if } z_t > z

  ("percentile" compares without :math:`\epsilon`). Else the limit is the norm from
  which there would be a spike; in the warm-up it is inf. Mean and variance learn
  :math:`L_t` from a spike, :math:`n_t` from other norms. All numbers may be traced.

  Args:
    z_threshold, decay, mode, clip_factor, skip_update_on_spike: as in
      `optax_clip.zclip`.
    warmup: how many norms to learn from first, without a limit; at least 1.
    eps: epsilon >= 0, in the units of the norms. The paper has 1e-6.
  """
  _validate.nonnegative(z_threshold=z_threshold, eps=eps)
  _validate.fraction(decay=decay)
  _validate.positive(clip_factor=clip_factor)
  _validate.steps(least=1, warmup=warmup)
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
      # z / z_t, below 1 for a spike.
      shrink = z * (std + eps) / jnp.where(spike, n - mean, 1)
      limit = mean + z * std * jnp.where(spike, shrink, 1)
    else:
      limit = mean if mode == "mean" else level
    limit = jnp.minimum(limit * factor, _memory.LARGEST)

    # Welford's recurrence for the plain moments of the first norms, then the paper's
    # for running ones. They differ in the weight of the new value, and in whether
    # its deviation is from the mean before it or after.
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
    return jnp.where(warm, math.inf, limits), new

  return _memory.remembering(start, rule)


@named
def zclip(
  z_threshold: Scalar = 2.5,
  decay: Scalar = 0.97,
  warmup: Scalar = 25,
  max_norm: ScalarOrSchedule | None = None,
  mode: Mode = "adaptive_scaling",
  clip_factor: Scalar = 1.0,
  skip_update_on_spike: bool = False,
  eps: Scalar = 0.0,
  early_factor: Scalar | None = 2.0,
  *,
  ord: float | None = None,
  nonfinite: Nonfinite = "propagate",
  strict: bool = False,
  axis_name: AxisName = "auto",
  specs: Specs = None,
  record: Recording = True,
  name: str = "zclip",
) -> optax.GradientTransformationExtraArgs:
  r"""Clips global norms with a high z-score (ZClip); may lock on a rising norm.

  With "adaptive_scaling" or "mean" it does not follow a lasting rise of more than
  `z_threshold` deviations, for thousands of steps or for ever: it clips such norms to
  about the mean, and remembers them as that. "percentile" follows within a few dozen
  steps. All numbers but `ord` may be traced.

  .. math::
      z_t = \frac{n - \mu}{\sigma + \epsilon}, \quad
      T = \mu + z \sigma \frac{z}{z_t} \text{ if } z_t > z \text{ else } n, \quad
      u \leftarrow u \cdot \min\left(1, \frac{\min(T, c)}{n}\right)

  and then, after a warm-up that takes the plain mean and variance,

  .. math::
      \mu \leftarrow \alpha \mu + (1 - \alpha) T, \quad
      \sigma^2 \leftarrow \alpha \sigma^2 + (1 - \alpha) (T - \mu)^2

  Args:
    z_threshold: z >= 0, in standard deviations.
    decay: alpha, from 0 to below 1.
    warmup: how many steps to learn from first, above 0.
    max_norm: c >= 0, in the units of the updates: a float, a schedule or a traced
      scalar; the paper has 1. Not remembered. `None`: no cap.
    mode: T of a spike: "adaptive_scaling", as above; "mean", mu; "percentile",
      mu + z sigma, for all norms above that.
    clip_factor: f > 0, multiplies T of a spike.
    skip_update_on_spike: whether to remember nothing of a spike.
    eps: epsilon >= 0, in the units of the updates. The paper has 1e-6.
    early_factor: in the warm-up a norm may be this many times the geometric mean of
      those before it (`thresholds.geometric`). `None`: only `max_norm` bounds the
      warm-up, as the paper has it.
    ord, strict: as in `measures.global_norm` and `actions.rescale`.
    nonfinite, name: as in `clip_with`.
    record: as in `clip_with`; without a spike the limit is the norm that would be one.
    axis_name, specs: as in `optax_clip.measures`.

  Returns:
    An `optax.GradientTransformationExtraArgs`; for its memory see `thresholds`.

  Raises:
    ValueError: if a number is outside its range, or `mode` is unknown.

  =======================  ================================================
  input                    result
  =======================  ================================================
  the first step           clipped to `max_norm`, or unchanged without one
  all zero                 unchanged, not remembered
  a NaN or inf element     as `nonfinite` says, not remembered
  equal norms, sigma = 0   unchanged, bit for bit
  one norm of 1e30         clipped; in the warm-up learned as a million
                           times the mean, and forgotten after 1000 steps
  =======================  ================================================

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.zclip(warmup=2)
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> for scale in (1.0, 1.0, 100.0):
    ...   updates, state = tx.update({"w": scale * jnp.array([3.0, 4.0])}, state)
    >>> print(updates["w"])
    [3. 4.]

  Differences: one NaN makes the official mean NaN, which clips nothing ever after; it
  also remembers zeros. The official `clip_factor` acts in "adaptive_scaling" only.

  References:
    Kumar et al., ZClip: Adaptive Spike Mitigation for LLM Pre-Training, 2025,
    arXiv:2504.02507.
  """
  threshold = zscore(
    z_threshold, decay, warmup, mode, clip_factor, skip_update_on_spike, eps
  )
  threshold = _geometric.early(threshold, early_factor)
  if max_norm is not None:
    _validate.limit(max_norm=max_norm)
    threshold = _limits.at_most(threshold, max_norm)
  return clip_with(
    measures.global_norm(ord=ord, axis_name=axis_name, specs=specs),
    threshold,
    actions.rescale(strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )
