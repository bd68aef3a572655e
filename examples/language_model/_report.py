"""Writes what a training run leaves behind: a CSV, a figure and a table."""

from collections.abc import Sequence
import csv
import math
from pathlib import Path
from typing import Any
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter
from matplotlib.ticker import LogLocator
import numpy as np
from rich import box
from rich.table import Table

# What each step records, in this order: the loss, then fields of `optax_clip.metrics`.
FIELDS = (
  "loss",
  "norm",
  "limit",
  "coefficient",
  "clipped_fraction",
  "steps_clipped",
  "steps_nonfinite",
)

# The train loss of the table is the mean over this many last steps.
LAST = 20

# A bit above the loss of a uniform guess, log 256 = 5.5.
_HIGHEST_LOSS = 6.5

_COLORS = (
  "#444444",
  "#1f6fb4",
  "#d35400",
  "#2e8b57",
  "#8e44ad",
  "#b8860b",
  "#c0392b",
  "#16a085",
  "#d16ba5",
  "#7f8c8d",
  "#6b4226",
  "#4b0082",
  "#9acd32",
  "#00bcd4",
  "#ff8a80",
  "#556b2f",
)


class Run(NamedTuple):
  """Holds one finished run.

  Attributes:
    name: the clipping method's name.
    measured: what its norm measures.
    lr: the learning rate.
    steps: for each step a dictionary with `FIELDS`.
    held_out: nats per byte on text that it did not train on.
    speed: steps per second, without compilation; NaN if unknown.
  """

  name: str
  measured: str
  lr: float
  steps: list[dict[str, float]]
  held_out: float
  speed: float

  def column(self, field: str) -> np.ndarray:
    """Returns one field at every step."""
    return np.array([step[field] for step in self.steps], float)

  def nonfinite(self) -> np.ndarray:
    """Returns for each step whether the loss or the norm was NaN or inf."""
    return ~np.isfinite(self.column("loss") + self.column("norm"))

  def clipped(self) -> float:
    """Returns the percentage of steps in which something was clipped."""
    return 100 * self.steps[-1]["steps_clipped"] / len(self.steps)

  def train_loss(self) -> float:
    """Returns the mean loss over the last steps."""
    return float(self.column("loss")[-LAST:].mean())


def write_csv(runs: Sequence[Run], path: Path) -> None:
  """Writes one row for each step of each run."""
  with path.open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(("run", "step", *FIELDS))
    for run in runs:
      for number, step in enumerate(run.steps, 1):
        writer.writerow((run.name, number, *(step[f] for f in FIELDS)))


def table(runs: Sequence[Run]) -> Table:
  """Makes the closing table, at most 80 columns wide."""
  measured = "; ".join(f"{run.name}: {run.measured}" for run in runs)
  result = Table(
    caption=f"Losses in nats/byte; train: mean of the last {LAST} steps."
    "\nClipped steps: those in which something was clipped."
    f"\nNorms: {measured}.",
    box=box.SIMPLE_HEAD,
    padding=(0, 1, 0, 0),
    pad_edge=False,
  )
  result.add_column("method", no_wrap=True, vertical="bottom")
  for name in (
    "lr",
    "train\nloss",
    "held-out\nloss",
    "clipped\nsteps",
    "non-\nfinite\nsteps",
    "max\nnorm",
    "steps\nper s",
  ):
    result.add_column(name, justify="right", no_wrap=True, vertical="bottom")
  for run in runs:
    norms = run.column("norm")[np.isfinite(run.column("norm"))]
    result.add_row(
      run.name,
      f"{run.lr:g}",
      _loss(run.train_loss()),
      _loss(run.held_out),
      f"{run.clipped():.0f}%",
      str(run.nonfinite().sum()),
      number(norms.max() if norms.size else math.nan),
      number(run.speed),
    )
  return result


def number(value: float) -> str:
  """Writes three digits, in few characters."""
  if not math.isfinite(value):
    return "-" if math.isnan(value) else str(value)
  return f"{value:.0f}" if 100 <= value < 1e5 else f"{value:#.3g}"


def _loss(value: float) -> str:
  if not math.isfinite(value):
    return "[red]diverged[/red]"
  return _digits(value)


def _digits(loss: float) -> str:
  return f"{loss:.3f}" if loss < 1000 else f"{loss:.1e}"


def draw(runs: Sequence[Run], path: Path, title: str) -> None:
  """Draws the losses together, and each run's norm with its limit."""
  matplotlib.use("Agg")
  columns = min(len(runs), 3)
  rows = math.ceil(len(runs) / columns)
  style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
  with plt.rc_context(style):
    figure = plt.figure(figsize=(9, 3.6 + 2.5 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[1.5] + [1] * rows)
    colors = [_COLORS[i % len(_COLORS)] for i in range(len(runs))]
    _draw_losses(figure.add_subplot(grid[0, :]), runs, colors)
    like: dict[Any, Any] = {}  # Norms of one kind share an axis, if finite.
    for i, (run, color) in enumerate(zip(runs, colors, strict=True)):
      row, column = divmod(i, columns)
      kind = (run.measured, run.nonfinite().any())
      axis = figure.add_subplot(grid[1 + row, column], sharey=like.get(kind))
      like.setdefault(kind, axis)
      _draw_norms(axis, run, color)
      if column == 0:
        axis.set_ylabel("norm")
      axis.set_xlabel("step")
    for axis in figure.axes[1:]:
      label_decades(axis)
    figure.get_layout_engine().set(h_pad=0.08)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


def _draw_losses(axis: Any, runs: Sequence[Run], colors: Sequence[str]) -> None:
  for run, color in zip(runs, colors, strict=True):
    loss = run.column("loss")
    steps = np.arange(1, len(loss) + 1)
    axis.plot(steps, loss, color=color, linewidth=0.6, alpha=0.3)
    axis.plot(steps, smooth(loss), color=color, linewidth=1.8, label=_label(run))
    if run.nonfinite().any():
      first = 1 + run.nonfinite().argmax()
      axis.axvline(first, color=color, linestyle=":")
  # A spike would flatten all that is worth a look.
  losses = np.concatenate([run.column("loss") for run in runs])
  losses = losses[np.isfinite(losses)]
  if losses.size:
    low, high = np.percentile(losses, (0, 99))
    axis.set_ylim(low - 0.1, max(min(high, _HIGHEST_LOSS), low) + 0.1)
  axis.set(ylabel="train loss (nats/byte)", xlim=(0, len(runs[0].steps)))
  axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
  axis.legend(frameon=False, title="held-out loss", alignment="left")


def _label(run: Run) -> str:
  if math.isfinite(run.held_out):
    return f"{run.name}: {_digits(run.held_out)}"
  return f"{run.name}: diverged at step {1 + run.nonfinite().argmax()}"


def smooth(values: np.ndarray, decay: float = 0.9) -> np.ndarray:
  """Computes an exponential mean without bias at the start."""
  result, mean, weight = [], 0.0, 0.0
  for value in values:
    mean = decay * mean + (1 - decay) * value
    weight = decay * weight + (1 - decay)
    result.append(mean / weight)
  return np.array(result)


def _draw_norms(axis: Any, run: Run, color: str) -> None:
  steps = np.arange(1, len(run.steps) + 1)
  norm, limit = run.column("norm"), run.column("limit")
  axis.plot(steps, norm, color=color, linewidth=0.9)
  if np.isfinite(limit).any():
    axis.plot(steps, limit, color="black", linewidth=1.2, linestyle="--")
    axis.annotate(
      "limit",
      (steps[-1], limit[-1]),
      (-2, 2),
      textcoords="offset points",
      ha="right",
      va="bottom",
      fontsize=9,
      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0},
    )
  if (norm[np.isfinite(norm)] > 0).any():
    axis.set_yscale("log")
  axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
  axis.set_xlim(0, len(run.steps))
  share = f", {run.clipped():.0f}% clipped" if np.isfinite(limit).any() else ""
  axis.set_title(f"{run.name}: {run.measured}{share}", fontsize=9)


def label_decades(axis: Any) -> None:
  """Labels an axis in plain numbers, once it has its range, which others may share."""
  low, high = axis.get_ylim()
  if axis.get_yscale() != "log":
    return
  if high < 1e5 * low:
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
  axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
  axis.yaxis.set_minor_formatter("")
