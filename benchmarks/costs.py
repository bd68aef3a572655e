"""How docs/costs.md gets its tables: `python -m benchmarks.costs`."""

import json
import pathlib
from typing import Any

from benchmarks import _marked
from benchmarks import _targets

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "costs.md"
RESULTS = ROOT / "benchmarks" / "results"

# The rows of the tables: their names there, and their methods.
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


# The rows of the second table.
COMPILED = {
  "none": ("none",),
  **ROWS,
  "`optax.apply_if_finite`": ("update, optax.apply_if_finite",),
  "`skip_nonfinite`, `skip_spikes`, `dynamic_loss_scale`": (
    "update, skip_nonfinite",
    "update, skip_spikes",
    "update, dynamic_loss_scale",
  ),
  "... by `guarded_step`": (
    "guarded_step, skip_nonfinite",
    "guarded_step, skip_spikes",
    "guarded_step, dynamic_loss_scale",
  ),
}
# The targets of the second table, one for each compiler.
ACCELERATORS = ("h100", "tpu-v5e")


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
  """Writes the first table: what an AdamW step costs, measured."""
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


def accelerators(results: dict[str, dict[str, Any]]) -> str:
  """Writes the second table: what a step compiles to for each target."""
  if not results:
    return "Not counted yet: `python -m benchmarks --suite compiled`."
  found = {
    target: {row["method"]: row for row in result["rows"] if _is_shown(row)}
    for target, result in results.items()
  }
  some = next(iter(results))
  first, about = found[some]["none"], results[some]["about"]
  titles = [_targets.TARGETS[target].title for target in results]
  head = "".join(f" {title}: kernels | bytes | copies |" for title in titles)
  lines = [
    f"An AdamW step on {first['parameters'] / 1e6:.0f}M float32 parameters in"
    f" {first['leaves']} leaves,",
    f"compiled for {' and '.join('an ' * ('NVIDIA' in t) + t for t in titles)} with JAX"
    f" {about['jax']} on {about['date']}; counted, not run:",
    "",
    f"| clipping |{head}",
    "|---" + "|---" * 3 * len(found) + "|",
  ]
  for name, methods in COMPILED.items():
    cells = []
    for rows in found.values():
      own = [rows[method] for method in methods]
      cells += [
        _range([row["kernels"] for row in own], 0),
        _range([row["bytes"] for row in own]),
        _range([row["temp_copies"] for row in own], 2).replace("0.00", "0"),
      ]
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return "\n".join(lines)


def _is_shown(row: dict[str, Any]) -> bool:
  """Returns whether a row belongs to the step that the table shows."""
  cell = tuple(row[key] for key in ("model", "optimizer", "dtype", "devices"))
  return cell == ("transformer", "adamw", "float32", 1)


def _range(values: list[float], digits: int = 2) -> str:
  low, high = (
    f"{abs(x) if round(x, digits) == 0 else x:.{digits}f}"
    for x in (min(values), max(values))
  )
  return low if low == high else f"{low} to {high}"


def updated(text: str) -> str:
  """Puts the tables of the committed results into the page."""
  results = json.loads((RESULTS / "cpu-overhead.json").read_text())
  text = _marked.replaced(text, "costs", table(results["rows"], results["about"]))
  paths = {target: RESULTS / f"compiled-{target}.json" for target in ACCELERATORS}
  counted = {k: json.loads(p.read_text()) for k, p in paths.items() if p.exists()}
  return _marked.replaced(text, "costs on accelerators", accelerators(counted))


if __name__ == "__main__":
  PAGE.write_text(updated(PAGE.read_text()))
