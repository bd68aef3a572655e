"""What clipping adds to a training step."""

from collections.abc import Callable
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from benchmarks import _clips
from benchmarks import _steps
from benchmarks import _suite
from benchmarks import _timing
from benchmarks import _torch
import optax_clip

OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
  "adamw": optax.adamw,
  "sgd": optax.sgd,
  "lion": optax.lion,
  "muon": optax.contrib.muon,
}
# With optimizers other than AdamW, only the clip that all others are measured by, its
# peer, and a threshold that learns: clips do not differ, only the step around them.
FEW = ("none", "optax.clip_by_global_norm", "clip_by_global_norm", "adagc")

# How often a method has to read arrays of the gradients' size: AGC reads the parameters
# too.
READS = {"adaptive_grad_clip": 2, "optax.adaptive_grad_clip": 2}


def run(options: _suite.Options) -> _suite.Rows:
  """Measures 55M parameters in 61 leaves; on accelerators also 1.2 billion."""
  models: list[tuple[int, Any]] = [(328 if options.quick else 656, jnp.float32)]
  if options.accelerator and not options.quick:
    models += [(3072, jnp.float32), (3072, jnp.bfloat16)]
  speed, note, rows = options.read_bytes_per_s, options.note, []
  for width, dtype in models:
    one = options.quick or width > 2000
    optimizers = ("adamw",) if one else ("adamw", "sgd", "lion")
    rows += measured(width, 15, dtype, options.repeats, optimizers, speed, note)
    if _torch.installed():
      note("torch")
      rows += measured_torch(width, 15, dtype, options.repeats, speed)
  # Orthogonalizing large matrices takes ten times as long as all the rest.
  repeats = 3 if options.quick else 9
  return rows + measured(164, 15, jnp.float32, repeats, ("muon",), speed, note)


def measured(
  width: int,
  blocks: int,
  dtype: Any,
  repeats: int,
  optimizers: tuple[str, ...] = ("adamw",),
  read_bytes_per_s: float = 0.0,
  note: Callable[[str], None] = lambda text: None,
) -> _suite.Rows:
  """Returns a row for each optimizer and method: all for AdamW, a few for others.

  Args:
    width: the model's width, see `_steps.transformer_shapes`.
    blocks: the number of its blocks.
    dtype: the dtype of gradients, parameters and moments.
    repeats: the number of interleaved rounds.
    optimizers: names in `OPTIMIZERS`.
    read_bytes_per_s: what the device reads in a second, as measured in this run.
    note: a function to tell what compiles.
  """
  shapes = _steps.transformer_shapes(width, blocks)
  grads = _steps.random_tree(shapes, dtype)
  jax.block_until_ready(grads)
  size = sum(g.nbytes for g in grads)
  norm = jax.jit(optax_clip.global_norm)
  rows = []
  for optimizer in optimizers:
    methods = tuple(_clips.timed()) if optimizer == "adamw" else FEW
    trainer = _steps.Trainer(OPTIMIZERS[optimizer](1e-3), grads)
    steps = {}
    for method in methods:
      note(f"{optimizer}: {method}")
      steps[method] = trainer.compiled(
        optax.chain(_clips.CLIPS[method].make(), trainer.optimizer)
      )
    runs = {method: step.run for method, step in steps.items()}
    runs["norm"] = lambda: norm(grads).block_until_ready()
    times = _timing.interleaved(runs, repeats)
    plain, bare = times["none"], times["norm"]
    rows += [
      {
        "suite": "overhead",
        "optimizer": optimizer,
        "method": method,
        "parameters": _steps.elements(shapes),
        "leaves": len(shapes),
        "dtype": str(grads[0].dtype),
        "gradient_bytes": size,
        "step_ms": 1e3 * statistics.median(times[method]),
        "spread": _timing.spread(times[method]),
        "step_over_none": _timing.ratio(times[method], plain),
        "added_ms": 1e3 * _timing.difference(times[method], plain),
        "bare_norm_ms": 1e3 * statistics.median(bare),
        "added_over_norm": _timing.difference(times[method], plain)
        / statistics.median(bare),
        "added_over_reads": _timing.difference(times[method], plain)
        / (READS.get(method, 1) * size / read_bytes_per_s),
        "step_over_optax": _timing.ratio(
          times[method], times["optax.clip_by_global_norm"]
        ),
        "temp_copies": (step.temp_bytes - steps["none"].temp_bytes) / size,
        "temp_bytes": step.temp_bytes,
        "lower_s": step.lower_s,
        "compile_s": step.compile_s,
        "kernels": step.kernels,
      }
      for method, step in steps.items()
    ]
  return rows


def measured_torch(
  width: int, blocks: int, dtype: Any, repeats: int, read_bytes_per_s: float
) -> _suite.Rows:
  """Returns the same rows for PyTorch: fused AdamW, and its own clip."""
  shapes = _steps.transformer_shapes(width, blocks)
  times = _timing.interleaved(_torch.steps(shapes, dtype), repeats)
  size = _steps.elements(shapes) * jax.numpy.dtype(dtype).itemsize
  plain = times["none"]
  return [
    {
      "suite": "overhead",
      "optimizer": "torch.adamw",
      "method": method,
      "parameters": _steps.elements(shapes),
      "leaves": len(shapes),
      "dtype": str(jax.numpy.dtype(dtype)),
      "gradient_bytes": size,
      "step_ms": 1e3 * statistics.median(taken),
      "spread": _timing.spread(taken),
      "step_over_none": _timing.ratio(taken, plain),
      "added_ms": 1e3 * _timing.difference(taken, plain),
      "added_over_reads": _timing.difference(taken, plain) / (size / read_bytes_per_s),
    }
    for method, taken in times.items()
  ]
