"""From rows of results to a table, a JSON file and a chart."""

import json
import pathlib
from typing import Any

from rich.console import Console
from rich.table import Table

# The columns of each suite: key, heading, format.
COLUMNS: dict[str, list[tuple[str, str, str]]] = {
  "overhead": [
    ("optimizer", "optimizer", "{}"),
    ("method", "clipping", "{}"),
    ("step_ms", "step ms", "{:.2f}"),
    ("step_over_none", "/ none", "{:.2f}"),
    ("added_over_norm", "added / norm", "{:.2f}"),
    ("temp_copies", "temp copies", "{:.2f}"),
  ],
  "skip": [
    ("method", "step", "{}"),
    ("step_ms", "step ms", "{:.2f}"),
    ("step_over_clip", "/ clip alone", "{:.2f}"),
    ("temp_copies", "temp copies", "{:.2f}"),
    ("bytes_over_clip", "bytes / clip", "{:.2f}"),
  ],
  "leaves": [
    ("leaves", "leaves", "{}"),
    ("method", "clipping", "{}"),
    ("lower_s", "trace s", "{:.2f}"),
    ("compile_s", "compile s", "{:.2f}"),
    ("step_ms", "step ms", "{:.2f}"),
    ("added_ms", "added ms", "{:.2f}"),
  ],
  "precision": [
    ("case", "case", "{}"),
    ("method", "norm by", "{}"),
    ("norm", "norm", "{:.7g}"),
    ("relative_error", "error", "{}"),
  ],
  "scale": [
    ("parameters", "parameters", "{:,}"),
    ("dtype", "dtype", "{}"),
    ("norm_ms", "norm ms", "{:.3f}"),
    ("norm_over_read", "norm / read", "{:.2f}"),
    ("clip_ms", "clip ms", "{:.3f}"),
    ("torch_clip_grad_norm_ms", "torch ms", "{:.3f}"),
  ],
}


def show(rows: list[dict[str, Any]], console: Console) -> None:
  """Prints one table for each suite."""
  for suite, columns in COLUMNS.items():
    of_suite = [row for row in rows if row["suite"] == suite]
    if not of_suite:
      continue
    table = Table(
      title=f"{suite}: {_subject(of_suite[0])}", title_justify="left", pad_edge=False
    )
    present = [c for c in columns if c[0] in of_suite[0]]
    for key, heading, _ in present:
      text = isinstance(of_suite[0][key], str)
      table.add_column(
        heading,
        justify="left" if text else "right",
        overflow="fold",
        # The longest name without a comma.
        min_width=25 if key == "method" else None,
      )
    for row in of_suite:
      table.add_row(*(_cell(row[key], form) for key, _, form in present))
    console.print(table)


def write(
  rows: list[dict[str, Any]], about: dict[str, Any], path: pathlib.Path
) -> None:
  """Writes results as JSON."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def chart(rows: list[dict[str, Any]], path: pathlib.Path, title: str) -> None:
  """Draws the overhead suite: the step with each clipping, over without."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  bars = [
    row
    for row in rows
    if row["suite"] == "overhead"
    and row["optimizer"] == "adamw"
    and row["method"] != "none"
  ]
  if not bars:
    return
  figure, axes = plt.subplots(figsize=(8, 0.42 * len(bars) + 1.2))
  names = [row["method"] for row in bars]
  values = [row["step_over_none"] for row in bars]
  colors = ["#b0b0b0" if n.startswith("optax.") else "#1f77b4" for n in names]
  axes.barh(names, values, color=colors)
  axes.axvline(1, color="black", linewidth=1)
  for y, value in enumerate(values):
    axes.text(value + 0.02, y, f"{value:.2f}", va="center", fontsize=9)
  axes.invert_yaxis()
  axes.set_xlim(0, max(values) * 1.12)
  axes.set_xlabel("time of an AdamW step, as a multiple of the step without clipping")
  axes.set_title(title, fontsize=10, loc="left")
  axes.spines[["top", "right"]].set_visible(False)
  figure.tight_layout()
  figure.savefig(path, dpi=150)
  plt.close(figure)


def _subject(row: dict[str, Any]) -> str:
  if row["suite"] in ("overhead", "skip"):
    return (
      f"{row['parameters'] / 1e6:.0f}M parameters in {row['leaves']} leaves,"
      f" {row['dtype']}"
    )
  return {
    "leaves": "the same bytes in more leaves, an sgd step",
    "precision": "the global norm against float64",
    "scale": "norm and clip alone",
  }[row["suite"]]


def _cell(value: Any, form: str) -> str:
  if isinstance(value, str):  # "inf" among numbers.
    return value
  if form == "{}" and isinstance(value, float):
    return f"{value:.1e}"
  return form.format(value)
