"""How a limit learns from a window of the last norms.

The functions are public as `optax_clip.thresholds`. `memory` does what all rules share
(forgetting, dtypes, counting, noise).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_clip import _validate
from optax_clip._algebra.types import Threshold
from optax_clip._thresholds import memory as _memory
from optax_clip._types import Scalar

Array = jax.Array


class WindowMemory(NamedTuple):
  """Holds what `percentile` and `history` remember.

  Attributes:
    window: f32[norms, window], a ring of the last norms; entries from `count` on are
      still 0.
  """

  window: Array


def percentile(q: Scalar = 10.0, window: int = 1000) -> Threshold:
  r"""Limits norms to a percentile of the last, the newest included (AutoClip).

  .. math::
      L_t = \text{percentile}_q(n_{t-W+1}, \dots, n_t)

  with linear interpolation. It follows any change within `window` steps.

  Args:
    q: in percent, from 0 to 100. A float or a traced scalar.
    window: W, how many norms are remembered; static.
  """
  _validate.within(0, 100, q=q)
  size = _validate.size(window=window)
  q = _memory.number(q)

  def start(norms: Array) -> WindowMemory:
    return WindowMemory(jnp.zeros((*norms.shape, size), jnp.float32))

  def rule(n: Array, memory: WindowMemory, count: Array) -> tuple[Array, WindowMemory]:
    _same_window(memory.window, size)
    learned = _inserted(memory.window, n, count)
    # A norm of 0 is not remembered, and leaves the window as it was.
    values = jnp.where((n > 0)[:, None], learned, memory.window)
    # In this order: the count may be the largest integer.
    total = jnp.minimum(jnp.minimum(count, size) + (n > 0).astype(count.dtype), size)
    return _percentile(values, total, q), WindowMemory(learned)

  return _memory.remembering(start, rule)


def history(
  sigmas: Scalar = 3.0, window: int = 128, surprise: Scalar | None = None
) -> Threshold:
  r"""Limits norms to the mean plus some deviations of the last, the newest excluded.

  .. math::
      L_t = \mu + k \sigma, \quad
      \mu, \sigma \text{ of } \min(n_{t-W}, s m), \dots, \min(n_{t-1}, s m)

  with m the median of :math:`n_{t-W}, \dots, n_{t-1}`. It sets no limit before the
  window is half full.

  Without a `surprise` it follows any change within `window` steps; for as long, one
  huge norm makes it blind. With one, it sees spikes as long as they are less than half
  of the window, and follows a rise once half of the window is of the new level.

  Args:
    sigmas: k >= 0. A float or a traced scalar.
    window: W >= 2, how many norms are remembered; static.
    surprise: s > 1, how many times the median a norm counts at most. A float or a
      traced scalar. `None`: any norm counts as what it is.
  """
  _validate.nonnegative(sigmas=sigmas)
  size = _validate.size(least=2, window=window)
  sigmas = _memory.number(sigmas)
  if surprise is not None:
    _validate.above(1.0, surprise=surprise)
    surprise = _memory.number(surprise)

  def start(norms: Array) -> WindowMemory:
    return WindowMemory(jnp.zeros((*norms.shape, size), jnp.float32))

  def rule(n: Array, memory: WindowMemory, count: Array) -> tuple[Array, WindowMemory]:
    _same_window(memory.window, size)
    past = memory.window
    if surprise is not None:
      median = _percentile(past, jnp.minimum(count, size), 50.0)
      past = jnp.minimum(past, surprise * median[:, None])
    mean, std = _window_moments(past, count)
    ready = count >= max(2, size // 2)
    limits = jnp.where(ready, mean + sigmas * std, math.inf)
    return limits, WindowMemory(_inserted(memory.window, n, count))

  return _memory.remembering(start, rule)


def _same_window(window: Array, size: int) -> None:
  if window.shape[1] != size:
    raise ValueError(
      f"The state holds a window of {window.shape[1]} norms, but window={size}:"
      " it was made with another window (it is a checkpoint's, perhaps). Pass that"
      " window, or make a new state with tx.init."
    )


def _inserted(window: Array, n: Array, count: Array) -> Array:
  """Puts one more norm into the ring."""
  size = window.shape[1]
  place = jnp.arange(size, dtype=count.dtype)[None] == (count % size)[:, None]
  return jnp.where(place, n[:, None], window)


def _filled(window: Array, count: Array) -> Array:
  return jnp.arange(window.shape[1], dtype=count.dtype)[None] < count[:, None]


def _percentile(values: Array, total: Array, q: Scalar) -> Array:
  """Interpolates a percentile of each row's first `total` values; inf of none."""
  ranked = jnp.sort(jnp.where(_filled(values, total), values, math.inf), axis=1)
  # In hundredths of a place, which are whole numbers for a whole q.
  last = jnp.maximum(total - 1, 0)
  hundredths = q * last.astype(jnp.float32)
  below = jnp.floor(hundredths / 100)
  fraction = (hundredths - 100 * below) / 100
  index = below.astype(jnp.int32)

  def at(place: Array) -> Array:
    place = jnp.clip(place, 0, last)
    return jnp.take_along_axis(ranked, place[:, None], axis=1)[:, 0]

  low, high = at(index), at(index + 1)
  empty = jnp.isinf(low)
  gap = jnp.where(empty, 0, high) - jnp.where(empty, 0, low)
  return low + fraction * gap


# `jit` so that eager callers compile it once; inside another one it is inlined.
@functools.partial(jax.jit, inline=True)
def _window_moments(window: Array, count: Array) -> tuple[Array, Array]:
  """Returns the mean and the population standard deviation of each row."""
  filled = _filled(window, count)
  total = jnp.maximum(jnp.sum(filled, axis=1), 1).astype(jnp.float32)
  largest = jax.lax.stop_gradient(jnp.max(window, axis=1))
  unit = jnp.where(largest > 0, largest, 1)[:, None]

  def mean(values: Array) -> Array:
    return jnp.sum(jnp.where(filled, values, 0), axis=1) / total

  # Relative to the largest, whose square is 1. The deviations correct the mean, so
  # that it is exact where all norms are equal.
  scaled = window / unit
  centre = mean(scaled)
  centre = centre + mean(scaled - centre[:, None])
  variance = mean(jnp.square(scaled - centre[:, None]))
  positive = variance > 0
  std = jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)
  return centre * unit[:, 0], std * unit[:, 0]
