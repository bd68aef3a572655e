"""Where a guard finds the loss of a step, and what it keeps of it."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_clip._algebra import record as _record
from optax_clip._norms import mesh as _mesh
from optax_clip._norms import power_sums as _power_sums

Array = jax.Array


def passed(extra_args: dict[str, Any]) -> Any:
  """Returns ``loss=``, or ``value=``, optax's name for it; `None` if there is none."""
  loss = extra_args.get("loss")
  return extra_args.get("value") if loss is None else loss


def judged(extra_args: dict[str, Any]) -> Array:
  """Returns the loss that a guard judges: f[], averaged over axes that it varies over.

  Raises:
    TypeError: if none was passed.
    ValueError: if it is no scalar.
  """
  loss = passed(extra_args)
  if loss is None:
    raise TypeError(
      "loss is a signal, but was not passed. Pass it, as in tx.update(grads, state,"
      " params, loss=loss), or by optax's name for it, value=."
    )
  loss = jnp.asarray(loss)
  if loss.ndim:
    raise ValueError(f"loss must be a scalar, got shape {loss.shape}: average it.")
  if not jnp.issubdtype(loss.dtype, jnp.floating):
    loss = loss.astype(jnp.float32)
  axes = _mesh.varying_axes(loss)
  return jax.lax.pmean(loss, axes) if axes else loss


def recorded(extra_args: dict[str, Any]) -> Array:
  """Returns the loss for the record: f32[], 0 if none was passed, inf for a NaN.

  One that differs over a mesh does not count: with it the state would differ, too. A
  NaN would stay in the state, and fail whoever looks for one, long after the step that
  was skipped.
  """
  loss = passed(extra_args)
  loss = jnp.asarray(0.0 if loss is None else loss)
  is_number = loss.size == 1 and jnp.issubdtype(loss.dtype, jnp.floating)
  if not is_number or _mesh.varying_axes(loss):
    return jnp.zeros((), jnp.float32)
  wide = loss.reshape(()).astype(_power_sums.accumulator(loss.dtype))
  return _record.single(jnp.where(jnp.isnan(wide), jnp.inf, wide))
