"""How a limit follows the running geometric mean of the norms."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_clip import _validate
from optax_clip._algebra.types import Threshold
from optax_clip._thresholds import limits as _limits
from optax_clip._thresholds import memory as _memory
from optax_clip._types import Scalar

Array = jax.Array


# A norm below this share of the mean counts as this share: its quotient is a float.
_LEAST = 2.0**-100


class GeometricMemory(NamedTuple):
  """Holds what `geometric` remembers.

  Attributes:
    mean: f32[norms], the running geometric mean.
  """

  mean: Array


def geometric(
  factor: Scalar = 2.0, surprise: Scalar = 3.0, decay: Scalar = 0.98
) -> Threshold:
  r"""Limits norms to a multiple of the running geometric mean of those before.

  .. math::
      L_t = f m, \quad
      m \leftarrow m \left(\frac{\min(n_t, s m)}{m}\right)^{w_t}, \quad
      w_t = \max\left(1 - \beta, \frac{1}{t + 1}\right)

  The first norm starts the mean, and the second one already has a limit. The mean is
  that of all norms at first, and of about the last ``1 / (1 - decay)`` later. No
  constant has the units of the norms: norms times a power of two give limits times the
  same, bit for bit. With the defaults the mean follows a rise by 10 in about 105 steps,
  and takes as long for each further power of ten, also from a first norm that was too
  small. All numbers may be traced.

  Args:
    factor: f > 0, how many times the mean a norm may be.
    surprise: s > 1, how many times the mean a norm counts at most: one norm of 1e30
      raises the mean by 2%.
    decay: beta, from 0 to below 1.

  Raises:
    ValueError: if a number is outside its range.

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> from optax_clip import actions, measures, thresholds
    >>> tx = optax_clip.clip_with(
    ...     measures.global_norm(), thresholds.geometric(), actions.rescale()
    ... )
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> for scale in (1.0, 4.0, 100.0):
    ...   updates, state = tx.update({"w": scale * jnp.array([0.6, 0.8])}, state)
    ...   print(f"{optax_clip.metrics(state)['clip/limit']:.2f}")
    inf
    2.00
    3.46
  """
  _validate.positive(factor=factor)
  _validate.above(1.0, surprise=surprise)
  _validate.fraction(decay=decay)
  factor, most, beta = map(_memory.number, (factor, surprise, decay))

  def rule(
    n: Array, memory: GeometricMemory, count: Array
  ) -> tuple[Array, GeometricMemory]:
    mean = memory.mean
    known = (count > 0) & (mean > 0)
    unit = jnp.where(known, mean, 1)
    # A quotient keeps what a logarithm loses: it is the same in all units.
    share = jnp.clip(n / unit, _LEAST, most)
    weight = jnp.maximum(1 - beta, 1 / (count.astype(jnp.float32) + 1))
    new = jnp.where(known, unit * share**weight, n)
    return jnp.where(known, factor * unit, math.inf), GeometricMemory(new)

  return _memory.remembering(lambda n: GeometricMemory(jnp.zeros_like(n)), rule)


def early(threshold: Threshold, factor: Scalar | None) -> Threshold:
  """Bounds limits by the first norms until a threshold has learned, unless `None`."""
  if factor is None:
    return threshold
  _validate.positive(early_factor=factor)
  return _limits.until_learned(threshold, geometric(factor))
