"""Brings the README's table of costs up to date: `python -m benchmarks.readme`."""

import json
import pathlib
from typing import Any

from benchmarks import _marked

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"

# Rows of the table: how they are called there, and the methods they are of.
ROWS = {
  "`optax.clip_by_global_norm`": ("optax.clip_by_global_norm",),
  "`clip_by_global_norm`": ("clip_by_global_norm",),
  '... with `nonfinite="zero"`, `strict=True`': (
    "clip_by_global_norm, nonfinite=zero",
    "clip_by_global_norm, strict",
  ),
  '... with `record="layers"`': ("clip_by_global_norm, record=layers",),
  "`clip_by_layer_norm`": ("clip_by_layer_norm",),
  "`optax.clip_by_block_rms`": ("optax.clip_by_block_rms",),
  "`clip_by_block_rms`": ("clip_by_block_rms",),
  "`autoclip`, `zclip`, `clip_by_history`": ("autoclip", "zclip", "clip_by_history"),
  "`adagc`, `clip_by_layer_percentile`, `adaclip`": (
    "adagc",
    "clip_by_layer_percentile",
    "adaclip",
  ),
  "`optax.adaptive_grad_clip`": ("optax.adaptive_grad_clip",),
  "`adaptive_grad_clip`": ("adaptive_grad_clip",),
  "`stable_spam`": ("stable_spam",),
}


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
  """The table, of an AdamW step."""
  found = {row["method"]: row for row in rows if row["optimizer"] == "adamw"}
  first = found["none"]
  lines = [
    f"An AdamW step on {first['parameters'] / 1e6:.0f}M float32 parameters in"
    f" {first['leaves']} leaves,",
    f"{about['cpu_count']} CPU cores, JAX {about['jax']}, all in one run on"
    f" {about['date']}:",
    "",
    "| clipping | step / none | added / norm | added / read | copies |",
    "|---|---|---|---|---|",
  ]
  for name, methods in ROWS.items():
    own = [found[method] for method in methods]
    cells = [
      _range([row[key] for row in own])
      for key in ("step_over_none", "added_over_norm", "added_over_reads")
    ]
    copies = _range([row["temp_copies"] for row in own], 0)
    lines.append(f"| {name} | {' | '.join(cells)} | {copies} |")
  return "\n".join(lines)


def _range(values: list[float], digits: int = 2) -> str:
  low, high = (
    f"{abs(x) if round(x, digits) == 0 else x:.{digits}f}"
    for x in (min(values), max(values))
  )
  return low if low == high else f"{low} to {high}"


def updated(text: str) -> str:
  """The README with the table of the committed results."""
  results = json.loads((RESULTS / "cpu-overhead.json").read_text())
  return _marked.replaced(text, "costs", table(results["rows"], results["about"]))


if __name__ == "__main__":
  README.write_text(updated(README.read_text()))
