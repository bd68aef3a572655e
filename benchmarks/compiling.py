"""How long a step takes until it runs: to trace, to lower and to compile.

`python -m benchmarks --suite compiling` compiles for the CPU; with `--target
h100,tpu-v5e` for these, on a machine that has none (`_targets`).
"""

from collections.abc import Callable
import gc
import itertools
import os
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import _suite
from benchmarks import _targets
import optax_clip

SHAPES = [(256, 64), (64, 256), (512, 48), (96,), (384,), (3, 3, 16, 32)]


def _before(*clips: Any) -> Any:
  return optax.chain(*clips, optax.adamw(1e-3))


# Ours, each with what does the same in optax.
PAIRS: dict[str, tuple[Callable[[], Any], str, Callable[[], Any]]] = {
  "clip_by_global_norm": (
    lambda: _before(optax_clip.clip_by_global_norm(1.0)),
    "optax.clip_by_global_norm",
    lambda: _before(optax.clip_by_global_norm(1.0)),
  ),
  "clip_by_block_rms": (
    lambda: _before(optax_clip.clip_by_block_rms(1.0)),
    "optax.clip_by_block_rms",
    lambda: _before(optax.clip_by_block_rms(1.0)),
  ),
  "adaptive_grad_clip": (
    lambda: _before(optax_clip.adaptive_grad_clip(0.01)),
    "optax.adaptive_grad_clip",
    lambda: _before(optax.adaptive_grad_clip(0.01)),
  ),
  "skip_nonfinite": (
    lambda: optax_clip.skip_nonfinite(_before(optax_clip.clip_by_global_norm(1.0))),
    "optax.apply_if_finite",
    lambda: optax.apply_if_finite(_before(optax.clip_by_global_norm(1.0)), 10),
  ),
}
STAGES = ("trace_s", "lower_s", "compile_s")


def run(options: _suite.Options) -> _suite.Rows:
  """Measures donated AdamW steps of 300 leaves in six shapes."""
  copies, rounds = (2, 1) if options.quick else (50, 3)
  shapes = SHAPES * copies
  if not options.targets:
    return measured(shapes, rounds, options.note)
  rows = []
  for name in options.targets:
    (device,) = _targets.devices(name)
    with _targets.float64(_targets.TARGETS[name].slow_float64):
      found = measured(shapes, rounds, options.note, device)
    rows += [{"target": name, **row} for row in found]
  return rows


def measured(
  shapes: list[tuple[int, ...]],
  rounds: int,
  note: Callable[[str], None] = lambda text: None,
  device: jax.Device | None = None,
) -> _suite.Rows:
  """Returns a row for each step, in CPU seconds, those of all rounds in turn.

  Args:
    shapes: the shapes of the parameters.
    rounds: how often each step is compiled; the median counts.
    note: a function to tell what compiles.
    device: the device to compile for; `None`: the one here.
  """
  makers = {name: ours for name, (ours, _, _) in PAIRS.items()}
  makers |= {peer: theirs for _, peer, theirs in PAIRS.values()}
  peers = {name: peer for name, (_, peer, _) in PAIRS.items()}
  times: dict[str, list[tuple[float, ...]]] = {name: [] for name in makers}
  place = None if device is None else jax.sharding.SingleDeviceSharding(device)
  params = [
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape in shapes
  ]
  # What JAX and XLA do once in a process is paid for by a few leaves.
  for make in makers.values():
    _seconds(make(), params[: len(SHAPES)])
  for _ in range(rounds):
    for name, make in makers.items():
      note(f"{len(shapes)} leaves: {name}")
      times[name].append(_seconds(make(), params))
  middle = {
    name: [statistics.median(column) for column in zip(*own, strict=True)]
    for name, own in times.items()
  }
  return [
    {
      "suite": "compiling",
      "method": name,
      "leaves": len(shapes),
      **dict(zip(STAGES, middle[name], strict=True)),
      "total_s": sum(middle[name]),
      "total_over_optax": sum(middle[name]) / sum(middle[peers.get(name, name)]),
    }
    for name in makers
  ]


def _seconds(tx: Any, params: list[jax.ShapeDtypeStruct]) -> tuple[float, ...]:
  """Measures one step: CPU seconds of this process for each of the stages."""
  tx = optax.with_extra_args_support(tx)
  (place,) = {x.sharding for x in params}

  def step(params: Any, state: Any, grads: Any) -> Any:
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  # A function that was traced in an earlier round would not be traced again.
  jax.clear_caches()
  state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    jax.eval_shape(tx.init, params),
  )
  jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=place)
  gc.collect()
  times = [_now()]
  traced = jitted.trace(params, state, params)
  times.append(_now())
  lowered = traced.lower()
  times.append(_now())
  lowered.compile()
  times.append(_now())
  return tuple(b - a for a, b in itertools.pairwise(times))


def _now() -> float:
  """Returns the CPU seconds of this process and of those it waited for.

  The assembler of a GPU is one.
  """
  return sum(os.times()[:4])
