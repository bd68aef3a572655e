"""The norms of one run, out of the records of a file, each step once."""

import pathlib
import re
import textwrap
from typing import Any
from typing import NamedTuple
from typing import TypeAlias

import numpy as np

from optax_clip._logs import columns as _columns
from optax_clip._logs import records as _records
from optax_clip._logs import text as _text
from optax_clip._logs.records import LogError

_RUNS = re.compile(
  r"^name$|(?:^|[/_ .])(?:run|trial|experiment|exp|seed|job)(?:.?(?:id|name))?$"
)
_PARTS = re.compile(r"[./_](?:weight|bias|kernel|scale|embedding)s?$|\.\d+\.|^layer")
# Fewer rows than these are no change of the interval, and say nothing about a run.
_CHANGED, _FEWEST = 10, 100

_Rows: TypeAlias = list[tuple[dict[str, Any], float]]
# Steps, their norms, and what is to be said of them.
_Noted: TypeAlias = tuple[np.ndarray, np.ndarray, list[str]]


class Log(NamedTuple):
  """Holds one column of a log, and notes on what was left out or chosen."""

  column: str
  norms: np.ndarray  # In the order of their steps, or of the rows.
  steps: np.ndarray
  notes: list[str]


def read(path: str, column: str | None = None, run: str | None = None) -> Log:
  """Reads a column, by default that of gradient norms; a run by its name or number."""
  try:
    kind, records, notes = _records.read(pathlib.Path(path))
    column, why = _columns.choose(kind, records, column)
    notes = [*why, *notes]
    cells = [(row, _norm(row, column, i)) for i, row in enumerate(records, 1)]
    rows = [(row, value) for row, value in cells if value is not None]
    if not rows:
      raise LogError(f"column {column!r} has no number")
    empty = len(cells) - len(rows)
    if empty and kind not in ("text", "TensorBoard's events"):
      have = "row has" if empty == 1 else "rows have"
      notes.append(f"{empty} of {len(cells)} {have} no {column}: left out")
    rows = _one_run(rows, run)
    _refuse_parts(rows)
  except LogError as error:
    said = textwrap.shorten(f"{path[-45:]}: {error}", 250, placeholder=" ...")
    raise LogError(said) from error
  norms = np.array([value for _, value in rows])
  steps, is_exact = _steps(rows)
  steps = steps if is_exact else np.arange(len(norms), dtype=float)
  steps, norms, repeated = _once(steps, norms)
  steps, norms, uneven = _evenly(steps, norms)
  return Log(column, norms, steps, [*notes, *repeated, *uneven, *_units(column, rows)])


def _norm(row: dict[str, Any], column: str, number: int) -> float | None:
  try:
    value = _text.number(row.get(column))
  except ValueError as error:
    raise LogError(f"row {number}, column {column!r}: {error}") from error
  if value is not None and value < 0:
    raise LogError(f"row {number}, column {column!r}: {value:g} is negative, no norm")
  return value


def _units(column: str, rows: _Rows) -> list[str]:
  """Notes what makes norms another thing than those of one step."""
  notes = []
  first = {key.lower().replace(" ", "_"): key for key in rows[0][0]}
  # fairseq logs means over its interval.
  if _columns.MEAN.search(column.lower()) or {"gnorm", "num_updates"} <= set(first):
    notes.append("the rows are means over several steps, which hide spikes")
  middle = float(np.median([value for _, value in rows]))
  cell = rows[-1][0].get(first.get("loss_scale", ""))
  scale = (_text.number(cell) if _text.is_number(cell) else None) or 1.0
  if middle > (1e3 if scale > 1 else 1e4):
    said = f"loss scale, {scale:g}" if scale > 1 else "loss scale"
    notes += [f"a median of {middle:.3g} may be in units of the {said}: divide by it"]
  return notes


def _one_run(rows: _Rows, wanted: str | None) -> _Rows:
  """Returns the rows of one run: of the only one, or of the one that is wanted."""
  keys = [key for key in rows[0][0] if _RUNS.search(key.lower())]
  named = ([str(row.get(key)) for row, _ in rows] for key in keys)
  names = next((x for x in named if len(set(x)) > 1), None)
  if names is None:
    # Each begins with a step as early as the first, and steps come again.
    steps, _ = _steps(rows)
    first = (np.diff(steps, prepend=steps[:1]) < 0) & (steps <= steps[0])
    first &= len(np.unique(steps)) < len(steps)
    names = [str(x) for x in 1 + np.cumsum(first)]
  runs: dict[str, _Rows] = {}
  for name, row in zip(names, rows, strict=True):
    runs.setdefault(name, []).append(row)
  if len(runs) == 1 and wanted is None:
    return rows
  if len(runs) > 1 and len(runs) == len(rows):
    raise LogError(f"seems to be a table of {len(runs)} runs, with one row for each")
  numbered = {str(i): x for i, x in enumerate(runs.values(), 1)} | runs
  if wanted in numbered:
    return numbered[wanted]
  sizes = ", ".join(str(len(x)) for x in runs.values())[:40]
  raise LogError(
    f"has {len(runs)} runs, of {sizes} rows. Name one by --run, or by its number from"
    f" 1: {_columns.listed(list(runs))}"
  )


def _refuse_parts(rows: _Rows) -> None:
  """Raises if each row is of another parameter, and none of a step."""
  for key, value in rows[0][0].items():
    if _PARTS.search(str(value).lower()):
      parts = list(dict.fromkeys(str(row.get(key)) for row, _ in rows))
      if len(parts) > 1:
        raise LogError(
          f"has norms of parts, not of steps: each row is of one {key}, as"
          f" {_columns.listed(parts[:2])}. The norm of all is the root of the sum of"
          " their squares"
        )


def _steps(rows: _Rows) -> tuple[np.ndarray, bool]:
  """Returns the rows' steps, or else their numbers, and whether they are steps."""
  found = []
  for name in rows[len(rows) // 2][0]:
    cells = [row.get(name) for row, _ in rows]
    if _columns.STEPS.search(name.lower()) and all(map(_text.is_number, cells)):
      is_epoch = name.lower() == "epoch"
      steps = np.array(list(map(_text.number, cells)), float)
      if len(np.unique(steps)) > 1 and (is_epoch or not np.any(steps % 1)):
        found.append((is_epoch, int((np.diff(steps) < 0).sum()), steps))
  if not found:
    return np.arange(len(rows)), False
  is_epoch, _, steps = min(found, key=lambda x: x[:2])
  back = np.diff(steps) < 0
  epochs = [np.diff(x) for of_epoch, _, x in found if of_epoch]
  if back.any() and epochs and np.all(epochs[0] >= 0) and np.all(epochs[0][back] > 0):
    # They begin again in each epoch.
    steps = steps + np.append(0.0, np.cumsum(np.where(back, 1 - np.diff(steps), 0)))
  return steps, not is_epoch


def _once(steps: np.ndarray, norms: np.ndarray) -> _Noted:
  """Keeps each step once, in order: in a resumed run the later row counts."""
  if len(np.unique(steps)) == len(steps):
    order = np.argsort(steps)
    return steps[order], norms[order], []
  same = np.diff(steps) == 0
  # Steps that are rounded, and several rows of one step, are no repetitions.
  several = bool(np.any(np.diff(norms)[same])) and same.mean() > 1 / _CHANGED
  # A row stays if all that come later have later steps.
  later = np.append(np.minimum.accumulate(steps[::-1])[-2::-1], np.inf)
  kept = steps <= later if several else steps < later
  left = int((~kept).sum())
  notes = [f"{left} rows are of steps that come again later: left out"] if left else []
  if several:
    notes.append(f"{int(same.sum())} rows have the step of the row before: kept")
  return steps[kept], norms[kept], notes


def _evenly(steps: np.ndarray, norms: np.ndarray) -> _Noted:
  """Rows at one interval, the one of most steps; and what such rows cannot show."""
  apart, counts = np.unique(np.diff(steps), return_counts=True)
  usual = float(apart[np.argmax(apart * counts)]) if len(apart) else 0.0
  if usual <= 1 or usual == np.inf:
    return steps, norms, []
  notes = []
  close = int(counts[apart <= usual / 2].sum())
  if close >= _CHANGED:
    # Of each interval the row in its middle.
    places = (steps - steps[-1]) / usual
    order = np.argsort(np.abs(places - np.rint(places)), kind="stable")
    kept = np.sort(order[np.unique(np.rint(places[order]), return_index=True)[1]])
    few = len(kept) < max(len(steps) / 2, _FEWEST)
    what = "count as much as others" if few else f"were thinned: {len(kept)} rows stay"
    notes.append(
      f"the interval changes: {close} rows are closer than {usual:g} steps, and {what}"
    )
    if not few:
      steps, norms = steps[kept], norms[kept]
  notes.append(
    f"every {usual:g}th step is logged: what is between, and what comes again every"
    f" {usual:g} steps, is not seen"
  )
  return steps, norms, notes
