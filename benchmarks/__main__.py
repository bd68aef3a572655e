"""How to run the benchmarks: `python -m benchmarks --suite overhead --quick`."""

import argparse
import pathlib
from typing import Any

SUITES = ("overhead", "skip", "leaves", "precision", "scale", "mesh")


def arguments() -> argparse.ArgumentParser:
  """Defines the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks",
    description="What clipping costs and how exact it is, next to optax (and"
    " PyTorch, where installed), in one run.",
  )
  parser.add_argument(
    "--suite",
    choices=(*SUITES, "compiled", "all"),
    default="all",
    help="which figures to measure (default: all but compiled)",
  )
  parser.add_argument(
    "--quick", action="store_true", help="smaller models, fewer repetitions"
  )
  parser.add_argument(
    "--device",
    choices=("cpu", "gpu", "tpu"),
    help="the platform to run on (default: the one JAX prefers)",
  )
  parser.add_argument(
    "--target",
    default="h100,tpu-v5e,tpu-v6e",
    help="of the suite compiled: what to compile for (default: %(default)s)",
  )
  parser.add_argument(
    "--only",
    default="",
    metavar="REGEX",
    help="of the suite compiled: which programs (default: all of them)",
  )
  parser.add_argument("--json", type=pathlib.Path, help="write results here")
  parser.add_argument("--png", type=pathlib.Path, help="draw the results here")
  return parser


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
  """Measures, shows and writes; returns the rows."""
  options = arguments().parse_args(argv)
  if options.suite == "compiled":
    from benchmarks import _targets

    _targets.prepare()
    from benchmarks import compiled

    return compiled.main(options)
  import jax

  if options.device:
    platform = {"gpu": "cuda"}.get(options.device, options.device)
    jax.config.update("jax_platforms", platform)
  import jax.numpy as jnp
  from rich.console import Console

  from benchmarks import _report
  from benchmarks import _timing
  from benchmarks import _torch
  from benchmarks import leaves
  from benchmarks import mesh
  from benchmarks import overhead
  from benchmarks import precision
  from benchmarks import scale
  from benchmarks import skip

  on_gpu = jax.default_backend() != "cpu"
  quick = options.quick
  suites = SUITES if options.suite == "all" else (options.suite,)
  console = Console()
  rows: list[dict[str, Any]] = []
  with _report.progress(console) as note:
    note("bandwidth")
    limits = _timing.bandwidth(2**26 if quick else 2**28, 11)
    if "overhead" in suites:
      # 55M parameters in 61 leaves; on accelerators also 1.2 billion.
      models: list[tuple[int, Any]] = [(328 if quick else 656, jnp.float32)]
      if on_gpu and not quick:
        models += [(3072, jnp.float32), (3072, jnp.bfloat16)]
      for width, dtype in models:
        one = quick or width > 2000
        rows += overhead.run(
          width,
          15,
          dtype,
          repeats=5 if quick else 25,
          optimizers=("adamw",) if one else ("adamw", "sgd", "lion"),
          read_bytes_per_s=limits["read_bytes_per_s"],
          note=note,
        )
        if _torch.installed():
          note("overhead: torch")
          rows += overhead.run_torch(
            width, 15, dtype, 5 if quick else 25, limits["read_bytes_per_s"]
          )
      # Orthogonalizing large matrices takes ten times as long as all the rest.
      note("overhead: muon")
      rows += overhead.run(
        164,
        15,
        jnp.float32,
        repeats=3 if quick else 9,
        optimizers=("muon",),
        read_bytes_per_s=limits["read_bytes_per_s"],
        note=note,
      )
    if "skip" in suites:
      rows += skip.run(328 if quick else 656, 15, jnp.float32, 5 if quick else 25, note)
    if "leaves" in suites:
      counts = (1, 10, 100) if quick else (1, 10, 100, 300, 1000, 2000, 4000)
      rows += leaves.run(counts, 2_000_000, 5 if quick else 25, note)
    if "precision" in suites:
      rows += precision.run(10**6 if quick else 10**9, note)
    if "scale" in suites:
      sizes: tuple[tuple[int, int], ...] = ((128, 4), (512, 8))
      if not quick:
        sizes += ((656, 15), (1536, 16))
      if on_gpu and not quick:
        sizes += ((3072, 15), (4096, 24))
      types = (jnp.float32, jnp.bfloat16)
      rows += scale.run(sizes, types, 5 if quick else 25, note)
    if "mesh" in suites:
      note("mesh")
      rows += mesh.run(164 if quick else 328, 15, 5 if quick else 15)
  for row in rows:
    if row["suite"] == "scale":
      row["norm_over_read"] = (
        row["norm_ms"] / 1e3 / (row["gradient_bytes"] / limits["read_bytes_per_s"])
      )
  _report.show(rows, console)
  about = _timing.environment() | limits
  console.print("  ".join(f"{k} {v}" for k, v in about.items() if isinstance(v, str)))
  console.print(
    f"measured limits: read {limits['read_bytes_per_s'] / 1e9:.1f} GB/s,"
    f" copy {limits['copy_bytes_per_s'] / 1e9:.1f} GB/s"
  )
  if options.json:
    _report.write(rows, about, options.json)
  if options.png:
    from benchmarks import _charts

    for path in _charts.draw(rows, options.png, about):
      console.print(f"wrote {path}", soft_wrap=True, highlight=False)
  return rows


if __name__ == "__main__":
  main()
