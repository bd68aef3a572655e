"""Where a guard finds the loss of a step, what it compares it with, and keeps of it."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_clip._algebra import record as _record
from optax_clip._norms import mesh as _mesh
from optax_clip._norms import power_sums as _power_sums
from optax_clip._thresholds import memory as _memory

Array = jax.Array
# The loss's level is its mean over about the last 100 steps taken.
_LEVEL_DECAY = 0.99
# The smallest normal float32.
_LEAST_DISTANCE = 2.0**-126


def passed(extra_args: dict[str, Any]) -> Any:
  """Returns ``loss=``, or ``value=``, optax's name for it; `None` if there is none."""
  loss = extra_args.get("loss")
  return extra_args.get("value") if loss is None else loss


def judged(extra_args: dict[str, Any], norms: Array) -> Array:
  """Returns the loss that a guard judges: f[], see `_agreed`.

  Raises:
    TypeError: if none was passed.
    ValueError: if it is not a scalar.
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
  return _agreed(loss, norms)


class Compared(NamedTuple):
  """Holds a loss beside its level, the bias-corrected running mean of earlier ones.

  Attributes:
    loss: f32[], the loss.
    bounded: f32[], the loss, within half the range of float32.
    size: f32[], its distance from the level; 0 for the first.
    sign: f32[], of this distance.
    level: f32[], the level with this loss.
  """

  loss: Array
  bounded: Array
  size: Array
  sign: Array
  level: Array


def compared(loss: Array, level: Array, learned: Array) -> Compared:
  """Compares a loss with its level, which has learned from so many losses.

  The loss may have any sign and offset: its distance from the level is to be judged.
  """
  loss = _record.single(loss)
  # Half the range, so that a difference between two is a float.
  bounded = jnp.clip(loss, -_memory.LARGEST / 2, _memory.LARGEST / 2)
  far = jnp.where(learned > 0, bounded - level, 0)
  # At least the rounding error: the threshold would not learn a distance of 0.
  least = jnp.maximum(_memory.NOISE * jnp.abs(level), _LEAST_DISTANCE)
  size = jnp.maximum(jnp.abs(far), jnp.where(learned > 0, least, 0))
  weight = _memory.debiasing(_LEVEL_DECAY, learned)
  later = level + weight * (bounded - level)
  return Compared(loss, bounded, size, jnp.sign(far), later)


def recorded(extra_args: dict[str, Any], norms: Array) -> Array:
  """Returns the loss for the record: f32[], 0 if none was passed, inf for a NaN.

  A NaN would stay in the state, and fail whoever looks for one, long after the step
  that was skipped.
  """
  loss = passed(extra_args)
  if loss is None:
    return jnp.zeros((), jnp.float32)
  loss = jnp.asarray(loss)
  if loss.size != 1 or not jnp.issubdtype(loss.dtype, jnp.floating):
    return jnp.zeros((), jnp.float32)
  wide = loss.reshape(()).astype(_power_sums.accumulator(loss.dtype))
  wide = _agreed(wide, norms)
  return _record.single(jnp.where(jnp.isnan(wide), jnp.inf, wide))


def _agreed(loss: Array, norms: Array) -> Array:
  """Averages a loss over the devices that hold the same model.

  Each device has the loss of its own batch, perhaps, but copies of a model must decide
  alike, or they part. Where types do not tell which devices hold copies, equal norms
  do: gradients that were averaged are the same to the last bit.
  """
  axes = set(_mesh.varying_axes(loss)) - set(_mesh.varying_axes(norms))
  if axes:
    loss = jax.lax.pmean(loss, tuple(sorted(axes)))
  if unchecked := _mesh.unchecked_axes():
    # As integers, of which a NaN is like itself.
    kind = jnp.dtype(f"int{8 * norms.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(norms, kind)
    for name in unchecked:
      same = jnp.all(jax.lax.pmax(bits, name) == jax.lax.pmin(bits, name))
      loss = jnp.where(same, jax.lax.pmean(loss, name), loss)
  return loss
