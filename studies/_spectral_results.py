"""What the study of spectral clipping found: tables, verdicts and a figure."""

import itertools
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from studies import _summary
from studies import spectral
from studies._summary import Mean
from studies._summary import Row
from studies._summary import select
from studies._summary import values

MARKS = {"clean": "o", "heavy": "s", "spikes": "^"}
# The pairs of spectral cells that the fourth claim compares.
FORMS = {
  "hard over soft": (
    ("spectral", "spectral, updates"),
    ("spectral soft", "spectral soft, updates"),
  ),
  "of gradients over of updates": (
    ("spectral", "spectral soft"),
    ("spectral, updates", "spectral soft, updates"),
  ),
}


def scores(row: Row) -> list[float]:
  """Returns each seed's score; that of knowing nothing for those that failed."""
  nothing = spectral.NOTHING[row["task"]]
  return [nothing if x is None else min(x, nothing) for x in row["score"]]


def failed(row: Row) -> int:
  """Counts the seeds that know no more at the end than nothing."""
  return sum(x >= spectral.NOTHING[row["task"]] for x in scores(row))


def best(rows: list[Row], names: tuple[str, ...]) -> Row:
  """Returns the row of the method that was best by the tuning seeds."""
  return min((r for r in rows if r["method"] in names), key=lambda r: r["tuning"])


def advantage(rows: list[Row], names: tuple[str, ...], over: tuple[str, ...]) -> Any:
  """Returns by how much each seed's score is lower with one group than with another."""
  ours, theirs = (scores(best(rows, x)) for x in (names, over))
  return [b - a for a, b in zip(ours, theirs, strict=True)]


def counted(difference: Mean) -> int:
  """Returns 1 or -1 for a difference of more than two standard errors, and else 0."""
  return int(np.sign(difference.value)) * (abs(difference.value) > 2 * difference.error)


def pairs(rows: list[Row]) -> list[tuple[str, str]]:
  """Lists tasks with optimizers."""
  return list(
    itertools.product(values(rows, "task"), dict.fromkeys(r["optimizer"] for r in rows))
  )


def tables(rows: list[Row]) -> list[tuple[list[str], list[list[str]]]]:
  """Makes heads and bodies: scores by task and optimizer, then what is compared."""
  runs = [row for row in rows if "score" in row]
  times = [row for row in rows if "ms" in row]
  kinds = values(runs, "batches")
  found = []
  for task, optimizer in pairs(runs):
    body = []
    for method in values(runs, "method"):
      at = {"task": task, "optimizer": optimizer, "method": method}
      (cost,) = select(times, **at)
      cells = [_cell(select(runs, **at, batches=kind)[0]) for kind in kinds]
      body.append([method, *cells, f"{cost['ms']:.2f}"])
    found.append(([f"{task}, {optimizer}", *kinds, "ms of a step"], body))
  return [*found, _differences(runs, kinds), _verdicts(runs, kinds)]


def _cell(row: Row) -> str:
  value, error = _summary.mean(scores(row))
  text = f"{value:.3f} ± {error:.3f} at {row['rate']:g}"
  text += "" if row["limit"] is None else f", {row['limit']:g}"
  dead, count = failed(row), len(row["score"])
  return text + (f" ({dead} of {count} fail)" if dead else "")


def _differences(runs: list[Row], kinds: list[str]) -> Any:
  body = []
  for task, optimizer in pairs(runs):
    cells = [f"{task}, {optimizer}"]
    gains = {}
    for kind in kinds:
      mine = select(runs, task=task, optimizer=optimizer, batches=kind)
      gains[kind] = advantage(mine, spectral.SPECTRAL, spectral.OTHERS)
      names = (best(mine, x)["method"] for x in (spectral.SPECTRAL, spectral.OTHERS))
      cells += [" over ".join(names), _text(_summary.mean(gains[kind]))]
    body.append([*cells, _text(_more(gains))])
  heads = [x for kind in kinds for x in (f"{kind}: best of both", "gain")]
  return ["spectral over others", *heads, "spikes minus clean"], body


def _more(gains: dict[str, list[float]]) -> Mean:
  """Returns by how much more is gained with spikes than on clean batches."""
  both = zip(gains["spikes"], gains["clean"], strict=True)
  return _summary.mean(spikes - clean for spikes, clean in both)


def _verdicts(runs: list[Row], kinds: list[str]) -> Any:
  groups = {
    "spectral over others": (spectral.SPECTRAL, spectral.OTHERS),
    "others over none": (spectral.OTHERS, ("none",)),
    **FORMS,
  }
  body = []
  for name, (ours, theirs) in groups.items():
    cells = [name]
    for kind in kinds:
      signs = [
        counted(
          _summary.mean(
            advantage(select(runs, task=t, optimizer=o, batches=kind), ours, theirs)
          )
        )
        for t, o in pairs(runs)
      ]
      cells.append(f"{signs.count(1)} better, {signs.count(-1)} worse")
    body.append(cells)
  return [f"of {len(pairs(runs))} pairs", *kinds], body


def _text(difference: Mean) -> str:
  return f"{difference.value:+.3f} ± {difference.error:.3f}"


def figure(rows: list[Row]) -> Any:
  """Shows the score of each cell on each kind of batches, in a panel for each pair."""
  runs = [row for row in rows if "score" in row]
  tasks = values(runs, "task")
  optimizers = values(runs, "optimizer")
  methods = values(runs, "method")
  drawn, axes = plt.subplots(
    len(optimizers),
    len(tasks),
    figsize=(11.5, 3.4 * len(optimizers)),
    layout="constrained",
    sharey=True,
    squeeze=False,
  )
  for line, optimizer in zip(axes, optimizers, strict=True):
    for axis, task in zip(line, tasks, strict=True):
      for y, method in enumerate(methods):
        cell = spectral.CELLS[method]
        for row in select(runs, task=task, optimizer=optimizer, method=method):
          value, error = _summary.mean(scores(row))
          axis.errorbar(
            value,
            y + 0.22 * (list(MARKS).index(row["batches"]) - 1),
            xerr=error,
            color=cell.color,
            marker=MARKS[row["batches"]],
            markerfacecolor=cell.color if cell.fill else "white",
            markersize=5,
          )
      axis.set(title=f"{task}, {optimizer}", xscale="log")
      axis.set_yticks(range(len(methods)), methods)
      axis.set_ylim(len(methods) - 0.5, -0.5)
      axis.grid(axis="y", color="#eeeeee")
      axis.xaxis.set_major_formatter("{x:.3g}")
      axis.xaxis.set_minor_formatter("{x:.3g}")
      axis.tick_params(axis="x", which="both", labelsize=6)
      axis.set_xlabel("held-out cross-entropy, standard error")
  marks = [
    plt.Line2D([], [], marker=mark, color="#444444", linestyle="", label=kind)
    for kind, mark in MARKS.items()
  ]
  drawn.legend(handles=marks, loc="outside upper right", ncols=3, frameon=False)
  return drawn
