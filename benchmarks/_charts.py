"""How a suite's rows become its figure."""

from collections.abc import Callable
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
import matplotlib.pyplot as plt

Rows = list[dict[str, Any]]

_PEERS = ("optax.", "torch.", "update, optax.")
_GREY, _BLUE = "#b0b0b0", "#1f77b4"


def draw(rows: Rows, path: pathlib.Path, about: dict[str, Any]) -> list[pathlib.Path]:
  """Draws a figure for each suite among the rows; returns the files.

  Several suites get a file each, with the suite's name before the ending.
  """
  suites = [suite for suite in _CHARTS if any(row["suite"] == suite for row in rows)]
  title = f"{about['device']}, JAX {about['jax']}, {about['date']}"
  written = []
  for suite in suites:
    own = path.with_stem(f"{path.stem}-{suite}") if len(suites) > 1 else path
    figure = _CHARTS[suite]([row for row in rows if row["suite"] == suite])
    figure.axes[0].set_title(f"{suite}: {title}", fontsize=10, loc="left")
    figure.tight_layout()
    own.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(own, dpi=130)
    plt.close(figure)
    written.append(own)
  return written


def _bars(rows: Rows, value: str, label: str) -> Any:
  """Draws a bar for each row, and a line at 1, the row that divides all."""
  figure, axes = plt.subplots(figsize=(8, 0.36 * len(rows) + 1.3))
  names = [row["method"] for row in rows]
  values = [row[value] for row in rows]
  axes.barh(names, values, color=[_color(name) for name in names])
  axes.axvline(1, color="black", linewidth=1)
  for y, width in enumerate(values):
    axes.text(max(width, 1) + 0.02, y, f"{width:.2f}", va="center", fontsize=9)
  axes.invert_yaxis()
  axes.set_xlim(0, max(values) * 1.12)
  axes.set_xlabel(label)
  _plain(axes)
  return figure


def _color(method: str) -> str:
  return _GREY if method.startswith(_PEERS) else _BLUE


def _plain(axes: Axes) -> None:
  axes.spines[["top", "right"]].set_visible(False)


def _overhead(rows: Rows) -> Any:
  # The largest of several models.
  most = max(row["gradient_bytes"] for row in rows)
  shown = [
    row
    for row in rows
    if row["optimizer"] == "adamw"
    and row["method"] != "none"
    and row["gradient_bytes"] == most
  ]
  return _bars(shown, "step_over_none", "AdamW step, over the step without clipping")


def _skip(rows: Rows) -> Any:
  label = "AdamW step, over the step with clip_by_global_norm alone"
  shown = [row for row in rows if row["method"] != "clip alone"]
  return _bars(shown, "step_over_clip", label)


def _lines(axes: Axes, rows: Rows, x: str, y: str, label: str) -> None:
  for method in dict.fromkeys(row["method"] for row in rows):
    own = [row for row in rows if row["method"] == method and row[y] > 0]
    style = "--" if method.startswith(_PEERS) or method == "none" else "-"
    axes.plot([r[x] for r in own], [r[y] for r in own], style, marker="o", label=method)
  axes.set_xscale("log")
  axes.set_yscale("log")
  axes.set_xlabel(x)
  axes.set_ylabel(label)
  _plain(axes)


def _leaves(rows: Rows) -> Any:
  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
  _lines(left, rows, "leaves", "compile_s", "compile an sgd step (s)")
  _lines(right, rows, "leaves", "step_ms", "run it (ms)")
  right.legend(fontsize=8, frameon=False, bbox_to_anchor=(1.02, 1), loc="upper left")
  return figure


def _precision(rows: Rows) -> Any:
  cases = list(dict.fromkeys(row["case"] for row in rows))
  figure, axes = plt.subplots(figsize=(8, 0.36 * len(cases) + 1.3))
  least = 1e-9
  for method in dict.fromkeys(row["method"] for row in rows):
    own = {
      row["case"]: row["relative_error"] for row in rows if row["method"] == method
    }
    errors = [1.0 if own[case] == "inf" else max(own[case], least) for case in cases]
    axes.plot(errors, cases, "o", color=_color(method), label=method)
  axes.axvline(1e-6, color="black", linewidth=1)
  axes.set_xscale("log")
  axes.invert_yaxis()
  axes.set_xlabel("relative error of the norm against float64 (inf and above at 1)")
  axes.legend(fontsize=8, frameon=False)
  _plain(axes)
  return figure


def _scale(rows: Rows) -> Any:
  figure, axes = plt.subplots(figsize=(9, 4.2))
  columns = {
    "norm_ms": ("global_norm", "-"),
    "clip_ms": ("clip_tree", "-"),
    "optax_ms": ("optax.clip_by_global_norm", "--"),
    "torch_clip_grad_norm_ms": ("torch clip_grad_norm_", "--"),
  }
  for dtype in dict.fromkeys(row["dtype"] for row in rows):
    for key, (name, style) in columns.items():
      own = [row for row in rows if row["dtype"] == dtype and key in row]
      axes.plot(
        [row["gradient_bytes"] for row in own],
        [row[key] / row["gradient_bytes"] * 1e9 for row in own],
        style,
        marker="o",
        label=f"{name}, {dtype}",
      )
  axes.set_xscale("log")
  axes.set_yscale("log")
  axes.set_xlabel("bytes of gradients")
  axes.set_ylabel("ms for a GB")
  axes.legend(fontsize=8, frameon=False, bbox_to_anchor=(1.02, 1), loc="upper left")
  _plain(axes)
  return figure


def _mesh(rows: Rows) -> Any:
  figure, axes = plt.subplots(figsize=(7, 4.2))
  _lines(axes, rows, "devices", "step_over_none", "AdamW step, over one without")
  counts = sorted({row["devices"] for row in rows})
  axes.set_xticks(counts, [str(count) for count in counts])
  axes.set_xticks([], minor=True)
  axes.set_yscale("linear")
  axes.set_ylim(bottom=0)
  axes.legend(fontsize=8, frameon=False)
  return figure


def _compiled(rows: Rows) -> Any:
  shown = [
    row
    for row in rows
    if (row["model"], row["optimizer"], row["dtype"], row["devices"])
    == ("transformer", "adamw", "float32", 1)
  ] or rows
  shown = [row for row in shown if "error" not in row]
  names = [row["method"] for row in shown]
  colors = [_color(name) for name in names]
  figure, panels = plt.subplots(1, 2, sharey=True, figsize=(11, 0.3 * len(names) + 1.3))
  for axes, key, label, form in (
    (panels[0], "kernels", "kernels of an AdamW step", "{}"),
    (panels[1], "bytes", "bytes, in units of the gradients", "{:.2f}"),
  ):
    values = [row[key] for row in shown]
    axes.barh(range(len(names)), values, color=colors)
    for y, value in enumerate(values):
      axes.text(value, y, " " + form.format(value), va="center", fontsize=8)
    axes.set_xlim(0, max(values) * 1.15)
    axes.set_xlabel(label)
    _plain(axes)
  panels[0].set_yticks(range(len(names)), names)
  panels[0].invert_yaxis()
  return figure


_CHARTS: dict[str, Callable[[Rows], Any]] = {
  "overhead": _overhead,
  "skip": _skip,
  "leaves": _leaves,
  "precision": _precision,
  "scale": _scale,
  "mesh": _mesh,
  "compiled": _compiled,
}
