"""Transformations whose limit is learned from running averages of norms."""

from typing import Any

import optax

from optax_clip import _groups
from optax_clip import _validate
from optax_clip import actions
from optax_clip import measures
from optax_clip import thresholds
from optax_clip._core import clip_with


def zclip(
  z_threshold: Any = 2.5,
  decay: Any = 0.97,
  warmup: Any = 25,
  max_norm: Any = None,
  mode: str = "adaptive_scaling",
  clip_factor: Any = 1.0,
  skip_update_on_spike: bool = False,
  eps: Any = 0.0,
  *,
  ord: float | None = None,
  nonfinite: str = "propagate",
  strict: bool = False,
  axis_name: Any = "auto",
  specs: Any = None,
  record: bool | str = True,
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
  threshold = thresholds.zscore(
    z_threshold, decay, warmup, mode, clip_factor, skip_update_on_spike, eps
  )
  if max_norm is not None:
    _validate.limit(max_norm=max_norm)
    threshold = thresholds.at_most(threshold, max_norm)
  return clip_with(
    measures.global_norm(ord=ord, axis_name=axis_name, specs=specs),
    threshold,
    actions.rescale(strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )


def adagc(
  ratio: Any = 1.05,
  decay: Any = 0.98,
  warmup: Any = 100,
  warmup_norm: Any = None,
  *,
  ord: float | None = None,
  eps: Any = 0.0,
  nonfinite: str = "propagate",
  strict: bool = False,
  axis_name: Any = "auto",
  specs: Any = None,
  stacked: _groups.Stacked = None,
  record: bool | str = True,
  name: str = "adagc",
) -> optax.GradientTransformationExtraArgs:
  r"""Clips each leaf to a little above its own average (AdaGC).

  .. math::
      u_i \leftarrow h_i u_i, \quad
      h_i = \min\left(1, \lambda_{rel} \frac{\gamma_i}{n_i}\right), \quad
      \gamma_i \leftarrow \beta \gamma_i + (1 - \beta) h_i n_i

  In the first `warmup` steps :math:`\gamma_i` is the least of the norms of its leaf.
  With a `warmup_norm` all leaves are clipped together in them, :math:`h = \min(1,
  \lambda_{abs} / n)` with n the global norm; else nothing is. After them limits
  rise by at most ``(1 - decay) * (ratio - 1)`` of themselves per step, 0.1% with
  the defaults: a rise of 30 times takes 3400 steps.

  Args:
    ratio: lambda_rel > 1, the limit over the average; at 1 or below limits can
      only fall.
    decay: beta, from 0 to below 1.
    warmup: how many steps are learned from first, at least 1. (The paper counts
      steps from 1: its T_start is ``warmup + 1``.)
    warmup_norm: lambda_abs > 0, in the units of the updates; the paper has 1. `None`:
      nothing is clipped in the warm-up.
    ord: p of the norm, 2 by default; 1, `float('inf')` or any p in (0, 64].
    eps: added to the norm in the denominator.
    nonfinite: ``"zero"`` turns the whole step into zeros if a norm is NaN or
      inf; ``"propagate"`` lets NaN through, so that it is seen.
    strict: whether no norm of the result may exceed its limit in exact
      arithmetic, as in `clip_by_global_norm`.
    axis_name: mesh axes to collect norms over, see `optax_clip.measures`.
    specs: which dimension of which leaf is sharded, see `optax_clip.measures`.
    stacked: which leaves hold many layers, and along which axis, see
      `optax_clip.measures`.
    record: whether the state keeps what `metrics` reads; ``"layers"``: and what
      `layer_metrics` does.
    name: the prefix of the metrics' keys.

  All numbers may be traced.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Its state is a `ClipState` whose
    `threshold` is a NamedTuple of vectors over the norms, float32 whatever the
    dtype of the updates.

  Raises:
    ValueError: if `ratio`, `warmup` or `warmup_norm` is not positive or `decay`
      is not in [0, 1); in `update`, if the state is of a tree with another number
      of leaves.
    TypeError: in `update`, if a leaf is an integer or a boolean.

  ======================  =================================================
  input                   result
  ======================  =================================================
  a leaf of zeros         unchanged, not remembered; its warm-up is counted
                          in steps where it is not zero
  a NaN or inf element    as `nonfinite` says; no leaf remembers the step
  equal norms             unchanged, bit for bit, after the warm-up
  one norm of 1e30        clipped; in warm-up it leaves the bounds of the
                          other leaves as they were
  ======================  =================================================

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.adagc(2.0, warmup=1, warmup_norm=5.0)
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> for scale in (1.0, 100.0):
    ...   g = {"w": scale * jnp.array([3.0, 4.0])}
    ...   updates, state = tx.update(g, state)
    >>> print(updates["w"])
    [6. 8.]

  Differences: in the paper a leaf whose gradient is zero once in the warm-up is
  frozen for ever (an expert that no token reached, the second factor of LoRA); we
  leave zeros out. We also leave out steps of the warm-up whose global norm is a
  million times the least one, which would have the same effect on all other
  leaves. Averages are float32; in bfloat16 they would not move.

  References:
    Wang et al., AdaGC: Improving Training Stability for Large Language Model
    Pretraining, 2025, arXiv:2502.11034.
  """
  return clip_with(
    measures.layer_norm(ord=ord, axis_name=axis_name, specs=specs, stacked=stacked),
    thresholds.adagc(ratio, decay, warmup, warmup_norm, ord),
    actions.rescale(eps=eps, strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )
