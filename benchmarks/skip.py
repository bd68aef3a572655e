"""What a step that may be skipped costs, next to one that may not."""

from collections.abc import Callable
import statistics
from typing import Any

import optax

from benchmarks import _steps
from benchmarks import _timing
import optax_clip

Transformation = optax.GradientTransformation

BASE = "clip alone"

# Each: the guard around clip and optimizer, and whether the step is taken whole.
METHODS: dict[str, tuple[Callable[[Transformation], Transformation], bool]] = {
  BASE: (lambda tx: tx, False),
  "guarded_step, skip_nonfinite": (optax_clip.skip_nonfinite, True),
  "guarded_step, skip_spikes": (optax_clip.skip_spikes, True),
  "guarded_step, dynamic_loss_scale": (optax_clip.dynamic_loss_scale, True),
  "guarded_step, both": (
    lambda tx: optax_clip.dynamic_loss_scale(optax_clip.skip_spikes(tx)),
    True,
  ),
  "update, skip_nonfinite": (optax_clip.skip_nonfinite, False),
  "update, skip_spikes": (optax_clip.skip_spikes, False),
  "update, optax.apply_if_finite": (lambda tx: optax.apply_if_finite(tx, 5), False),
}


def run(
  width: int,
  blocks: int,
  dtype: Any,
  repeats: int,
  note: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
  """One row for each guard; all around our clip and AdamW, and with metrics."""
  shapes = _steps.transformer_shapes(width, blocks)
  grads = _steps.random_tree(shapes, dtype)
  size = sum(g.nbytes for g in grads)
  trainer = _steps.Trainer(optax.adamw(1e-3), grads)
  steps = {}
  for method, (guard, whole) in METHODS.items():
    note(f"skip: {method}")
    chain = optax.chain(optax_clip.clip_by_global_norm(1.0), trainer.optimizer)
    steps[method] = trainer.compiled(guard(chain), whole, show=method != BASE)
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
