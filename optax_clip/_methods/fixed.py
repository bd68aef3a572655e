"""Limits that are given: elements, and the norm of all updates."""

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
    max_delta: c >= 0, in the units of the updates: a float, a schedule of the
      step, or a traced scalar. `None`: no limit.
    nonfinite: ``"zero"`` turns the whole step into zeros if an element is NaN
      or inf. With ``"propagate"`` NaN stays NaN, and inf becomes c, which hides
      it.
    strict: whether a bound that a leaf's dtype cannot hold is rounded down.
    record: whether to keep `metrics`; the norm is then the largest modulus.
      Off by default, unlike elsewhere: elements are clipped without a norm, so
      that knowing it costs a read that clipping does not need.
    name: the prefix of the metrics' keys.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: if `max_delta` is negative or NaN, or `nonfinite` is unknown.
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
      n = \Big(\sum_i |u_i|^p\Big)^{1/p}

  Drop-in for `optax.clip_by_global_norm`. The norm is that of float64 to 1e-6
  whatever the dtype of the leaves, their number and their magnitude.

  Args:
    max_norm: c >= 0, in the units of the updates: a float, a schedule of the
      step, or a traced scalar (0 if negative). It never changes the dtype of a
      leaf and, if traced, never recompiles. `None`: no limit, the norm is measured
      and recorded.
    ord: p, 2 by default; 1, `float('inf')` or any p in (0, 64].
    eps: added to the norm in the denominator. 1e-6 is what PyTorch does.
    nonfinite: ``"zero"`` turns the whole step into zeros if the norm is NaN or
      inf; ``"propagate"`` lets NaN through, so that it is seen.
    strict: whether the norm of the result must never exceed c in exact
      arithmetic. It then lies below c: by 2e-6 of it in float32, and, as elements
      are rounded toward zero, typically by 5e-4 in float16 and 3e-3 in bfloat16,
      at worst twice that. Subnormal elements of the leaf become zero, except in
      float16.
    axis_name: mesh axes to collect the norm over, see `optax_clip.measures`.
    specs: which dimension of which leaf is sharded, see `optax_clip.measures`.
    record: whether the state keeps what `metrics` reads; ``"layers"``: and what
      `layer_metrics` does, of each leaf, from the same read (for orders below 1
      from a second). With `False` the state
      is that of optax, and so are checkpoints.
    name: the prefix of the metrics' keys.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: if `max_norm` or `eps` is negative or NaN, or `ord` or
      `nonfinite` is unknown.
    TypeError: in `update`, if a leaf is an integer or a boolean; names its
      path.

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
