"""Thresholds: how large updates may be.

Each function returns a `Threshold` for `optax_clip.clip_with`: a pair of pure
functions, shaped like a gradient transformation but acting on norms. Those that
learn work with any measure: each of its norms has a memory of its own. A step
whose norms are not finite is never remembered, nor is a norm of 0.
"""

from optax_clip._methods.adagc import clipped_mean
from optax_clip._methods.stable_spam import mean_over_rms
from optax_clip._methods.zclip import zscore
from optax_clip._thresholds.average import average
from optax_clip._thresholds.limits import at_most
from optax_clip._thresholds.limits import constant
from optax_clip._thresholds.limits import of
from optax_clip._thresholds.limits import per_group
from optax_clip._thresholds.limits import scheduled
from optax_clip._thresholds.limits import warmup
from optax_clip._thresholds.window import history
from optax_clip._thresholds.window import percentile

__all__ = [
  "at_most",
  "average",
  "clipped_mean",
  "constant",
  "history",
  "mean_over_rms",
  "of",
  "per_group",
  "percentile",
  "scheduled",
  "warmup",
  "zscore",
]
