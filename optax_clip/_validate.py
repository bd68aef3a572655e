"""Which hyperparameters are refused, where the user passes them.

A traced value (under `jit`, or from `optax.inject_hyperparams`) has no number to check
yet, and passes.
"""

from collections.abc import Callable
import inspect
import math
from typing import Any
import warnings

import jax
import numpy as np

from optax_clip._types import PyTree


def _concrete(value: object) -> np.ndarray | None:
  return None if isinstance(value, jax.core.Tracer) else np.asarray(value)


def _numeric(name: str, value: object) -> np.ndarray | None:
  if callable(value) and not hasattr(value, "dtype"):
    raise TypeError(
      f"{name} must be a number, got the function {value!r}: this takes no schedule."
      " optax.inject_hyperparams evaluates schedules for transformations whose"
      " arguments are numbers."
    )
  concrete = _concrete(value)
  if concrete is None:
    return None
  # bfloat16 and the float8 types are of numpy kind "V".
  if concrete.dtype.kind not in "iufV" or concrete.dtype == np.bool_:
    raise TypeError(
      f"{name} must be a number, got {value!r} of type {type(value).__name__}."
    )
  return concrete.astype(np.float64)


def limit(**values: object) -> None:
  """Raises unless each named value is `None`, a schedule, or one number >= 0.

  Warns of a 0 that stands in the program: in configurations of others it means that
  nothing is clipped.
  """
  for name, value in values.items():
    if callable(value):
      continue
    bound(**{name: value})
    if isinstance(value, (int, float, np.generic, np.ndarray)) and value == 0:
      warnings.warn(
        f"{name}={value!r} turns every update into zeros, and nothing is learned. In"
        " MaxText and Levanter 0 means that nothing is clipped: for that pass None or"
        " float('inf').",
        UserWarning,
        stacklevel=_callers(),
      )


def bound(**values: object) -> None:
  """Raises unless each named value is `None`, or one number >= 0."""
  for name, value in values.items():
    if value is not None:
      nonnegative(**{name: value})
      scalar(**{name: value})


def _callers() -> int:
  """Returns the `stacklevel` by which a warning of ours points at the user's call."""
  frame, level = inspect.currentframe(), 0
  while frame is not None and _is_ours(frame.f_globals.get("__name__", "")):
    frame, level = frame.f_back, level + 1
  return level


def _is_ours(module: str) -> bool:
  return module.partition(".")[0] == __name__.partition(".")[0]


def scalar(**values: object) -> None:
  """Raises for a named value that is an array of several numbers."""
  for name, value in values.items():
    if np.shape(value):
      raise ValueError(
        f"{name} must be a scalar, got an array of shape {np.shape(value)}. For several"
        " limits, see optax_clip.clip_by_group_norm, or thresholds.constant, whose"
        " limit may be an array with one for each norm."
      )


def nonnegative(**values: object) -> None:
  """Raises unless each named value is >= 0 (inf is allowed, NaN is not)."""
  for name, value in values.items():
    concrete = _numeric(name, value)
    if concrete is not None and not np.all(concrete >= 0):
      raise ValueError(
        f"{name} must be non-negative, got {value!r}. Use 0 to turn every"
        " update into zeros and float('inf') to never clip."
      )


def steps(*, least: int = 0, **values: object) -> None:
  """Raises unless each named value is a whole number of steps, at least `least`."""
  for name, value in values.items():
    concrete = _numeric(name, value)
    # Counters are int32, and a fraction or inf would be rounded to some other number.
    if concrete is not None and not np.all(
      (concrete >= least) & (concrete < 2**31) & (concrete == np.floor(concrete))
    ):
      raise ValueError(
        f"{name} must be a whole number of steps from {least} to 2147483647, got"
        f" {value!r}."
      )


def known_norm(norm: object) -> None:
  """Raises unless a value can be a norm: at least 0, or NaN."""
  concrete = _numeric("norm", norm)
  scalar(norm=norm)
  if concrete is not None and concrete < 0:
    raise ValueError(
      f"norm must be non-negative or NaN, got {norm!r}: it is not a norm."
    )


def positive(**values: object) -> None:
  """Raises unless each named value is > 0."""
  for name, value in values.items():
    concrete = _numeric(name, value)
    if concrete is not None and not np.all(concrete > 0):
      raise ValueError(f"{name} must be positive, got {value!r}.")


def above(low: float, **values: object) -> None:
  """Raises unless each named value is above `low`."""
  for name, value in values.items():
    concrete = _numeric(name, value)
    if concrete is not None and not np.all(concrete > low):
      raise ValueError(f"{name} must be above {low:g}, got {value!r}.")


def within(low: float, high: float, **values: object) -> None:
  """Raises unless each named value is between `low` and `high`, or one of them."""
  for name, value in values.items():
    concrete = _numeric(name, value)
    if concrete is not None and not np.all((concrete >= low) & (concrete <= high)):
      raise ValueError(f"{name} must be between {low:g} and {high:g}, got {value!r}.")


def fraction(**values: object) -> None:
  """Raises unless each named value, a decay, is in [0, 1)."""
  for name, value in values.items():
    concrete = _numeric(name, value)
    if concrete is not None and not np.all((concrete >= 0) & (concrete < 1)):
      raise ValueError(
        f"{name} must be at least 0 and below 1, got {value!r}. The closer to"
        " 1, the longer the memory."
      )


def state(kind: type, given: object, owner: str) -> None:
  """Raises unless a state is of the type that `init` of its owner returned."""
  if not isinstance(given, kind):
    _refuse(kind.__name__, given, owner)


def pair(given: object, owner: str) -> None:
  """Raises unless a state is a pair, as of a chain of two."""
  if not isinstance(given, tuple) or len(given) != 2:
    _refuse("pair", given, owner)


def _refuse(kind: str, given: object, owner: str) -> None:
  raise TypeError(
    f"The state of {owner} must be the {kind} that its init returned, got a"
    f" {type(given).__name__}. Pass tx.init(params) of this same tx; of a checkpoint"
    " of another chain, optax_clip.convert_state(tx, params, old_state) makes one."
  )


class Kind:
  """Checks that a memory has the structure it started with, which it finds once."""

  def __init__(self, what: str) -> None:
    """Names the owner of the memory, for errors."""
    self._what, self._structure = what, None

  def check(self, state: PyTree, init: Callable[[], Any]) -> None:
    """Raises unless a memory has the structure that `init` returns."""
    if self._structure is None:
      self._structure = _structure(jax.eval_shape(init))
    if _structure(state) != self._structure:
      raise TypeError(
        f"The state of {self._what} must be a {_kind(jax.eval_shape(init))}, got a"
        f" {_kind(state)}: another transformation, or a checkpoint of one, made the"
        " ClipState or GuardState that holds it. Pass the state that init of this same"
        " transformation returned."
      )


def _structure(state: PyTree) -> Any:
  return jax.tree.structure(_bare(state))


def _bare(state: PyTree) -> Any:
  """Drops names that are keys, as they may change."""
  return list(state.values()) if isinstance(state, dict) else state


def _kind(state: PyTree) -> str:
  inside = [type(x).__name__ for x in state] if isinstance(state, tuple) else []
  nested = [x for x in inside if x.endswith(("Memory", "State"))]
  return type(state).__name__ + (f" of {', '.join(nested)}" if nested else "")


def size(*, least: int = 1, **values: object) -> int:
  """Checks and returns the one named value, the static length of an array."""
  ((name, value),) = values.items()
  if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
    raise TypeError(
      f"{name} must be a Python integer, as it is the length of an array, got"
      f" {value!r}. With optax.inject_hyperparams, pass"
      f" static_args=({name!r},)."
    )
  if value < least:
    raise ValueError(f"{name} must be at least {least}, got {value!r}.")
  return int(value)


def order(ord: object) -> float:
  """Checks the order of a norm and returns it as a float; `None` is 2."""
  if ord is None:
    return 2.0
  if isinstance(ord, (jax.core.Tracer, bool)) or not isinstance(ord, (int, float)):
    raise TypeError(
      "ord must be a Python number, as it decides what is compiled, got"
      f" {ord!r}. With optax.inject_hyperparams, pass static_args=('ord',)."
    )
  # Beyond 64 the powers of float32 leave its range even after rescaling.
  if not (ord == math.inf or 0 < ord <= 64):
    raise ValueError(
      f"ord must be float('inf') or in (0, 64], got {ord!r}. The usual ones"
      " are 1, 2 and float('inf')."
    )
  return float(ord)


def choice(options: tuple[Any, ...], **values: object) -> None:
  """Raises unless each named value is one of `options`."""
  for name, value in values.items():
    if value not in options:
      raise ValueError(
        f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}."
      )


def instance(kind: type, where: str, **values: object) -> None:
  """Raises unless each named value is a `kind`; errors say `where` to get one."""
  for name, value in values.items():
    if not isinstance(value, kind):
      raise TypeError(
        f"{name} must be a {kind.__name__} from {where}, got {value!r} of type"
        f" {type(value).__name__}."
      )
