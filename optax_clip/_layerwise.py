"""The named transformations that clip layers, groups and units on their own.

As in `_transforms`: complete docstrings, bodies of a few lines.
"""

from collections.abc import Hashable
from collections.abc import Mapping
from typing import Any

import optax

from optax_clip import _groups
from optax_clip import _validate
from optax_clip import actions
from optax_clip import measures
from optax_clip import thresholds
from optax_clip._core import clip_with


def clip_by_layer_norm(
  max_norm: Any,
  *,
  ord: float | None = None,
  eps: Any = 0.0,
  nonfinite: str = "propagate",
  strict: bool = False,
  axis_name: Any = "auto",
  specs: Any = None,
  stacked: _groups.Stacked = None,
  record: bool | str = True,
  name: str = "clip_by_layer_norm",
) -> optax.GradientTransformationExtraArgs:
  r"""Scales each leaf on its own so that its norm is at most `max_norm`.

  .. math::
      u_l \leftarrow u_l \cdot \min\left(1, \frac{c}{\|u_l\|_p + \epsilon}\right)

  What Keras calls `clipnorm`. One exploding layer does not shrink the updates
  of the others.

  Args:
    max_norm: c >= 0, in the units of the updates: a float, a schedule of the
      step, or a traced scalar.
    ord: p, 2 by default; 1, `float('inf')` or any p in (0, 64].
    eps: added to the norm in the denominator.
    nonfinite: ``"zero"`` turns the whole step into zeros if a norm is NaN or
      inf.
    strict: whether no norm may exceed c in exact arithmetic.
    axis_name: mesh axes to collect norms over, see `optax_clip.measures`.
    specs: which dimension of which leaf is sharded, see `optax_clip.measures`.
    stacked: which leaves hold many layers, and along which axis, see
      `optax_clip.measures`.
    record: whether the state keeps what `metrics` reads; ``"layers"``: and what
      `layer_metrics` does.
    name: the prefix of the metrics' keys.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: if `max_norm` or `eps` is negative or NaN, or `ord` or
      `nonfinite` is unknown.
    TypeError: in `update`, if a leaf is an integer or a boolean.

  The edge cases are those of `clip_by_global_norm`, leaf by leaf.

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.clip_by_layer_norm(1.0)
    >>> g = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.1, 0.0])}
    >>> updates, _ = tx.update(g, tx.init(g))
    >>> print(updates["a"], updates["b"])
    [0.6 0.8] [0.1 0. ]
  """
  _validate.limit(max_norm=max_norm)
  return clip_with(
    measures.layer_norm(ord=ord, axis_name=axis_name, specs=specs, stacked=stacked),
    thresholds.of(max_norm),
    actions.rescale(eps=eps, strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )


def clip_by_group_norm(
  labels: _groups.Labels,
  max_norms: Mapping[Hashable, Any],
  *,
  ord: float | None = None,
  eps: Any = 0.0,
  nonfinite: str = "propagate",
  strict: bool = False,
  counted: Any = None,
  axis_name: Any = "auto",
  specs: Any = None,
  record: bool | str = True,
  name: str = "clip_by_group_norm",
) -> optax.GradientTransformationExtraArgs:
  r"""Scales groups of leaves, each by its own norm and limit.

  .. math::
      u_g \leftarrow u_g \cdot \min\left(1, \frac{c_g}{\|u_g\|_p + \epsilon}\right)

  Args:
    labels: the label of each leaf: a tree, a prefix of one, or a function from
      the updates to either, as in `optax.multi_transform`; `labels_by_path` makes
      one of regular expressions.
    max_norms: for each label its limit: a non-negative float, a schedule of
      the step, or a traced scalar. `float('inf')`: measured, never clipped.
    ord: p, 2 by default; 1, `float('inf')` or any p in (0, 64].
    eps: added to the norm in the denominator.
    nonfinite: ``"zero"`` turns the whole step into zeros if a norm is NaN or
      inf.
    strict: whether no norm may exceed its limit in exact arithmetic.
    counted: for each leaf whether it counts in the norm of its group, given like
      `labels`; all do if `None`. One that does not is scaled with its group.
    axis_name: mesh axes to collect norms over, see `optax_clip.measures`.
    specs: which dimension of which leaf is sharded, see `optax_clip.measures`.
    record: whether the state keeps what `metrics` reads; ``"layers"``: and what
      `layer_metrics` does.
    name: the prefix of the metrics' keys.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: if `labels` or `max_norms` is empty, a label has no limit, a
      limit is negative or NaN; in `init`, if `labels` or `counted` do not fit the
      tree.
    TypeError: in `update`, if a leaf is an integer or a boolean.

  The edge cases are those of `clip_by_global_norm`, group by group.

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.clip_by_group_norm(
    ...     {"body": "slow", "head": "fast"}, {"slow": 1.0, "fast": 10.0})
    >>> g = {"body": jnp.array([3.0, 4.0]), "head": jnp.array([3.0, 4.0])}
    >>> updates, _ = tx.update(g, tx.init(g))
    >>> print(updates["body"], updates["head"])
    [0.6 0.8] [3. 4.]
  """
  names = _groups.named_limits(max_norms)
  for label in names:
    _validate.limit(**{f"max_norms[{label!r}]": max_norms[label]})
  return clip_with(
    measures.group_norm(
      labels, names, ord=ord, counted=counted, axis_name=axis_name, specs=specs
    ),
    thresholds.per_group([max_norms[label] for label in names]),
    actions.rescale(eps=eps, strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )


def clip_by_block_rms(
  threshold: Any,
  *,
  eps: Any = 0.0,
  nonfinite: str = "propagate",
  strict: bool = False,
  axis_name: Any = "auto",
  specs: Any = None,
  stacked: _groups.Stacked = None,
  record: bool | str = True,
  name: str = "clip_by_block_rms",
) -> optax.GradientTransformationExtraArgs:
  r"""Scales each leaf so that its root mean square is at most `threshold`.

  .. math::
      u_l \leftarrow u_l \cdot \min\left(1, \frac{d}{\text{rms}(u_l) + \epsilon}
      \right), \quad \text{rms}(u) = \|u\|_2 / \sqrt{\text{size}(u)}

  Drop-in for `optax.clip_by_block_rms`. In Adafactor it is applied to the
  scaled updates (d = 1), not to gradients.

  Args:
    threshold: d >= 0, in the units of the updates: a float, a schedule of the
      step, or a traced scalar.
    eps: added to the root mean square in the denominator.
    nonfinite: ``"zero"`` turns the whole step into zeros if a root mean square
      is NaN or inf.
    strict: whether no root mean square may exceed d in exact arithmetic.
    axis_name: mesh axes to collect over, see `optax_clip.measures`.
    specs: which dimension of which leaf is sharded, see `optax_clip.measures`.
    stacked: which leaves hold many layers, and along which axis, see
      `optax_clip.measures`.
    record: whether the state keeps what `metrics` reads; ``"layers"``: and what
      `layer_metrics` does.
    name: the prefix of the metrics' keys.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: if `threshold` or `eps` is negative or NaN, or `nonfinite` is
      unknown.
    TypeError: in `update`, if a leaf is an integer or a boolean.

  The edge cases are those of `clip_by_global_norm`, leaf by leaf.

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.clip_by_block_rms(1.0)
    >>> g = {"w": jnp.array([2.0, -2.0]), "b": jnp.array([0.5])}
    >>> updates, _ = tx.update(g, tx.init(g))
    >>> print(updates["w"], updates["b"])
    [ 1. -1.] [0.5]

  References:
    Shazeer & Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory
    Cost, 2018, arXiv:1804.04235.
  """
  _validate.limit(threshold=threshold)
  return clip_with(
    measures.layer_rms(axis_name=axis_name, specs=specs, stacked=stacked),
    thresholds.of(threshold),
    actions.rescale(eps=eps, strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )


def adaptive_grad_clip(
  clipping: Any,
  eps: Any = 1e-3,
  axis: Any = None,
  *,
  ord: float | None = None,
  nonfinite: str = "propagate",
  strict: bool = False,
  axis_name: Any = "auto",
  specs: Any = None,
  stacked: _groups.Stacked = None,
  record: bool | str = True,
  name: str = "adaptive_grad_clip",
) -> optax.GradientTransformationExtraArgs:
  r"""Adaptive gradient clipping (AGC): each unit in proportion to its weights.

  `eps`, 1e-3 by default as in optax, is an absolute constant in the units of weights.

  .. math::
      u_i \leftarrow u_i \cdot \min\left(1,
      \lambda \frac{\max(\|p_i\|, \epsilon)}{\|u_i\|}\right)

  for each unit i: the whole leaf for scalars, biases and gains; axis 0 for
  matrices and rank 3; all but the last axis for convolution kernels. Drop-in
  for `optax.adaptive_grad_clip`. Needs `params` in `update`. NFNets leave their
  final linear layer out (`optax.masked`).

  Args:
    clipping: lambda >= 0, dimensionless; 0.01 for NFNets at batch size 4096.
      A float, a schedule of the step, or a traced scalar.
    eps: the least norm that a unit's weights count with, so that units that
      start at zero can move. With 0 they stay there.
    axis: the axes that belong to one unit, for every leaf; by rank if `None`. Or
      by path: ``{"embedding": 1, "attention/out": (0, 1)}``, a mapping from regular
      expressions, or a function from path and leaf, to axes or `None`.
    ord: the order of both norms, 2 by default.
    nonfinite: ``"zero"`` turns the whole step into zeros if a norm is NaN or
      inf.
    strict: whether no norm may exceed its limit in exact arithmetic, up to the
      rounding of the parameters' norm.
    axis_name: mesh axes to collect norms over, see `optax_clip.measures`.
    specs: which dimension of which leaf is sharded, see `optax_clip.measures`.
    stacked: which leaves hold many layers, and along which axis, see
      `optax_clip.measures`.
    record: whether the state keeps what `metrics` reads; ``"layers"``: and what
      `layer_metrics` does. The recorded norm is the largest ratio of a unit's update
      to its weights.
    name: the prefix of the metrics' keys.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: if `clipping` or `eps` is negative or NaN; in
      `update`, if `params` is missing or of another structure, or a leaf has a
      rank above 5 and `axis` is `None`.
    TypeError: in `update`, if a leaf is an integer or a boolean.

  ==================  =====================================================
  input               result
  ==================  =====================================================
  a unit of zeros     unchanged
  weights of zeros    clipped to ``clipping * eps``
  ``clipping=0``      zeros
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
      eps=eps,
    ),
    thresholds.of(clipping),
    actions.rescale(strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )
