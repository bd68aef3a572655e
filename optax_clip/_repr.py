"""How transformations and states print, in logs and notebooks."""

from collections.abc import Callable
from collections.abc import Mapping
import functools
import inspect
from typing import Any
from typing import ParamSpec

import jax
import numpy as np
import optax

from optax_clip._types import PyTree

_P = ParamSpec("_P")

# The largest arrays that print their values, as the vectors of records do.
_SHORT = 7


class Named(optax.GradientTransformationExtraArgs):
  """Prints a transformation as the call that made it."""

  call: tuple[str, Mapping[str, Any]] | None = None

  def __repr__(self) -> str:
    """Returns the call, as ``autoclip(percentile=10.0, window=1000)``."""
    if self.call is None:
      return super().__repr__()
    name, arguments = self.call
    return f"{name}({', '.join(f'{k}={_argument(v)}' for k, v in arguments.items())})"


def named(
  factory: Callable[_P, optax.GradientTransformationExtraArgs],
) -> Callable[_P, optax.GradientTransformationExtraArgs]:
  """Makes the transformations that a public function returns print as its call.

  The text shows arguments that may be positional, and others if they differ from their
  default.
  """
  signature = inspect.signature(factory)

  def is_shown(key: str, value: object) -> bool:
    own = signature.parameters[key]
    is_default = value is own.default
    return not is_default or (own.kind is not own.KEYWORD_ONLY and value is not None)

  @functools.wraps(factory)
  def made(
    *args: _P.args, **kwargs: _P.kwargs
  ) -> optax.GradientTransformationExtraArgs:
    tx = Named(*factory(*args, **kwargs))
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    shown = {k: v for k, v in bound.arguments.items() if is_shown(k, v)}
    tx.call = factory.__name__, shown
    return tx

  return made


def short(node: PyTree) -> str:
  """Formats a state: arrays as `float32[1000]`, short ones by their values."""
  if isinstance(node, tuple) and hasattr(node, "_fields"):
    fields = zip(node._fields, node, strict=True)
    inside = ", ".join(f"{key}={short(value)}" for key, value in fields)
    return f"{type(node).__name__}({inside})"
  if isinstance(node, (list, tuple)):
    inside = ", ".join(map(short, node))
    return f"[{inside}]" if isinstance(node, list) else f"({inside})"
  if isinstance(node, dict):
    return f"{{{', '.join(f'{k!r}: {short(v)}' for k, v in node.items())}}}"
  if not hasattr(node, "dtype") or not hasattr(node, "shape"):
    return repr(node)
  has_values = isinstance(node, (jax.Array, np.ndarray))
  if not has_values or isinstance(node, jax.core.Tracer) or node.size > _SHORT:
    return f"{node.dtype}{list(node.shape)}"
  return str(np.asarray(node).tolist()) if node.ndim else str(node)


def _argument(value: object) -> str:
  if isinstance(value, (bool, int, float, str, type(None), Named)):
    return repr(value)
  if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
    return repr(value)
  if isinstance(value, jax.Array):
    return short(value)
  return getattr(value, "__name__", "...")
