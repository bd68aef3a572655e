"""Draws the figures in docs/evidence.md, each from its study's rows."""

from collections.abc import Callable
import pathlib
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from benchmarks._charts import STYLE
from studies import _regret
from studies import _spectral_results
from studies import _summary
from studies import untuned
from studies import update_clipping
from studies._compared import METHODS
from studies._summary import Row
from studies._summary import select
from studies._summary import values

WORST = 3.0  # Larger losses stand as text: drawn, they would leave no room for others.
TAUS = {None: "#444444", 100.0: "#1f6fb4", 30.0: "#e67e22"}
LIBRARIES = {"none": "#444444", "optax": "#c0392b", "optax_clip": "#1f6fb4"}


def draw(study: str, rows: list[Row], path: pathlib.Path) -> None:
  """Draws a study's figure into a PNG."""
  matplotlib.use("Agg")
  with plt.rc_context(STYLE):
    figure = globals()[f"_{study}"](rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _temporal_order(rows: list[Row]) -> Any:
  """Shows solved seeds for each method and rate; the best rate with its interval."""
  lengths = values(rows, "length")
  counts = [len(values(select(rows, length=n), "method")) for n in lengths]
  figure, axes = plt.subplots(
    len(lengths),
    2,
    figsize=(9.5, 0.27 * sum(counts) + 0.9 * len(lengths)),
    layout="constrained",
    height_ratios=[n + 1 for n in counts],
  )
  for row_of_axes, length in zip(np.atleast_2d(axes), lengths, strict=True):
    mine = select(rows, length=length)
    methods = values(mine, "method")
    seeds = len(mine[0]["solved_at"])
    solved = [[_summary.solved(r) for r in select(mine, method=m)] for m in methods]
    left, right = row_of_axes
    _heat(left, methods, values(mine, "rate"), solved, "{:.0f}", (0, seeds))
    left.set_title(f"length {length}: seeds of {seeds} that solved it")
    left.set_xlabel("learning rate")
    for y, method in enumerate(methods):
      best = _summary.most_solved(select(mine, method=method))
      share = _summary.solved(best) / seeds
      low, high = _summary.wilson(_summary.solved(best), seeds)
      _dot(right, y, 100 * share, 100 * low, 100 * high, METHODS[method].color)
    _rows(right, methods)
    right.set(xlim=(-3, 103), xlabel="solved at the best rate (%), 95% interval")
  return figure


def _batch_range(rows: list[Row]) -> Any:
  """Shows accuracy over learning rates, by kind of threshold."""
  panels = {
    "one norm, constant": ("global 0.1", "global 1", "global 10", "tanh 1"),
    "by layer or unit, constant": ("layer 0.1", "layer 1", "agc 0.01", "agc 0.1"),
    "learned": ("autoclip", "zclip", "zclip, no cap", "adagc"),
  }
  figure, axes = plt.subplots(
    1, len(panels), figsize=(11, 4.2), sharey=True, layout="constrained"
  )
  for axis, (title, methods) in zip(axes, panels.items(), strict=True):
    for name in ("none", *methods):
      mine = select(rows, method=name)
      means = [_summary.mean(row["accuracy"]) for row in mine]
      axis.errorbar(
        values(mine, "rate"),
        [m.value for m in means],
        [m.error for m in means],
        color=METHODS[name].color,
        linestyle=METHODS[name].line,
        marker="o",
        markersize=3.5,
        label=name,
      )
    axis.axhline(95, color="#bbbbbb", linewidth=0.8, zorder=0)
    axis.set(xscale="log", xlabel="learning rate", title=title, ylim=(0, 102))
    axis.legend(loc="lower left", fontsize=9, frameon=False)
  axes[0].set_ylabel("test accuracy (%), mean and standard error")
  return figure


def _shifting_scale(rows: list[Row]) -> Any:
  """Shows accuracy by method and scale, at scale 1's best rate and at each one's."""
  methods, scales = values(rows, "method"), values(rows, "scale")

  def kept(method: str, scale: str) -> Row:
    rate = _summary.most_accurate(select(rows, method=method, scale="1"))["rate"]
    return select(rows, method=method, scale=scale, rate=rate)[0]

  def tuned(method: str, scale: str) -> Row:
    return _summary.most_accurate(select(rows, method=method, scale=scale))

  figure, axes = plt.subplots(
    1, 2, figsize=(10.5, 5.6), sharey=True, layout="constrained"
  )
  choices: dict[str, Callable[[str, str], Row]] = {
    "learning rate tuned at scale 1 and kept": kept,
    "learning rate tuned at each scale": tuned,
  }
  for axis, (title, choose) in zip(axes, choices.items(), strict=True):
    means = [
      [_summary.mean(choose(m, s)["accuracy"]).value for s in scales] for m in methods
    ]
    _heat(axis, methods, scales, means, "{:.0f}", (10, 100))
    axis.set(title=title, xlabel="gradients multiplied by")
  figure.suptitle("Test accuracy (%), mean of 5 seeds", x=0.01, ha="left")
  return figure


def _language(rows: list[Row]) -> Any:
  """Shows held-out losses at each method's best rate, on clean and faulty batches."""
  optimizers = values(rows, "optimizer")
  figure, axes = plt.subplots(
    1, len(optimizers), figsize=(10.5, 4.8), layout="constrained", squeeze=False
  )
  for axis, optimizer in zip(axes[0], optimizers, strict=True):
    mine = select(rows, optimizer=optimizer)
    methods = values(mine, "method")
    for y, method in enumerate(methods):
      for batches, shift in (("clean", -0.17), ("faulty", 0.17)):
        best = _summary.least_loss(select(mine, method=method, batches=batches))
        value, error = _summary.mean(_summary.losses(best))
        dead, count = _summary.diverged(best), len(best["loss"])
        if value > WORST:
          note = f"{batches}: {value:.2f}"
          note += f", {dead} of {count} seeds diverge" if dead else ""
          axis.text(
            0.98,
            y + shift,
            note,
            transform=axis.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
          )
          continue
        color = METHODS.get(method, METHODS["none"]).color
        fill = color if batches == "faulty" else "white"
        _dot(axis, y + shift, value, value - error, value + error, color, fill)
    _rows(axis, methods)
    axis.set(title=optimizer, xlim=(None, WORST))
    axis.set_xlabel("held-out loss at the best rate (nats/byte), standard error")
  marks = [
    plt.Line2D([], [], marker="o", color="#444444", markerfacecolor=fill, label=label)
    for label, fill in (("clean batches", "white"), ("faulty batches", "#444444"))
  ]
  figure.legend(handles=marks, loc="outside upper right", ncols=2, frameon=False)
  return figure


def _low_precision(rows: list[Row]) -> Any:
  """Shows float16 by batch and loss scale, for each library; bfloat16 by rate."""
  half, many = select(rows, part="float16"), select(rows, part="bfloat16")
  batches, scales = values(half, "batch"), values(half, "loss_scale")
  names = [f"mean x {scale:g}" if scale else "sum" for scale in scales]
  figure = plt.figure(figsize=(7.4, 6.2), layout="constrained")
  above, below = figure.subfigures(2, 1, height_ratios=(1, 0.95))
  above.suptitle("float16: test accuracy (%) by loss and batch", x=0.01, ha="left")
  for axis, method in zip(
    above.subplots(1, len(LIBRARIES), sharey=True), LIBRARIES, strict=True
  ):
    means = [
      [
        _summary.mean(
          select(half, method=method, loss_scale=s, batch=b)[0]["accuracy"]
        ).value
        for b in batches
      ]
      for s in scales
    ]
    _heat(axis, names, batches, means, "{:.0f}", (10, 100))
    axis.set(xlabel="batch", title=method)
  below.suptitle("bfloat16: 2,000 leaves", x=0.01, ha="left")
  axis = below.subplots()
  for method, color in LIBRARIES.items():
    mine = select(many, method=method)
    means = [_summary.mean(row["accuracy"]) for row in mine]
    axis.errorbar(
      values(mine, "rate"),
      [m.value for m in means],
      [m.error for m in means],
      color=color,
      marker="o",
      markersize=4,
      capsize=3,
      label=method,
    )
  axis.set(xscale="log", xlabel="learning rate", ylabel="test accuracy (%)")
  rates = values(many, "rate")
  axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
  axis.set_xticks([], minor=True)
  axis.legend(frameon=False, loc="lower left")
  return figure


def _qk_clip(rows: list[Row]) -> Any:
  """The largest logits over steps, for each rate and seed; the losses at the end."""
  optimizers, taus = values(rows, "optimizer"), values(rows, "tau")
  columns = max(len(values(select(rows, optimizer=o), "rate")) for o in optimizers)
  figure, axes = plt.subplots(
    len(optimizers),
    columns + 1,
    figsize=(13.5, 2.9 * len(optimizers)),
    layout="constrained",
    width_ratios=(*[1] * columns, 1.5),
    squeeze=False,
  )
  most = max(x or 0 for row in rows for x in _summary.peaks(row))
  for row_of_axes, optimizer in zip(axes, optimizers, strict=True):
    mine = select(rows, optimizer=optimizer)
    rates = values(mine, "rate")
    for axis, rate in zip(row_of_axes, rates, strict=False):
      for tau in taus:
        (row,) = select(mine, rate=rate, tau=tau)
        for sizes in row["largest"]:
          # From the last step of each portion.
          steps = row["steps"] / len(sizes) * (1 + np.arange(len(sizes)))
          logits = [np.nan if x is None else max(x, 0.1) for x in sizes]
          axis.plot(steps, logits, color=TAUS[tau], linewidth=1.1, alpha=0.85)
        if tau is not None:
          axis.axhline(tau, color=TAUS[tau], linewidth=0.8, linestyle=":", zorder=0)
      axis.set(yscale="log", ylim=(0.5, 2 * most), title=f"{optimizer}, rate {rate:g}")
      axis.set_xlabel("step")
    row_of_axes[0].set_ylabel("largest attention logit")
    for number, tau in enumerate(taus):
      means = [
        _summary.mean(_summary.losses(select(mine, rate=r, tau=tau)[0])) for r in rates
      ]
      row_of_axes[-1].errorbar(
        np.array(rates) * 1.06 ** (number - 1),
        [m.value for m in means],
        [m.error for m in means],
        color=TAUS[tau],
        marker="o",
        markersize=4,
        capsize=3,
        label="no bound" if tau is None else f"tau = {tau:g}",
      )
    row_of_axes[-1].set(xscale="log", xlabel="learning rate", title=optimizer)
    row_of_axes[-1].set_ylabel("held-out loss (nats/byte)")
    row_of_axes[-1].set_xticks(rates, [f"{rate:g}" for rate in rates])
    row_of_axes[-1].set_xticks([], minor=True)
  axes[0, -1].legend(frameon=False, fontsize=9)
  return figure


def _update_clipping(rows: list[Row]) -> Any:
  """Accuracy after the padding at each rate; errors of rare tokens over rates."""
  cells = update_clipping.CELLS | update_clipping.ROWS_TOO
  padded = select(rows, task="padded", quiet=update_clipping.QUIET)
  rates = values(padded, "rate")
  figure, axes = plt.subplots(
    1, len(rates) + 1, figsize=(12.5, 4.2), layout="constrained"
  )
  for axis, rate in zip(axes, rates, strict=False):
    for row in select(padded, rate=rate):
      cell = cells[row["method"]]
      steps = update_clipping.EVERY * np.arange(len(row["course"]))
      axis.plot(steps, row["course"], color=cell.color, linestyle=cell.line)
    axis.set(title=f"padded, rate {rate:g}", ylim=(78, 100))
    axis.set_xlabel("steps after the padding")
  axes[0].set_ylabel("test accuracy (%), mean of 5 seeds")
  sparse = select(rows, task="sparse")
  for method in values(sparse, "method"):
    mine = select(sparse, method=method)
    means = [_summary.mean(_summary.errors(row, "rare")) for row in mine]
    axes[-1].errorbar(
      values(mine, "rate"),
      [m.value for m in means],
      [m.error for m in means],
      color=cells[method].color,
      linestyle=cells[method].line,
      marker="o",
      markersize=3.5,
      label=method,
    )
  axes[-1].set(xscale="log", title="sparse", xlabel="learning rate")
  axes[-1].set_ylabel("squared error of rare tokens")
  figure.legend(loc="outside lower center", ncols=4, frameon=False)
  return figure


def _spectral(rows: list[Row]) -> Any:
  """Shows scores of all cells by task, optimizer and kind of batches."""
  return _spectral_results.figure(rows)


def _untuned(rows: list[Row]) -> Any:
  """Shows each method's mean regret, by kind of batches and by task."""
  study = _regret.Study(rows)
  constant, over_all, *_ = study.kept()
  names = [*study.ranked(), constant, "none"]
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(11.5, 6.2), sharey=True, layout="constrained", width_ratios=(1.3, 1)
  )
  marks = {"clean": "o", "heavy": "s", "early": "D", "corrupted": "^"}
  for y, method in enumerate(names):
    color = METHODS[method].color if method in METHODS else "#1f6fb4"
    left.barh(y, study.mean_of(method), color=color, alpha=0.75, height=0.7)
    for fault, mark in marks.items():
      left.plot(
        study.mean_of(method, fault=fault),
        y,
        mark,
        color="#222222",
        markerfacecolor="white",
        markersize=5,
        label=fault if y == 0 else None,
      )
  gate = over_all * untuned.GATE["regret"]
  left.axvline(gate, color="#c0392b", linewidth=1.2, linestyle="--")
  left.text(gate + 0.6, len(names) - 1.5, "gate", color="#c0392b", va="center")
  left.legend(loc="upper right", fontsize=9, frameon=False, title="mean by batches")
  left.set_xlabel("lost to the best constant of each cell, % of what can be learned")
  left.set_title("If nobody tunes the rate or the limit")
  tasks = values(rows, "task")
  means = [[study.mean_of(m, task=t) for t in tasks] for m in names]
  labels = [task.replace("_", "-") for task in tasks]
  _heat(right, names, labels, means, "{:.0f}", (0, 60))
  right.set_title("the same, by task (%)")
  right.tick_params(axis="x", rotation=25)
  _rows(left, names)
  return figure


def _horizon(rows: list[Row]) -> Any:
  """Shows mean regrets over the number of steps, for each task."""
  study = _regret.Study(rows)
  tasks, steps = values(rows, "task"), values(rows, "steps")
  figure, axes = plt.subplots(
    1, len(tasks), figsize=(10.5, 3.8), layout="constrained", sharey=True, squeeze=False
  )
  for axis, task in zip(axes[0], tasks, strict=True):
    for method in [*study.methods, "none"]:
      for fault, fill in (("clean", "white"), ("heavy", None)):
        color = METHODS[method].color
        axis.plot(
          steps,
          [study.mean_of(method, task=task, fault=fault, steps=n) for n in steps],
          color=color,
          linestyle=METHODS[method].line,
          marker="o",
          markerfacecolor=fill or color,
          label=f"{method}, {fault}",
        )
    axis.set(xscale="log", title=task, xlabel="steps")
    axis.set_xticks(steps, [str(n) for n in steps])
    axis.set_xticks([], minor=True)
  axes[0, 0].set_ylabel("mean regret (%)")
  figure.legend(
    *axes[0, 0].get_legend_handles_labels(),
    loc="outside lower center",
    ncols=4,
    frameon=False,
    fontsize=9,
  )
  return figure


def _heat(
  axis: Any,
  rows: list[Any],
  columns: list[Any],
  cells: list[list[float]],
  form: str,
  limits: tuple[float, float],
) -> None:
  """Draws a table whose numbers colour its cells."""
  axis.imshow(cells, cmap="Blues", vmin=limits[0], vmax=limits[1] * 1.2, aspect="auto")
  for y, line in enumerate(cells):
    for x, cell in enumerate(line):
      dark = (cell - limits[0]) / (limits[1] - limits[0]) > 0.65
      color = "white" if dark else "black"
      axis.text(x, y, form.format(cell), ha="center", va="center", color=color)
  axis.set_xticks(range(len(columns)), [str(c) for c in columns])
  axis.set_yticks(range(len(rows)), [str(r) for r in rows])
  axis.tick_params(length=0)
  axis.spines[:].set_visible(False)


def _dot(
  axis: Any,
  y: float,
  value: float,
  low: float,
  high: float,
  color: str,
  fill: str | None = None,
) -> None:
  """Draws a value with an interval, on its own line."""
  axis.plot([low, high], [y, y], color=color, linewidth=1.6, zorder=2)
  axis.plot(value, y, "o", color=color, markerfacecolor=fill or color, zorder=3)


def _rows(axis: Any, names: list[str]) -> None:
  """Makes one line for each name, the first on top."""
  axis.set_yticks(range(len(names)), names)
  axis.set_ylim(len(names) - 0.5, -0.5)
  axis.grid(axis="y", color="#eeeeee")
  axis.set_axisbelow(True)
  axis.tick_params(axis="y", length=0)
