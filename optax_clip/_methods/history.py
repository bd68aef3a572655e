"""Clips by the mean and the standard deviation of the last norms."""

import optax

from optax_clip import actions
from optax_clip import measures
from optax_clip._algebra.clip_with import clip_with
from optax_clip._repr import named
from optax_clip._thresholds import geometric as _geometric
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
  early_factor: Scalar | None = 2.0,
  surprise: Scalar | None = 2.0,
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
  r"""Clips to `sigmas` standard deviations above the mean of the last global norms.

  .. math::
      u \leftarrow u \cdot \min\left(1, \frac{\mu + k \sigma}{n}\right), \quad
      \mu, \sigma \text{ of } \min(n_{t-W}, s m), \dots, \min(n_{t-1}, s m)

  with m the median of :math:`n_{t-W}, \dots, n_{t-1}`. It remembers norms before
  clipping, so that the limit cannot collapse, and follows any change within a window: a
  fall to the end of it, a rise once it fills half of it.

  Args:
    sigmas: k >= 0, in standard deviations. May be traced.
    window: W >= 2, how many norms to remember; they set the limit as soon as the window
      is half full. Static, as in `autoclip`.
    early_factor: before that, as in `zclip`. `None`: nothing is clipped until then.
    surprise: s > 1, how many times the median a norm counts at most, so that frequent
      spikes do not lift the limit out of their reach: with 2 it is at most 3 medians
      where the other norms are equal. May be traced. `None`: each norm counts as it is,
      as in Levanter: a rise is followed at once, and one spike blinds for a window.
    ord, eps, strict: as in `measures.global_norm` and `actions.rescale`.
    nonfinite, record, name: as in `clip_with`.
    axis_name, specs: as in `optax_clip.measures`.

  Returns:
    An `optax.GradientTransformationExtraArgs`; for its memory see `thresholds`.

  Raises:
    ValueError: if `sigmas` is negative or NaN, `window` is below 2, or `surprise` is
      not above 1.
    TypeError: if `window` is not a Python integer.

  =====================  =====================================================
  input                  result
  =====================  =====================================================
  the first step         unchanged
  all zero               unchanged, not remembered
  a NaN or inf element   as `nonfinite` says, not remembered
  equal norms            unchanged, bit for bit
  one norm of 1e30       clipped; then counts as twice the median
  =====================  =====================================================

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.clip_by_history(window=4)
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> for scale in (1.0, 1.0, 100.0):
    ...   updates, state = tx.update({"w": scale * jnp.array([3.0, 4.0])}, state)
    >>> print(updates["w"])
    [3. 4.]

  Differences: the official code has no `surprise`, and takes the deviation to be at
  least 1e-6. It remembers NaN, and then clips nothing for a window.

  References:
    `clip_update_by_historical_norm` of Levanter, Stanford CRFM, 2025.
  """
  return clip_with(
    measures.global_norm(ord=ord, axis_name=axis_name, specs=specs),
    _geometric.early(_window.history(sigmas, window, surprise), early_factor),
    actions.rescale(eps=eps, strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )
