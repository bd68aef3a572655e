"""What `python -m optax_clip` does: suggests a threshold, and replays methods."""

from collections.abc import Callable
from collections.abc import Sequence
import inspect
import math
import shutil
import sys
from typing import Any
from typing import NamedTuple

import numpy as np
import optax

from optax_clip._methods.adagc import adagc
from optax_clip._methods.autoclip import autoclip
from optax_clip._methods.autoclip import clip_by_layer_percentile
from optax_clip._methods.fixed import clip_by_global_norm
from optax_clip._methods.history import clip_by_history
from optax_clip._methods.layers import clip_by_layer_norm
from optax_clip._methods.zclip import zclip
from optax_clip._report import drawing as _drawing
from optax_clip._report.logs import Log
from optax_clip._report.logs import LogError
from optax_clip._report.suggest import replay_limits
from optax_clip._report.suggest import suggest_max_norm

_GLOBAL: tuple[Callable[..., optax.GradientTransformation], ...] = (
  autoclip,
  clip_by_global_norm,
  clip_by_history,
  zclip,
)
_OF_LAYERS = (adagc, clip_by_layer_norm, clip_by_layer_percentile)
METHODS = {made.__name__: made for made in _GLOBAL + _OF_LAYERS}
# Without a word about methods: those that learn the limit of all leaves together.
USUAL = ("clip_by_history", "zclip", "zclip:mode=percentile", "autoclip")

_COLUMNS = 80
# A norm after a clip is the limit, but for rounding.
_SAME, _OFTEN = 1e-3, 0.02
_WORDS = {"true": True, "false": False, "none": None}


class Replayed(NamedTuple):
  """What a method would have done to a history.

  Attributes:
    text: the method, as the user wrote it.
    last: its limit at the last step; inf if it had none.
    clipped: the share of the finite norms that are above the limits.
    largest: the largest finite norm after the clip; NaN if none is finite.
  """

  text: str
  last: float
  clipped: float
  largest: float


# --- Suggest --------------------------------------------------------------------


def suggest(path: str, log: Log, clipped_share: float, png: str | None) -> str:
  """The text of a suggestion, with its plot; writes the PNG if one is wanted.

  Raises:
    LogError: if the log says too little, or the figure cannot be written.
  """
  if png is not None:
    try:
      _drawing.require_matplotlib()
    except ModuleNotFoundError as error:
      raise LogError(f"--png: {error}") from error
  try:
    found = suggest_max_norm(log.norms, clipped_share)
  except ValueError as error:
    raise LogError(f"{path}: column {log.column!r} as {error}") from error
  parts = [str(found)]
  if already := _clipped_before(log.norms):
    parts.append(already)
  parts += ["", _drawing.in_terminal(log.norms, found.max_norm, width=_width())]
  if png is not None:
    try:
      _drawing.in_png(log.norms, found, png, f"{path}: {log.column}")
    except OSError as error:
      raise LogError(f"--png {png}: cannot be written: {error.strerror}.") from error
    parts += ["", f"wrote {png}"]
  return "\n".join(parts)


def _clipped_before(norms: np.ndarray) -> str:
  """A warning if many norms are the largest one, as those after a clip are."""
  finite = norms[np.isfinite(norms)]
  top = float(finite.max())
  same = float(np.mean(finite >= top * (1 - _SAME)))
  if same < _OFTEN or float(finite.min()) >= top * (1 - _SAME):
    return ""
  return (
    f"  note        {100 * same:.0f}% of the norms equal the largest, {top:.3g}: if"
    " they were\n              logged after a clip, take those before it"
  )


def _width() -> int:
  return min(shutil.get_terminal_size((_COLUMNS, 24)).columns, _COLUMNS)


# --- Replay ---------------------------------------------------------------------


def method(text: str) -> optax.GradientTransformation:
  """The transformation that a text names, as "autoclip:percentile=50,window=200".

  Raises:
    LogError: if there is no such method or argument, or its value is not allowed.
  """
  name, colon, rest = text.partition(":")
  if name not in METHODS:
    raise LogError(f"unknown method {name!r}; there are {', '.join(METHODS)}.")
  made = METHODS[name]
  # Keyword-only ones say how norms are taken, and these are given.
  parameters = {
    key: p
    for key, p in inspect.signature(made).parameters.items()
    if p.kind is p.POSITIONAL_OR_KEYWORD
  }
  arguments: dict[str, Any] = {}
  for i, part in enumerate(rest.split(",") if colon else ()):
    key, equals, value = (x.strip() for x in part.partition("="))
    if not equals and i == 0:
      key, value = next(iter(parameters)), key  # As a first argument in Python.
    elif not equals:
      raise LogError(f"{text}: {part!r} has no '=': write argument=value.")
    if key not in parameters:
      raise LogError(f"{text}: {name} has no {key!r}; it takes {_named(parameters)}.")
    if key in arguments:
      raise LogError(f"{text}: {key!r} is given twice.")
    arguments[key] = _value(value)
  missing = [
    key
    for key, p in parameters.items()
    if p.default is p.empty and key not in arguments
  ]
  if missing:
    raise LogError(f"{text}: has no {missing[0]}: write {name}:{missing[0]}=1.0")
  try:
    return made(**arguments)
  except (TypeError, ValueError) as error:
    raise LogError(f"{text}: {error}") from error


def _named(parameters: dict[str, Any]) -> str:
  return ", ".join(parameters)


def _value(text: str) -> Any:
  """A number, True, False or None if the text says one, else the text."""
  for convert in (int, float):
    try:
      return convert(text)
    except ValueError:
      continue
  return _WORDS.get(text.lower(), text)


def replay(log: Log, methods: Sequence[str]) -> list[Replayed]:
  """What methods would have allowed.

  Raises:
    LogError: as `method`.
  """
  made = {text: method(text) for text in methods}  # All errors before all work.
  finite = np.isfinite(log.norms)
  norms = log.norms[finite]
  rows = []
  for text, tx in made.items():
    limits = replay_limits(tx, log.norms)
    kept = np.minimum(norms, limits[finite])
    # The limits are float32, and a norm is compared with them as such.
    above = np.mean(norms.astype(np.float32) > limits[finite]) if norms.size else 0.0
    largest = float(kept.max()) if norms.size else math.nan
    rows.append(Replayed(text, float(limits[-1]), float(above), largest))
  return rows


_HEAD = ("method", "last limit", "clipped", "largest kept")


def show(rows: Sequence[Replayed]) -> None:
  """Prints a table: with rich in a terminal, if it is installed, else plain."""
  cells = [
    (row.text, _digits(row.last), f"{100 * row.clipped:.1f}%", _digits(row.largest))
    for row in rows
  ]
  if not (sys.stdout.isatty() and _rich(cells)):
    print(_plain(cells))
  layers = {made.__name__ for made in _OF_LAYERS}
  if any(row.text.partition(":")[0] in layers for row in rows):
    names = ", ".join(sorted(layers))
    print(
      f"These clip each layer: {names}.\nTheir rows are right for the norms of one."
    )
  print("A run that is clipped may take another course than the one in the log.")


def _plain(cells: Sequence[tuple[str, ...]]) -> str:
  numbers = [
    max(map(len, column)) for column in list(zip(_HEAD, *cells, strict=True))[1:]
  ]
  longest = max(len(row[0]) for row in (_HEAD, *cells))
  first = min(longest, _COLUMNS - sum(numbers) - 2 * len(numbers))
  lines = []
  for row in (_HEAD, *cells):
    text, *rest = row
    if len(text) > first:  # A line of its own.
      lines.append(text)
      text = ""
    tail = "".join(f"  {x:>{n}}" for x, n in zip(rest, numbers, strict=True))
    lines.append(f"{text:{first}}{tail}")
  lines.insert(1, "-" * len(lines[0]))
  return "\n".join(lines)


def _rich(cells: Sequence[tuple[str, ...]]) -> bool:
  """Prints the table with rich; False if that is not installed."""
  try:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
  except ModuleNotFoundError:
    return False
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  table.add_column(_HEAD[0], overflow="fold")
  for name in _HEAD[1:]:
    table.add_column(name, justify="right", no_wrap=True)
  for text, *numbers in cells:
    table.add_row(Text(text), *numbers)
  Console(width=_width()).print(table)
  return True


def _digits(value: float) -> str:
  if math.isinf(value):
    return "none yet"
  return "-" if math.isnan(value) else f"{value:.3g}"
