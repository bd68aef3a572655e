"""Whether clipping helps: small training runs with it and without it.

`python -m benchmarks --suite training --study batch_range` measures one study, writes
`benchmarks/results/training-batch_range.json`, draws `docs/figures/batch_range.png` and
updates the tables in `docs/evidence.md`. With `--quick` it is much smaller and writes
nothing unless `--json` says where.
"""

import argparse
import importlib
import json
import pathlib
import time
from typing import Any

STUDIES = (
  "temporal_order",
  "language",
  "shifting_scale",
  "batch_range",
  "low_precision",
  "qk_clip",
  "update_clipping",
  "untuned",
  "horizon",
)
ROOT = pathlib.Path(__file__).parent.parent.parent


def results(study: str) -> pathlib.Path:
  """Returns the file that keeps a study's results."""
  return ROOT / "benchmarks" / "results" / f"training-{study}.json"


def main(options: argparse.Namespace) -> list[dict[str, Any]]:
  """Runs one study or all, prints and writes the tables; returns the rows."""
  from rich.console import Console

  from benchmarks.training import _page

  console = Console()
  if options.study and options.study not in STUDIES:
    raise SystemExit(f"--study {options.study}: choose from {', '.join(STUDIES)}")
  if options.json and not options.study:
    raise SystemExit("--json is a file for one study: name it with --study")
  rows = []
  for study in (options.study,) if options.study else STUDIES:
    path = options.json or (None if options.quick else results(study))
    mine = measure(study, options.quick, path, console.log)
    console.print(_page.tables(study, mine), markup=False, soft_wrap=True)
    if not options.quick and not options.json:
      _page.draw(study, mine)
      _page.update(study, mine)
    rows += mine
  return rows


def measure(
  study: str, quick: bool, path: pathlib.Path | None, note: Any
) -> list[dict[str, Any]]:
  """Measures one study; writes rows as they come, so that a stopped run leaves some."""
  from benchmarks import _report
  from benchmarks import _timing

  module = importlib.import_module(f"benchmarks.training.{study}")
  about = {"study": study, "quick": quick, **_timing.environment()}
  started = time.perf_counter()
  rows = []
  for row in module.run(quick, note):
    rows.append(row)
    if path:
      wall = {"wall_s": round(time.perf_counter() - started)}
      _report.write(rows, about | wall, path)
  return rows


def load(study: str) -> list[dict[str, Any]]:
  """Loads the rows that are kept of a study."""
  return json.loads(results(study).read_text())["rows"]
