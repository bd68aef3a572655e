"""What a guard that may skip steps costs, next to the clip alone."""

from collections.abc import Callable
import statistics
from typing import Any

import jax.numpy as jnp
import optax

from benchmarks import _steps
from benchmarks import _suite
from benchmarks import _timing
import optax_clip

Transformation = optax.GradientTransformation

BASE = "clip alone"

Guard = Callable[[Transformation], Transformation]


def _clipped(guard: Guard) -> Guard:
  """Puts a guard around the optimizer and the clip that all rows have."""
  clip = optax_clip.clip_by_global_norm(1.0)
  return lambda optimizer: guard(optax.chain(clip, optimizer))


def _everything(optimizer: Transformation) -> Transformation:
  """Learns a threshold and keeps a record for each layer; skips nonfinite steps."""
  return optax_clip.skip_nonfinite(
    optax.chain(optax_clip.adagc(record="layers"), optimizer),
    measure=optax_clip.measures.layer_norm(),
    record="layers",
  )


# Each: how to make the optimizer, and whether `guarded_step` takes the step.
METHODS: dict[str, tuple[Guard, bool]] = {
  BASE: (_clipped(lambda tx: tx), False),
  "guarded_step, skip_nonfinite": (_clipped(optax_clip.skip_nonfinite), True),
  "guarded_step, skip_spikes": (_clipped(optax_clip.skip_spikes), True),
  "guarded_step, dynamic_loss_scale": (_clipped(optax_clip.dynamic_loss_scale), True),
  "guarded_step, both": (
    _clipped(lambda tx: optax_clip.dynamic_loss_scale(optax_clip.skip_spikes(tx))),
    True,
  ),
  "guarded_step, everything": (_everything, True),
  "update, skip_nonfinite": (_clipped(optax_clip.skip_nonfinite), False),
  "update, skip_spikes": (_clipped(optax_clip.skip_spikes), False),
  "update, optax.apply_if_finite": (
    _clipped(lambda tx: optax.apply_if_finite(tx, 5)),
    False,
  ),
}


def run(options: _suite.Options) -> _suite.Rows:
  """Measures 55M parameters in 61 leaves."""
  width = 328 if options.quick else 656
  return measured(width, 15, jnp.float32, options.repeats, options.note)


def measured(
  width: int,
  blocks: int,
  dtype: Any,
  repeats: int,
  note: Callable[[str], None] = lambda text: None,
) -> _suite.Rows:
  """Returns a row for each guard around AdamW; all but the base return metrics.

  "everything" is `adagc`, which learns a threshold for each layer, in `skip_nonfinite`,
  with a record of each layer.
  """
  shapes = _steps.transformer_shapes(width, blocks)
  grads = _steps.random_tree(shapes, dtype)
  size = sum(g.nbytes for g in grads)
  trainer = _steps.Trainer(optax.adamw(1e-3), grads)
  steps = {}
  for method, (guard, whole) in METHODS.items():
    note(f"skip: {method}")
    tx = guard(trainer.optimizer)
    steps[method] = trainer.compiled(tx, whole, show=method != BASE)
  times = _timing.interleaved(
    {method: step.run for method, step in steps.items()}, repeats
  )
  return [
    {
      "suite": "skip",
      "method": method,
      "parameters": _steps.elements(shapes),
      "leaves": len(shapes),
      "dtype": str(grads[0].dtype),
      "step_ms": 1e3 * statistics.median(times[method]),
      "spread": _timing.spread(times[method]),
      "step_over_clip": _timing.ratio(times[method], times[BASE]),
      "temp_copies": (step.temp_bytes - steps[BASE].temp_bytes) / size,
      "bytes_over_clip": step.bytes_accessed / steps[BASE].bytes_accessed,
      "compile_s": step.compile_s,
    }
    for method, step in steps.items()
  ]
