"""Clips and normalizes as Stable-SPAM does: AdaClip, AdaGN, and both in a row."""

import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip import _validate
from optax_clip import actions
from optax_clip import measures
from optax_clip._algebra import handed as _handed
from optax_clip._algebra import measured as _measured
from optax_clip._algebra.clip_with import clip_with
from optax_clip._algebra.handed import Known
from optax_clip._algebra.types import Threshold
from optax_clip._norms import extended as _extended
from optax_clip._norms import mesh as _mesh
from optax_clip._norms import power_sums as _power_sums
from optax_clip._norms import scalars as _scalars
from optax_clip._norms.extended import Extended
from optax_clip._repr import named
from optax_clip._thresholds import memory as _memory
from optax_clip._thresholds.average import average
from optax_clip._trees import axes as _axes
from optax_clip._trees import leaves as _leaves
from optax_clip._types import AxisName
from optax_clip._types import Nonfinite
from optax_clip._types import OptState
from optax_clip._types import Params
from optax_clip._types import Recording
from optax_clip._types import Scalar
from optax_clip._types import Specs
from optax_clip._types import Updates

Array = jax.Array


class RatioMemory(NamedTuple):
  """Holds what `mean_over_rms` remembers.

  Attributes:
    mean: f32[norms], the bias-corrected running mean.
    rms: f32[norms], the root of the bias-corrected running mean of squares.
  """

  mean: Array
  rms: Array


def mean_over_rms(
  decay_mean: Scalar = 0.7, decay_square: Scalar = 0.9, eps: Scalar = 0.0
) -> Threshold:
  r"""Divides a running mean of norms by a running root mean square (AdaGN).

  .. math::
      L = \hat a / (\sqrt{\hat b} + \epsilon)

  with a and b as in `optax_clip.adagn`. The ratio is around 1 in whatever units norms
  are: a limit for `optax_clip.actions.normalize`, after which updates have no units.
  All numbers may be traced.

  Args:
    decay_mean: gamma_1, from 0 to below 1.
    decay_square: gamma_2, from 0 to below 1.
    eps: epsilon >= 0, in the units of the norms. The paper has 1e-8.
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
    # The derivative of `quotient` squares nothing, however small the norms are.
    ratio = _extended.quotient(mean, jnp.where(known, rms, 1) + eps)
    limits = jnp.where(known, _extended.as_float(ratio), 1)
    return limits, RatioMemory(mean, rms)

  return _memory.remembering(start, rule)


@named
def adaclip(
  decay: Scalar = 0.999,
  *,
  nonfinite: Nonfinite = "propagate",
  axis_name: AxisName = "auto",
  specs: Specs = None,
  stacked: _axes.Stacked = None,
  record: Recording = True,
  name: str = "adaclip",
) -> optax.GradientTransformationExtraArgs:
  r"""Scales elements beyond the average of their leaf's largest (AdaClip).

  .. math::
      m = \max_i |g_i|, \quad T \leftarrow \gamma T + (1 - \gamma) m, \quad
      g_i \leftarrow g_i \frac{\hat T}{m} \text{ where } |g_i| > \hat T

  for each leaf, :math:`\hat T = T / (1 - \gamma^t)`. The first part of `stable_spam`,
  which has the reference; not the AdaCliP of differential privacy.

  Args:
    decay: gamma, from 0 to below 1. May be traced.
    nonfinite, name: as in `clip_with`.
    record: as in `clip_with`; the norm is the largest modulus.
    axis_name, specs, stacked: as in `optax_clip.measures`.

  Returns:
    An `optax.GradientTransformationExtraArgs`; for its memory see `thresholds`.

  Raises:
    ValueError: if `decay` is not in [0, 1).

  =====================  ==================================================
  input                  result
  =====================  ==================================================
  the first step         unchanged
  a leaf of zeros        unchanged, not remembered
  a NaN or inf element   as `nonfinite` says; no leaf remembers the step
  equal maxima           unchanged, bit for bit
  =====================  ==================================================

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.adaclip(0.5)
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> for g in (jnp.array([1.0, 1.0]), jnp.array([2.5, -1.0])):
    ...   updates, state = tx.update({"w": g}, state)
    >>> print(updates["w"])
    [ 2. -1.]

  Differences: T does not learn from leaves of zeros, and learns a maximum beyond a
  million times itself as just that.
  """
  return clip_with(
    measures.layer_norm(
      ord=math.inf, axis_name=axis_name, specs=specs, stacked=stacked
    ),
    average(decay),
    actions.rescale_elements(),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )


@named
def adagn(
  decay_mean: Scalar = 0.7,
  decay_square: Scalar = 0.9,
  eps: Scalar = 0.0,
  *,
  nonfinite: Nonfinite = "propagate",
  axis_name: AxisName = "auto",
  specs: Specs = None,
  stacked: _axes.Stacked = None,
  record: Recording = True,
  name: str = "adagn",
) -> optax.GradientTransformationExtraArgs:
  r"""Normalizes each leaf to the ratio of its norm's running moments (AdaGN).

  .. math::
      a \leftarrow \gamma_1 a + (1 - \gamma_1) n, \quad
      b \leftarrow \gamma_2 b + (1 - \gamma_2) n^2, \quad
      g \leftarrow \frac{g}{n} \cdot \frac{\hat a}{\sqrt{\hat b} + \epsilon}

  for each leaf, with n its norm. All leaves come out with norms around 1. The second
  part of `stable_spam`, which has the reference.

  Args:
    decay_mean, decay_square, eps: as in `thresholds.mean_over_rms`. May be traced.
    nonfinite, record, name: as in `clip_with`.
    axis_name, specs, stacked: as in `optax_clip.measures`.

  Returns:
    An `optax.GradientTransformationExtraArgs`; for its memory see `thresholds`.

  Raises:
    ValueError: if a decay is not in [0, 1) or `eps` is negative.

  =====================  ==================================================
  input                  result
  =====================  ==================================================
  the first step         norm 1 for each leaf
  a leaf of zeros        unchanged, not remembered
  a NaN or inf element   as `nonfinite` says; no leaf remembers the step
  norms of 1e30          norm 1: nothing is squared
  =====================  ==================================================

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.adagn()
    >>> g = {"w": jnp.array([3.0, -4.0])}
    >>> updates, _ = tx.update(g, tx.init(g))
    >>> print(updates["w"])
    [ 0.6 -0.8]

  Differences: a and b do not learn from leaves of zeros, and learn a norm beyond a
  million times the average as just that. For the official schedule of gamma_1, use
  `optax.inject_hyperparams`.
  """
  return clip_with(
    measures.layer_norm(axis_name=axis_name, specs=specs, stacked=stacked),
    mean_over_rms(decay_mean, decay_square, eps),
    actions.normalize(),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )


@named
def stable_spam(
  decay_max: Scalar = 0.999,
  decay_mean: Scalar = 0.7,
  decay_square: Scalar = 0.9,
  eps: Scalar = 0.0,
  *,
  nonfinite: Nonfinite = "propagate",
  axis_name: AxisName = "auto",
  specs: Specs = None,
  stacked: _axes.Stacked = None,
  record: Recording = True,
  name: str = "stable_spam",
) -> optax.GradientTransformationExtraArgs:
  """Applies `adaclip`, then `adagn`, as Stable-SPAM does to gradients before Adam.

  Args:
    decay_max: the decay of `adaclip`, from 0 to below 1. May be traced.
    decay_mean, decay_square, eps: as in `thresholds.mean_over_rms`. May be traced.
    nonfinite, record: as in `clip_with`, for both.
    name: the prefix of the metrics' keys, ``<name>_adaclip`` and ``<name>_adagn``.
    axis_name, specs, stacked: as in `optax_clip.measures`.

  Returns:
    An `optax.GradientTransformationExtraArgs`, an `optax.chain` of the two.

  Errors and edge cases are those of the two.

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.stable_spam()
    >>> state = tx.init({"w": jnp.zeros(3)})
    >>> for g in ([3.0, -4.0, 0.0], [0.3, -0.4, 0.0], [30.0, -0.4, 0.1]):
    ...   updates, state = tx.update({"w": jnp.array(g)}, state)
    >>> print(updates["w"].round(4))
    [ 0.8693 -0.0303  0.0076]

  Differences: this leaves Stable-SPAM's resets of the momentum out. `adagn` takes its
  norms from the clipped elements before they are rounded to the leaf's dtype, which
  for bfloat16 moves the result by up to one rounding.

  References:
    Huang et al., Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam,
    2025, arXiv:2502.17055.
  """
  _validate.fraction(decay_max=decay_max)
  where: dict[str, Any] = {"axis_name": axis_name, "specs": specs, "stacked": stacked}
  common: dict[str, Any] = {**where, "nonfinite": nonfinite, "record": record}
  first = adaclip(decay_max, name=f"{name}_adaclip", **common)
  second = adagn(decay_mean, decay_square, eps, name=f"{name}_adagn", **common)
  peak = measures.layer_norm(ord=math.inf, **where)
  norm = measures.layer_norm(**where)
  largest = average(decay_max)

  def init(params: Params) -> Any:
    return first.init(params), second.init(params)

  def update(
    updates: Updates, state: OptState, params: Params = None, **extra_args: object
  ) -> tuple[Any, Any]:
    del extra_args
    _validate.pair(state, repr(name))
    given_updates, updates = updates, _leaves.with_values(updates)
    layout, peaks = peak.layout(updates), list(peak.measure(updates))
    with _handed.scope(_measured.known(peak, updates, peaks)):
      clipped, first_state = first.update(updates, state[0], params)
    known = Known()
    # Not if leaves are stacked, or of several dtypes, or differ over a mesh.
    if specs is None and len(layout.blocks) == 1 and layout.places[0].dims is None:
      sizes = _extended.as_float(peaks[0])
      limits, _ = largest.update(sizes, state[0].threshold)
      leaves = _leaves.floating_leaves(updates)
      norms = _clipped_norms(leaves, peaks[0], limits, axis_name)
      if nonfinite == "zero":
        # AdaGN then sees updates of zero.
        finite = jnp.all(jnp.isfinite(peaks[0].value))
        norms = norms._replace(value=jnp.where(finite, norms.value, 0))
      known = _measured.known(norm, clipped, norms)
    with _handed.scope(known):
      result, second_state = second.update(clipped, state[1], params)
    return _leaves.restored(result, given_updates), (first_state, second_state)

  return optax.GradientTransformationExtraArgs(init, update)


def _clipped_norms(
  leaves: list[Array], peaks: Extended, limits: Array, axis_name: AxisName
) -> Extended:
  """Measures what `actions.rescale_elements` returns, from the leaves that it is given.

  A plain chain of the two moves two gradients more (with AdamW 14.0 instead of 12.0, on
  a CPU with JAX 0.12.0.1), keeps a copy of them and has a conditional.

  The largest modulus says in which unit to sum. So no second measurement stands by,
  whose `lax.cond` would need the clipped leaves as arrays. And XLA's CPU backend fuses
  no selection into a sum of squares, but writes its result to memory; arithmetic with
  0 and 1 it does fuse.
  """
  factor, shift = actions.rescale().weigh(peaks, limits)
  unit = _extended.power_of_two(jnp.minimum(_extended.as_float(peaks), limits))

  # XLA must not know these numbers: of a known one it would write down a constant as
  # large as a leaf, for all leaves of one shape.
  zero, one = jnp.zeros_like(limits), jnp.ones_like(limits)

  def moment(leaf: Array, column: list[Array]) -> Array:
    limit, factor, shift, unit, zero, one = column
    # x keeps its sign: XLA would write a modulus down, as the measure takes it too.
    x = jnp.abs(leaf) if jnp.iscomplexobj(leaf) else leaf
    x = x.astype(limit.dtype)
    beyond = jnp.maximum(x - limit, zero) + jnp.maximum(-x - limit, zero)
    large = jnp.sign(beyond)
    clipped = x * (one - large) + large * x * shift * factor
    # The derivative of a quotient divides by a square, even if the unit is constant.
    unit = jax.lax.stop_gradient(unit)
    return _power_sums.power_sum(clipped, 2, limit.dtype, unit)

  found = _scalars.columns([limits, factor, shift, unit, zero, one])
  moments = [moment(x, column) for x, column in zip(leaves, found, strict=True)]
  axes = [_mesh.collected_axes(x, axis_name) for x in leaves]
  total = jnp.stack(_mesh.collect_each(moments, axes, jax.lax.psum))
  # The derivative at 0 is finite.
  zero = total == 0
  root = jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, total)))
  return Extended(root, unit)
