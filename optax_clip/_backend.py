"""Which form of a computation a backend gets, chosen when a program is lowered for it.

Two questions have an answer for each backend: how a sum keeps its range
(`sums_by_backend`), and how a guard skips a step (`skipped_step`). One more has an
answer for each device: GPUs are not alike in how fast they add float64
(`has_fast_float64`).
"""

from collections.abc import Callable
import functools
import os
from typing import Any

import jax
from jax import lax

# For tests: runs the forms of one backend on any backend.
_FORCED = "OPTAX_CLIP_FORMS"
# For programs that are compiled on a machine without the GPU: "fast" or "slow".
_FLOAT64 = "OPTAX_CLIP_FLOAT64"
# GPUs that add float64 at half their float32 rate or more.
_FAST_NVIDIA = ("6.0", "7.0", "8.0", "9.0", "10.0")
_FAST_AMD = ("gfx906", "gfx908", "gfx90a", "gfx94", "gfx95", "gfx1251")


def forced() -> str | None:
  """Returns the backend whose forms run everywhere: a name in `by_backend`."""
  return os.environ.get(_FORCED)


def forms() -> tuple[str | None, bool]:
  """Returns the settings that choose forms beside the backend: keys of programs."""
  return forced(), has_fast_float64()


def is_traced(*operands: Any) -> bool:
  """Returns whether one of the arrays belongs to a program that is being traced.

  Outside of a program JAX compiles a choice between backends anew at each call, and
  keeps what it compiled: whoever can do without the choice asks this first.
  """
  return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(operands))


def traced_once(f: Callable[..., Any]) -> Callable[..., Any]:
  """Makes a function that is traced once for all arguments of like shapes.

  Leaf by leaf, tracing the same arithmetic takes longer than anything else in a trace.
  The program is what it would be. Outside of one nothing is compiled.
  """
  return _called(f, "JAX_LATE")


def compiled_once(f: Callable[..., Any]) -> Callable[..., Any]:
  """Makes a function that XLA:CPU optimises once for all arguments of like shapes.

  With JAX 0.12 it stays a function of the program, whose arguments and results are
  written to memory: it is for rare branches, and for what is to be written anyway. On
  several devices, which may share the function's arrays, this is `traced_once`.
  """
  return _called(f, "XLA_LATE" if keeps_functions() else "JAX_LATE")


def keeps_functions() -> bool:
  """Returns whether functions can stay such in XLA:CPU's program: `compiled_once`."""
  is_alone = jax.device_count() == 1 and jax.sharding.get_abstract_mesh().empty
  return hasattr(jax, "Inline") and is_alone


def _called(f: Callable[..., Any], when: str) -> Callable[..., Any]:
  inline = getattr(getattr(jax, "Inline", None), when, True)
  jitted = jax.jit(lambda *operands: f(*operands), inline=inline)
  return lambda *operands: (jitted if is_traced(operands) else f)(*operands)


def by_backend(
  *operands: Any,
  cpu: Callable[..., Any],
  gpu: Callable[..., Any],
  tpu: Callable[..., Any],
  rocm: Callable[..., Any] | None = None,
  oneapi: Callable[..., Any] | None = None,
) -> Any:
  """Applies the function of the backend that the program is lowered for.

  Args:
    *operands: trees of arrays.
    cpu: the function for CPUs, and for backends that are not named here.
    gpu: for GPUs: of NVIDIA, and of those for which there is no function of their own.
    tpu: for TPUs.
    rocm: for GPUs of AMD, if they are not as NVIDIA's.
    oneapi: for GPUs of Intel, if they are not as NVIDIA's.
  """
  found = {"cpu": cpu, "gpu": gpu, "tpu": tpu}
  found |= {"rocm": rocm or gpu, "oneapi": oneapi or gpu}
  if (backend := forced()) is not None:
    return found[backend](*operands)
  if all(f is cpu for f in found.values()):
    return cpu(*operands)
  names = {"cuda": "gpu", "rocm": "rocm", "oneapi": "oneapi", "tpu": "tpu"}
  forms = {platform: found[name] for platform, name in names.items()}
  return lax.platform_dependent(*operands, default=cpu, **forms)


def has_fast_float64() -> bool:
  """Returns whether this process's GPUs add float64 at half their float32 rate or more.

  Those for data centres do. Consumer cards do not: on NVIDIA's 8.6, 8.9 and 12.0 it is
  1/64 (CUDA C++ Programming Guide, table of arithmetic throughput), on AMD's RDNA 3 it
  is 1/32 (1.9 and 61 TFLOPS of an RX 7900 XTX). Which of AMD's have half or full rate
  stands in LLVM: the features ``HalfRate64Ops`` and ``FullRate64Ops`` in its AMDGPU.td,
  which no gfx10, gfx11 and gfx120 has.

  GPUs of Intel are not asked. A kernel with float64 does not run on an Arc of the A
  series ("Required aspect fp64 is not supported on the device"): `by_backend` tells
  all of them apart.

  Without a GPU the program is compiled for another machine's: one in a data centre,
  unless the environment has ``OPTAX_CLIP_FLOAT64=slow``.
  """
  if (given := os.environ.get(_FLOAT64)) is not None:
    return given != "slow"
  return _are_fast()


@functools.cache
def _are_fast() -> bool:
  """Asks the devices, which stay what they are; asking takes longer than an answer."""
  try:
    devices = jax.local_devices(backend="gpu")
  except RuntimeError:
    return True
  return all(_is_fast(getattr(device, "compute_capability", "")) for device in devices)


def _is_fast(capability: Any) -> bool:
  """Returns whether a GPU, named as "9.0" or "gfx942", adds float64 fast."""
  name = str(capability)
  known = name[:1].isdigit() or name.startswith("gfx")
  return name in _FAST_NVIDIA or name.startswith(_FAST_AMD) or not known
