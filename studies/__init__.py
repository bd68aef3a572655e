"""Whether clipping helps: small training runs with it and without it.

`python -m studies batch_range` measures one study, writes
`studies/results/batch_range.json`, draws `docs/figures/batch_range.png` and updates the
tables in `docs/evidence.md`. With `--quick` it is much smaller and writes nothing
unless `--json` says where; with `--draw` it measures nothing. `all` stands for every
study. `python -m studies.silent_stall` is a demonstration that takes seconds.
"""

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
  "spectral",
  "untuned",
  "horizon",
)
ROOT = pathlib.Path(__file__).parent


def results(study: str) -> pathlib.Path:
  """Returns the file that keeps a study's results."""
  return ROOT / "results" / f"{study}.json"


def measure(
  study: str, quick: bool, path: pathlib.Path | None, note: Any
) -> list[dict[str, Any]]:
  """Measures one study; writes rows as they come, so that a stopped run leaves some."""
  from benchmarks import _rows
  from benchmarks import _timing

  module = importlib.import_module(f"studies.{study}")
  about = {"study": study, "quick": quick, **_timing.environment()}
  started = time.perf_counter()
  rows = []
  for row in module.run(quick, note):
    rows.append(row)
    if path:
      wall = {"wall_s": round(time.perf_counter() - started)}
      _rows.write(rows, about | wall, path)
  return rows


def load(study: str) -> list[dict[str, Any]]:
  """Loads the rows that are kept of a study."""
  return json.loads(results(study).read_text())["rows"]
