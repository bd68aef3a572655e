"""The usual stack around an optimizer in one call: a guard, a clip, a record."""

from collections.abc import Callable
from typing import Any

import optax

from optax_clip import _validate
from optax_clip import actions
from optax_clip import measures
from optax_clip._algebra.clip_with import clip_with
from optax_clip._algebra.types import Threshold
from optax_clip._guards.guard import Guard
from optax_clip._guards.nonfinite import skip_nonfinite
from optax_clip._methods.fixed import clip_by_global_norm
from optax_clip._thresholds.geometric import geometric
from optax_clip._types import ScalarOrSchedule


def protect(
  inner: optax.GradientTransformation,
  clip: ScalarOrSchedule | Threshold | optax.GradientTransformation | None = None,
  *,
  guard: Callable[[Any], optax.GradientTransformation] | None = skip_nonfinite,
) -> optax.GradientTransformationExtraArgs:
  r"""Puts the usual stack around an optimizer: skips NaNs, clips, and records both.

  ``protect(optimizer, 1.0)`` is exactly

  .. code-block:: python

      skip_nonfinite(optax.chain(clip_by_global_norm(1.0), optimizer))

  and ``protect(optimizer)``, for whoever has no threshold, is

  .. code-block:: python

      clip = clip_with(
        measures.global_norm(), thresholds.geometric(), actions.rescale()
      )
      skip_nonfinite(optax.chain(clip, optimizer))

  That bounds each step by twice the usual norm, from the second step on and in any
  units. It takes the edge off bad batches. It does not find the limit that trains best:
  `suggest_max_norm` helps with that.

  Args:
    inner: the optimizer.
    clip: a number or a schedule for `clip_by_global_norm`; a threshold for the global
      norm, as ``thresholds.percentile()``; or any transformation, as
      ``clip_by_layer_norm(1.0)``.
    guard: from the clip and the optimizer in a chain to the whole, as `skip_spikes` or
      ``functools.partial(skip_nonfinite, record="layers")``. `None`: no guard.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Its state is that of the chain.

  Raises:
    TypeError: if `inner` is not a transformation.
    ValueError: if `clip` is negative, or `inner` a `dynamic_loss_scale`, which goes
      around.

  Example:
    >>> import jax.numpy as jnp, optax, optax_clip
    >>> tx = optax_clip.protect(optax.sgd(1.0))
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for g in (1.0, jnp.nan, 100.0):
    ...   updates, state = tx.update({"w": jnp.array([g])}, state)
    ...   print(updates["w"])
    [-1.]
    [0.]
    [-2.]
    >>> metrics = optax_clip.metrics(state)
    >>> print(metrics["skip_nonfinite/steps_skipped"], metrics["clip/steps_clipped"])
    1 1
  """
  _validate.instance(optax.GradientTransformation, "optax", inner=inner)
  if isinstance(inner.update, Guard) and any(x.scales for x in inner.update.judges):
    raise ValueError(
      "inner must not be a dynamic_loss_scale: protect would clip scaled gradients. Put"
      " it around: dynamic_loss_scale(protect(optimizer))."
    )
  if clip is None:
    clip = geometric()
  if isinstance(clip, Threshold):
    clip = clip_with(measures.global_norm(), clip, actions.rescale())
  elif not isinstance(clip, optax.GradientTransformation):
    if not callable(clip):
      _validate.bound(clip=clip)
    clip = clip_by_global_norm(clip)
  whole = optax.chain(clip, inner)
  return optax.with_extra_args_support(whole if guard is None else guard(whole))
