"""How a training step is compiled for devices that need not be there."""

import collections
from collections.abc import Callable
from collections.abc import Sequence
import hashlib
import math
import re
import time
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax

from benchmarks import _programs
import optax_clip


class Compiled(NamedTuple):
  """Holds a compiled step.

  Attributes:
    program: what XLA compiled.
    gradient_bytes: the bytes of all gradients, on one device.
    lower_s: seconds to trace and lower the step.
    compile_s: seconds to compile it.
  """

  program: jax.stages.Compiled
  gradient_bytes: float
  lower_s: float
  compile_s: float

  def row(self) -> dict[str, Any]:
    """Returns its figures, as results have them."""
    row = _programs.Program(self.program.as_text(), self.gradient_bytes).row()
    held = self.program.memory_analysis().temp_size_in_bytes
    return row | {
      "temp_copies": held / self.gradient_bytes,
      "lower_s": self.lower_s,
      "compile_s": self.compile_s,
    }


def _stepped(tx: Any, whole: bool) -> Callable[[Any, Any, Any], Any]:
  """Returns the step from parameters, state and gradients."""

  def stepped(params: Any, state: Any, grads: Any) -> Any:
    if whole:
      return optax_clip.guarded_step(tx, grads, state, params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return stepped


def traced(
  tx: optax.GradientTransformation,
  shapes: Sequence[tuple[int, ...]],
  dtype: Any,
  whole: bool = False,
) -> jax.stages.Traced:
  """Traces a step, in the forms of all backends, for no device in particular."""
  tx = optax.with_extra_args_support(tx)
  params = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes]
  state = jax.eval_shape(tx.init, params)
  return jax.jit(_stepped(tx, whole)).trace(params, state, params)


def digest(traced: jax.stages.Traced, platform: str) -> str:
  """Hashes the operations of a step on a platform: lowered for it, not compiled.

  Names, comments and modules do not change it, nor does the order of operations, nor
  the forms of other backends, nor how often a form is chosen. Versions of JAX and optax
  do, and the number of devices that JAX has.
  """
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  # Constants of forms that are not chosen are in it.
  choice = re.compile(
    r"\}, \{|stablehlo\.return .*|.*constant dense<\d+> : tensor<i32>"
  )
  lines = [
    re.sub(r"[@%][\w.#:]+", "", line).replace("func.call", "call")
    for function in text.split("func.func")
    for line in _unconditional(_used(function.splitlines()))
  ]
  text = "\n".join(sorted(x for x in map(str.strip, lines) if not choice.fullmatch(x)))
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _unconditional(lines: list[str]) -> list[str]:
  """Leaves out where a function chooses by a constant, as it does by the platform."""
  known: set[str] = set()
  kept, opened = [], []
  for line in lines:
    name, _, operation = line.strip().partition(" = ")
    is_choice = False
    if line.endswith("({"):
      choice = re.match(r'"stablehlo\.case"\((%\w+)\)', operation)
      is_choice = choice is not None and choice[1] in known
      opened.append(is_choice)
    elif line.lstrip().startswith("})"):
      is_choice = opened.pop()
    if is_choice or operation.startswith("stablehlo.constant"):
      known.add(name)
    if not is_choice:
      kept.append(line)
  return kept


def _used(lines: list[str]) -> list[str]:
  """Leaves out the lines of a function whose value no line uses."""
  uses = collections.Counter(name for x in lines for name in re.findall(r"%\w+", x))

  def unused(line: str) -> bool:
    name = re.match(r"\s*(%\w+) = ", line)
    return bool(name) and uses[name[1]] == 1 and not line.endswith("({")

  kept = [line for line in lines if not unused(line)]
  return kept if len(kept) == len(lines) else _used(kept)


def step(
  tx: optax.GradientTransformation,
  shapes: Sequence[tuple[int, ...]],
  dtype: Any,
  devices: Sequence[jax.Device],
  whole: bool = False,
) -> Compiled:
  """Compiles a step from parameters, state and gradients to parameters and state.

  Args:
    tx: the whole optimizer.
    shapes: the shapes of the parameters.
    dtype: the dtype of parameters and gradients.
    devices: the devices to compile for. Several shard each matrix, and its entries in
      the state, along the first axis.
    whole: whether `optax_clip.guarded_step` takes the step.
  """
  tx = optax.with_extra_args_support(tx)
  mesh = jax.sharding.Mesh(np.array(devices), ("data",))

  def placed(x: Any, spec: Any = None) -> Any:
    sharding: jax.sharding.Sharding = jax.sharding.SingleDeviceSharding(devices[0])
    if len(devices) > 1:
      sharding = NamedSharding(mesh, spec or PartitionSpec())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  specs = [PartitionSpec("data" if len(shape) > 1 else None) for shape in shapes]
  params = [
    placed(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), spec)
    for shape, spec in zip(shapes, specs, strict=True)
  ]
  state = jax.tree.map(placed, jax.eval_shape(tx.init, params))
  if len(devices) > 1:
    state = optax.tree.map_params(tx, placed, state, specs)

  like = jax.tree.map(lambda x: x.sharding, (params, state))
  begin = time.perf_counter()
  # Donated in the order of the results, by which XLA pairs them.
  lowered = jax.jit(
    _stepped(tx, whole), donate_argnums=(0, 1), out_shardings=like
  ).lower(params, state, params)
  between = time.perf_counter()
  program = lowered.compile()
  end = time.perf_counter()
  local = (math.prod(x.sharding.shard_shape(x.shape)) for x in params)
  size = sum(local) * jnp.dtype(dtype).itemsize
  return Compiled(program, size, between - begin, end - between)
