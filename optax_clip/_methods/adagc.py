"""Clips each layer by the running mean of its clipped norms (AdaGC)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip import _validate
from optax_clip import actions
from optax_clip import measures
from optax_clip._algebra.clip_with import clip_with
from optax_clip._algebra.types import Threshold
from optax_clip._norms import power_sums as _power_sums
from optax_clip._repr import named
from optax_clip._thresholds import geometric as _geometric
from optax_clip._thresholds import memory as _memory
from optax_clip._trees import axes as _axes
from optax_clip._types import AxisName
from optax_clip._types import Nonfinite
from optax_clip._types import Recording
from optax_clip._types import Scalar
from optax_clip._types import Specs

Array = jax.Array


_TINY = float(jnp.finfo(jnp.float32).tiny)


class BoundMemory(NamedTuple):
  """Holds what `clipped_mean` remembers.

  Attributes:
    gamma: f32[norms], the running mean of clipped norms; in the warm-up the least
      one.
    calmest: f32[norms], the least global norm of the warm-up.
  """

  gamma: Array
  calmest: Array


def clipped_mean(
  ratio: Scalar = 1.05,
  decay: Scalar = 0.98,
  warmup: Scalar = 100,
  warmup_norm: Scalar | None = None,
  ord: float | None = None,
) -> Threshold:
  r"""Limits each norm to a little above its own clipped average (AdaGC).

  .. math::
      L_i = \lambda_{rel} \gamma_i, \quad
      \gamma_i \leftarrow \beta \gamma_i + (1 - \beta) \min(n_i, L_i)

  Args:
    ratio, decay, warmup, warmup_norm: as in `optax_clip.adagc`, for each norm of the
      measure instead of each leaf. `warmup` counts the norms that an entry learns.
    ord: the order of the measure's norms; the warm-up makes the global norm of them.
      It cannot be traced.
  """
  _validate.positive(ratio=ratio)
  _validate.steps(least=1, warmup=warmup)
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
    # n is divided first, as most / total may be too small for a float.
    total = jnp.where(total > 0, total, 1)
    # The unit cancels. Without it the derivative of n / total may be no float.
    unit = jax.lax.stop_gradient(total)
    share = jnp.where(n > 0, (n / unit) / (total / unit), 1)
    early = math.inf if most is None else share * most
    limits = jnp.where(warm, early, ratio * gamma)
    clipped = jnp.maximum(jnp.minimum(n, limits), _TINY)

    # A spike teaches nothing: it would leave all other entries a bound near 0.
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


def _total(norms: Array, ord: float) -> Array:
  """Combines all norms into the global one."""
  if not norms.size:
    return jnp.zeros((), norms.dtype)
  if ord == math.inf:
    return jnp.max(norms)
  largest = jnp.max(norms)
  unit = _power_sums.as_unit(largest)
  share = norms / unit
  # The largest share is 1: the root has a finite derivative.
  present = share > 0
  moment = jnp.sum(jnp.where(present, jnp.where(present, share, 1) ** ord, 0))
  root = jnp.where(largest > 0, moment, 1) ** (1 / ord)
  return jnp.where(largest > 0, unit * root, 0)


@named
def adagc(
  ratio: Scalar = 1.05,
  decay: Scalar = 0.98,
  warmup: Scalar = 100,
  warmup_norm: Scalar | None = None,
  early_factor: Scalar | None = 2.0,
  *,
  ord: float | None = None,
  eps: Scalar = 0.0,
  nonfinite: Nonfinite = "propagate",
  strict: bool = False,
  axis_name: AxisName = "auto",
  specs: Specs = None,
  stacked: _axes.Stacked = None,
  record: Recording = True,
  name: str = "adagc",
) -> optax.GradientTransformationExtraArgs:
  r"""Clips each leaf to a little above its own average (AdaGC).

  .. math::
      u_i \leftarrow h_i u_i, \quad
      h_i = \min\left(1, \lambda_{rel} \frac{\gamma_i}{n_i}\right), \quad
      \gamma_i \leftarrow \beta \gamma_i + (1 - \beta) h_i n_i

  In the first `warmup` steps :math:`\gamma_i` is the least clipped norm of its leaf,
  and `warmup_norm` clips all leaves together: :math:`h = \min(1, \lambda_{abs} / n)`
  with n the global norm. Later a limit rises by at most ``(1 - decay) * (ratio - 1)``
  of itself per step, 0.1% with the defaults: a rise of 30 times takes 3400 steps. All
  numbers but `ord` may be traced.

  Args:
    ratio: lambda_rel > 1, the limit over the average. At 1 or below limits only fall.
    decay: beta, from 0 to below 1.
    warmup: how many steps to learn from first, at least 1. The paper counts steps
      from 1: its T_start is ``warmup + 1``.
    warmup_norm: lambda_abs > 0, in the units of the updates; the paper has 1. With
      `None` the first norms of each leaf bound its warm-up.
    early_factor: how, as in `zclip`; of no use with a `warmup_norm`. `None`: nothing is
      clipped in the warm-up.
    ord, eps, strict: as in `measures.global_norm` and `actions.rescale`.
    nonfinite, record, name: as in `clip_with`.
    axis_name, specs, stacked: as in `optax_clip.measures`.

  Returns:
    An `optax.GradientTransformationExtraArgs`; for its memory see `thresholds`.

  Raises:
    ValueError: if `ratio`, `warmup` or `warmup_norm` is not positive, or `decay` is
      not in [0, 1).

  ====================  ==================================================
  input                 result
  ====================  ==================================================
  a leaf of zeros       unchanged, not learned, not counted in its warm-up
  a NaN or inf element  as `nonfinite` says; no leaf remembers the step
  equal norms           unchanged, bit for bit, after the warm-up
  one norm of 1e30      clipped; in the warm-up it moves no other bound
  ====================  ==================================================

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.adagc(2.0, warmup=1, warmup_norm=5.0)
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> for scale in (1.0, 100.0):
    ...   updates, state = tx.update({"w": scale * jnp.array([3.0, 4.0])}, state)
    >>> print(updates["w"])
    [6. 8.]

  Differences: in the paper a leaf freezes for ever if its gradient is zero once in
  the warm-up (an expert that no token reached, a LoRA factor whose partner is zero);
  we leave zeros out. We also leave out warm-up steps whose global norm is a million
  times the least: they would freeze all other leaves. Averages are float32; in
  bfloat16 they would not move.

  References:
    Wang et al., AdaGC: Improving Training Stability for Large Language Model
    Pretraining, 2025, arXiv:2502.11034.
  """
  return clip_with(
    measures.layer_norm(ord=ord, axis_name=axis_name, specs=specs, stacked=stacked),
    _geometric.early(
      clipped_mean(ratio, decay, warmup, warmup_norm, ord),
      early_factor if warmup_norm is None else None,
    ),
    actions.rescale(eps=eps, strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )
