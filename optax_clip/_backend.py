"""What differs between backends is chosen when a program is lowered for one.

Two questions have an answer for each: how a sum keeps its range (`sums`), and how
a step is not taken (`branch`).
"""

from collections.abc import Callable
import os
from typing import Any

from jax import lax

# For tests: the forms of one backend on whatever backend there is.
_FORCED = "OPTAX_CLIP_FORMS"


def forced() -> str | None:
  """The backend whose forms are to be used everywhere, if any: cpu, gpu or tpu."""
  return os.environ.get(_FORCED)


def by_backend(
  *operands: Any,
  cpu: Callable[..., Any],
  gpu: Callable[..., Any],
  tpu: Callable[..., Any],
) -> Any:
  """What the function of the backend that is lowered for makes of the operands.

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
