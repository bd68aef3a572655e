"""Sets how large updates may be: thresholds for `optax_clip.clip_with`.

Each function returns a `Threshold`: a pair of pure functions, shaped like a gradient
transformation but acting on norms. Those that learn work with any measure, and
remember each of its norms apart: their state, ``threshold`` in `ClipState`, is a
NamedTuple of arrays over the norms, float32 whatever the dtype of the updates. They
remember no norm of 0, and nothing of a step in which a norm is not finite. ``update``
raises a `ValueError` if the state is of another number of norms, as of another model.
"""

from optax_clip._methods.adagc import clipped_mean
from optax_clip._methods.stable_spam import mean_over_rms
from optax_clip._methods.zclip import zscore
from optax_clip._thresholds.average import average
from optax_clip._thresholds.geometric import geometric
from optax_clip._thresholds.limits import at_most
from optax_clip._thresholds.limits import by_shape
from optax_clip._thresholds.limits import constant
from optax_clip._thresholds.limits import of
from optax_clip._thresholds.limits import per_group
from optax_clip._thresholds.limits import scheduled
from optax_clip._thresholds.limits import until_learned
from optax_clip._thresholds.limits import warmup
from optax_clip._thresholds.window import history
from optax_clip._thresholds.window import percentile

__all__ = [
  "at_most",
  "average",
  "by_shape",
  "clipped_mean",
  "constant",
  "geometric",
  "history",
  "mean_over_rms",
  "of",
  "per_group",
  "percentile",
  "scheduled",
  "until_learned",
  "warmup",
  "zscore",
]
