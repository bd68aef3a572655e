"""How far the global norm is from float64, by dtype, size and magnitude."""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _suite
import optax_clip

# name: dtype, leaves, elements a leaf, magnitude
CASES: dict[str, tuple[Any, int, int, float]] = {
  "float32, 1e6 elements": (jnp.float32, 1, 10**6, 1.0),
  "float32, 1e8 elements": (jnp.float32, 1, 10**8, 1.0),
  "float32, 1e9 elements": (jnp.float32, 10, 10**8, 1.0),
  "float32, 1000 leaves": (jnp.float32, 1000, 1000, 1.0),
  "float32, of 1e20": (jnp.float32, 1, 1000, 1e20),
  "float32, of 1e-30": (jnp.float32, 1, 1000, 1e-30),
  "bfloat16, 1e8 elements": (jnp.bfloat16, 1, 10**8, 1.0),
  "bfloat16, 1000 leaves": (jnp.bfloat16, 1000, 1000, 1.0),
  "float16, 1e6 elements": (jnp.float16, 1, 10**6, 1.0),
  "float16, of 300": (jnp.float16, 1, 1000, 300.0),
  "float16, of 1e-4": (jnp.float16, 1, 10**6, 1e-4),
}


def run(options: _suite.Options) -> _suite.Rows:
  """Measures all cases, or those of at most a million elements."""
  return measured(10**6 if options.quick else 10**9, options.note)


def measured(most: int, note: Callable[[str], None] = lambda text: None) -> _suite.Rows:
  """Returns a row for each library and case of at most `most` elements."""
  rows = []
  for case, (dtype, leaves, size, magnitude) in CASES.items():
    if leaves * size > most:
      continue
    note(case)
    # One array serves for all leaves: the norm reads each.
    rng = np.random.default_rng(0)
    leaf = jnp.asarray(
      rng.standard_normal(size, np.float32) * np.float32(magnitude), dtype
    )
    exact = math.sqrt(leaves) * _float64_norm(leaf)
    tree = [leaf] * leaves
    for name, function in {
      "optax.global_norm": optax.tree.norm,
      "optax_clip.global_norm": optax_clip.global_norm,
    }.items():
      norm = float(jax.jit(function)(tree))
      rows.append(
        {
          "suite": "precision",
          "case": case,
          "method": name,
          "norm": _finite(norm),
          "float64_norm": exact,
          "relative_error": _finite(abs(norm / exact - 1)),
        }
      )
  return rows


def _float64_norm(x: jax.Array) -> float:
  """Sums pieces, to hold no float64 copy of 1e8 elements; 1e20 squared fits."""
  pieces = np.array_split(np.asarray(x), max(1, x.size // 10**7))
  return math.sqrt(
    math.fsum(float(np.sum(np.square(p.astype(np.float64)))) for p in pieces)
  )


def _finite(error: float) -> float | str:
  # JSON has no inf.
  return error if math.isfinite(error) else "inf"
