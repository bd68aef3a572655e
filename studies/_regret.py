"""What a method lost to the best constant of each cell, for `untuned` and `horizon`.

A cell is a task, a kind of batches, a learning rate, and (in `horizon`) a number of
steps. A score counts at most as much as that of whoever knows nothing.
"""

from collections.abc import Iterable
import math
import statistics
from typing import Any
from typing import NamedTuple

from studies import untuned
from studies._summary import Row
from studies._summary import mean
from studies._summary import select
from studies._summary import values

Cell = tuple[Any, ...]
ORACLE = ("none", *(f"constant {c:g}" for c in untuned.ORACLE))


class Regret(NamedTuple):
  """Holds what a method lost in one cell at one scale.

  Attributes:
    percent: of what can be learned in this task with these batches.
    error: its standard error: of the difference, seed by seed, and at least the
      median of such errors in the task.
  """

  percent: float
  error: float


class Summary(NamedTuple):
  """Holds how a method did over all cells.

  Attributes:
    mean: the mean regret, in percent.
    worst: the largest.
    within: the share of cells within two standard errors, in percent.
    harm: by how much it was worse than no clipping on the clean cell where that is
      most, in percent of what can be learned.
    harmed: on how many clean cells that is more than the gate allows, and more than two
      standard errors.
    tuned: the mean regret at each method's own best rate.
  """

  mean: float
  worst: float
  within: float
  harm: float
  harmed: int
  tuned: float


class Study:
  """Answers questions about the rows of a study."""

  def __init__(self, rows: list[Row]):
    """Sorts the rows into cells, and finds the best constant of each."""
    self._rows = rows
    self._found = {(_cell(row), row["method"], row["scale"]): row for row in rows}
    self.cells = list(dict.fromkeys(map(_cell, rows)))
    names = values(rows, "method")
    self._constants = {
      m: float(m.split()[1]) for m in names if m.startswith("constant ")
    }
    self.methods = [m for m in names if m != "none" and m not in self._constants]
    self.scales = values(rows, "scale")
    known = [m for m in ORACLE if m in names]
    self._oracle = {
      cell: min(
        (self._found[cell, name, 1.0] for name in known),
        key=lambda row: mean(scores(row)).value,
      )
      for cell in self.cells
    }
    least: dict[Cell, float] = {}
    for cell, row in self._oracle.items():
      group, value = _without_rate(cell), mean(scores(row)).value
      least[group] = min(least.get(group, value), value)
    self._least = {cell: least[_without_rate(cell)] for cell in self.cells}
    self._median: dict[Any, float] = {}

  def regret(self, method: str, cell: Cell, scale: float = 1.0) -> Regret:
    """Returns what a method lost to the best constant."""
    return self._difference(self._row(method, cell, scale), self._oracle[cell], cell)

  def all_of(self, method: str, scales: Iterable[float] | None = None) -> list[Regret]:
    """Returns a method's regrets in all cells, at all scales or some."""
    return [
      self.regret(method, cell, scale)
      for cell in self.cells
      for scale in (self.scales if scales is None else scales)
    ]

  def mean_of(self, method: str, **wanted: Any) -> float:
    """Returns the mean regret over the cells in which these fields are so."""
    return statistics.fmean(
      self.regret(method, cell, scale).percent
      for cell in self.cells
      for scale in self.scales
      if all(self._oracle[cell][k] == v for k, v in wanted.items())
    )

  def summary(self, method: str) -> Summary:
    """Sums up a method over all cells and scales."""
    regrets = self.all_of(method)
    harms = [
      self._difference(
        self._row(method, cell, scale), self._row("none", cell, 1.0), cell
      )
      for cell in self.cells
      if self._oracle[cell]["fault"] == "clean"
      for scale in self.scales
    ]
    best = []
    for group in dict.fromkeys(map(_without_rate, self.cells)):
      mine = [cell for cell in self.cells if _without_rate(cell) == group]
      for scale in self.scales:
        rows = [self._row(method, cell, scale) for cell in mine]
        row = min(rows, key=lambda row: mean(scores(row)).value)
        room = row["nothing"] - self._least[mine[0]]
        best.append(100 * (mean(scores(row)).value - self._least[mine[0]]) / room)
    return Summary(
      mean=statistics.fmean(r.percent for r in regrets),
      worst=max(r.percent for r in regrets),
      within=100 * statistics.fmean(r.percent <= 2 * r.error for r in regrets),
      harm=max(x.percent for x in harms),
      harmed=sum(x.percent > max(untuned.GATE["harm"], 2 * x.error) for x in harms),
      tuned=statistics.fmean(best),
    )

  def ranked(self) -> tuple[str, ...]:
    """Returns the methods that learn by their mean regret, the least first."""
    return tuple(sorted(self.methods, key=self.mean_of))

  def kept(self) -> tuple[str, float, str, float]:
    """Returns the best constant over all scales, and that at scale 1, with regrets."""
    found = list(self._constants)
    whole = {m: statistics.fmean(r.percent for r in self.all_of(m)) for m in found}
    one = {m: statistics.fmean(r.percent for r in self.all_of(m, [1.0])) for m in found}
    best, alone = min(whole, key=whole.__getitem__), min(one, key=one.__getitem__)
    return best, whole[best], alone, one[alone]

  def _row(self, method: str, cell: Cell, scale: float) -> Row:
    if method in self._constants:
      # Gradients times s, clipped to c: as gradients clipped to c / s.
      limit = self._constants[method] / scale
      sizes = self._constants
      near = min(sizes, key=lambda m: abs(math.log(sizes[m] / limit)))
      method = "none" if limit > 1.5 * max(sizes.values()) else near
      scale = 1.0
    return self._found[cell, method, 1.0 if method == "none" else scale]

  def _difference(self, row: Row, base: Row, cell: Cell) -> Regret:
    room = row["nothing"] - self._least[cell]
    pairs = zip(scores(row), scores(base), strict=True)
    lost = mean(a - b for a, b in pairs)
    error = max(lost.error, self._usual(row))
    return Regret(100 * lost.value / room, 100 * error / room)

  def _usual(self, row: Row) -> float:
    """Returns the median standard error of differences in a task."""
    key = row["task"], row["steps"]
    if key not in self._median:
      self._median[key] = statistics.median(
        mean(
          a - b
          for a, b in zip(
            scores(other), scores(self._oracle[_cell(other)]), strict=True
          )
        ).error
        for other in select(self._rows, task=row["task"], steps=row["steps"])
        if other is not self._oracle[_cell(other)]
      )
    return self._median[key]


def scores(row: Row) -> list[float]:
  """Returns each seed's score, at most that of knowing nothing."""
  most = row["nothing"]
  return [most if x is None else min(x, most) for x in row["score"]]


def _cell(row: Row) -> Cell:
  return row["task"], row["fault"], row["steps"], row["rate"]


def _without_rate(cell: Cell) -> Cell:
  return cell[:3]
