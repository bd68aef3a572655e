"""Which odd quintics, composed, bring what lies between l and 1 to 1.

The sign of a symmetric matrix, and the polar factor of any, are limits of compositions
of odd polynomials. Each here is the best of its degree on the interval that the ones
before left (Remez: the error takes its largest value four times, with changing sign).
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
# The least value that is ever brought to 1: float32 resolves it, with room.
_LEAST = 2.0**-26
# Divided by its largest value alone, a quintic has a slope of 13 at its fixed point 1:
# rounding errors there would grow thirteenfold in every step.
_MARGIN = 1.002


def first_for(low: Array) -> Array:
  """Returns the first row of the table that values from `low` up need."""
  lows = jnp.asarray(table()[:, 3], low.dtype)
  return jnp.maximum(jnp.sum((lows <= low).astype(jnp.int32)) - 1, 0)


def composed(step: Callable[[Any, Array], Any], x: Any, low: Array) -> Any:
  """Composes ``step(x, [a, b, c])`` so that all from `low` to 1 comes to 1."""
  rows = jnp.asarray(table()[:, :3], low.dtype)
  return lax.fori_loop(first_for(low), rows.shape[0], lambda i, x: step(x, rows[i]), x)


@functools.cache
def table() -> np.ndarray:
  """Returns rows a, b, c of ``a x + b x³ + c x⁵``, with the lower end l before each."""
  rows, low = [], _LEAST
  while 1 - low >= 2 * (_MARGIN - 1):
    a, b, c, error = _best(low)
    top = (1 + error) * _MARGIN
    rows.append((a / top, b / top, c / top, low))
    low = (1 - error) / top
  # Taylor's, which squares the distance to 1 and more.
  rows += [(15 / 8, -10 / 8, 3 / 8, low), (15 / 8, -10 / 8, 3 / 8, 1 - 1e-6)]
  return np.asarray(rows)


def _best(low: float) -> tuple[float, float, float, float]:
  """Finds the quintic nearest to 1 on [low, 1], and its error there."""
  points = [low, low + 0.25 * (1 - low), low + 0.75 * (1 - low), 1.0]
  for _ in range(100):
    x = np.asarray(points)
    signs = np.asarray([1.0, -1.0, 1.0, -1.0])
    a, b, c, error = np.linalg.solve(
      np.stack([x, x**3, x**5, signs], axis=1), np.ones(4)
    ).tolist()
    root = 9 * b * b - 20 * a * c
    if root <= 0:
      break
    inner = [
      math.sqrt((-3 * b + sign * math.sqrt(root)) / (10 * c)) for sign in (-1, 1)
    ]
    if not low < inner[0] < inner[1] < 1:
      break
    moved = max(abs(x - y) for x, y in zip(inner, points[1:3], strict=True))
    points[1:3] = inner
    if moved < 1e-13:
      break
  return a, b, c, abs(error)
