"""ZClip: a limit from the z-score of the norm."""

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
from optax_clip._thresholds import limits as _limits
from optax_clip._thresholds import memory as _memory
from optax_clip._types import AxisName
from optax_clip._types import Nonfinite
from optax_clip._types import Recording
from optax_clip._types import Scalar
from optax_clip._types import ScalarOrSchedule
from optax_clip._types import Specs

Array = jax.Array


_INF = float("inf")

Mode: TypeAlias = Literal["adaptive_scaling", "mean", "percentile"]


class MomentsMemory(NamedTuple):
  """What `zscore` remembers.

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

  With its defaults it does not follow a lasting rise of the norm of more than
  `z_threshold` deviations, for thousands of steps or for ever: such norms are
  clipped to about the mean, and remembered as that. ``mode="percentile"`` follows
  within a few dozen steps.

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
    warmup: how many steps are learned from first; clipped to `max_norm` only.
    max_norm: c >= 0, in the units of the updates; a float, a schedule or a traced
      scalar; the paper has 1. Not remembered. `None`: no such cap, and nothing bounds
      the warm-up.
    mode: T of a spike: "adaptive_scaling", as above; "mean", mu; "percentile",
      mu + z sigma, for all norms above that.
    clip_factor: f > 0; all of T of a spike is multiplied by it.
    skip_update_on_spike: whether a spike is not remembered at all.
    eps: epsilon >= 0, in the units of the updates. The paper has 1e-6.
    ord: p of the norm, 2 by default; 1, `float('inf')` or any p in (0, 64].
    nonfinite: ``"zero"`` turns the whole step into zeros if a norm is NaN or
      inf; ``"propagate"`` lets NaN through, so that it is seen.
    strict: whether no norm of the result may exceed its limit in exact
      arithmetic, as in `clip_by_global_norm`.
    axis_name: mesh axes to collect norms over, see `optax_clip.measures`.
    specs: which dimension of which leaf is sharded, see `optax_clip.measures`.
    record: whether the state keeps what `metrics` reads; ``"layers"``: and what
      `layer_metrics` does.
    name: the prefix of the metrics' keys.

  All numbers may be traced.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Its state is a `ClipState` whose
    `threshold` is a NamedTuple of vectors over the norms, float32 whatever the
    dtype of the updates.

  Raises:
    ValueError: if `z_threshold`, `max_norm` or `eps` is negative or NaN, `decay` is
      not in [0, 1), `warmup` or `clip_factor` is not positive, or `mode` is unknown.
    TypeError: in `update`, if a leaf is an integer or a boolean.

  =======================  ================================================
  input                    result
  =======================  ================================================
  the first steps          clipped to `max_norm`, or unchanged without one
  all zero                 unchanged, not remembered
  a NaN or inf element     as `nonfinite` says, not remembered
  equal norms, sigma = 0   unchanged, bit for bit
  one norm of 1e30         clipped; in warm-up learned as a million times the
                           mean, which takes 1000 steps to forget
  =======================  ================================================

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.zclip(warmup=2)
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> for scale in (1.0, 1.0, 100.0):
    ...   g = {"w": scale * jnp.array([3.0, 4.0])}
    ...   updates, state = tx.update(g, state)
    >>> print(updates["w"])
    [3. 4.]

  Differences: one NaN makes the official mean NaN, and nothing is clipped ever
  after; zeros are remembered there. The official `clip_factor` acts in
  "adaptive_scaling" only. Norms of the warm-up beyond a million times the mean are
  learned as that. The recorded limit of a step without a spike is the
  norm from which it would have been one.

  References:
    Kumar et al., ZClip: Adaptive Spike Mitigation for LLM Pre-Training, 2025,
    arXiv:2504.02507.
  """
  threshold = zscore(
    z_threshold, decay, warmup, mode, clip_factor, skip_update_on_spike, eps
  )
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
