"""How a limit follows the running mean of the norms."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_clip import _validate
from optax_clip._algebra.types import Threshold
from optax_clip._thresholds import memory as _memory
from optax_clip._types import Scalar

Array = jax.Array


class AverageMemory(NamedTuple):
  """Holds what `average` remembers.

  Attributes:
    mean: f32[norms], the bias-corrected running mean.
  """

  mean: Array


def average(decay: Scalar = 0.999) -> Threshold:
  r"""Limits norms to their bias-corrected running mean, the newest included.

  .. math::
      T \leftarrow \beta T + (1 - \beta) n_t, \quad L_t = T / (1 - \beta^t)

  Args:
    decay: beta, from 0 to below 1. A float or a traced scalar.
  """
  _validate.fraction(decay=decay)
  beta = _memory.number(decay)

  def rule(
    n: Array, memory: AverageMemory, count: Array
  ) -> tuple[Array, AverageMemory]:
    x, restart = _memory.plausible(n, memory.mean, count)
    weight = jnp.where(restart, 1, _memory.debiasing(beta, count))
    mean = memory.mean + weight * (x - memory.mean)
    known = jnp.where(n > 0, mean, memory.mean)
    unknown = (count == 0) & (n == 0)
    return jnp.where(unknown, math.inf, known), AverageMemory(mean)

  return _memory.remembering(lambda n: AverageMemory(jnp.zeros_like(n)), rule)
