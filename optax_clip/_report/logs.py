"""Reads one column of numbers out of the log of a run: CSV, JSON lines, TensorBoard."""

from collections.abc import Iterator
from collections.abc import Sequence
import csv
import difflib
import json
import math
import pathlib
import re
from typing import Any
from typing import NamedTuple
from typing import TextIO

import numpy as np

from optax_clip._report import events as _events

# What loggers and spreadsheets write where there is no number.
_NO_NUMBER = {"", "na", "n/a", "nan", "none", "null"}
_LISTED = 12  # Names of columns in an error.

_ANY = "[^a-z]*"
_GRADIENT_NORM = re.compile(
  rf"(?:^|[^a-z])(?:g|grads?|gradients?){_ANY}(?:(?:global|total|l2){_ANY})?norm"
  rf"(?:{_ANY}(?:global|total|l2))?$"
  # Those of `optax_clip.metrics` are <name of the clip>/norm.
  r"|(?:^|/)(?:global_?)?norm$"
)
_OTHER_NORM = re.compile("batch|layer|param|update|weight")


class LogError(ValueError):
  """What is wrong with a log, in one line."""


class Log(NamedTuple):
  """One column of a log.

  Attributes:
    column: its name.
    norms: f64[rows], the oldest first; NaN where a cell is empty.
    notes: what was left out or chosen, one sentence each.
  """

  column: str
  norms: np.ndarray
  notes: list[str]


class _Cell(NamedTuple):
  """What a log says in one place.

  Attributes:
    place: for errors, as "line 7".
    value: a number, a text, or anything that JSON has.
  """

  place: str
  value: Any


def read(path: str, column: str | None = None, *, skip_empty: bool = False) -> Log:
  """Reads a column of a log.

  Args:
    path: a file of comma- or tab-separated values, of JSON objects, one a line, or of
      TensorBoard's events, or a folder of these.
    column: the name of the column, of the key, or of the tag. `None`: the only one
      that is named as a norm of gradients.
    skip_empty: whether rows without a number are left out, instead of being NaN.

  Returns:
    A `Log`.

  Raises:
    LogError: if there is no such file or column, or it holds what are no norms.
  """
  source = _source(pathlib.Path(path))
  try:
    names = source.names()
    notes = []
    if column is None:
      column = _likely(path, names)
      notes.append(f"took column {column!r}: no other looks like a norm of gradients")
    elif names.count(column) != 1:
      raise LogError(_no_column(path, column, names))
    values, empty = [], 0
    for cell in source.cells(column):
      value = _number(path, column, cell)
      empty += value is None
      if value is not None or not skip_empty:
        values.append(math.nan if value is None else value)
  except OSError as error:
    raise LogError(f"{path}: cannot be read: {error.strerror}.") from error
  except UnicodeDecodeError as error:
    raise LogError(
      f"{path}: is neither text in UTF-8 nor a file of TensorBoard's events."
    ) from error
  except (csv.Error, _events.Corrupt) as error:
    raise LogError(f"{path}: {error}.") from error
  if not values:
    raise LogError(f"{path}: column {column!r} has no number.")
  if empty:
    what = "left out" if skip_empty else "NaN here; --skip-empty leaves them out"
    notes.append(f"{empty} of {len(values) + skip_empty * empty} cells empty: {what}")
  return Log(column, np.array(values, np.float64), notes + source.notes)


# --- Formats --------------------------------------------------------------------


class _Separated:
  """Comma- or tab-separated values, with the names in the first line."""

  def __init__(self, path: pathlib.Path) -> None:
    self.path, self.notes = path, list[str]()
    with self._open() as file:
      head = next((line for line in file if line.strip("\r\n")), "")
    self.separator = max(",\t;", key=head.count)
    first = next(csv.reader([head], delimiter=self.separator), [])
    self.header = [name.strip() for name in first]
    # One column of numbers, as `numpy.savetxt` writes it, needs no name.
    self.bare = len(first) == 1 and _is_number(first[0])
    if self.bare:
      self.header = ["1"]

  def _open(self) -> TextIO:
    return self.path.open(encoding="utf-8-sig", newline="")

  def names(self) -> list[str]:
    return self.header

  def cells(self, column: str) -> Iterator[_Cell]:
    index, wanted = self.header.index(column), len(self.header)
    with self._open() as file:
      reader = csv.reader(file, delimiter=self.separator)
      rows = ((reader.line_num, row) for row in reader if row)  # No blank lines.
      if not self.bare:
        next(rows)
      for line, row in rows:
        if len(row) != wanted:
          if len(row) < wanted and next(rows, None) is None:
            self.notes.append(f"left out the last line, {line}: it is not complete")
            return
          raise LogError(
            f"{self.path}: line {line} has {len(row)} cells, the first has {wanted}."
          )
        yield _Cell(f"line {line}", row[index])


class _JsonLines:
  """One JSON object for each line; of nested ones the keys are joined by "/"."""

  def __init__(self, path: pathlib.Path) -> None:
    self.path, self.notes = path, list[str]()

  def names(self) -> list[str]:
    found: dict[str, None] = {}
    for _, row in self._rows():
      found.update(dict.fromkeys(row))
    return list(found)

  def cells(self, column: str) -> Iterator[_Cell]:
    without = 0
    for line, row in self._rows():
      if column in row:
        yield _Cell(f"line {line}", row[column])
      without += column not in row
    if without:
      self.notes.append(f"left out {without} lines without this key")

  def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
    self.notes.clear()
    with self.path.open(encoding="utf-8-sig") as file:
      lines = ((i, line) for i, line in enumerate(file, 1) if line.strip())
      for i, line in lines:
        try:
          row = json.loads(line)
        except json.JSONDecodeError as error:
          if not line.endswith("\n"):
            self.notes.append(f"left out the last line, {i}: it is not complete")
            return
          raise LogError(f"{self.path}: line {i} is no JSON: {error.msg}.") from error
        if not isinstance(row, dict):
          raise LogError(
            f"{self.path}: line {i} is no JSON object, as"
            ' {"step": 1, "grad_norm": 0.5}.'
          )
        yield i, _flat(row)


class _Events:
  """TensorBoard's scalars."""

  def __init__(self, path: pathlib.Path) -> None:
    self.path, self.notes = path, list[str]()
    if not _events.files(path):
      runs = {p.parent.relative_to(path).as_posix() for p in path.rglob("*tfevents*")}
      below = f" Runs in it: {_list(sorted(runs))}." if runs else ""
      raise LogError(f"{path}: this folder has no file of TensorBoard's events.{below}")

  def names(self) -> list[str]:
    return _events.tags(self.path)

  def cells(self, column: str) -> Iterator[_Cell]:
    for step, value in _events.history(self.path, column):
      yield _Cell(f"step {step}", value)


def _source(path: pathlib.Path) -> _Separated | _JsonLines | _Events:
  """The reader of a file or folder, by what is in it."""
  try:
    if path.is_dir() or _events.looks_like_events(path):
      return _Events(path)
    with path.open("rb") as file:
      head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head:
      raise LogError(f"{path}: is empty.")
    if head.startswith((b"{", b"[")):
      return _JsonLines(path)
    return _Separated(path)
  except FileNotFoundError as error:
    raise LogError(f"{path}: there is no such file or folder.") from error
  except OSError as error:
    raise LogError(f"{path}: cannot be read: {error.strerror}.") from error
  except UnicodeDecodeError as error:
    raise LogError(
      f"{path}: is neither text in UTF-8 nor a file of TensorBoard's events."
    ) from error


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in row.items():
    if isinstance(value, dict):
      flat |= _flat(value, f"{prefix}{key}/")
    else:
      flat[prefix + key] = value
  return flat


# --- Columns and cells ----------------------------------------------------------


def _likely(path: str, names: Sequence[str]) -> str:
  """The only column that is named as a norm of gradients."""
  likely = [
    name
    for name in names
    if _GRADIENT_NORM.search(name.lower()) and not _OTHER_NORM.search(name.lower())
  ]
  if len(names) == 1:
    likely = list(names)
  if len(likely) != 1:
    many = f"{len(likely)} columns look" if likely else "no column looks"
    raise LogError(
      f"{path}: {many} like the norm of the gradients. Name it by --column; there are"
      f" {_list(likely or names)}."
    )
  return likely[0]


def _no_column(path: str, column: str, names: Sequence[str]) -> str:
  if column in names:
    return f"{path}: has {names.count(column)} columns of the name {column!r}."
  near = difflib.get_close_matches(column, names, 1)
  meant = f" Did you mean {near[0]!r}?" if near else ""
  return f"{path}: has no column {column!r}.{meant} There are {_list(names)}."


def _list(names: Sequence[str]) -> str:
  """Names for people, those of norms first; not hundreds of them."""
  ordered = sorted(names, key=lambda name: "norm" not in name.lower())
  more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
  return ", ".join(map(repr, ordered[:_LISTED])) + more if names else "none"


def _number(path: str, column: str, cell: _Cell) -> float | None:
  """The number in a cell; None if it is empty, or says that there is none."""
  value, where = cell.value, f"{path}: {cell.place}, column {column!r}"
  if value is None or (
    isinstance(value, str) and value.strip().lower() in _NO_NUMBER - {"nan"}
  ):
    return None
  if not _is_number(value):
    raise LogError(f"{where}: {value!r} is no number.")
  number = float(value)
  if number < 0:
    raise LogError(f"{where}: {number:g} is negative, and no norm.")
  return number


def _is_number(value: Any) -> bool:
  if isinstance(value, str):
    try:
      float(value)
    except ValueError:
      return False
    return "_" not in value
  return isinstance(value, (int, float)) and not isinstance(value, bool)
