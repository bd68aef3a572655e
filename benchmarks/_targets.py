"""Which devices a program can be compiled for on a machine that has none of them.

The compilers of GPUs and TPUs run anywhere, given a description of the device: of GPUs
`targets/*.txtpb`, in the fields of XLA's `GpuTargetConfigProto`. `prepare` sets the
environment before JAX is imported: the CPU stays the platform of all other programs,
and one installation may hold several compilers.

`missing` says what to install: the dependencies of these packages are for running, and
are left out. CONTRIBUTING has the commands. NVIDIA's compilers come with CUDA 12 or 13,
either of which will do.
"""

from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
import importlib.metadata
import os
import pathlib
from typing import Any
from typing import NamedTuple

_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  # The lock protects devices, and there are none: several processes may compile.
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_FOLDER = pathlib.Path(__file__).with_name("targets")
_FLOAT64 = "OPTAX_CLIP_FLOAT64"


class Compiler(NamedTuple):
  """Names the packages that compile for a device.

  Attributes:
    packages: their names.
    install: the arguments of pip that install them; `{jax}` is the version of JAX.
  """

  packages: tuple[str, ...]
  install: str


class Target(NamedTuple):
  """Describes a kind of device.

  Attributes:
    title: its name, for people.
    platform: its platform, as JAX names it.
    compilers: what compiles for it, any one of them.
    topologies: for each number of devices, the arguments that describe them.
    slow_float64: whether it is a GPU that adds float64 at a small part of its rate.
  """

  title: str
  platform: str
  compilers: tuple[Compiler, ...]
  topologies: dict[int, dict[str, str]]
  slow_float64: bool = False


def _described(name: str) -> dict[int, dict[str, str]]:
  config = (_FOLDER / f"{name}.txtpb").read_text()
  return {n: {"target_config": config, "topology": f"1x{n}x1"} for n in (1, 8)}


def _cuda(version: int, *packages: str) -> Compiler:
  jax = [f"jax-cuda{version}-{part}" for part in ("plugin", "pjrt")]
  pinned = [f"{name}=={{jax}}" for name in jax]
  return Compiler(
    (*jax, *packages), f"--no-deps {' '.join(pinned)} {' '.join(packages)}"
  )


_CUDA = (
  _cuda(12, "nvidia-cuda-nvcc-cu12"),
  # The assembler and its library of functions are two packages there.
  _cuda(13, "nvidia-cuda-nvcc", "nvidia-nvvm"),
)


def _nvidia(title: str, name: str, slow_float64: bool = False) -> Target:
  return Target(title, "cuda", _CUDA, _described(name), slow_float64)


def _tpu(title: str, kind: str, one: str, eight: str) -> Target:
  grids = ((1, one), (8, eight))
  return Target(
    title,
    "tpu",
    (Compiler(("libtpu",), "libtpu"),),
    {count: {"topology_name": f"{kind}:{grid}"} for count, grid in grids},
  )


TARGETS = {
  "h100": _nvidia("NVIDIA H100", "h100"),
  "b200": _nvidia("NVIDIA B200", "b200"),
  "rtx4090": _nvidia("NVIDIA RTX 4090", "rtx4090", slow_float64=True),
  "rtx5090": _nvidia("NVIDIA RTX 5090", "rtx5090", slow_float64=True),
  "mi300x": Target(
    "AMD MI300X",
    "rocm",
    (
      Compiler(
        ("jax-rocm7-plugin", "jax-rocm7-pjrt"),
        "jax==0.12.0 jaxlib==0.12.0, and then: pip install --no-deps"
        " jax-rocm7-plugin==0.12.0 jax-rocm7-pjrt==0.12.0",
      ),
    ),
    _described("mi300x"),
  ),
  "intel-max": Target(
    "Intel Max 1100",
    "oneapi",
    (Compiler(("jax-oneapi-plugin",), '"jax-oneapi-plugin[with-oneapi]==0.11.2"'),),
    _described("intel-max"),
  ),
  # A program for one chip uses the first of four, of which a core of TPU7x is a half.
  "tpu-v5e": _tpu("TPU v5e", "v5e", "2x2", "2x4"),
  "tpu-v6e": _tpu("TPU v6e", "v6e", "2x2", "2x4"),
  "tpu7x": _tpu("TPU7x", "tpu7x", "1x1x1", "2x2x1"),
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
  """Says in one line what the compiler of a target lacks; `None` if it is here.

  Of several compilers it is the one of which most is here, as CUDA 13 without its
  library of functions, or else the first.
  """
  compilers = TARGETS[name].compilers
  absent = [[x for x in made.packages if not _found(x)] for made in compilers]
  if not all(absent):
    return None
  shares = [
    len(x) / len(made.packages) for x, made in zip(absent, compilers, strict=True)
  ]
  nearest = shares.index(min(shares))
  install = compilers[nearest].install.format(jax=importlib.metadata.version("jax"))
  lacks = ", ".join(absent[nearest])
  return f"The compiler for {name} lacks {lacks}: pip install {install}"


def _found(package: str) -> bool:
  try:
    return bool(importlib.metadata.version(package))
  except importlib.metadata.PackageNotFoundError:
    return False


def devices(name: str, count: int = 1) -> list[Any]:
  """Returns devices of a kind, to compile for.

  Raises:
    MissingError: if the compiler is not installed; says in one line what to do.
  """
  if text := missing(name):
    raise MissingError(text)
  from jax.experimental import topologies

  target = TARGETS[name]
  if target.platform in ("rocm", "oneapi"):
    from benchmarks import _stubs

    _stubs.register(target.platform)
  described = topologies.get_topology_desc(
    platform=target.platform, **target.topologies[count]
  )
  return list(described.devices[:count])


@contextlib.contextmanager
def float64(slow: bool) -> Iterator[None]:
  """Lets programs be traced as on a machine whose GPUs add float64 slowly, or fast.

  The library asks which GPUs there are; a machine without one has no answer.
  """
  before = os.environ.get(_FLOAT64)
  os.environ[_FLOAT64] = "slow" if slow else "fast"
  try:
    yield
  finally:
    os.environ.pop(_FLOAT64)
    if before is not None:
      os.environ[_FLOAT64] = before


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
