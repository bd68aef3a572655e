"""Clips to a percentile of the last norms, of all leaves (AutoClip) or of each."""

import optax

from optax_clip import _validate
from optax_clip import actions
from optax_clip import measures
from optax_clip._algebra.clip_with import clip_with
from optax_clip._repr import named
from optax_clip._thresholds import window as _window
from optax_clip._trees import axes as _axes
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
  r"""Clips to a percentile of the last global norms (AutoClip).

  .. math::
      u \leftarrow u \cdot \min\left(1, \frac{L}{n}\right), \quad
      L = \text{percentile}_q(n_{t-W+1}, \dots, n_t)

  The default clips most steps: it sets how long a step is, and singles out no outliers.

  Args:
    percentile: q, from 0 to 100; interpolated linearly. May be traced.
    window: W, how many norms to remember, this one included. Static: with
      `optax.inject_hyperparams` pass ``static_args=("window",)``.
    ord, eps, strict: as in `measures.global_norm` and `actions.rescale`.
    nonfinite, record, name: as in `clip_with`.
    axis_name, specs: as in `optax_clip.measures`.

  Returns:
    An `optax.GradientTransformationExtraArgs`; for its memory see `thresholds`.

  Raises:
    ValueError: if `percentile` is not in [0, 100] or `window` is below 1.
    TypeError: if `window` is not a Python integer.

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
    ...   updates, state = tx.update({"w": scale * jnp.array([3.0, 4.0])}, state)
    >>> print(updates["w"])
    [3. 4.]

  Differences: the official code keeps all norms, we the last `window`. The two agree
  until then; later ours follows a shift. The official code also remembers zeros, and
  NaN, after which every limit is NaN.

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
  stacked: _axes.Stacked = None,
  record: Recording = True,
  name: str = "clip_by_layer_percentile",
) -> optax.GradientTransformationExtraArgs:
  r"""Clips each leaf to a percentile of its own last norms.

  .. math::
      u_l \leftarrow u_l \cdot \min\left(1, \frac{L_l}{n_l}\right), \quad
      L_l = \text{percentile}_q(n_{l,t-W+1}, \dots, n_{l,t})

  This is `autoclip` for each leaf, and what bitsandbytes called percentile clipping.

  Args:
    percentile, window: as in `autoclip`, of the norms of each leaf.
    ord, eps, strict: as in `measures.global_norm` and `actions.rescale`.
    nonfinite, record, name: as in `clip_with`.
    axis_name, specs, stacked: as in `optax_clip.measures`.

  Returns:
    An `optax.GradientTransformationExtraArgs`; for its memory see `thresholds`.

  Errors and edge cases are those of `autoclip`, leaf by leaf. After a NaN in one leaf
  no leaf remembers the step.

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.clip_by_layer_percentile(50.0)
    >>> state = tx.init({"a": jnp.zeros(2), "b": jnp.zeros(2)})
    >>> for scale in (1.0, 1.0, 100.0):
    ...   g = {"a": scale * jnp.array([3.0, 4.0]), "b": jnp.array([3.0, 4.0])}
    ...   updates, state = tx.update(g, state)
    >>> print(updates["a"], updates["b"])
    [3. 4.] [3. 4.]

  Differences: bitsandbytes kept squared norms, took the nearest entry of the window
  without interpolation, and counted the unfilled entries as 0.

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
