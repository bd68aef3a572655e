"""Which column of a log holds the norms of the gradients, by its name."""

from collections.abc import Sequence
import difflib
import math
import re
from typing import Any
from typing import TypeAlias

from optax_clip._logs import text as _text
from optax_clip._logs.records import LogError

_ANY = "[^a-z]*"
_GRADIENT = re.compile(
  rf"(?:^|[^a-z])(?:g|grads?|gradients?){_ANY}(?:(?:global|total|l2){_ANY})?norm"
  rf"(?:{_ANY}(?:global|total|all|l2|mean|avg|average|raw|step|epoch))*"
  rf"(?:{_ANY}(?:clipped|(?:before|pre|after|post|un){_ANY}clip(?:ped|ping)?))?{_ANY}$"
  r"|norm[/.]grad(?:ient)?s?(?:[/.](?:global|total))?$|^\|+g(?:rad|radient)?\|+$"
)
# Those of `optax_clip.metrics` are <name of the clip>/norm.
_BARE = re.compile(r"(?:^|[/ ])(?:global_?)?norm$")
_OTHER = re.compile("batch|layer|param|update|weight")
# Of one word: settings, and what is computed from norms.
_SETTING = re.compile(
  r"(?:^|[^a-z])(?:max|min|clip|target|log|prev|ema|var|std|threshold)(?![a-z])"
)
_CLIPPED = re.compile(r"(?:clipped|(?:before|pre|after|post|un).?clip\w*)\)?$")
MEAN = re.compile("mean|avg|average")
# From the worst to the best, what makes one of several the better one.
_WORSE = (re.compile(r"(?<!un)clipped|(?:post|after).?clip"), re.compile("epoch"), MEAN)
_BETTER = re.compile(r"raw|orig|unclip|(?:pre|before).?clip")
STEPS = re.compile(
  r"(?:^|[/_ .])(?:steps?|iter(?:ation)?s?|num_updates|updates?|up\.?|batch(?:_idx)?)"
  r"(?:/max_steps)?$|^epoch$"
)
_NAMELESS = re.compile(r"value|\d+")
_LISTED = 6  # Names in an error.
# What a column without norms says of a file.
_HINTS = {
  "State": " It is a table of runs: export the history of one.",
  "current_steps": " LLaMA-Factory has it in trainer_state.json.",
}
_Rows: TypeAlias = Sequence[dict[str, Any]]


def choose(kind: str, rows: _Rows, wanted: str | None) -> tuple[str, list[str]]:
  """Chooses the column with a wanted name, or one of gradients; says why."""
  keys = list(dict.fromkeys(key for row in rows for key in row))
  if wanted is not None:
    norms = (
      [wanted] if wanted in keys else [x for x in keys if wanted in x and _rank(x)]
    )
    if len(norms) == 1:
      return norms[0], []
    near = difflib.get_close_matches(wanted, keys, 1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    raise LogError(f"has no column {wanted!r}.{meant} There are {listed(keys)}")
  names = [x for x in keys if any(_text.is_number(row.get(x)) for row in rows)]
  ranks = {name: rank for name in names if (rank := _rank(name)) is not None}
  if not ranks:  # A download of one scalar.
    ranks = {x: () for x in names if _NAMELESS.fullmatch(x.lower())}
  if not ranks:
    hint = "".join(text for key, text in _HINTS.items() if key in keys)
    raise LogError(
      f"seems to be {kind}, and no column looks like the norm of the gradients."
      f"{hint} Name it by --column; there are {listed(names or keys)}"
    )
  varying = {name: rank for name, rank in ranks.items() if _varies(rows, name)}
  if not varying:
    raise LogError(
      f"column {next(iter(ranks))!r} is constant or never finite: a setting, norms"
      " after a clip that always acted, or overflows. --column takes it all the same"
    )
  best = [name for name, rank in varying.items() if rank == min(varying.values())]
  if len(best) > 1:
    look = "columns look like the norm of the gradients. Name one by --column"
    raise LogError(f"{len(best)} {look}: {listed(best)}")
  rest = [name for name in ranks if name != best[0]]
  why = f"and not {listed(rest)}" if rest else "as no other looks like a gradient norm"
  return best[0], [f"took column {best[0]!r}, {why}"]


def listed(names: Sequence[str]) -> str:
  """Names for people, those of norms first; not hundreds of them."""
  ordered = sorted(names, key=lambda name: "norm" not in name.lower())[:_LISTED]
  shown = [repr(x if len(x) < 32 else f"{x[:14]}...{x[-14:]}") for x in ordered]
  more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
  return ", ".join(shown) + more if names else "none"


def _rank(name: str) -> tuple[bool, ...] | None:
  """Ranks the name of a norm, the best lowest; returns None for another name."""
  text = name.lower()
  last = re.split(r"[/.:]| - ", text)[-1]
  of_gradients = _GRADIENT.search(text)
  if not (of_gradients or _BARE.search(text)) or _OTHER.search(text):
    return None
  if _SETTING.search(_CLIPPED.sub("", last)):
    return None
  worse = (bool(mark.search(last)) for mark in _WORSE)
  return not of_gradients, *worse, not _BETTER.search(last)


def _varies(rows: _Rows, name: str) -> bool:
  """Returns whether a column has several finite numbers, or one row with one."""
  cells = [row[name] for row in rows if _text.is_number(row.get(name))]
  finite = [x for cell in cells if math.isfinite(x := _text.number(cell) or 0.0)]
  return len(set(finite)) > 1 or len(finite) == 1
