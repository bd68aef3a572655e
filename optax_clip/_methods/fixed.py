"""Clips by fixed thresholds: each element, or the norm of all updates."""

import math

import optax

from optax_clip import _validate
from optax_clip import actions
from optax_clip import measures
from optax_clip._algebra.clip_with import clip_with
from optax_clip._repr import named
from optax_clip._thresholds import limits as _limits
from optax_clip._types import AxisName
from optax_clip._types import Nonfinite
from optax_clip._types import Recording
from optax_clip._types import Scalar
from optax_clip._types import ScalarOrSchedule
from optax_clip._types import Specs


@named
def clip(
  max_delta: ScalarOrSchedule | None,
  *,
  nonfinite: Nonfinite = "propagate",
  strict: bool = False,
  record: Recording = False,
  name: str = "clip",
) -> optax.GradientTransformationExtraArgs:
  r"""Clips each element of the updates.

  .. math::
      u_i \leftarrow \min(\max(u_i, -c), c)

  This changes the direction of the updates. Drop-in for `optax.clip`.

  Args:
    max_delta: c >= 0, given like `max_norm` in `clip_by_global_norm`.
    nonfinite: as in `clip_with`. ``"propagate"`` makes c of inf, which hides it.
    strict: as in `actions.clamp`.
    record: as in `clip_with`; the norm is the largest modulus. Off by default, as
      clipping elements needs no norm, and measuring it costs a read.
    name: as in `clip_with`.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: if `max_delta` is negative or NaN.
    TypeError: in `update`, if a leaf is complex, an integer or a boolean.

  ==================  =====================================================
  input               result
  ==================  =====================================================
  ``max_delta=0``     zeros, and a `UserWarning`
  ``max_delta=inf``   unchanged
  ``max_delta=None``  unchanged
  an inf element      c, with its sign
  a NaN element       NaN
  ==================  =====================================================

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.clip(1.0)
    >>> g = {"w": jnp.array([3.0, -0.5, -2.0])}
    >>> updates, _ = tx.update(g, tx.init(g))
    >>> print(updates["w"])
    [ 1.  -0.5 -1. ]
  """
  _validate.limit(max_delta=max_delta)
  return clip_with(
    measures.global_norm(ord=math.inf),
    _limits.of(max_delta),
    actions.clamp(strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )


@named
def clip_by_global_norm(
  max_norm: ScalarOrSchedule | None,
  *,
  ord: float | None = None,
  eps: Scalar = 0.0,
  nonfinite: Nonfinite = "propagate",
  strict: bool = False,
  axis_name: AxisName = "auto",
  specs: Specs = None,
  record: Recording = True,
  name: str = "clip_by_global_norm",
) -> optax.GradientTransformationExtraArgs:
  r"""Scales all updates together so that their norm is at most `max_norm`.

  .. math::
      u \leftarrow u \cdot \min\left(1, \frac{c}{n + \epsilon}\right), \quad
      n = \left(\sum_i |u_i|^p\right)^{1/p}

  Drop-in for `optax.clip_by_global_norm`. Its norm agrees with float64 to 1e-6,
  whatever the dtype of the leaves, their number and their magnitude.

  Args:
    max_norm: c >= 0, in the units of the updates: a float, a schedule of the step,
      or a traced scalar (0 if negative). `None` is off: the norm is measured and
      recorded. It never changes the dtype of a leaf and,
      if traced, never recompiles.
    ord, eps, strict: as in `measures.global_norm` and `actions.rescale`.
    nonfinite, name: as in `clip_with`.
    record: as in `clip_with`. For orders below 1, ``"layers"`` takes a second read.
    axis_name, specs: as in `optax_clip.measures`.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: if `max_norm` or `eps` is negative or NaN, or `ord` is unknown.
    TypeError: in `update`, if a leaf is an integer or a boolean; names its path.

  ==========================  =============================================
  input                       result
  ==========================  =============================================
  all zero, or an empty tree  unchanged, norm 0
  ``max_norm=0``              zeros, and a `UserWarning` where it is constructed
  ``max_norm=inf``            unchanged
  ``max_norm=None``           unchanged
  within `max_norm`           unchanged, bit for bit
  a NaN element               all NaN; with ``"zero"`` all zero
  an inf element              NaN there, 0 elsewhere; with ``"zero"`` all zero
  float32 ``[3e38] * 4``      norm `max_norm`, direction kept
  ==========================  =============================================

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.clip_by_global_norm(1.0)
    >>> g = {"w": jnp.array([3.0, 4.0])}
    >>> updates, state = tx.update(g, tx.init(g))
    >>> print(updates["w"])
    [0.6 0.8]
    >>> print(optax_clip.metrics(state)["clip_by_global_norm/norm"])
    5.0

  References:
    Pascanu, Mikolov & Bengio, On the difficulty of training Recurrent Neural
    Networks, 2013, arXiv:1211.5063.
  """
  _validate.limit(max_norm=max_norm)
  return clip_with(
    measures.global_norm(ord=ord, axis_name=axis_name, specs=specs),
    _limits.of(max_norm),
    actions.rescale(eps=eps, strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )
