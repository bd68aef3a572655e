"""Draws norms over steps: in a terminal by uniplot, in a PNG by matplotlib."""

import math
import sys

import numpy as np
import uniplot

from optax_clip._logs.log import Log

# Norms further from the median than these factors are drawn at the edge.
_BELOW, _ABOVE = 1e-3, 1e4
_HEIGHT, _LABEL = 14, 9


def in_terminal(log: Log, limit: float, width: int) -> str:
  """A plot of characters, in 14 lines: norms by step, and a limit unless it is NaN."""
  steps, norms = _drawn(log)
  low, high = np.log10([norms.min() / 1.05, norms.max() * 1.05])
  unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
  text = uniplot.plot_to_string(
    np.log10(norms),
    steps,
    y_min=low,
    y_max=high,
    y_gridlines=[math.log10(limit)] if np.isfinite(limit) else [],
    x_gridlines=[],
    # Its own labels are rounded until they just differ: 0, 1, 2 for 0.5, 1.0, 1.5.
    y_labels=False,
    width=width,
    line_length_hard_cap=width - _LABEL,
    height=_HEIGHT,
    character_set="block" if unicode else "ascii",
    color=False,
  )
  lines = [line.rstrip() for line in text.splitlines()]
  for i in range(0, _HEIGHT, 3):
    middle = high - (i + 0.5) / _HEIGHT * (high - low)
    lines[i + 1] += f" {10**middle:.3g}"
  return "\n".join(lines)


def in_png(log: Log, limit: float, path: str) -> None:
  """Writes a figure of the same, or raises an `OSError`."""
  # It takes longer than all else. Without pyplot there is no window, and no backend.
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 4.5), layout="constrained")
  axis = figure.subplots()
  steps, norms = _drawn(log)
  above = norms > limit
  axis.scatter(steps, norms, s=4, c=np.where(above, "#c0392b", "#1f6fb4"))
  if np.isfinite(limit):
    axis.axhline(limit, color="#222222", linewidth=1)
  axis.set(yscale="log", xlabel="step", ylabel="norm")
  axis.set_title(f"{log.column}, max_norm {limit:.3g}", loc="left", fontsize=11)
  axis.spines[["top", "right"]].set_visible(False)
  figure.savefig(path, dpi=130, format="png")


def _drawn(log: Log) -> tuple[np.ndarray, np.ndarray]:
  """Steps and norms that have a place, and none that flattens all others."""
  drawn = np.isfinite(log.norms) & (log.norms > 0)
  norms = log.norms[drawn]
  middle = float(np.median(norms))
  return log.steps[drawn], np.clip(norms, middle * _BELOW, middle * _ABOVE)
