"""What `python -m optax_clip` says: a threshold for a log, and what methods do."""

import ast
from collections.abc import Sequence
import math
import shutil
import textwrap
from typing import Any

import numpy as np
import optax
from tabulate import tabulate

import optax_clip
from optax_clip._logs import drawing as _drawing
from optax_clip._logs.log import Log
from optax_clip._logs.records import LogError

# Those that clip each layer are right for the norms of one.
_OF_LAYERS = ("adagc", "clip_by_layer_norm", "clip_by_layer_percentile")
METHODS = ("autoclip", "clip_by_global_norm", "clip_by_history", "zclip", *_OF_LAYERS)
# The default of `replay`: methods with one learned limit for all leaves.
USUAL = ("clip_by_history", "zclip", "zclip:mode=percentile", "autoclip")

_COLUMNS = 80
# A norm after a clip is the limit, but for rounding.
_SAME, _OFTEN, _FEWEST = 1e-3, 0.02, 100
_WORDS = {"true": True, "false": False, "none": None}


def about(path: str, log: Log) -> str:
  """What was read, and what is to be known about it, in lines of 80 columns."""
  first, last = log.steps[[0, -1]]
  rows = f"{len(log.norms)} rows of {log.column}, steps {first:.0f} to {last:.0f}"
  return "\n".join([f"{path}: {rows}", *map(_note, log.notes)])


def _note(text: str) -> str:
  return textwrap.fill(
    text, _COLUMNS, initial_indent="  note        ", subsequent_indent=" " * 14
  )


def suggest(log: Log, share: float, *, clip: float | None, png: str | None) -> str:
  """The text of a suggestion, with its plot; also writes the PNG that is wanted."""
  said = _clipped_at(log.norms, clip, share) if clip else _clipped_before(log.norms)
  try:
    found = optax_clip.suggest_max_norm(log.norms, share)
  except ValueError as error:
    raise LogError(f"column {log.column!r} as {error}") from error
  width = min(shutil.get_terminal_size((_COLUMNS, 24)).columns, _COLUMNS)
  parts = [str(found), *([_note(said)] if said else [])]
  parts += ["", _drawing.in_terminal(log, found.max_norm, width)]
  if png is not None:
    try:
      _drawing.in_png(log, found.max_norm, png)
    except OSError as error:
      raise LogError(f"--png {png}: cannot be written: {error.strerror}") from error
    parts += ["", f"wrote {png}"]
  return "\n".join(parts)


def _clipped_before(norms: np.ndarray) -> str:
  """A warning if many norms are the largest one, as those after a clip are."""
  finite = norms[np.isfinite(norms)]
  top = float(finite.max(initial=0.0))
  same = float(np.mean(finite >= top * (1 - _SAME))) if len(finite) >= _FEWEST else 0.0
  if same < _OFTEN:
    return ""
  return (
    f"{100 * same:.0f}% of the norms equal the largest, {top:.3g}: if they were logged"
    " after a clip, this is its limit and no more. Take those before it; or say"
    f" --from-clip {top:.3g}, if a few were clipped"
  )


def _clipped_at(norms: np.ndarray, clip: float, share: float) -> str:
  """What norms that were logged after a clip say; a `LogError` if it is nothing."""
  finite = norms[np.isfinite(norms)]
  cut = float(np.mean(finite > clip * (1 - _SAME))) if finite.size else 0.0
  if np.any(finite > clip * (1 + _SAME)):
    return f"norms above {clip:g} are in the log: it has them from before the clip"
  if cut > share:
    raise LogError(
      f"--from-clip {clip:g}: {100 * cut:.0f}% of the norms are at this limit, and were"
      " larger before it by what nobody logged: log the norm before the clip"
    )
  return f"{100 * cut:.1f}% of the norms were clipped at {clip:g}: they count as larger"


def method(text: str) -> optax.GradientTransformation:
  """The transformation that a text names, as "autoclip:percentile=50,window=200"."""
  name, _, rest = text.partition(":")
  if name not in METHODS:
    raise LogError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
  parts = [[x.strip() for x in part.split("=", 1)] for part in rest.split(",") if part]
  values = [_value(part[0]) for part in parts if len(part) == 1]
  try:
    named = {part[0]: _value(part[1]) for part in parts if len(part) == 2}
    return getattr(optax_clip, name)(*values, **named)
  except (TypeError, ValueError) as error:
    raise LogError(f"{text}: {error}") from error


def _value(text: str) -> Any:
  """A number, True, False or None if the text says one, else the text."""
  try:
    return _WORDS.get(text.lower(), ast.literal_eval(text))
  except (SyntaxError, ValueError):
    return _WORDS.get(text.lower(), text)


def replay(log: Log, methods: Sequence[str]) -> str:
  """A table of what methods would have allowed, and what is to be known about it."""
  made = {text: method(text) for text in methods}  # All errors before all work.
  finite = np.isfinite(log.norms)
  norms, cells = log.norms[finite], []
  for text, tx in made.items():
    limits = optax_clip.replay_limits(tx, log.norms)[finite]
    # The limits are float32, and a norm is compared with them as such.
    above = np.mean(norms.astype(np.float32) > limits) if norms.size else 0.0
    kept = np.minimum(norms, limits)
    last, largest = (_digits(x.max(initial=0)) for x in (limits[-1:], kept))
    short = textwrap.fill(text.replace(",", ", "), 40).replace(", ", ",")
    cells.append((short, last, f"{100 * above:.1f}%", largest))
  parts = [
    tabulate(
      cells,
      ("method", "last limit", "clipped", "largest kept"),
      disable_numparse=True,
      colalign=("left", "right", "right", "right"),
    )
  ]
  if norms.size < _FEWEST:
    parts.append(f"Too few to judge by: {norms.size} norms; a method learns from more.")
  if any(text.partition(":")[0] in _OF_LAYERS for text in methods):
    parts.append("Methods that clip each layer: the row is right for the norms of one.")
  if said := _clipped_before(log.norms):
    parts.append(_note(said))
  parts.append("A run that is clipped may take another course than the one in the log.")
  return "\n".join(parts)


def _digits(value: float) -> str:
  return "none yet" if math.isinf(value) else f"{value:.3g}"
