"""What `python -m optax_clip` says: a threshold for a log, and what methods do."""

import argparse
import ast
import math
import shutil
import sys
import textwrap
from typing import Any

import numpy as np
import optax
import uniplot

import optax_clip
from optax_clip._logs import log as _log
from optax_clip._logs.records import LogError

# Those that clip each layer are right for the norms of one.
_OF_LAYERS = ("adagc", "clip_by_layer_norm", "clip_by_layer_percentile")
METHODS = ("autoclip", "clip_by_global_norm", "clip_by_history", "zclip", *_OF_LAYERS)
# The default of `replay`: methods with one learned limit for all leaves.
USUAL = ("clip_by_history", "zclip", "zclip:mode=percentile", "autoclip")

_COLUMNS, _HEIGHT, _LABEL = 80, 14, 9
_NOTES = textwrap.TextWrapper(_COLUMNS, "  note        ", " " * 14)
# A norm after a clip is the limit, but for rounding.
_SAME, _OFTEN, _FEWEST = 1e-3, 0.02, 100
# Norms further from the median than these factors are drawn at the edge.
_BELOW, _ABOVE = 1e-3, 1e4


def answer(asked: argparse.Namespace) -> str:
  """Writes what was read, notes about it, and the answer to what was asked."""
  share, clip, methods = asked.clipped_share, asked.from_clip, asked.methods
  if asked.command == "suggest" and methods:
    raise LogError(f"suggest takes no method: {', '.join(methods)}")
  if asked.command == "replay" and (share, clip) != (None, None):
    raise LogError("--clipped-share and --from-clip are for suggest")
  if clip is not None and not 0 < clip < math.inf:
    raise LogError(f"--from-clip {clip:g} is not a number above 0")
  log = _log.read(asked.log, asked.column, asked.run)
  first, last = log.steps[[0, -1]]
  rows = f"{len(log.norms)} rows of {log.column}, steps {first:.0f} to {last:.0f}"
  said = [f"{asked.log}: {rows}", *map(_NOTES.fill, log.notes)]
  if asked.command == "replay":
    return "\n".join([*said, "", replay(log, methods or [*USUAL])])
  share = 0.05 if share is None else share
  if after := _after_clip(log.norms, clip, share):
    said.append(_NOTES.fill(after))
  found = optax_clip.suggest_max_norm(log.norms, share)
  return "\n".join([*said, str(found), "", _plot(log, found.max_norm)])


def _plot(log: _log.Log, limit: float) -> str:
  """Norms by step in 14 lines of characters, and a limit unless it is NaN."""
  width = min(shutil.get_terminal_size((_COLUMNS, 24)).columns, _COLUMNS)
  drawn = np.isfinite(log.norms) & (log.norms > 0)
  middle = float(np.median(log.norms[drawn]))
  norms = np.clip(log.norms[drawn], middle * _BELOW, middle * _ABOVE)
  low, high = np.log10([norms.min() / 1.05, norms.max() * 1.05])
  unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
  text = uniplot.plot_to_string(
    np.log10(norms),
    log.steps[drawn],
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
    lines[i + 1] += f" {10 ** (high - (i + 0.5) / _HEIGHT * (high - low)):.3g}"
  return "\n".join(lines)


def _after_clip(
  norms: np.ndarray, clip: float | None = None, share: float = 1.0
) -> str:
  """Says what norms tell that were logged after a clip; may raise a `LogError`."""
  finite = norms[np.isfinite(norms)]
  top = float(finite.max(initial=0.0)) if clip is None else clip
  cut = float(np.mean(finite >= top * (1 - _SAME))) if finite.size else 0.0
  if clip is None:
    if cut < _OFTEN or len(finite) < _FEWEST:
      return ""
    return (
      f"{100 * cut:.0f}% of the norms equal the largest, {top:.3g}: if they were logged"
      " after a clip, this is its limit and no more. Take those before it; or say"
      f" --from-clip {top:.3g}, if a few were clipped"
    )
  if np.any(finite > clip * (1 + _SAME)):
    return f"norms above {clip:g} are in the log: it has them from before the clip"
  if cut > share:
    raise LogError(
      f"--from-clip {clip:g}: {100 * cut:.0f}% of the norms are at this limit, and were"
      " larger before it by what nobody logged: log the norm before the clip"
    )
  return f"{100 * cut:.1f}% of the norms were clipped at {clip:g}: they count as larger"


def method(text: str) -> optax.GradientTransformation:
  """Makes the transformation of a text, as "autoclip:percentile=50,window=200"."""
  name, _, rest = text.partition(":")
  if name not in METHODS:
    raise LogError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
  pairs = [part.rpartition("=") for part in rest.split(",") if part]
  values = [_value(value) for key, _, value in pairs if not key]
  try:
    named = {key.strip(): _value(value) for key, _, value in pairs if key}
    return getattr(optax_clip, name)(*values, **named)
  except (TypeError, ValueError) as error:
    raise LogError(f"{text}: {error}") from error


def _value(text: str) -> Any:
  """Reads a number, True, False or None from a text; returns any other text."""
  try:
    return ast.literal_eval(text.strip().capitalize())
  except (SyntaxError, ValueError):
    return text.strip()


def replay(log: _log.Log, methods: list[str]) -> str:
  """Writes a table of what methods would have allowed, with notes."""
  from tabulate import tabulate

  made = {text: method(text) for text in methods}  # All errors before all work.
  finite = np.isfinite(log.norms)
  norms, cells = log.norms[finite], []
  for text, tx in made.items():
    limits = optax_clip.replay_limits(tx, log.norms)[finite]
    # The limits are float32, and a norm is compared with them as such.
    above = np.mean(norms.astype(np.float32) > limits) if norms.size else 0.0
    most = [x.max(initial=0) for x in (limits[-1:], np.minimum(norms, limits))]
    last, kept = ("none yet" if math.isinf(x) else f"{x:.3g}" for x in most)
    short = textwrap.fill(text.replace(",", ", "), 40).replace(", ", ",")
    cells.append((short, last, f"{100 * above:.1f}%", kept))
  heads = ("method", "last limit", "clipped", "largest kept")
  sides = ("left", "right", "right", "right")
  table = tabulate(cells, heads, disable_numparse=True, colalign=sides)
  said = []
  if norms.size < _FEWEST:
    said = [f"Too few to judge by: {norms.size} norms; a method learns from more."]
  if any(text.partition(":")[0] in _OF_LAYERS for text in methods):
    said.append("Methods that clip each layer: the row is right for the norms of one.")
  if after := _after_clip(log.norms):
    said.append(_NOTES.fill(after))
  said.append("A run that is clipped may take another course than the one in the log.")
  return "\n".join([table, *said])
