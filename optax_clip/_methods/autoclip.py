"""AutoClip: a percentile of the last norms, of all updates or of each layer."""

import optax

from optax_clip import _validate
from optax_clip import actions
from optax_clip import measures
from optax_clip._algebra.clip_with import clip_with
from optax_clip._repr import named
from optax_clip._thresholds import window as _window
from optax_clip._trees import units as _units
from optax_clip._types import AxisName
from optax_clip._types import Nonfinite
from optax_clip._types import Recording
from optax_clip._types import Scalar
from optax_clip._types import Specs


@named
def autoclip(
  percentile: Scalar = 10.0,
  window: int = 1000,
  *,
  ord: float | None = None,
  eps: Scalar = 0.0,
  nonfinite: Nonfinite = "propagate",
  strict: bool = False,
  axis_name: AxisName = "auto",
  specs: Specs = None,
  record: Recording = True,
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
    _window.percentile(percentile, window),
    actions.rescale(eps=eps, strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )


@named
def clip_by_layer_percentile(
  percentile: Scalar = 5.0,
  window: int = 100,
  *,
  ord: float | None = None,
  eps: Scalar = 0.0,
  nonfinite: Nonfinite = "propagate",
  strict: bool = False,
  axis_name: AxisName = "auto",
  specs: Specs = None,
  stacked: _units.Stacked = None,
  record: Recording = True,
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
    _window.percentile(percentile, window),
    actions.rescale(eps=eps, strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )
