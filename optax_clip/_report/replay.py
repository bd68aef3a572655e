"""Which limits a learned threshold would have had in a first run."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from optax_clip._report.history import checked
from optax_clip._report.metrics import metrics
from optax_clip._thresholds import memory as _memory
from optax_clip._types import OptState

Array = jax.Array


def replay_limits(
  tx: optax.GradientTransformation, norms: ArrayLike | Sequence[float]
) -> np.ndarray:
  r"""Computes the limits that a clip of the global norm would have had on a history.

  .. math::
      L_t = \text{threshold}(n_0, \dots, n_t)

  Use it to try learned thresholds on a run that you only observed.

  Args:
    tx: `autoclip`, `zclip`, `clip_by_history`, or another single transformation that
      `clip_with` made from a measure that takes one number for its own norm.
    norms: as in `suggest_max_norm`; any number of them.

  Returns:
    f32[steps]; inf where there was no limit yet. A float64 history counts as float32.

  Raises:
    ValueError: if `norms` is not one-dimensional or has a negative number, or `tx`
      does not record one limit, or needs more than one number.
    TypeError: if `tx` is not a transformation, or `norms` are not real numbers, or are
      traced.

  Example:
    >>> import optax_clip
    >>> tx = optax_clip.autoclip(50.0)
    >>> print(optax_clip.replay_limits(tx, [1.0, 3.0, 100.0]))
    [1. 2. 3.]
  """
  history = checked(norms)
  # A large norm must not become inf, which stands for an element that was not finite.
  finite = np.isfinite(history)
  exact = np.where(finite, np.minimum(history, _memory.LARGEST), history)
  if not isinstance(tx, optax.GradientTransformation):
    raise TypeError(
      f"tx must be one clip, as optax_clip.autoclip(), got {tx!r} of type"
      f" {type(tx).__name__}."
    )
  one = jnp.zeros((), jnp.float32)
  try:
    start = tx.init(one)
    jax.eval_shape(tx.update, one, start)
  except (TypeError, ValueError) as error:
    raise ValueError(
      "tx must be one clip of the global norm, as optax_clip.autoclip(), since it gets"
      " one number for each step, without params. This one raised:"
      f" {error}"
    ) from error
  recorded = metrics(start, allow_empty=True)
  limits = [key for key in recorded if key.endswith("/limit")]
  if len(limits) != 1:
    raise ValueError(
      f"tx must record one limit, got one that records {len(limits)}: {limits}. Pass"
      " one clip, as optax_clip.autoclip(), without record=False."
    )

  def step(state: OptState, norm: jax.Array) -> tuple[Any, jax.Array]:
    _, state = tx.update(norm, state)
    return state, metrics(state)[limits[0]]

  replayed = jax.lax.scan(step, start, jnp.asarray(exact, jnp.float32))[1]
  return np.asarray(replayed)
