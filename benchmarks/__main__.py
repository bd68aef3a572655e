"""How to run the benchmarks: `python -m benchmarks --suite overhead --quick`."""

import argparse
from collections.abc import Sequence
import importlib
import pathlib
from typing import Any

SUITES = (
  *("overhead", "skip", "leaves", "compiling"),
  *("precision", "spectral", "scale", "mesh"),
)


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
    default="",
    help="what to compile for: of the suite compiled (default: h100,tpu-v5e,tpu-v6e),"
    " and of the suite compiling (default: the device here)",
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
  if options.suite == "compiled" or options.target:
    from benchmarks import _targets

    _targets.prepare()
  if options.suite == "compiled":
    from benchmarks import compiled

    options.target = options.target or "h100,tpu-v5e,tpu-v6e"
    return compiled.run(options)
  import jax

  if options.device:
    platform = {"gpu": "cuda"}.get(options.device, options.device)
    jax.config.update("jax_platforms", platform)
  return timed(SUITES if options.suite == "all" else (options.suite,), options)


def timed(names: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
  """Runs these suites in turn; shows, writes and returns their rows."""
  import jax
  from rich.console import Console

  from benchmarks import _rows
  from benchmarks import _suite
  from benchmarks import _targets
  from benchmarks import _timing

  console = Console()
  rows: list[dict[str, Any]] = []
  with _rows.progress(console) as note:
    note("bandwidth")
    limits = _timing.bandwidth(2**26 if options.quick else 2**28, 11)
    on_accelerator = jax.default_backend() != "cpu"
    given = _suite.Options(
      options.quick,
      on_accelerator,
      limits["read_bytes_per_s"],
      note,
      _targets.named(options.target),
    )
    for name in names:
      rows += importlib.import_module(f"benchmarks.{name}").run(given)
  _rows.show(rows, console)
  about = _timing.environment() | limits
  if given.targets:
    about["device"] = f"compiled for {', '.join(given.targets)}, not run"
  console.print("  ".join(f"{k} {v}" for k, v in about.items() if isinstance(v, str)))
  console.print(
    f"measured limits: read {limits['read_bytes_per_s'] / 1e9:.1f} GB/s,"
    f" copy {limits['copy_bytes_per_s'] / 1e9:.1f} GB/s"
  )
  if options.json:
    _rows.write(rows, about, options.json)
  if options.png:
    from benchmarks import _charts

    for path in _charts.draw(rows, options.png, about):
      console.print(f"wrote {path}", soft_wrap=True, highlight=False)
  return rows


if __name__ == "__main__":
  main()
