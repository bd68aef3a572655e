"""Which ways to clip the studies compare: one table, with a colour for each."""

from collections.abc import Callable
from typing import NamedTuple

import optax

import optax_clip
from optax_clip import actions
from optax_clip import measures
from optax_clip import thresholds
from studies._agreement import clip_by_agreement

Transformation = optax.GradientTransformation


class Method(NamedTuple):
  """Describes a way to clip, or not to.

  Attributes:
    around: maps an optimizer to an optimizer that clips.
    color: its colour in every figure.
    line: its line style, which tells apart methods with one colour.
  """

  around: Callable[[Transformation], Transformation]
  color: str
  line: str = "-"


def _first(clip: Transformation) -> Callable[[Transformation], Transformation]:
  return lambda optimizer: optax.chain(clip, optimizer)


def _soft(limit: float) -> Transformation:
  return optax_clip.clip_with(
    measures.global_norm(), thresholds.constant(limit), actions.tanh()
  )


def _by(
  threshold: optax_clip.Threshold, measure: optax_clip.Measure | None = None
) -> Transformation:
  measure = measures.global_norm() if measure is None else measure
  return optax_clip.clip_with(measure, threshold, actions.rescale())


def _spikes(
  judge: optax_clip.Threshold | None, clip: Transformation | None = None
) -> Callable[[Transformation], Transformation]:
  """Returns a guard around a clip, or around what only counts, and an optimizer."""
  clip = optax_clip.clip_by_global_norm(float("inf")) if clip is None else clip
  return lambda optimizer: optax_clip.skip_spikes(optax.chain(clip, optimizer), judge)


def constant(limit: float) -> Method:
  """Describes one more fixed limit on the global norm."""
  return Method(_first(optax_clip.clip_by_global_norm(limit)), "#1f6fb4", ":")


# For `skip_spikes`: what judged before it had an early limit, and one that has no
# history: a step is a spike from five times the typical norm on.
_HISTORY, _JUDGE = thresholds.history(6.0), thresholds.geometric(5.0)

# Constants are powers of ten, and the same ones for all; methods that learn have their
# authors' defaults. Nobody chose a number here after a look at results.
METHODS = {
  # Nothing is above an infinite limit: this only counts.
  "none": Method(_first(optax_clip.clip_by_global_norm(float("inf"))), "#444444"),
  "global 0.1": Method(_first(optax_clip.clip_by_global_norm(0.1)), "#1f6fb4", ":"),
  "global 1": Method(_first(optax_clip.clip_by_global_norm(1.0)), "#1f6fb4"),
  "global 10": Method(_first(optax_clip.clip_by_global_norm(10.0)), "#1f6fb4", "--"),
  "layer 0.1": Method(_first(optax_clip.clip_by_layer_norm(0.1)), "#17a2b8", ":"),
  "layer 1": Method(_first(optax_clip.clip_by_layer_norm(1.0)), "#17a2b8"),
  "tanh 1": Method(_first(_soft(1.0)), "#8e44ad"),
  "agc 0.01": Method(_first(optax_clip.adaptive_grad_clip(0.01)), "#2e8b57", ":"),
  "agc 0.1": Method(_first(optax_clip.adaptive_grad_clip(0.1)), "#2e8b57"),
  "autoclip": Method(_first(optax_clip.autoclip()), "#e67e22"),
  "history": Method(
    _first(optax_clip.clip_by_history(early_factor=None, surprise=None)), "#b8860b"
  ),
  "layer percentile": Method(
    _first(optax_clip.clip_by_layer_percentile()), "#e67e22", "--"
  ),
  # With the papers' constants, which are not the defaults: `zclip` never allows more
  # than a norm of 1, and `adagc` begins with one.
  "zclip": Method(
    _first(optax_clip.zclip(max_norm=1.0, eps=1e-6, early_factor=None)), "#c0392b"
  ),
  "zclip, no cap": Method(
    _first(optax_clip.zclip(eps=1e-6, early_factor=None)), "#c0392b", "--"
  ),
  "adagc": Method(_first(optax_clip.adagc(warmup_norm=1.0)), "#d6569b"),
  "adagc, no cap": Method(_first(optax_clip.adagc(early_factor=None)), "#d6569b", "--"),
  "skip_spikes": Method(_spikes(_HISTORY), "#7f8c8d"),
  # "early", the default: until a method has learned, the first norms bound a step.
  "history, early": Method(
    _first(optax_clip.clip_by_history(surprise=None)), "#b8860b", "--"
  ),
  # A norm counts as at most twice the median, the default.
  "history, robust": Method(_first(optax_clip.clip_by_history()), "#b8860b", ":"),
  "zclip, early": Method(_first(optax_clip.zclip()), "#c0392b", ":"),
  "adagc, early": Method(_first(optax_clip.adagc()), "#d6569b", ":"),
  "geometric": Method(_first(_by(thresholds.geometric())), "#6b8e23"),
  "geometric, layers": Method(
    _first(_by(thresholds.geometric(), measures.layer_norm())), "#6b8e23", "--"
  ),
  "agreement": Method(_first(clip_by_agreement()), "#5b2c83"),
  "agreement 0.2": Method(_first(clip_by_agreement(rate=0.2)), "#5b2c83", ":"),
  "agreement, all": Method(_first(clip_by_agreement("all")), "#5b2c83", "--"),
  "skip_spikes, geometric": Method(_spikes(_JUDGE), "#7f8c8d", "--"),
  "skip_spikes, early": Method(_spikes(None), "#7f8c8d", ":"),
  # A guard and a clip.
  "pair": Method(_spikes(_HISTORY, _by(thresholds.geometric())), "#2c3e50"),
  "pair, geometric": Method(
    _spikes(_JUDGE, _by(thresholds.geometric())), "#2c3e50", "--"
  ),
  "skip_spikes, global 1": Method(
    _spikes(_HISTORY, optax_clip.clip_by_global_norm(1.0)), "#2c3e50", ":"
  ),
}
