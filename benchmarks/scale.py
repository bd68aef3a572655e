"""The cost of a clip for each byte, from a million parameters to what fits."""

from collections.abc import Callable
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import _steps
from benchmarks import _timing
from benchmarks import _torch
import optax_clip


def run(
  widths: tuple[tuple[int, int], ...],
  dtypes: tuple[Any, ...],
  repeats: int,
  note: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
  """One row for each size and dtype: clip alone, in an update that donates."""
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
      clip = jax.jit(lambda tree: optax_clip.clip_tree(tree, 1.0), donate_argnums=0)

      def run_clip(carry: list[Any] = carry, clip: Any = clip) -> None:
        carry[0], _ = clip(carry[0])
        jax.block_until_ready(carry[0])

      runs: dict[str, Callable[[], Any]] = {
        "norm": lambda norm=norm, carry=carry: norm(carry[0]).block_until_ready(),
        "clip": run_clip,
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
        "clip_ms": 1e3 * statistics.median(times["clip"]),
      }
      if _torch.installed():
        row["torch_clip_grad_norm_ms"] = 1e3 * statistics.median(times["torch"])
      rows.append(row)
      del grads, carry, runs
  return rows
