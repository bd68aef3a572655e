"""Clips matrices by their singular values."""

import optax

from optax_clip import _validate
from optax_clip import actions
from optax_clip import measures
from optax_clip._algebra.clip_with import clip_with
from optax_clip._algebra.types import Threshold
from optax_clip._matrices.measure import matrix_norm
from optax_clip._repr import named
from optax_clip._thresholds import limits as _limits
from optax_clip._trees import axes as _axes
from optax_clip._types import AxisName
from optax_clip._types import Nonfinite
from optax_clip._types import Recording
from optax_clip._types import Scalar
from optax_clip._types import ScalarOrSchedule
from optax_clip._types import Specs
from optax_clip._types import UnitAxis


@named
def spectral_clip(
  max_norm: ScalarOrSchedule | Threshold | None,
  *,
  soft: bool = False,
  nonfinite: Nonfinite = "propagate",
  strict: bool = False,
  axis: UnitAxis = None,
  axis_name: AxisName = "auto",
  specs: Specs = None,
  stacked: _axes.Stacked = None,
  record: Recording = True,
  name: str = "spectral_clip",
) -> optax.GradientTransformationExtraArgs:
  r"""Clips each singular value of each matrix at `max_norm`.

  .. math::
      U \, \text{diag}(s) \, V^T \leftarrow U \, \text{diag}(f(s)) \, V^T, \quad
      f(s) = \min(s, c) \text{ or, softly, } s / \sqrt{1 + s^2 / c^2}

  A direction that explodes, as a spike of rank one, is clipped alone: all others keep
  their size. For gradients, and after an optimizer for its updates. It takes matmuls
  alone, and none for a matrix whose 2-norm is within the limit. docs/spectral.md has
  the proof of the bound.

  Args:
    max_norm: c >= 0: a float, a schedule of the step, a traced scalar, or a threshold,
      as `thresholds.by_shape`. `None` is off.
    soft: whether to shrink every singular value, as SPECTRA does, instead of
      those above c alone.
    strict: whether c itself bounds the result. Otherwise what is at most 1e-3 above it,
      in bfloat16 2^-8, may stay. What is as much below may then be clipped.
    nonfinite, record, name: as in `clip_with`. The norm in the record is a proven upper
      bound of the largest singular value: the 2-norm, where that decides.
    axis: which axes of a leaf count rows, see `measures.spectral_norm`; by rank if
      `None`.
    axis_name, specs, stacked: as in `optax_clip.measures`.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: if `max_norm` is negative or NaN; in `update`, inside ``shard_map``, if
      nothing says along which axes a matrix is cut.

  ===========================  ==============================================
  input                        result
  ===========================  ==============================================
  all singular values <= c     the leaf, bit for bit (not if soft)
  a vector or a scalar         scaled to a 2-norm of c, the same function
  a kernel of a convolution    as ``[height * width * in, out]``, which bounds
                               the convolution by c sqrt(height * width)
  a NaN or inf element         the leaf passes, see `nonfinite`; a vector
                               becomes NaN
  no elements                  passes
  c = 0                        all zero
  ===========================  ==============================================

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.spectral_clip(1.0)
    >>> g = {"w": jnp.diag(jnp.array([100.0, 0.5])), "b": jnp.array([3.0, 4.0])}
    >>> updates, _ = tx.update(g, tx.init(g))
    >>> print(updates["w"].round(3), updates["b"])
    [[1.  0. ]
     [0.  0.5]] [0.6 0.8]

  References:
    Jiang, Semenov & Stich, SPECTRA, 2026, arXiv:2603.14315, clip updates and gradients
    softly; Cesista's "hardcap" clips weights at c. Theirs exceed the limit, and move
    what is below it. Here neither happens, and a vector is a matrix of one column.
  """
  if not isinstance(max_norm, Threshold):
    _validate.limit(max_norm=max_norm)
  action = actions.soft_clip_singular_values if soft else actions.clip_singular_values
  return clip_with(
    matrix_norm(axis=axis, axis_name=axis_name, specs=specs, stacked=stacked),
    _limits.of(max_norm),
    action(strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )


@named
def clip_by_spectral_norm(
  max_norm: ScalarOrSchedule | Threshold | None,
  *,
  eps: Scalar = 0.0,
  nonfinite: Nonfinite = "propagate",
  strict: bool = False,
  axis: UnitAxis = None,
  axis_name: AxisName = "auto",
  specs: Specs = None,
  stacked: _axes.Stacked = None,
  record: Recording = True,
  name: str = "clip_by_spectral_norm",
) -> optax.GradientTransformationExtraArgs:
  r"""Scales each matrix so that its largest singular value is at most `max_norm`.

  .. math::
      u_l \leftarrow u_l \cdot \min\left(1, \frac{c}{s_1(u_l) + \epsilon}\right)

  The direction of the update stays, and its small singular values shrink with the
  largest: `spectral_clip` keeps them.

  Args:
    max_norm: c >= 0, given as in `spectral_clip`.
    eps, strict: as in `actions.rescale`.
    nonfinite, record, name: as in `clip_with`.
    axis, axis_name, specs, stacked: as in `measures.spectral_norm`, which is at most
      1e-3 above the truth, and never below: so much below c a matrix may be scaled.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Errors and edge cases are those of `clip_by_layer_norm`.

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.clip_by_spectral_norm(1.0)
    >>> g = {"w": jnp.diag(jnp.array([100.0, 0.5]))}
    >>> updates, _ = tx.update(g, tx.init(g))
    >>> print(updates["w"].round(3).diagonal())
    [1.    0.005]
  """
  if not isinstance(max_norm, Threshold):
    _validate.limit(max_norm=max_norm)
  return clip_with(
    measures.spectral_norm(
      axis=axis, axis_name=axis_name, specs=specs, stacked=stacked
    ),
    _limits.of(max_norm),
    actions.rescale(eps=eps, strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )
