"""Reads the files that trainers leave into records: one dictionary for each row."""

from collections.abc import Iterator
import contextlib
import csv
import json
import pathlib
import re
from typing import Any
from typing import NamedTuple

from optax_clip._logs import text as _text

# What files of numbers that are not text begin with, and what they are.
_BINARY = {
  b"PAR1": "a Parquet file: write it as CSV, with pandas",
  b"\x93NUMPY": "an array of NumPy: write it by numpy.savetxt",
  b"PK": "a zip archive, as of numpy.savez and torch.save: unpack it",
  b"\x1f\x8b": "compressed: unpack it by gunzip",
  b"SQLite": "an SQLite database: export its table as CSV",
  b":W&B": "wandb's own file: download the run's history as CSV",
}
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # Of a terminal.
_FLOATS = (1, 2, 14, 19)  # Of TensorFlow: float, double, bfloat16, half.
_SCALAR = ("Wall time", "Step", "Value")  # TensorBoard's download.
# Columns of names, where each row has one name and one value.
_LONG = ("key", "metric", "metric_name", "tag", "variable", "name")
# Names for columns without: numpy.savetxt of steps and norms, and MLflow's store.
_NAMELESS = {2: ["step", "value"], 3: ["timestamp", "value", "step"]}
_is_plain = re.compile(
  r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|inf)", re.I
).fullmatch


class LogError(ValueError):
  """Says in one line what is wrong with a log."""


class Rows(NamedTuple):
  """Holds a file's rows as they are, its kind, and notes on what was left out."""

  kind: str
  records: list[dict[str, Any]]  # Keys of nested ones are joined by "/".
  notes: list[str]


def read(path: pathlib.Path) -> Rows:
  """Reads a file, or a folder of TensorBoard's events; raises a `LogError`."""
  if not path.exists():
    raise LogError("there is no such file or folder")
  try:
    if path.is_dir() or "tfevents" in path.name:
      return _events(path)
    data = path.read_bytes()
  except OSError as error:
    raise LogError(f"cannot be read: {error.strerror}") from error
  if not data.strip():
    raise LogError("is empty")
  for magic, kind in _BINARY.items():
    if data.startswith(magic):
      raise LogError(f"is {kind}")
  # A shell of Windows writes UTF-16, and marks the order of its bytes.
  wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
  if not wide and b"\0" in data[:4096]:
    raise LogError("is not text, nor a file that is named as TensorBoard's events are")
  text = data.decode("utf-16" if wide else "utf-8-sig", errors="replace")
  text = _COLOURS.sub("", text)
  rows = _json(text) if text.lstrip()[:1] in ("{", "[") else None
  rows = rows or _table(text) or Rows("text", list(_text.records(text)), [])
  return rows._replace(records=[_flat(record) for record in rows.records])


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Flattens dictionaries in a row; a name and its value are one entry."""
  flat: dict[str, Any] = {}
  for key, value in record.items():
    if isinstance(value, str) and "norm" in value and any(x in value for x in ":="):
      flat |= dict(_text.pairs(value))  # A line of text, or a printed dictionary.
    elif isinstance(value, dict):
      flat |= _flat(value, f"{prefix}{key}/")
    else:
      flat[f"{prefix}{key}"] = value
  names = [x for x in _LONG if isinstance(flat.get(x), str)]
  if names and "value" in flat:
    flat[flat.pop(names[0])] = flat.pop("value")
  return flat


def _json(text: str) -> Rows | None:
  """Reads one document, or one object a line."""
  with contextlib.suppress(json.JSONDecodeError):
    return _document(json.loads(text))
  lines, rows = [line for line in text.splitlines() if line.strip()], []
  for line in lines:
    with contextlib.suppress(json.JSONDecodeError):
      rows += [x for x in [json.loads(line)] if isinstance(x, dict)]
  bad = len(lines) - len(rows)
  left = [f"left out {bad} lines that are not JSON, or not complete"] if bad else []
  return Rows("JSON lines", rows, left) if bad <= len(rows) else None


def _document(document: Any) -> Rows:
  """Finds the longest list of objects, TensorBoard's triples, or columns."""
  if isinstance(document, dict) and isinstance(document.get("cells"), list):
    outputs = [x for cell in document["cells"] for x in cell.get("outputs", ())]
    said = [x.get("text") or x.get("data", {}).get("text/plain", "") for x in outputs]
    return Rows("a notebook", list(_text.records("\n".join(map("".join, said)))), [])
  lists = (x for x in _lists(document) if isinstance(x[0], dict))
  rows = max(lists, key=len, default=[])
  if not rows and isinstance(document, list):
    triples = [x for x in document if isinstance(x, list) and len(x) == 3]
    rows = [dict(zip(_SCALAR, x, strict=True)) for x in triples]
  elif not rows:  # {"step": [0, 1], ...}, or {"step": {"0": 0, "1": 1}, ...}.
    cells = {
      k: [*v.values()] if isinstance(v, dict) else v for k, v in document.items()
    }
    columns = {k: v for k, v in cells.items() if isinstance(v, list)}
    length = max(map(len, columns.values()), default=0)
    whole = {k: v for k, v in columns.items() if len(v) == length}
    rows = [{k: v[i] for k, v in whole.items()} for i in range(length)] or [document]
  return Rows("JSON", [x for x in rows if isinstance(x, dict)], [])


def _lists(value: Any) -> Iterator[list[Any]]:
  """Finds the lists in a document that are not empty."""
  if isinstance(value, list) and value:
    yield value
  for inner in value.values() if isinstance(value, dict) else ():
    yield from _lists(inner)


def _table(text: str) -> Rows | None:
  """Values between commas, tabs, semicolons or blanks."""
  lines = [line for line in text.splitlines() if line.strip()]
  first = next((i for i, line in enumerate(lines) if line[0] not in "#%"), 0)
  # The line before it may be a comment that holds the names.
  lines = [lines[first - 1].lstrip("#% ") if first else "", *lines[first:]]
  separator = max(",\t;|", key=lines[1].count)
  # In text a quotation mark may open what no other closes.
  with contextlib.suppress(csv.Error):
    rows = list(csv.reader(lines, delimiter=separator))
    if separator == ";":  # Where a comma is the point of decimals.
      rows[2:] = [[cell.replace(",", ".") for cell in row] for row in rows[2:]]
    if found := _rows(rows, "TSV" if separator == "\t" else "CSV"):
      return found
  # Any text has blanks: only numbers may stand between these.
  if not all(_is_plain(cell) for line in lines[2:] for cell in line.split()):
    return None
  rows = [line.split() for line in lines]
  names = re.split("  +", lines[1].strip())  # Of several words each.
  if len(rows[1]) + 1 == len(rows[-1]):
    names = ["index", *rows[1]]
  rows[1] = names if len(names) == len(rows[-1]) else rows[1]
  return _rows(rows, "columns")


def _rows(rows: list[list[str]], kind: str) -> Rows | None:
  """Reads names and rows as a table, if most have one length and a number."""
  header, body = [name.strip() for name in rows[1]], rows[2:]
  width = len(header)
  if all(map(_is_plain, header)):  # The names are in the comment, or nowhere.
    body = rows[1:]
    header = _NAMELESS.get(width, [str(i + 1) for i in range(width)])
    header = rows[0] if len(rows[0]) == width else header
  is_number = _is_plain if kind == "columns" else _text.is_number
  # A line of text may end in a number, too, but in the first line as well.
  named = [i for i, x in enumerate(header) if not _is_plain(x)] or range(width)
  fits = [len(x) == width and any(is_number(x[i]) for i in named) for x in body[:50]]
  if sum(fits) <= len(fits) / 2 and (fits or width < 2 or kind == "columns"):
    return None
  # Lines of dashes stand below names. A run that goes on may write these once more.
  body = [x for x in body if "".join(x).strip(" -:")]
  body = [x for x in body if [name.strip() for name in x] != header]
  whole = [x for x in body if len(x) == width]
  short = len(body) - len(whole)
  left = [f"left out {short} of {len(body)} rows of another length"] if short else []
  twice = {name for name in header if header.count(name) > 1}
  header = [f"{x}.{i}" if x in twice else x for i, x in enumerate(header, 1)]
  return Rows(kind, [dict(zip(header, x, strict=True)) for x in whole], left)


def _events(path: pathlib.Path) -> Rows:
  """TensorBoard's scalars, by its own reader: it drops what a resumed run repeats."""
  if path.is_dir() and not any("tfevents" in x.name for x in path.iterdir()):
    runs = {x.parent for x in path.rglob("*tfevents*")}
    logs = {p for x in ("csv", "json", "jsonl", "log") for p in path.rglob(f"*.{x}")}
    below = [repr(x.relative_to(path).as_posix()) for x in sorted(runs or logs)[:4]]
    what = f" {'Runs' if runs else 'Logs'} in it: {', '.join(below)}" if below else ""
    raise LogError(f"this folder has no file of TensorBoard's events.{what}")
  from tensorboard.backend.event_processing import event_accumulator
  from tensorboard.util import tensor_util

  events = event_accumulator.EventAccumulator(str(path), {"scalars": 0, "tensors": 0})
  events.Reload()
  records: list[dict[str, Any]] = []
  for tag in events.Tags()["scalars"]:
    records += [{"step": x.step, tag: x.value} for x in events.Scalars(tag)]
  for tag in events.Tags()["tensors"]:
    kept = [x for x in events.Tensors(tag) if x.tensor_proto.dtype in _FLOATS]
    made = [(x.step, tensor_util.make_ndarray(x.tensor_proto)) for x in kept]
    records += [{"step": i, tag: float(x.item())} for i, x in made if x.size == 1]
  return Rows("TensorBoard's events", records, [])
