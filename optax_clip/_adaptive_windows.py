"""Transformations whose limit is learned from a window of the last norms."""

from typing import Any

import optax

from optax_clip import _groups
from optax_clip import _validate
from optax_clip import actions
from optax_clip import measures
from optax_clip import thresholds
from optax_clip._core import clip_with


def autoclip(
  percentile: Any = 10.0,
  window: int = 1000,
  *,
  ord: float | None = None,
  eps: Any = 0.0,
  nonfinite: str = "propagate",
  strict: bool = False,
  axis_name: Any = "auto",
  specs: Any = None,
  record: bool | str = True,
  name: str = "autoclip",
) -> optax.GradientTransformationExtraArgs:
  r"""Clips to a percentile of the global norms seen so far (AutoClip).

  .. math::
      u \leftarrow u \cdot \min\left(1, \frac{L}{n}\right), \quad
      L = \text{percentile}_q(n_{t-W+1}, \dots, n_t)

  With the default most steps are clipped: the limit says how long a step is, not
  what is an outlier.

  Args:
    percentile: q, from 0 to 100; interpolated linearly. May be traced.
    window: W, how many norms are remembered, this one included. Static: with
      `optax.inject_hyperparams` pass ``static_args=("window",)``.
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
    ValueError: if `percentile` is not in [0, 100] or `window` is below 1.
    TypeError: if `window` is not a Python integer; in `update`, if a leaf is an
      integer or a boolean.

  ======================  =================================================
  input                   result
  ======================  =================================================
  the first step          unchanged: it is its own percentile
  all zero                unchanged, not remembered
  a NaN or inf element    as `nonfinite` says, not remembered
  equal norms             unchanged, bit for bit
  norms rise 30 times     followed: the norms are those before clipping
  ======================  =================================================

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.autoclip(50.0)
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> for scale in (1.0, 1.0, 100.0):
    ...   g = {"w": scale * jnp.array([3.0, 4.0])}
    ...   updates, state = tx.update(g, state)
    >>> print(updates["w"])
    [3. 4.]

  Differences: the official code keeps all norms, we keep the last `window`, which
  is the same until then and follows a shift after it. It remembers NaN (every
  later limit is NaN) and zeros; we do not.

  References:
    Seetharaman et al., AutoClip: Adaptive Gradient Clipping for Source Separation
    Networks, 2020, arXiv:2007.14469.
  """
  _validate.within(0, 100, percentile=percentile)
  return clip_with(
    measures.global_norm(ord=ord, axis_name=axis_name, specs=specs),
    thresholds.percentile(percentile, window),
    actions.rescale(eps=eps, strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )


def clip_by_layer_percentile(
  percentile: Any = 5.0,
  window: int = 100,
  *,
  ord: float | None = None,
  eps: Any = 0.0,
  nonfinite: str = "propagate",
  strict: bool = False,
  axis_name: Any = "auto",
  specs: Any = None,
  stacked: _groups.Stacked = None,
  record: bool | str = True,
  name: str = "clip_by_layer_percentile",
) -> optax.GradientTransformationExtraArgs:
  r"""Clips each leaf to a percentile of its own last norms.

  .. math::
      u_l \leftarrow u_l \cdot \min\left(1, \frac{L_l}{n_l}\right), \quad
      L_l = \text{percentile}_q(n_{l,t-W+1}, \dots, n_{l,t})

  `autoclip` for each leaf. It is what bitsandbytes called percentile clipping.

  Args:
    percentile: q, from 0 to 100; interpolated linearly. May be traced.
    window: W, how many norms of each leaf are remembered, this one included.
      Static: with `optax.inject_hyperparams` pass ``static_args=("window",)``.
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

  Returns:
    An `optax.GradientTransformationExtraArgs`. Its state is a `ClipState` whose
    `threshold` is a NamedTuple of vectors over the norms, float32 whatever the
    dtype of the updates.

  Raises:
    ValueError: if `percentile` is not in [0, 100] or `window` is below 1; in
      `update`, if the state is of a tree with another number of leaves.
    TypeError: if `window` is not a Python integer; in `update`, if a leaf is an
      integer or a boolean.

  The edge cases are those of `autoclip`, leaf by leaf; a NaN in one leaf makes
  the step forgotten for all.

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.clip_by_layer_percentile(50.0)
    >>> state = tx.init({"a": jnp.zeros(2), "b": jnp.zeros(2)})
    >>> for scale in (1.0, 1.0, 100.0):
    ...   g = {"a": scale * jnp.array([3.0, 4.0]), "b": jnp.array([3.0, 4.0])}
    ...   updates, state = tx.update(g, state)
    >>> print(updates["a"], updates["b"])
    [3. 4.] [3. 4.]

  Differences: bitsandbytes kept squared norms, took the nearest entry of the
  window without interpolation, and counted the unfilled entries as 0.

  References:
    Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022,
    arXiv:2110.02861 (the library that had it; it was withdrawn in 2026).
  """
  _validate.within(0, 100, percentile=percentile)
  return clip_with(
    measures.layer_norm(ord=ord, axis_name=axis_name, specs=specs, stacked=stacked),
    thresholds.percentile(percentile, window),
    actions.rescale(eps=eps, strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )


def clip_by_history(
  sigmas: Any = 3.0,
  window: int = 128,
  *,
  ord: float | None = None,
  eps: Any = 0.0,
  nonfinite: str = "propagate",
  strict: bool = False,
  axis_name: Any = "auto",
  specs: Any = None,
  record: bool | str = True,
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
    thresholds.history(sigmas, window),
    actions.rescale(eps=eps, strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )
