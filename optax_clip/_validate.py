"""Checks of hyperparameters, made where the user passes them.

A value that is traced (under `jit`, or injected by `optax.inject_hyperparams`)
or a schedule cannot be checked here and passes.
"""

import math
from typing import Any

import jax
import numpy as np


def _concrete(value: Any) -> np.ndarray | None:
  if isinstance(value, jax.core.Tracer) or callable(value):
    return None
  return np.asarray(value)


def _numeric(name: str, value: Any) -> np.ndarray | None:
  concrete = _concrete(value)
  if concrete is None:
    return None
  # bfloat16 and the float8 types are of numpy kind "V".
  if concrete.dtype.kind not in "iufV" or isinstance(value, (bool, np.bool_)):
    raise TypeError(
      f"{name} must be a number, an array or a schedule (a function of the"
      f" step), got {value!r} of type {type(value).__name__}."
    )
  return concrete.astype(np.float64)


def nonnegative(**values: Any) -> None:
  """Raises unless each named value is >= 0 (inf is allowed, NaN is not)."""
  for name, value in values.items():
    concrete = _numeric(name, value)
    if concrete is not None and not np.all(concrete >= 0):
      raise ValueError(
        f"{name} must be non-negative, got {value!r}. Use 0 to turn every"
        " update into zeros and float('inf') to never clip."
      )


def positive(**values: Any) -> None:
  """Raises unless each named value is > 0."""
  for name, value in values.items():
    concrete = _numeric(name, value)
    if concrete is not None and not np.all(concrete > 0):
      raise ValueError(f"{name} must be positive, got {value!r}.")


def above(low: float, **values: Any) -> None:
  """Raises unless each named value is larger than a number."""
  for name, value in values.items():
    concrete = _numeric(name, value)
    if concrete is not None and not np.all(concrete > low):
      raise ValueError(f"{name} must be above {low:g}, got {value!r}.")


def within(low: float, high: float, **values: Any) -> None:
  """Raises unless each named value is between two numbers, which are allowed."""
  for name, value in values.items():
    concrete = _numeric(name, value)
    if concrete is not None and not np.all((concrete >= low) & (concrete <= high)):
      raise ValueError(f"{name} must be between {low:g} and {high:g}, got {value!r}.")


def fraction(**values: Any) -> None:
  """Raises unless each named value, a decay, is in [0, 1)."""
  for name, value in values.items():
    concrete = _numeric(name, value)
    if concrete is not None and not np.all((concrete >= 0) & (concrete < 1)):
      raise ValueError(
        f"{name} must be at least 0 and below 1, got {value!r}. The closer to"
        " 1, the longer is remembered."
      )


def size(*, least: int = 1, **values: Any) -> int:
  """The one named value, the static length of an array."""
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


def order(ord: Any) -> float:
  """The order of a norm as a float; `None` is 2."""
  if ord is None:
    return 2.0
  if isinstance(ord, jax.core.Tracer) or not isinstance(ord, (int, float)):
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


def choice(options: tuple[Any, ...], **values: Any) -> None:
  """Raises unless each named value is one of `options`."""
  for name, value in values.items():
    if value not in options:
      raise ValueError(
        f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}."
      )


def instance(kind: type, where: str, **values: Any) -> None:
  """Raises unless each named value is of a type; `where` names what makes such."""
  for name, value in values.items():
    if not isinstance(value, kind):
      raise TypeError(
        f"{name} must be a {kind.__name__} from {where}, got {value!r} of type"
        f" {type(value).__name__}."
      )
