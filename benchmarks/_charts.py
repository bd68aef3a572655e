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
_GREY, _BLUE = "#a0a0a0", "#1f6fb4"
# The look of all figures, of the studies too.
STYLE = {
  "font.size": 10,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.titlesize": 11,
  "axes.titlelocation": "left",
  "figure.facecolor": "white",
}
# What each figure shows; where and when it was measured stands beside it.
_TITLES = {
  "overhead": "What clipping adds to an AdamW step (1: no clipping)",
  "skip": "What a guard adds to a clipped AdamW step (1: the clip alone)",
  "leaves": "A step of many small leaves",
  "precision": "Our norm is right to 1e-6 in every dtype and range",
  "scale": "Time to clip a gigabyte of gradients",
  "spectral": "Clips of singular values: what exceeds the limit, and what moves below",
  "mesh": "A clipped step on simulated devices: two cores run them all",
  "compiled": "What the compiler makes of a clipped AdamW step",
}


def draw(rows: Rows, path: pathlib.Path, about: dict[str, Any]) -> list[pathlib.Path]:
  """Draws a figure for each suite among the rows; returns the files.

  Several suites get a file each, with the suite's name before the ending.
  """
  suites = [suite for suite in _CHARTS if any(row["suite"] == suite for row in rows)]
  where = f"{about['device']}, JAX {about['jax']}, {about['date']}"
  written = []
  for suite in suites:
    own = path.with_stem(f"{path.stem}-{suite}") if len(suites) > 1 else path
    with plt.rc_context(STYLE):
      figure = _CHARTS[suite]([row for row in rows if row["suite"] == suite])
      figure.suptitle(_TITLES[suite], x=0.01, ha="left", fontsize=12)
      figure.text(
        0.995, 0.985, where, ha="right", va="top", fontsize=8, color="#777777"
      )
      own.parent.mkdir(parents=True, exist_ok=True)
      figure.savefig(own, dpi=130)
      plt.close(figure)
    written.append(own)
  return written


def _bars(rows: Rows, value: str, label: str) -> Any:
  """Draws a bar for each row, and a line at 1, the row that divides all."""
  figure, axes = plt.subplots(figsize=(8, 0.34 * len(rows) + 1.5), layout="constrained")
  names = [row["method"] for row in rows]
  values = [row[value] for row in rows]
  axes.barh(names, values, color=[_color(name) for name in names])
  axes.axvline(1, color="black", linewidth=1)
  for y, width in enumerate(values):
    axes.text(max(width, 1) + 0.02, y, f"{width:.2f}", va="center", fontsize=9)
  axes.invert_yaxis()
  axes.set_xlim(0, max(values) * 1.12)
  axes.set_xlabel(label)
  return figure


def _color(method: str) -> str:
  return _GREY if method.startswith(_PEERS) else _BLUE


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


def _leaves(rows: Rows) -> Any:
  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
  _lines(left, rows, "leaves", "compile_s", "compile an sgd step (s)")
  _lines(right, rows, "leaves", "step_ms", "run it (ms)")
  right.legend(fontsize=8, frameon=False, bbox_to_anchor=(1.02, 1), loc="upper left")
  return figure


def _precision(rows: Rows) -> Any:
  cases = list(dict.fromkeys(row["case"] for row in rows))
  figure, axes = plt.subplots(
    figsize=(8, 0.36 * len(cases) + 1.5), layout="constrained"
  )
  least = 1e-9
  for method in dict.fromkeys(row["method"] for row in rows):
    own = {
      row["case"]: row["relative_error"] for row in rows if row["method"] == method
    }
    errors = [1.0 if own[case] == "inf" else max(own[case], least) for case in cases]
    is_peer = method.startswith(_PEERS)
    # A ring around the dot where both agree.
    style = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.8}
    axes.plot(
      errors,
      cases,
      "o",
      color=_color(method),
      label=method,
      **(style if is_peer else {"markersize": 6}),
    )
    for y, case in enumerate(cases):
      if own[case] == "inf":
        axes.text(0.45, y, "inf", va="center", ha="right", color=_color(method))
  axes.axvline(1e-6, color="#c0392b", linewidth=1, linestyle="--")
  axes.set_xscale("log")
  axes.invert_yaxis()
  axes.set_xlabel("relative error of the norm against float64")
  axes.legend(fontsize=9, frameon=False, loc="upper right")
  return figure


def _scale(rows: Rows) -> Any:
  columns = {
    "optax_ms": ("optax.clip_by_global_norm", _GREY, "--"),
    "torch_clip_grad_norm_ms": ("torch clip_grad_norm_", "#e67e22", "--"),
    "clip_ms": ("clip_tree", _BLUE, "-"),
    "norm_ms": ("global_norm, the norm alone", "#6ab0de", "-"),
  }
  dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
  figure, panels = plt.subplots(
    1, len(dtypes), figsize=(9, 4.2), layout="constrained", sharey=True, squeeze=False
  )
  ticks = [10, 20, 50, 100, 200, 500]
  for axes, dtype in zip(panels[0], dtypes, strict=True):
    for key, (name, color, style) in columns.items():
      own = [row for row in rows if row["dtype"] == dtype and key in row]
      axes.plot(
        [row["gradient_bytes"] / 1e6 for row in own],
        [row[key] / row["gradient_bytes"] * 1e9 for row in own],
        style,
        color=color,
        marker="o",
        label=name,
      )
    axes.set(xscale="log", yscale="log", xlabel="megabytes of gradients", title=dtype)
    axes.set_xticks([10, 100, 1000], ["10", "100", "1,000"])
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
  panels[0, 0].set_ylabel("milliseconds for a gigabyte")
  figure.legend(
    *panels[0, 0].get_legend_handles_labels(),
    loc="outside lower left",
    ncols=4,
    fontsize=9,
    frameon=False,
  )
  return figure


def _mesh(rows: Rows) -> Any:
  figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
  colors = {
    "none": "#444444",
    "optax.clip_by_global_norm": _GREY,
    "clip_by_global_norm": _BLUE,
    "clip_by_layer_norm": "#17a2b8",
    "adaptive_grad_clip": "#2e8b57",
    "adagc": "#d6569b",
  }
  for method in dict.fromkeys(row["method"] for row in rows):
    own = [row for row in rows if row["method"] == method]
    axes.plot(
      [row["devices"] for row in own],
      [row["step_over_none"] for row in own],
      "--" if method == "none" or method.startswith(_PEERS) else "-",
      color=colors.get(method),
      marker="o",
      label=method,
    )
  counts = sorted({row["devices"] for row in rows})
  axes.set_xscale("log")
  axes.set_xticks(counts, [str(count) for count in counts])
  axes.set_xticks([], minor=True)
  axes.set_ylim(bottom=0)
  axes.set(xlabel="simulated devices", ylabel="AdamW step, over one without a clip")
  axes.legend(fontsize=9, frameon=False)
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
  figure, panels = plt.subplots(
    1,
    2,
    sharey=True,
    figsize=(11, 0.3 * len(names) + 1.5),
    layout="constrained",
  )
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
  panels[0].set_yticks(range(len(names)), names)
  panels[0].invert_yaxis()
  return figure


def _spectral(rows: Rows) -> Any:
  rows = [row for row in rows if "excess" in row and row["dtype"] == "float32"]
  rows = [row for row in rows if "strict" not in row["method"]]
  names = [row["method"] for row in rows]
  colors = [_BLUE if name.startswith("spectral_clip") else _GREY for name in names]
  figure, panels = plt.subplots(
    1, 2, figsize=(11, 0.36 * len(names) + 1.4), sharey=True, layout="constrained"
  )
  for axes, key, label in (
    (panels[0], "excess", "largest excess over the limit, over the limit"),
    (panels[1], "tiny", "error of what is below a thousandth of it, over the limit"),
  ):
    values = [min(max(row[key], 1e-9), 1e5) for row in rows]
    axes.barh(range(len(names)), values, color=colors, left=0)
    for y, (value, row) in enumerate(zip(values, rows, strict=True)):
      text = f" {value:.1e}" if row[key] > 0 else " none"
      axes.text(value, y, text, va="center", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(1e-9, 1e6)
    axes.set_xlabel(label)
  panels[0].set_yticks(range(len(names)), names)
  panels[0].invert_yaxis()
  return figure


_CHARTS: dict[str, Callable[[Rows], Any]] = {
  "overhead": _overhead,
  "skip": _skip,
  "leaves": _leaves,
  "precision": _precision,
  "scale": _scale,
  "spectral": _spectral,
  "mesh": _mesh,
  "compiled": _compiled,
}
