"""What a clip costs for each byte, from a million parameters to what fits."""

from collections.abc import Callable
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import _steps
from benchmarks import _suite
from benchmarks import _timing
from benchmarks import _torch
import optax_clip


def run(options: _suite.Options) -> _suite.Rows:
  """Measures 1 to 308 million parameters, on accelerators up to 3.2 billion."""
  sizes: tuple[tuple[int, int], ...] = ((128, 4), (512, 8))
  if not options.quick:
    sizes += ((656, 15), (1536, 16))
    if options.accelerator:
      sizes += ((3072, 15), (4096, 24))
  types = (jnp.float32, jnp.bfloat16)
  speed = options.read_bytes_per_s
  return measured(sizes, types, options.repeats, speed, options.note)


def measured(
  widths: tuple[tuple[int, int], ...],
  dtypes: tuple[Any, ...],
  repeats: int,
  read_bytes_per_s: float,
  note: Callable[[str], None] = lambda text: None,
) -> _suite.Rows:
  """Returns a row for each size and dtype: the clip alone, with donated updates."""
  rows = []
  for width, blocks in widths:
    for dtype in dtypes:
      shapes = _steps.transformer_shapes(width, blocks)
      count = _steps.elements(shapes)
      note(f"{count / 1e6:.0f}M parameters, {jnp.dtype(dtype)}")
      grads = _steps.random_tree(shapes, dtype)
      size = sum(g.nbytes for g in grads)
      norm = jax.jit(optax_clip.global_norm)
      carry = [grads]
      limit = [float(norm(grads))]
      runs: dict[str, Callable[[], Any]] = {
        "norm": lambda norm=norm, carry=carry: norm(carry[0]).block_until_ready(),
        "clip": _clipping(
          lambda tree, c: optax_clip.clip_tree(tree, c)[0], carry, limit
        ),
        "optax": _clipping(
          lambda tree, c: optax.clip_by_global_norm(c).update(tree, None)[0],
          carry,
          limit,
        ),
      }
      if _torch.installed():
        runs["torch"] = _torch.clip(shapes, dtype)
      times = _timing.interleaved(runs, repeats)
      row = {
        "suite": "scale",
        "parameters": count,
        "leaves": len(shapes),
        "dtype": str(jnp.dtype(dtype)),
        "gradient_bytes": size,
        "norm_ms": 1e3 * statistics.median(times["norm"]),
        "norm_bytes_per_s": size / statistics.median(times["norm"]),
        "norm_over_read": statistics.median(times["norm"]) / (size / read_bytes_per_s),
        "clip_ms": 1e3 * statistics.median(times["clip"]),
        "optax_ms": 1e3 * statistics.median(times["optax"]),
      }
      if _torch.installed():
        row["torch_clip_grad_norm_ms"] = 1e3 * statistics.median(times["torch"])
      rows.append(row)
      del grads, carry, runs
  return rows


def _clipping(
  clip: Callable[[Any, Any], Any], carry: list[Any], limit: list[float]
) -> Callable[[], None]:
  """Makes a run that clips in place, to a limit that falls each time.

  Within the limit XLA:CPU copies each leaf onto itself, which is free.
  """
  dtype = carry[0][0].dtype
  compiled = jax.jit(clip, donate_argnums=0)

  def run_clip() -> None:
    limit[0] *= 0.9
    # optax needs the dtype of the leaves.
    carry[0] = compiled(carry[0], jnp.asarray(limit[0], dtype))
    jax.block_until_ready(carry[0])

  return run_clip
