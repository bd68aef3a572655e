"""Mean and standard deviations of the last norms."""

import optax

from optax_clip import actions
from optax_clip import measures
from optax_clip._algebra.clip_with import clip_with
from optax_clip._repr import named
from optax_clip._thresholds import window as _window
from optax_clip._types import AxisName
from optax_clip._types import Nonfinite
from optax_clip._types import Recording
from optax_clip._types import Scalar
from optax_clip._types import Specs


@named
def clip_by_history(
  sigmas: Scalar = 3.0,
  window: int = 128,
  *,
  ord: float | None = None,
  eps: Scalar = 0.0,
  nonfinite: Nonfinite = "propagate",
  strict: bool = False,
  axis_name: AxisName = "auto",
  specs: Specs = None,
  record: Recording = True,
  name: str = "clip_by_history",
) -> optax.GradientTransformationExtraArgs:
  r"""Clips what is some deviations above the mean of the last global norms.

  .. math::
      u \leftarrow u \cdot \min\left(1, \frac{\mu + k \sigma}{n}\right), \quad
      \mu, \sigma \text{ of } n_{t-W}, \dots, n_{t-1}

  The norms remembered are those before clipping, so that the limit cannot
  collapse and follows any change within a window.

  Args:
    sigmas: k >= 0, in standard deviations. May be traced.
    window: W >= 2, how many norms are remembered; none is clipped before it is
      half full. Static: with `optax.inject_hyperparams` pass
      ``static_args=("window",)``.
    ord: p of the norm, 2 by default; 1, `float('inf')` or any p in (0, 64].
    eps: added to the norm in the denominator.
    nonfinite: ``"zero"`` turns the whole step into zeros if a norm is NaN or
      inf; ``"propagate"`` lets NaN through, so that it is seen.
    strict: whether no norm of the result may exceed its limit in exact
      arithmetic, as in `clip_by_global_norm`.
    axis_name: mesh axes to collect norms over, see `optax_clip.measures`.
    specs: which dimension of which leaf is sharded, see `optax_clip.measures`.
    record: whether the state keeps what `metrics` reads; ``"layers"``: and what
      `layer_metrics` does.
    name: the prefix of the metrics' keys.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Its state is a `ClipState` whose
    `threshold` is a NamedTuple of vectors over the norms, float32 whatever the
    dtype of the updates.

  Raises:
    ValueError: if `sigmas` is negative or NaN, or `window` is below 2.
    TypeError: if `window` is not a Python integer; in `update`, if a leaf is an
      integer or a boolean.

  =========================  ==============================================
  input                      result
  =========================  ==============================================
  the first W / 2 steps      unchanged
  all zero                   unchanged, not remembered
  a NaN or inf element       as `nonfinite` says, not remembered
  equal norms                unchanged, bit for bit
  one norm of 1e30           clipped; no limit to speak of for a window, as
                             it is in the mean (add `thresholds.at_most`)
  =========================  ==============================================

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.clip_by_history(window=4)
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> for scale in (1.0, 1.0, 100.0):
    ...   g = {"w": scale * jnp.array([3.0, 4.0])}
    ...   updates, state = tx.update(g, state)
    >>> print(updates["w"])
    [3. 4.]

  Differences: the official code takes the deviation to be at least 1e-6 and
  remembers NaN, after which nothing is clipped for a window.

  References:
    `clip_update_by_historical_norm` of Levanter, Stanford CRFM, 2025.
  """
  return clip_with(
    measures.global_norm(ord=ord, axis_name=axis_name, specs=specs),
    _window.history(sigmas, window),
    actions.rescale(eps=eps, strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )
