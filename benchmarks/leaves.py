"""What more leaves cost for the same bytes: to trace, compile and run."""

from collections.abc import Callable
import statistics

import jax.numpy as jnp
import optax

from benchmarks import _clips
from benchmarks import _steps
from benchmarks import _suite
from benchmarks import _timing

FEW = ("none", _clips.GLOBAL, "clip_by_global_norm")
# The most leaves with which clips with a norm for each leaf are tried, about what the
# largest models have, scanned ones aside.
MOST_LAYERS = 300


def run(options: _suite.Options) -> _suite.Rows:
  """Measures two million parameters in 1 to 4000 leaves."""
  counts = (1, 10, 100) if options.quick else (1, 10, 100, 300, 1000, 2000, 4000)
  return measured(counts, 2_000_000, options.repeats, options.note)


def measured(
  counts: tuple[int, ...],
  total: int,
  repeats: int,
  note: Callable[[str], None] = lambda text: None,
) -> _suite.Rows:
  """Returns a row for each number of leaves and method; the optimizer is sgd."""
  rows = []
  for count in counts:
    grads = _steps.random_tree([(total // count,)] * count, jnp.float32)
    trainer = _steps.Trainer(optax.sgd(1e-3), grads)
    steps = {}
    methods = FEW if count > MOST_LAYERS else (*FEW, *_clips.of_layers())
    for method in methods:
      note(f"{count} leaves: {method}")
      steps[method] = trainer.compiled(
        optax.chain(_clips.CLIPS[method].make(), trainer.optimizer)
      )
    times = _timing.interleaved(
      {method: step.run for method, step in steps.items()}, repeats
    )
    rows += [
      {
        "suite": "leaves",
        "method": method,
        "leaves": count,
        "parameters": total // count * count,
        "lower_s": step.lower_s,
        "compile_s": step.compile_s,
        "step_ms": 1e3 * statistics.median(times[method]),
        "spread": _timing.spread(times[method]),
        "added_ms": 1e3 * _timing.difference(times[method], times["none"]),
        "temp_bytes": step.temp_bytes,
      }
      for method, step in steps.items()
    ]
  return rows
