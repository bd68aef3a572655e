"""Which form of a computation a backend gets, chosen when a program is lowered for it.

Two questions have an answer for each backend: how a sum keeps its range (`range`), and
how a guard skips a step (`skipped_step`).
"""

from collections.abc import Callable
import os
from typing import Any

import jax
from jax import lax

# For tests: runs the forms of one backend on any backend.
_FORCED = "OPTAX_CLIP_FORMS"


def forced() -> str | None:
  """Returns the backend whose forms run everywhere, if any: cpu, gpu or tpu."""
  return os.environ.get(_FORCED)


def is_traced(*operands: Any) -> bool:
  """Returns whether one of the arrays belongs to a program that is being traced.

  Outside of a program JAX compiles a choice between backends anew at each call, and
  keeps what it compiled: whoever can do without the choice asks this first.
  """
  return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(operands))


def by_backend(
  *operands: Any,
  cpu: Callable[..., Any],
  gpu: Callable[..., Any],
  tpu: Callable[..., Any],
) -> Any:
  """Applies the function of the backend that the program is lowered for.

  Args:
    *operands: trees of arrays.
    cpu: the function for CPUs, and for backends that are not named here.
    gpu: for GPUs.
    tpu: for TPUs.
  """
  if (backend := forced()) is not None:
    return {"cpu": cpu, "gpu": gpu, "tpu": tpu}[backend](*operands)
  if cpu is gpu is tpu:
    return cpu(*operands)
  return lax.platform_dependent(*operands, cuda=gpu, rocm=gpu, tpu=tpu, default=cpu)
