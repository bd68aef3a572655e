"""Clips each leaf by the ratio between its updates and its weights (Clippy)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_clip import _validate
from optax_clip import actions
from optax_clip import measures
from optax_clip._algebra.clip_with import clip_with
from optax_clip._algebra.types import Measure
from optax_clip._norms import extended as _extended
from optax_clip._norms import power_sums as _power_sums
from optax_clip._norms.extended import Extended
from optax_clip._repr import named
from optax_clip._thresholds import limits as _limits
from optax_clip._thresholds import memory as _memory
from optax_clip._trees import axes as _axes
from optax_clip._trees import leaves as _leaves
from optax_clip._types import AxisName
from optax_clip._types import Nonfinite
from optax_clip._types import Params
from optax_clip._types import Recording
from optax_clip._types import Scalar
from optax_clip._types import Specs
from optax_clip._types import Updates

Array = jax.Array


@named
def clippy(
  relative: Scalar = 0.1,
  absolute: Scalar = 1e-7,
  accumulator_relative: Scalar | None = None,
  *,
  nonfinite: Nonfinite = "propagate",
  strict: bool = False,
  axis_name: AxisName = "auto",
  specs: Specs = None,
  stacked: _axes.Stacked = None,
  record: Recording = True,
  name: str = "clippy",
) -> optax.GradientTransformationExtraArgs:
  r"""Scales each leaf so that no weight changes by more than a share of itself.

  `absolute`, 1e-7 as in the authors' code, is in the units of the weights.

  .. math::
      u_l \leftarrow u_l \cdot \min\left(1, \min_{i \in l}
      \frac{r |p_i| + s / \sqrt{v_i} + a}{|u_i|}\right)

  Place it after the optimizer and its learning rate, as it compares steps with
  weights. A single weight at 0 limits its whole leaf to steps of `absolute`: if that
  is tiny, leaves that start at zero stay there. Mask them, or raise it. Its `update`
  needs `params`. All numbers may be traced.

  Args:
    relative: r >= 0, the share of a weight.
    absolute: a >= 0, in the units of the weights.
    accumulator_relative: s >= 0; `None` leaves the term out. With a number `update`
      needs ``accumulator=v``, a tree like the updates: Adagrad's sum of squares.
    strict: as in `actions.rescale`, by elements, up to the rounding of their bounds.
    nonfinite, name: as in `clip_with`.
    record: as in `clip_with`; the norm is the largest ratio of an element to its
      bound, and the limit 1.
    axis_name, specs, stacked: as in `optax_clip.measures`.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: if a number is negative or NaN; in `update`, if `params` is missing
      or of another structure, or `accumulator` is needed and missing.

  ==========================  =============================================
  input                       result
  ==========================  =============================================
  all zero                    unchanged
  a weight of 0, absolute 0   its leaf is 0, unless its own update is
  a NaN element               its leaf is NaN; with ``"zero"`` all are zero
  ==========================  =============================================

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.clippy(0.1, 0.01)
    >>> params = {"w": jnp.array([1.0, 0.1])}
    >>> updates, _ = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
    >>> print(updates["w"])
    [0.02 0.02]

  References:
    Tang et al., Improving Training Stability for Multitask Ranking Models in
    Recommender Systems, 2023, arXiv:2302.09178. The defaults are from the authors'
    code in TensorFlow Recommenders.
  """
  _validate.nonnegative(relative=relative, absolute=absolute)
  if accumulator_relative is not None:
    _validate.nonnegative(accumulator_relative=accumulator_relative)
  return clip_with(
    _share_of_bound(
      _exact(relative),
      _exact(absolute),
      # The default is `None`, as `optax.inject_hyperparams` would trace a 0.
      0.0 if accumulator_relative is None else _exact(accumulator_relative),
      axis_name,
      specs,
      stacked,
    ),
    _limits.constant(1.0),
    actions.rescale(strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )


def _exact(value: Any) -> Any:
  """Keeps a hyperparameter's dtype: float64 weights deserve float64 bounds."""
  known = _memory.number(value)
  return known if isinstance(known, float) else jnp.asarray(value)


def _share_of_bound(
  r: Any, a: Any, s: Any, axis_name: AxisName, specs: Specs, stacked: _axes.Stacked
) -> Measure:
  """Measures for each leaf the largest ratio between an element and its bound."""
  peak = measures.layer_norm(
    ord=math.inf, axis_name=axis_name, specs=specs, stacked=stacked
  )

  def measure(
    updates: Updates, params: Params = None, *, accumulator: Any = None, **extra: object
  ) -> list[Extended]:
    del extra
    _leaves.same_structure(updates, params)
    leaves = _leaves.floating_leaves(updates)
    weights = _leaves.floating_leaves(params)
    sums: list[Any] = [None] * len(leaves)
    if not (isinstance(s, float) and s == 0):
      if accumulator is None:
        raise ValueError(
          "With accumulator_relative, pass the sums of squares, as in"
          " tx.update(updates, state, params, accumulator=v)."
        )
      sums = _leaves.floating_leaves(accumulator)

    def ratio(far: bool, u: Array, p: Array, v: Array | None) -> Array:
      wide = _power_sums.accumulator(u.dtype)
      unit = _far(wide) if far else 1.0
      size = jnp.abs(u).astype(wide)
      bound = jnp.asarray(r, wide) * jnp.abs(p).astype(wide) + jnp.asarray(a, wide)
      if v is not None:
        bound = bound + jnp.asarray(s, wide) * jax.lax.rsqrt(v.astype(wide))
      moves = size != 0
      share = jnp.where(moves, size / unit, 0) / jnp.where(moves, bound, 1)
      most = jnp.finfo(wide).max
      return jnp.where(jnp.isfinite(size), jnp.minimum(share, most), size)

    def largest(far: bool) -> list[Extended]:
      shares = [ratio(far, *x) for x in zip(leaves, weights, sums, strict=True)]
      tree = jax.tree.unflatten(jax.tree.structure(updates), shares)
      return list(peak.measure(tree))

    def chosen(near: Extended, far: Extended) -> Extended:
      dtype = near.value.dtype
      use = jnp.isfinite(near.value) & (near.value > 2 * _far(dtype))
      # The bound is 0, and the ratio beyond all numbers.
      never = far.value >= float(jnp.finfo(dtype).max)
      unit = jnp.where(never, _extended.beyond(dtype), _far(dtype))
      return Extended(jnp.where(use, far.value, near.value), jnp.where(use, unit, 1))

    return list(map(chosen, largest(False), largest(True)))

  return peak._replace(measure=measure, ord=None)


def _far(dtype: Any) -> float:
  """Returns a unit for ratios that no float can hold, such as 3e38 over 1e-7.

  An element with such a ratio is above 1, and stays a normal float in this unit.
  """
  return float(2.0 ** (jnp.finfo(dtype).maxexp - 2))
