"""Where training runs: on one device, or on all devices of one or more processes."""

import argparse
from collections.abc import Callable
import re
from typing import Any
import zlib

from flax import nnx
import jax
from jax.experimental import multihost_utils
import numpy as np

from examples.language_model import _numbers

_AXIS = "devices"


class One:
  """Trains on the default device.

  Attributes:
    first: whether this process prints and writes.
  """

  first = True

  def build(self, make: Callable[[], Any]) -> Any:
    """Returns the model and the optimizer that `make` makes."""
    return make()

  def keep(self, modules: Any) -> None:
    """Says inside a step where the modules it updated belong."""

  def batch(self, batch: np.ndarray) -> Any:
    """Puts a batch where the weights are."""
    return batch

  def wait(self, result: Any, *modules: Any) -> Any:
    """Returns the result once another computation may start."""
    return result


ONE = One()


class All(One):
  """Trains on all devices of all processes: fully sharded data parallelism (FSDP).

  Each device has a part of every weight, of its optimizer state, and of the batch. XLA
  gathers a weight where a step needs it, and no device ever has all weights: not at the
  start either.
  """

  def __init__(self):
    kind = jax.sharding.AxisType.Auto
    self._mesh = jax.make_mesh((jax.device_count(),), (_AXIS,), axis_types=(kind,))
    self.first = jax.process_index() == 0

  def build(self, make: Callable[[], Any]) -> Any:
    """Makes them as above, but never whole on one device."""

    @nnx.jit
    def parts() -> Any:
      modules = make()
      self.keep(modules)
      return modules

    modules = parts()
    return self.wait(modules, modules)

  def keep(self, modules: Any) -> None:
    """Says it as above; XLA might choose another place, and compile again for that."""
    model, _ = modules
    shapes = {x.shape for x in jax.tree.leaves(nnx.state(model))}

    def placed(x: jax.Array) -> jax.Array:
      # The memory of a clip is small, and every device needs all of it.
      spec = self._cut(x.shape) if x.shape in shapes else jax.P()
      return jax.lax.with_sharding_constraint(x, jax.NamedSharding(self._mesh, spec))

    nnx.update(modules, jax.tree.map(placed, nnx.state(modules)))

  def batch(self, batch: np.ndarray) -> Any:
    """Puts it as above; every process has the whole batch, and takes its part."""
    return jax.make_array_from_callback(
      batch.shape, jax.NamedSharding(self._mesh, jax.P(_AXIS)), lambda part: batch[part]
    )

  def wait(self, result: Any, *modules: Any) -> Any:
    """Waits on CPU: with few threads, two steps at once can lock each other."""
    if jax.default_backend() == "cpu":
      jax.block_until_ready((result, nnx.state(modules)))
    return result

  def _cut(self, shape: tuple[int, ...]) -> jax.sharding.PartitionSpec:
    """Cuts the largest dimension that the devices divide; none if they divide none."""
    sizes = [0 if size % self._mesh.size else size for size in shape]
    if not any(sizes):
      return jax.P()
    return jax.P(*[None] * int(np.argmax(sizes)), _AXIS)


def _address(text: str) -> str:
  """Checks an address, as a type for argparse."""
  found = re.fullmatch(r"[^ ]+:(\d{1,5})", text)
  if text != "auto" and not (found and 0 < int(found[1]) < 2**16):
    raise argparse.ArgumentTypeError(
      f"{text!r} is neither HOST:PORT, of process 0, nor 'auto'"
    )
  return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that `find` reads."""
  add = parser.add_argument
  add(
    "--fsdp",
    action="store_true",
    help="train on all devices, with a part of weights, optimizer and batch on each",
  )
  add(
    "--coordinator",
    type=_address,
    metavar="HOST:PORT",
    default=argparse.SUPPRESS,
    help="where process 0 listens, if several train together; 'auto' where JAX finds"
    " that out, and the next two: under Slurm, Open MPI, on TPU pods",
  )
  add(
    "--processes",
    type=_numbers.positive,
    metavar="N",
    default=argparse.SUPPRESS,
    help="how many they are",
  )
  add(
    "--process",
    type=_numbers.natural,
    metavar="I",
    default=argparse.SUPPRESS,
    help="which of them this is, from 0; that one prints and writes",
  )


def find(
  flags: argparse.Namespace, batch: int, error: Callable[[str], Any]
) -> One | All:
  """Joins the other processes; call it before JAX has computed anything.

  Args:
    flags: those of `add_arguments`, and `--checkpoint`.
    batch: the batch size, which the devices must divide.
    error: says what is wrong and does not return.
  """
  several = {
    name: getattr(flags, name)
    for name in ("coordinator", "processes", "process")
    if name in flags
  }
  if not flags.fsdp:
    for name, value in several.items():
      error(f"argument --{name}: {value}: give --fsdp as well")
    return ONE
  if "checkpoint" in flags:
    error(
      f"argument --checkpoint: {flags.checkpoint}: checkpoints are of runs on one"
      " device; leave out --checkpoint or --fsdp"
    )
  if several:
    _join(several, error)
  count = jax.device_count()
  if batch % count:
    error(
      f"argument --fsdp: {count} devices do not divide the batch of {batch}; take a"
      " number of devices that does"
    )
  return All()


def _join(given: dict[str, Any], error: Callable[[str], Any]) -> None:
  address = given.get("coordinator")
  if address is None:
    for name, value in given.items():
      error(f"argument --{name}: {value}: give --coordinator HOST:PORT as well")
  if address != "auto":
    for name in ("processes", "process"):
      if name not in given:
        error(f"argument --coordinator: {address}: give --{name} as well")
    if given["process"] >= given["processes"]:
      error(
        f"argument --process: {given['process']}: must be below --processes, which is"
        f" {given['processes']}"
      )
  try:
    jax.distributed.initialize(
      None if address == "auto" else address,
      given.get("processes"),
      given.get("process"),
    )
  except (RuntimeError, ValueError) as failed:
    if address == "auto":
      error(
        "argument --coordinator: auto: JAX does not find the other processes"
        f" ({failed}); give HOST:PORT, --processes and --process"
      )
    error(
      f"argument --coordinator: {address}: {failed}; name the host of process 0 and"
      " a port that is free there"
    )


def check_same(settings: Any, error: Callable[[str], Any]) -> None:
  """Checks that all processes have these settings, or they would wait for ever."""
  if jax.process_count() == 1:
    return
  mine = np.uint32(zlib.crc32(repr(settings).encode()))
  if len(set(multihost_utils.process_allgather(mine).tolist())) > 1:
    error(
      "argument --coordinator: the processes have different flags or texts; start all"
      " with the same flags but --process, and the same version of Python"
    )
