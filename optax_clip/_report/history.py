"""Reads the norms that `observe` kept, and checks those that come back."""

from collections.abc import Sequence

import jax
from jax.typing import ArrayLike
import numpy as np

from optax_clip._guards.observe import NormHistory
from optax_clip._report import metrics as _metrics
from optax_clip._types import OptState


def norm_history(opt_state: OptState, name: str | None = None) -> np.ndarray:
  """Reads the norms that `observe` kept, the oldest first.

  Call it outside `jax.jit`: the number of norms depends on the steps taken.

  Args:
    opt_state: any optimizer state that holds one of `observe`, however deep: what
      `metrics` takes, also one that `jax.vmap` or `jax.pmap` stacked.
    name: which one, if there are several: the name that `observe` got.

  Returns:
    f32[steps], or f32[steps, norms] for a measure with several, in its order; with the
    axes of `jax.vmap` in front. There are as many steps as were taken, at most
    `window`. NaN and inf are among them.

  Raises:
    ValueError: if the state holds no such history, or several; if members of an
      ensemble have taken different numbers of steps.
    TypeError: inside `jax.jit`.

  Example:
    >>> import jax.numpy as jnp, optax, optax_clip
    >>> tx = optax_clip.observe(optax.sgd(0.1))
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> _, state = tx.update({"w": jnp.array([3.0, jnp.nan])}, state)
    >>> _, state = tx.update({"w": jnp.array([3.0, 4.0])}, state)
    >>> print(optax_clip.norm_history(state))
    [nan  5.]
  """
  _, history = _metrics.the_entry(
    opt_state,
    NormHistory,
    name,
    words=("history of norms", "histories"),
    ask="Wrap the optimizer, as in optax_clip.observe(optax.adamw(1e-3))",
  )
  ring, steps = (_metrics.array(x) for x in history)
  if isinstance(steps, jax.core.Tracer):
    raise TypeError(
      "norm_history was called on a traced state, whose number of steps is not"
      " known. Call it outside of jax.jit, on the state that the step returned."
    )
  return _in_order(np.asarray(ring), np.asarray(steps))


def _in_order(ring: np.ndarray, steps: np.ndarray) -> np.ndarray:
  """Orders the rows that steps reached, oldest first; `vmap` adds axes to both."""
  taken = set(steps.ravel().tolist())
  if len(taken) != 1:
    raise ValueError(
      f"The members of the ensemble have taken {sorted(taken)} steps. Pass the state"
      " of one of them, as jax.tree.map(lambda x: x[0], opt_state)."
    )
  count, axis = taken.pop(), steps.ndim
  window = ring.shape[axis]
  if count < window:
    return ring.take(range(count), axis=axis)
  return np.roll(ring, -(count % window), axis=axis)


def checked(norms: ArrayLike | Sequence[float]) -> np.ndarray:
  """Checks norms, and returns them in float64."""
  if isinstance(norms, jax.core.Tracer):
    raise TypeError("norms are traced: call this outside of jax.jit, on their values.")
  try:
    history = np.asarray(norms)
  except (TypeError, ValueError) as error:
    raise TypeError(
      f"norms must be real numbers, got a {type(norms).__name__}. Pass what"
      " optax_clip.norm_history(opt_state) returns."
    ) from error
  # bfloat16 has the NumPy kind "V".
  if history.dtype.kind not in "iufV":
    raise TypeError(
      f"norms must be real numbers, got {norms!r} of dtype {history.dtype}. Pass what"
      " optax_clip.norm_history(opt_state) returns."
    )
  history = history.astype(np.float64)
  if history.ndim != 1:
    raise ValueError(
      f"norms must have one dimension, the steps, got shape {list(history.shape)}."
      " For norms by layer pass one column, as norms[:, 0]."
    )
  if np.any(history < 0):
    worst = int(np.argmin(np.where(history < 0, history, 0)))
    raise ValueError(
      f"norms must not be negative, got norms[{worst}] = {history[worst]:g}. Pass what"
      " optax_clip.norm_history(opt_state) returns."
    )
  return history
