"""Which devices a program can be compiled for on a machine that has none of them.

The compilers of GPUs and TPUs run anywhere, given a description of the device.
`prepare` sets the environment before JAX is imported: the CPU stays the platform of
all other programs, and one installation may hold both compilers.

TPUs need `pip install libtpu`. GPUs need, in the version of jax, `pip install --no-deps
jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12`: the dependencies are for
running.
"""

from collections.abc import Iterable
import importlib.metadata
import importlib.util
import os
from typing import Any
from typing import NamedTuple

_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  # The lock protects devices, and there are none: several processes may compile.
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# XLA's description: `gpu_device_info` in the repositories of TensorFlow and XLA.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Target(NamedTuple):
  """Describes a kind of device.

  Attributes:
    title: its name, for people.
    modules: the modules that compile for it.
    install: the arguments of pip that install them; `{jax}` is the version of jax.
    topologies: for each number of devices, the arguments that describe them.
  """

  title: str
  modules: tuple[str, ...]
  install: str
  topologies: dict[int, dict[str, str]]


def _gpu(title: str, config: str) -> Target:
  return Target(
    title,
    ("jax_cuda12_plugin", "jax_plugins.xla_cuda12", "nvidia.cuda_nvcc"),
    "--no-deps jax-cuda12-plugin=={jax} jax-cuda12-pjrt=={jax} nvidia-cuda-nvcc-cu12",
    {
      count: {
        "platform": "cuda",
        "target_config": config,
        "topology": f"1x{count}x1",
      }
      for count in (1, 8)
    },
  )


def _tpu(title: str, kind: str) -> Target:
  return Target(
    title,
    ("libtpu",),
    "libtpu",
    # The smallest description has four chips; a program for one uses one of them.
    {
      count: {"platform": "tpu", "topology_name": f"{kind}:{grid}"}
      for count, grid in ((1, "2x2"), (8, "2x4"))
    },
  )


TARGETS = {
  "h100": _gpu("NVIDIA H100", _H100),
  "tpu-v5e": _tpu("TPU v5e", "v5e"),
  "tpu-v6e": _tpu("TPU v6e", "v6e"),
}


class MissingError(RuntimeError):
  """Says that the compiler of a target is not installed."""


def prepare(devices: int = 1) -> None:
  """Sets the environment; call it before JAX is imported.

  Args:
    devices: how many devices of the CPU the process gets. A library that asks JAX
      whether arrays may be on several devices sees as many.
  """
  os.environ.update(_ENVIRONMENT)
  flag = f"--xla_force_host_platform_device_count={devices}"
  if devices > 1:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def missing(name: str) -> str | None:
  """Says in one line how to install the compiler of a target; `None` if it is here."""
  target = TARGETS[name]
  if all(map(_found, target.modules)):
    return None
  install = target.install.format(jax=importlib.metadata.version("jax"))
  return f"The compiler for {name} is not installed: pip install {install}"


def _found(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # Of the package around it.
    return False


def devices(name: str, count: int = 1) -> list[Any]:
  """Returns devices of a kind, to compile for.

  Raises:
    MissingError: if the compiler is not installed; says in one line what to do.
  """
  if text := missing(name):
    raise MissingError(text)
  from jax.experimental import topologies

  keywords = TARGETS[name].topologies[count]
  return list(topologies.get_topology_desc(**keywords).devices[:count])


def named(text: str) -> list[str]:
  """Splits a list of targets at its commas.

  Raises:
    ValueError: if no target has one of the names.
  """
  names = [name.strip() for name in text.split(",") if name.strip()]
  _known(names)
  return names


def _known(names: Iterable[str]) -> None:
  for name in names:
    if name not in TARGETS:
      raise ValueError(f"--target {name}: choose from {', '.join(TARGETS)}")
