"""What clipping adds to a step that is sharded over 1 to 8 devices.

On CPU the devices are virtual and share the cores, so that only ratios and counts of
collectives mean something. They have to exist before JAX starts, which takes a process
of its own: `python -m benchmarks.mesh`.
"""

import json
import os
import re
import statistics
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import optax

from benchmarks import _programs
from benchmarks import _steps
from benchmarks import _suite
from benchmarks import _timing
import optax_clip

METHODS: dict[str, Any] = {
  "none": optax.identity,
  "optax.clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
  "clip_by_global_norm": lambda: optax_clip.clip_by_global_norm(1.0),
  "clip_by_layer_norm": lambda: optax_clip.clip_by_layer_norm(1.0),
  "adaptive_grad_clip": lambda: optax_clip.adaptive_grad_clip(0.01),
  "adagc": optax_clip.adagc,
}

COUNTS = (1, 2, 4, 8)


def run(options: _suite.Options) -> _suite.Rows:
  """Measures 14M parameters, on a CPU in a process with 8 devices."""
  width, blocks, repeats = (164, 15, 5) if options.quick else (328, 15, 15)
  options.note("mesh")
  if options.accelerator:
    return measured(width, blocks, repeats)
  flags = f"--xla_force_host_platform_device_count={max(COUNTS)}"
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
  }
  arguments = [str(x) for x in (width, blocks, repeats)]
  output = subprocess.run(
    [sys.executable, "-m", "benchmarks.mesh", *arguments],
    env=environment,
    stdout=subprocess.PIPE,
    check=True,
    text=True,
  ).stdout
  return json.loads(output.splitlines()[-1])


def measured(width: int, blocks: int, repeats: int) -> _suite.Rows:
  """Returns a row for each number of the devices of this process, and method."""
  shapes = _steps.transformer_shapes(width, blocks)
  rows = []
  for count in COUNTS:
    if count > jax.device_count():
      break
    mesh = jax.make_mesh(
      (count,),
      ("data",),
      axis_types=(AxisType.Auto,),
      devices=jax.devices()[:count],
    )
    # Shards each leaf along its first axis, as in fully sharded data parallelism.
    specs = [PartitionSpec("data" if s[0] % count == 0 else None) for s in shapes]
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    grads = jax.device_put(_steps.random_tree(shapes, jnp.float32), shardings)
    steps = {name: _step(make(), grads) for name, make in METHODS.items()}
    times = _timing.interleaved({k: run for k, (run, _) in steps.items()}, repeats)
    rows += [
      {
        "suite": "mesh",
        "devices": count,
        "method": name,
        "parameters": _steps.elements(shapes),
        "leaves": len(shapes),
        "step_ms": 1e3 * statistics.median(times[name]),
        "spread": _timing.spread(times[name]),
        "step_over_none": _timing.ratio(times[name], times["none"]),
        **{
          kind: _count(text, kind) - _count(steps["none"][1], kind)
          for kind in _programs.COLLECTIVES
        },
      }
      for name, (_, text) in steps.items()
    ]
  return rows


def _step(clip: optax.GradientTransformation, grads: list[jax.Array]) -> Any:
  """Compiles an AdamW step; returns a run of it, and its program."""
  tx = optax.chain(clip, optax.adamw(1e-3))
  like = [g.sharding for g in grads]

  def step(params: Any, state: Any, grads: Any) -> Any:
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params = jax.device_put([jnp.full(g.shape, 0.01, g.dtype) for g in grads], like)
  # Shards the moments as the parameters: XLA would choose for itself.
  state = optax.tree.map_params(tx, jax.device_put, tx.init(params), like)
  carry: list[Any] = [(params, state)]
  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carry[0], grads).compile()

  def run_step() -> None:
    carry[0] = compiled(*carry[0], grads)
    # Steps in flight on many virtual devices would wait for each other for good.
    jax.block_until_ready(carry[0])

  return run_step, compiled.as_text()


def _count(text: str, kind: str) -> int:
  """Counts the collectives of a kind that every step runs.

  Branches do not count: the rescue of norms that left the range of floats, which no
  ordinary step takes, has two of its own.
  """
  branches = {
    name.strip(" %")
    for line in text.splitlines()
    if " conditional(" in line
    for found in re.findall(
      r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=([^,\s]+))", line
    )
    for name in "".join(found).split(",")
  }
  blocks = re.findall(r"^(?:ENTRY )?%([\w.\-]+) \(.*?^\}", text, flags=re.M | re.S)
  bodies = re.split(r"^(?=(?:ENTRY )?%[\w.\-]+ \()", text, flags=re.M)[1:]
  return sum(
    len(re.findall(rf" {kind}(?:-start)?\(", body))
    for name, body in zip(blocks, bodies, strict=True)
    if name not in branches
  )


if __name__ == "__main__":
  print(json.dumps(measured(*map(int, sys.argv[1:]))))
