"""Clips layers and groups, each by a norm of its own."""

from collections.abc import Hashable
from collections.abc import Mapping
from typing import Any

import optax

from optax_clip import _validate
from optax_clip import actions
from optax_clip import measures
from optax_clip._algebra.clip_with import clip_with
from optax_clip._repr import named
from optax_clip._thresholds import limits as _limits
from optax_clip._trees import axes as _axes
from optax_clip._trees import labels as _labels
from optax_clip._types import AxisName
from optax_clip._types import Nonfinite
from optax_clip._types import PyTree
from optax_clip._types import Recording
from optax_clip._types import Scalar
from optax_clip._types import ScalarOrSchedule
from optax_clip._types import Specs


@named
def clip_by_layer_norm(
  max_norm: ScalarOrSchedule | None,
  *,
  ord: float | None = None,
  eps: Scalar = 0.0,
  nonfinite: Nonfinite = "propagate",
  strict: bool = False,
  axis_name: AxisName = "auto",
  specs: Specs = None,
  stacked: _axes.Stacked = None,
  record: Recording = True,
  name: str = "clip_by_layer_norm",
) -> optax.GradientTransformationExtraArgs:
  r"""Scales each leaf on its own so that its norm is at most `max_norm`.

  .. math::
      u_l \leftarrow u_l \cdot \min\left(1, \frac{c}{\|u_l\|_p + \epsilon}\right)

  Keras calls this `clipnorm`. A layer that explodes does not shrink other updates.

  Args:
    max_norm: c >= 0, as in `clip_by_global_norm`.
    ord, eps, strict: as in `measures.global_norm` and `actions.rescale`.
    nonfinite, record, name: as in `clip_with`.
    axis_name, specs, stacked: as in `optax_clip.measures`.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Errors and edge cases are those of `clip_by_global_norm`, leaf by leaf.

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
    _limits.of(max_norm),
    actions.rescale(eps=eps, strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )


@named
def clip_by_group_norm(
  labels: _labels.Labels,
  max_norms: Mapping[Hashable, Any],
  *,
  ord: float | None = None,
  eps: Scalar = 0.0,
  nonfinite: Nonfinite = "propagate",
  strict: bool = False,
  counted: PyTree = None,
  scaled: PyTree = None,
  axis_name: AxisName = "auto",
  specs: Specs = None,
  record: Recording = True,
  name: str = "clip_by_group_norm",
) -> optax.GradientTransformationExtraArgs:
  r"""Scales groups of leaves, each by its own norm and limit.

  .. math::
      u_g \leftarrow u_g \cdot \min\left(1, \frac{c_g}{\|u_g\|_p + \epsilon}\right)

  Args:
    labels: a tree with a label for each leaf, a prefix of one, or a function from the
      updates to either, as in `optax.multi_transform`, which `labels_by_path` makes
      from regular expressions. With `optax.inject_hyperparams`, which takes functions
      for schedules, pass ``static_args=("labels",)``.
    max_norms: the limit of each label: a non-negative float, a schedule of the step,
      or a traced scalar. `None` or `float('inf')`: measured, never clipped.
    counted: which leaves count in the norm of their group, given like `labels`; all
      do if `None`. A leaf that does not is still scaled with its group.
    scaled: which leaves are scaled with their group, given like `labels`; all are if
      `None`. Any other leaf counts in the norm and passes bit for bit: the norm of
      its group may then stay above the limit, also with `strict`.
    ord, eps, strict: as in `measures.global_norm` and `actions.rescale`.
    nonfinite, record, name: as in `clip_with`.
    axis_name, specs: as in `optax_clip.measures`.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: if `labels` or `max_norms` is empty, a label has no limit, or a limit
      is negative or NaN; in `init`, if `labels`, `counted` or `scaled` do not fit the
      tree.

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
  names = _labels.named_limits(max_norms)
  for label in names:
    _validate.limit(**{f"max_norms[{label!r}]": max_norms[label]})
  return clip_with(
    measures.group_norm(
      labels,
      names,
      ord=ord,
      counted=counted,
      scaled=scaled,
      axis_name=axis_name,
      specs=specs,
    ),
    _limits.per_group([max_norms[label] for label in names]),
    actions.rescale(eps=eps, strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )


@named
def clip_by_block_rms(
  threshold: ScalarOrSchedule | None,
  *,
  eps: Scalar = 0.0,
  nonfinite: Nonfinite = "propagate",
  strict: bool = False,
  axis_name: AxisName = "auto",
  specs: Specs = None,
  stacked: _axes.Stacked = None,
  record: Recording = True,
  name: str = "clip_by_block_rms",
) -> optax.GradientTransformationExtraArgs:
  r"""Scales each leaf so that its root mean square is at most `threshold`.

  .. math::
      u_l \leftarrow u_l \cdot \min\left(1, \frac{d}{\text{rms}(u_l) + \epsilon}
      \right), \quad \text{rms}(u) = \|u\|_2 / \sqrt{\text{size}(u)}

  Drop-in for `optax.clip_by_block_rms`. Adafactor applies it to the scaled updates
  (d = 1), not to gradients.

  Args:
    threshold: d >= 0, given like `max_norm` in `clip_by_global_norm`.
    eps, strict: as in `actions.rescale`, with the root mean square as norm.
    nonfinite, record, name: as in `clip_with`.
    axis_name, specs, stacked: as in `optax_clip.measures`.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Errors and edge cases are those of `clip_by_global_norm`, leaf by leaf.

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
    _limits.of(threshold),
    actions.rescale(eps=eps, strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )
