"""Numbers in text: in a cell, and as pairs of a name and a number in any line."""

from collections.abc import Iterator
import re
from typing import Any

# What loggers and spreadsheets write where there is no number.
_NO_NUMBER = {"", "-", "--", "na", "n/a", "<na>", "none", "null"}
_POWERS = {"k": 1e3, "m": 1e6, "b": 1e9}

_FINITE = r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?[kmb]?"
_OTHER = r"[-+]?(?:nan|inf(?:inity)?)"
_NUMBER = rf"{_FINITE}|{_OTHER}"
# tensor(3.07, device='cuda:0'), np.float64(0.4), [2.5], "1.2", 3/10, and so on.
_OPENED = r"[\"'(\[]*(?:[a-z_][\w.]*\([\[ ]*)*"
_IN_CELL = re.compile(
  rf"{_OPENED}(?P<number>{_NUMBER})(?:[\])\"' ]*|\s*/\s*\d+|[\])]*,\s*\w+=.*\))"
  rf"|<.*\bnumpy=(?P<tensor>{_NUMBER})>",
  re.IGNORECASE,
)
_WORD = r"[a-z_][\w./@-]*+"
_PAIR = re.compile(
  rf"(?<![\w.])(?P<name>{_WORD}(?: {_WORD}){{0,4}}?(?: ?\([a-z][^()]*\))?"
  r"|\|{1,2}(?:g|grad|gradient)\|{1,2})[\"']?"
  # Behind blanks alone a NaN may be a word, as in "number of nan iterations: 0".
  rf"(?:(?:\s*[:=|]\s*|\s+is\s+){_OPENED}(?P<number>{_NUMBER})"
  rf"|\s+(?P<bare>{_FINITE}|{_OTHER}(?! [a-z])))"
  # No time, no date, no version, no unit.
  r"(?![\w:%]|\.\w|-\d|,\d)",
  re.IGNORECASE,
)
_HEADING = re.compile(r"\s*([\w./\[\]-]+):\s*")


def number(value: Any) -> float | None:
  """Reads the number in a cell; None if it is empty, else a `ValueError`."""
  text = str(value).strip()
  try:
    return float(text)
  except ValueError:
    if text.lower() in _NO_NUMBER:
      return None
    if found := _IN_CELL.fullmatch(text):
      return _float(found["number"] or found["tensor"])
  raise ValueError(f"{text[:40]!r} is not a number")


def is_number(value: Any) -> bool:
  """Returns whether a cell holds a number."""
  try:
    return number(value) is not None
  except ValueError:
    return False


def pairs(line: str) -> Iterator[tuple[str, float]]:
  """Finds names in a line before a number, as in `grad norm: 1.2 |`."""
  for found in _PAIR.finditer(line):
    yield found["name"], _float(found["number"] or found["bare"])


def records(text: str) -> Iterator[dict[str, Any]]:
  """Splits records at a name that comes again, a blank or dashes, or a heading."""
  record: dict[str, Any] = {}
  for line in text.splitlines():
    heading = _HEADING.fullmatch(line)
    if heading or not line.strip(" -=+|"):
      if record:
        yield record
      record = {"heading": heading[1]} if heading else {}
    for name, value in pairs(line):
      if name in record:
        yield record
        record = {}
      record[name] = value
  if record:
    yield record


def _float(text: str) -> float:
  text = text.replace(",", "").lower()
  power = _POWERS.get(text[-1], 1.0)
  return float(text if power == 1.0 else text[:-1]) * power
