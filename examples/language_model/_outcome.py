"""Writes what a training run leaves behind: a CSV, a figure, a table and some words."""

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

# What each step records, in this order: the loss, then fields of `optax_clip.metrics`,
# of the clip and, last, of the guard.
FIELDS = (
  "loss",
  "norm",
  "limit",
  "coefficient",
  "clipped_fraction",
  "steps_clipped",
  "steps_skipped",
)

# The train loss of the table is the mean over this many last steps that were taken.
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
    steps: for each step a dictionary with `FIELDS`.
    held_out: nats per byte on text that it did not train on.
  """

  name: str
  measured: str
  steps: list[dict[str, float]]
  held_out: float

  def column(self, field: str) -> np.ndarray:
    """Returns one field at every step."""
    return np.array([step[field] for step in self.steps], float)

  def learned(self) -> bool:
    """Returns whether the weights that it ended with are of any use."""
    return math.isfinite(self.held_out)

  def skipped(self) -> np.ndarray:
    """Returns for each step whether the guard skipped it."""
    return np.diff(self.column("steps_skipped"), prepend=0) > 0

  def taken(self, field: str) -> np.ndarray:
    """Returns one field at the steps that the guard let through."""
    return self.column(field)[~self.skipped()]

  def clipped(self) -> float:
    """Returns the percentage of steps in which something was clipped."""
    return 100 * self.steps[-1]["steps_clipped"] / len(self.steps)

  def clipped_to(self) -> float:
    """Returns the least coefficient: what was left of the most clipped update."""
    return float(self.taken("coefficient").min(initial=1.0))

  def train_loss(self) -> float:
    """Returns the mean loss over the last steps that were taken."""
    losses = self.taken("loss")[-LAST:]
    return float(losses.mean()) if losses.size else math.nan


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
  result = Table(
    box=box.SIMPLE_HEAD,
    padding=(0, 1, 0, 0),
    pad_edge=False,
    show_edge=False,
  )
  result.add_column("method", no_wrap=True, vertical="bottom")
  for name in (
    "median\nnorm",
    "last\nlimit",
    "clipped\nsteps",
    "least\nkept",
    "skipped\nsteps",
    "train\nloss",
    "held-out\nloss",
  ):
    result.add_column(name, justify="right", no_wrap=True, vertical="bottom")
  for run in runs:
    result.add_row(
      run.name,
      number(median(run.taken("norm"))),
      number(run.steps[-1]["limit"]),
      f"{run.clipped():.0f}%",
      f"{run.clipped_to():.2g}",
      str(run.skipped().sum()),
      number(run.train_loss()),
      _loss(run.held_out),
    )
  return result


def notes(runs: Sequence[Run], lr: float) -> str:
  """Says what the columns of the table are."""
  kinds = {run.measured for run in runs}
  measured = "; ".join(f"{run.name}: {run.measured}" for run in runs)
  if len(kinds) == 1:
    measured = f"{kinds.pop()} of the gradients"
  return (
    f"All at learning rate {lr:g}. Norms: {measured}. Clipped: steps in which something"
    " was clipped; kept: what was left of the most clipped update. Skipped: steps that"
    f" were not finite. Losses in nats/byte; train: mean of the last {LAST} steps that"
    " were taken."
  )


def median(values: np.ndarray) -> float:
  """Computes the median of what is finite; NaN if nothing is."""
  finite = values[np.isfinite(values)]
  return float(np.median(finite)) if finite.size else math.nan


def best(runs: Sequence[Run]) -> Run | None:
  """Returns the run with the lowest held-out loss; `None` if all diverged."""
  learned = [run for run in runs if run.learned()]
  return min(learned, key=lambda run: run.held_out, default=None)


def seen(runs: Sequence[Run], broken: int) -> str:
  """Says in words what the runs showed, and what became of the broken batches."""
  first = best(runs)
  if first is None:
    said = ["Every run diverged: no loss on held-out text is finite. Try a lower --lr."]
  else:
    others = "".join(
      f", '{run.name}' {'at ' if run.learned() else ''}{_loss(run.held_out)}"
      for run in runs
      if run is not first
    )
    said = [
      f"On text that no run trained on, '{first.name}' ended at"
      f" {_loss(first.held_out)} nats/byte{others}."
    ]
    if first.clipped():
      said.append(
        f"It clipped {first.clipped():.0f}% of its {len(first.steps)} steps, one of"
        f" them to {first.clipped_to():.2g} of its size."
      )
  if broken:
    said.append(
      f"{broken} batches were broken on purpose, with a loss of NaN: the guard skipped"
      " those steps, and no NaN reached the weights."
    )
  return "\n".join(said)


def number(value: float) -> str:
  """Writes three digits, or as many as fit into seven characters."""
  if not math.isfinite(value):
    return "-" if math.isnan(value) else str(value)
  if 100 <= abs(value) < 1e5:
    return f"{value:.0f}"
  return f"{value:#.{3 if 0.001 <= abs(value) < 100 else 2}g}"


def _loss(value: float) -> str:
  if not math.isfinite(value):
    return "diverged"
  return f"{value:.3f}" if value < 1000 else f"{value:.1e}"


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
    like: dict[Any, Any] = {}  # Norms of one kind share an axis, if all went well.
    for i, (run, color) in enumerate(zip(runs, colors, strict=True)):
      row, column = divmod(i, columns)
      kind = (run.measured, run.learned())
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
    return f"{run.name}: {_loss(run.held_out)}"
  return f"{run.name}: diverged"


def smooth(values: np.ndarray, decay: float = 0.9) -> np.ndarray:
  """Computes an exponential mean without bias at the start, over what is finite."""
  result, mean, weight = [], 0.0, 0.0
  for value in values:
    if math.isfinite(value):
      mean = decay * mean + (1 - decay) * value
      weight = decay * weight + (1 - decay)
    result.append(mean / weight if weight else math.nan)
  return np.array(result)


def _draw_norms(axis: Any, run: Run, color: str) -> None:
  steps = np.arange(1, len(run.steps) + 1)
  norm, limit = run.column("norm"), run.column("limit")
  axis.plot(steps, norm, color=color, linewidth=0.9)
  if run.skipped().any():
    axis.plot(
      steps[run.skipped()],
      np.full(run.skipped().sum(), 0.03),
      "x",
      color="#c0392b",
      markersize=5,
      transform=axis.get_xaxis_transform(),
      label="skipped",
    )
    axis.legend(frameon=False, loc="upper right", fontsize=9)
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
