"""Clips units in proportion to their weights (adaptive gradient clipping, AGC)."""

import jax
import jax.numpy as jnp
import optax

from optax_clip import _validate
from optax_clip import actions
from optax_clip import measures
from optax_clip._algebra.clip_with import clip_with
from optax_clip._norms import extended as _extended
from optax_clip._norms import norm as _norm
from optax_clip._norms import power_sums as _power_sums
from optax_clip._repr import named
from optax_clip._thresholds import limits as _limits
from optax_clip._trees import axes as _axes
from optax_clip._trees import leaves as _leaves
from optax_clip._types import AxisName
from optax_clip._types import Nonfinite
from optax_clip._types import Recording
from optax_clip._types import Scalar
from optax_clip._types import ScalarOrSchedule
from optax_clip._types import Specs
from optax_clip._types import UnitAxis

Array = jax.Array


@named
def adaptive_grad_clip(
  clipping: ScalarOrSchedule | None,
  eps: Scalar = 1e-3,
  axis: UnitAxis = None,
  *,
  ord: float | None = None,
  nonfinite: Nonfinite = "propagate",
  strict: bool = False,
  axis_name: AxisName = "auto",
  specs: Specs = None,
  stacked: _axes.Stacked = None,
  record: Recording = True,
  name: str = "adaptive_grad_clip",
) -> optax.GradientTransformationExtraArgs:
  r"""Clips each unit in proportion to its weights (adaptive gradient clipping, AGC).

  `eps`, 1e-3 as in optax, is an absolute constant in the units of the weights.

  .. math::
      u_i \leftarrow u_i \cdot \min\left(1,
      \lambda \frac{\max(\|p_i\|, \epsilon)}{\|u_i\|}\right)

  for each unit i: the whole leaf for scalars, biases and gains; axis 0 for matrices
  and rank 3; all but the last axis for convolution kernels (rank 4 and 5). Drop-in
  for `optax.adaptive_grad_clip`. Its `update` needs `params`. NFNets leave their
  final linear layer out (`optax.masked`).

  Args:
    clipping: lambda >= 0, dimensionless: a float, a schedule of the step, or a traced
      scalar; `None` is off. NFNets use 0.01 at batch size 4096.
    eps: the least norm that a unit's weights count with, so that units that start
      at zero can move. With 0 they stay there.
    axis: the axes that form one unit, for every leaf; by rank if `None`. Or by path:
      ``{"embedding": 1, "attention/out": (0, 1)}``, a mapping from regular
      expressions, or a function from path and leaf, to axes or `None`; or a tree of
      these of a class of your own, like the updates. With `optax.inject_hyperparams`
      pass ``static_args=("axis",)``.
    ord: the order of both norms, as in `measures.global_norm`.
    strict: as in `actions.rescale`, up to the rounding of the parameters' norm.
    nonfinite, name: as in `clip_with`.
    record: as in `clip_with`; the norm is the largest ratio of a unit's update to its
      weights.
    axis_name, specs, stacked: as in `optax_clip.measures`.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: if `clipping` or `eps` is negative or NaN; in `update`, if `params`
      is missing or of another structure, or a leaf has a rank above 5 without `axis`.

  ==================  =====================================================
  input               result
  ==================  =====================================================
  a unit of zeros     unchanged
  weights of zeros    clipped to ``clipping * eps``
  ``clipping=0``      zeros, and a `UserWarning`
  ``clipping=None``   unchanged
  a NaN element       its unit is NaN; with ``"zero"`` all are zero
  ==================  =====================================================

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.adaptive_grad_clip(0.5)
    >>> params = {"w": jnp.array([3.0, 4.0])}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": jnp.array([7.0, 24.0])}, state, params)
    >>> print(updates["w"])
    [0.7 2.4]

  References:
    Brock et al., High-Performance Large-Scale Image Recognition Without
    Normalization, 2021, arXiv:2102.06171.
  """
  _validate.limit(clipping=clipping)
  _validate.nonnegative(eps=eps)
  return clip_with(
    measures.relative(
      measures.unit_norm(
        axis=axis, ord=ord, axis_name=axis_name, specs=specs, stacked=stacked
      ),
      floor=eps,
    ),
    _limits.of(clipping),
    actions.rescale(strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )


def unitwise_norm(x: Array, axis: UnitAxis = None) -> Array:
  """Measures the 2-norm of each unit, and repeats it at each of the unit's elements.

  Args:
    x: a floating or complex array.
    axis: the axes that form one unit; by rank if `None`, as in `adaptive_grad_clip`.

  Returns:
    An array of the shape of `x`, f32 (f64 for float64), since the norm of a
    float16 unit may be no float16.

  Raises:
    ValueError: if `axis` is out of range, or `None` with a rank above 5.

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> print(optax_clip.unitwise_norm(jnp.array([[3.0, 1.0], [4.0, 0.0]])))
    [[5. 1.]
     [5. 1.]]
  """
  (x,) = _leaves.floating_leaves(x)
  (norm,) = _norm.over_dims([x], [_axes.unit_axes(x.shape, axis)])
  value = _extended.as_float(norm)
  # An explicitly sharded `x` does not allow `broadcast_to`.
  return value + jnp.zeros_like(x, value.dtype)


def unitwise_clip(
  g_norm: Array, max_norm: Array, grad: Array, div_eps: Scalar = 1e-6
) -> Array:
  r"""Clips each unit of an array, given norms and limits element by element.

  .. math::
      g \leftarrow g \cdot \frac{c}{\max(n, \epsilon)} \text{ where } n \ge c

  Args:
    g_norm: n, as from `unitwise_norm`; of the shape of `grad`.
    max_norm: c, of the shape of `grad`.
    grad: a floating or complex array.
    div_eps: the least value to divide by.

  Returns:
    The clipped array, of the dtype of `grad`.

  Raises:
    ValueError: if the three shapes differ.

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> g = jnp.array([[3.0, 0.1], [4.0, 0.0]])
    >>> norm = optax_clip.unitwise_norm(g)
    >>> print(optax_clip.unitwise_clip(norm, jnp.ones_like(g), g))
    [[0.6 0.1]
     [0.8 0. ]]
  """
  (grad,) = _leaves.floating_leaves(grad)
  shapes = {jnp.shape(g_norm), jnp.shape(max_norm), grad.shape}
  if len(shapes) > 1:
    raise ValueError(
      "g_norm, max_norm and grad must have one shape, got"
      f" {jnp.shape(g_norm)}, {jnp.shape(max_norm)} and {grad.shape}."
    )
  wide = _power_sums.accumulator(grad.dtype)
  norm, limit = (jnp.asarray(x, wide) for x in (g_norm, max_norm))
  divisor = jnp.maximum(norm, jnp.asarray(div_eps, wide))
  action = actions.rescale()
  clipped = action.apply(grad, action.weigh(_extended.of(divisor), limit), limit)
  return jnp.where(norm < limit, grad, clipped)
