"""Draws norms over steps: in a terminal, and with matplotlib into a PNG."""

import math
from typing import Any

import numpy as np

from optax_clip._report.suggest import Suggestion

# What stands for one norm in a place of the plot, for two or three, and for more.
_INK = ".:#"
_MARGIN = 10  # Columns left of the axis.
# Norms further from the median than these factors are drawn at the edge.
_BELOW, _ABOVE = 1e3, 1e4
_MISSING = "matplotlib is not installed: pip install matplotlib"


def in_terminal(
  norms: np.ndarray, limit: float, *, width: int = 80, height: int = 14
) -> str:
  """A plot of characters: norms by step on a logarithmic scale, and a limit.

  Args:
    norms: f[steps]; of those that are not finite the place is marked below.
    limit: a positive number, drawn as a line.
    width: in characters, of the whole plot.
    height: in lines, without the axis.

  Returns:
    Lines of ASCII, none longer than `width`.
  """
  width = max(width, _MARGIN + 20)
  columns = width - _MARGIN - 1
  low, high = _range(norms, limit)
  size = math.log(high / low)

  def line_of(value: Any) -> Any:
    place = np.log(np.asarray(value, np.float64) / low) / size * (height - 1)
    return height - 1 - np.clip(np.round(place), 0, height - 1).astype(int)

  positive = np.isfinite(norms) & (norms > 0)
  steps = np.flatnonzero(positive)
  counts = np.zeros((height, columns), int)
  column_of = np.arange(len(norms)) * columns // max(len(norms), 1)
  np.add.at(counts, (line_of(norms[positive]), column_of[steps]), 1)
  grid = np.array(list(" " + _INK))[np.digitize(counts, (1, 2, 4))]
  for edge, beyond, mark in ((0, norms > high, "^"), (-1, norms < low, "v")):
    grid[edge, column_of[positive & beyond]] = mark

  ticks = {int(line_of(x)): x for x in _ticks(low, high)}
  at = int(line_of(limit))
  grid[at, grid[at] == " "] = "-"
  lines = []
  for i, row in enumerate(grid):
    # The limit's own line, and its neighbours, are for its number alone.
    tick = f"{ticks[i]:.3g}" if i in ticks and abs(i - at) > 1 else ""
    label, axis = (f"{limit:.3g}", "+") if i == at else (tick, "+" if tick else "|")
    lines.append(f"{label:>{_MARGIN - 1}} {axis}{''.join(row)}".rstrip())
  lines.append(" " * _MARGIN + "+" + "-" * columns)
  for mark, flags in (("x", ~np.isfinite(norms)), ("0", norms == 0)):
    if flags.any():
      row = np.full(columns, " ")
      row[column_of[flags]] = mark
      words = "not finite" if mark == "x" else "zero"
      lines.append(f"{words:>{_MARGIN}} {''.join(row)}".rstrip())
  last = str(len(norms) - 1)
  lines.append(" " * _MARGIN + f" 0{'step':^{columns - 1 - len(last)}}{last}")
  return "\n".join(lines)


def _range(norms: np.ndarray, limit: float) -> tuple[float, float]:
  """The lowest and the highest norm that have a place of their own."""
  known = norms[np.isfinite(norms) & (norms > 0)]
  middle = float(np.median(known))
  low = min(max(float(known.min()), middle / _BELOW), limit)
  high = max(min(float(known.max()), middle * _ABOVE), limit)
  # Equal norms have a scale, too.
  return (low, high) if high > 1.01 * low else (low / 1.1, high * 1.1)


def _ticks(low: float, high: float) -> list[float]:
  """Round numbers in a range: powers of ten; with few of these, 2 and 5 times them."""
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  for factors in ((1,), (1, 2, 5)):
    ticks = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
    if len(ticks) >= 3:
      return ticks
  return ticks or [low, high]


def require_matplotlib() -> None:
  """Raises unless matplotlib is there.

  Raises:
    ModuleNotFoundError: with the line that installs it.
  """
  try:
    import matplotlib.figure
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(_MISSING) from error
  del matplotlib


def in_png(norms: np.ndarray, found: Suggestion, path: str, title: str) -> None:
  """Writes a figure: the norms, the suggestion, and what it left out.

  Args:
    norms: f[steps], as `suggest_max_norm` was given them.
    found: what it returned.
    path: of the file.
    title: stands above it.
  """
  require_matplotlib()
  # Without pyplot: no window, and no backend that a user may have chosen.
  from matplotlib.figure import Figure

  steps = np.arange(len(norms))
  low, high = _range(norms, found.max_norm)
  drawn = np.isfinite(norms) & (norms > 0)
  above = drawn & (norms > found.max_norm)
  figure = Figure(figsize=(9, 4.5), layout="constrained")
  axis = figure.subplots()
  dot = 9 if len(norms) < 2000 else 3
  for flags, color, words in (
    (drawn & ~above, "#1f6fb4", "kept"),
    (above, "#c0392b", f"above: {100 * found.clipped:.1f}%"),
  ):
    shown = np.clip(norms[flags], low, high)
    axis.scatter(steps[flags], shown, s=dot, color=color, linewidths=0, label=words)
  axis.axhline(
    found.max_norm, color="#222222", linewidth=1, label=f"max_norm {found.max_norm:.3g}"
  )
  if found.start:
    words = f"left out: the first {found.start} steps"
    axis.axvspan(0, found.start, color="#dddddd", zorder=0, linewidth=0, label=words)
  bad = steps[~np.isfinite(norms)]
  if len(bad):
    words = f"not finite: {len(bad)}"
    axis.plot(bad, np.full(len(bad), low), "kx", markersize=5, label=words)
  axis.set(yscale="log", xlabel="step", ylabel="norm", xlim=(0, max(len(norms) - 1, 1)))
  axis.set_title(title, loc="left", fontsize=11)
  axis.spines[["top", "right"]].set_visible(False)
  axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
  axis.set_axisbelow(True)
  figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
  figure.savefig(path, dpi=130, format="png")
