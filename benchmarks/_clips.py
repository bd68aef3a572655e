"""The clips that the suites measure: one row each, here and nowhere else.

A process that compiles for another device imports this once JAX has been told so.
"""

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple

import jax
import optax

import optax_clip

GLOBAL = "optax.clip_by_global_norm"
LAYER = "optax.clip_by_block_rms"
UNIT = "optax.adaptive_grad_clip"
ELEMENT = "optax.clip"


class Clip(NamedTuple):
  """Describes a clip.

  Attributes:
    make: makes it. All limits clip: gradients are normal, weights are 0.01.
    peer: what to compare it with, by name; `None`: it is of optax, or nothing.
    line: where docs/costs.md names it, with others; empty if nowhere.
    timed: whether the suite `overhead` times it.
  """

  make: Callable[[], optax.GradientTransformation]
  peer: str | None = None
  line: str = ""
  timed: bool = True


def _labels(tree: Any) -> Any:
  return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", tree)


def _global(**keywords: Any) -> Callable[[], optax.GradientTransformation]:
  return functools.partial(optax_clip.clip_by_global_norm, 1.0, **keywords)


def _groups() -> optax.GradientTransformation:
  return optax_clip.clip_by_group_norm(_labels, {"matrix": 1.0, "vector": 0.1})


_BEYOND = '... with `nonfinite="zero"`, `strict=True`'
_ALL = "`autoclip`, `zclip`, `clip_by_history`"
_EACH = "`adagc`, `clip_by_layer_percentile`, `adaclip`"
_with = functools.partial
CLIPS = {
  "none": Clip(optax.identity),
  GLOBAL: Clip(_with(optax.clip_by_global_norm, 1.0), line=f"`{GLOBAL}`"),
  "clip_by_global_norm": Clip(_global(), GLOBAL, "`clip_by_global_norm`"),
  "clip_by_global_norm, nonfinite=zero": Clip(
    _global(nonfinite="zero"), GLOBAL, _BEYOND
  ),
  "clip_by_global_norm, strict": Clip(_global(strict=True), GLOBAL, _BEYOND),
  "clip_by_global_norm, record=layers": Clip(
    _global(record="layers"), GLOBAL, '... with `record="layers"`'
  ),
  "clip_by_layer_norm": Clip(
    _with(optax_clip.clip_by_layer_norm, 1.0), LAYER, "`clip_by_layer_norm`"
  ),
  LAYER: Clip(_with(optax.clip_by_block_rms, 0.1), line=f"`{LAYER}`"),
  "clip_by_block_rms": Clip(
    _with(optax_clip.clip_by_block_rms, 0.1), LAYER, "`clip_by_block_rms`"
  ),
  ELEMENT: Clip(_with(optax.clip, 0.1)),
  "clip": Clip(_with(optax_clip.clip, 0.1), ELEMENT),
  "autoclip": Clip(optax_clip.autoclip, GLOBAL, _ALL),
  "zclip": Clip(optax_clip.zclip, GLOBAL, _ALL),
  "clip_by_history": Clip(optax_clip.clip_by_history, GLOBAL, _ALL),
  "clip_by_layer_percentile": Clip(optax_clip.clip_by_layer_percentile, LAYER, _EACH),
  "adagc": Clip(optax_clip.adagc, LAYER, _EACH),
  "adaclip": Clip(optax_clip.adaclip, LAYER, _EACH),
  UNIT: Clip(_with(optax.adaptive_grad_clip, 0.01), line=f"`{UNIT}`"),
  "adaptive_grad_clip": Clip(
    _with(optax_clip.adaptive_grad_clip, 0.01), UNIT, "`adaptive_grad_clip`"
  ),
  "stable_spam": Clip(optax_clip.stable_spam, LAYER, "`stable_spam`"),
  "clip_by_global_norm, record=False": Clip(_global(record=False), GLOBAL, timed=False),
  "clip_by_group_norm": Clip(_groups, GLOBAL, timed=False),
  "adagn": Clip(optax_clip.adagn, LAYER, timed=False),
  "clippy": Clip(optax_clip.clippy, ELEMENT, timed=False),
  "spectral_clip": Clip(_with(optax_clip.spectral_clip, 1.0), GLOBAL, timed=False),
  "clip_by_spectral_norm": Clip(
    _with(optax_clip.clip_by_spectral_norm, 1.0), GLOBAL, timed=False
  ),
  "clip_element_spikes": Clip(optax_clip.clip_element_spikes, ELEMENT, timed=False),
}


def timed() -> dict[str, Clip]:
  """Returns those that the suite `overhead` times."""
  return {name: clip for name, clip in CLIPS.items() if clip.timed}


def of_layers() -> list[str]:
  """Returns the names of those with a norm for each leaf."""
  return [name for name, clip in timed().items() if clip.peer == LAYER]


def lines() -> dict[str, list[str]]:
  """Returns the lines of docs/costs.md, in its order, each with its clips."""
  found: dict[str, list[str]] = {}
  for name, clip in CLIPS.items():
    if clip.line:
      found.setdefault(clip.line, []).append(name)
  return found
