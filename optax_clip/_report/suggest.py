"""Which threshold fits the norms of a first run. Plain NumPy, on the host."""

from collections.abc import Sequence
import math
from typing import NamedTuple

import jax
from jax.typing import ArrayLike
import numpy as np

from optax_clip._report.history import checked
from optax_clip._thresholds import memory as _memory

Array = jax.Array


# Fewer norms say little about which norms are rare.
_FEWEST = 100
# Tukey's fence for what is "far out", in interquartile ranges.
_FENCE = 3.0
# The number of norms whose median decides whether the start is over: a spike of up
# to half as many steps does not move it.
_RUN = 11
# Levels that differ by less than this factor are one level.
_NEAR = 1.1
# A level that moves by more than the first factor is worth a warning; by more than
# the second, a constant that clips its spikes at one end does nothing at the other.
_DRIFT, _MOVED = 2.0, 4.0
# A start that is a larger share of the run leaves too little to judge by.
_LONGEST_START = 1 / 3
# A constant that clips by this share more than it was asked to does not fit.
_TOO_MANY = 0.15
_PERCENTS = (5, 25, 50, 75, 95, 99)


class Suggestion(NamedTuple):
  """Says what `suggest_max_norm` found; prints as a summary of at most 80 columns.

  Norms and limits are in the units of the updates, shares are from 0 to 1.

  Attributes:
    max_norm: the suggested threshold; NaN if no constant fits.
    misfit: why no constant fits, in a few words; empty if one does.
    clipped: the share of all finite norms that are above it; NaN without one.
    clipped_later: the share of norms after the start that are above it.
    steps: how many steps the history has.
    start: how many first steps were left out; 0 unless their norms were on another
      level than those after them.
    start_level: the median of the norms left out; NaN if there are none.
    spikes: how many norms after the start are spikes. All are above `max_norm`.
    nonfinite: how many norms are NaN or inf.
    zeros: how many norms are 0.
    quantiles: for the norms after the start, from percent to norm: 5, 25, 50, 75, 95,
      99, 100.
    drift: for the norms after the start, the median of their last quarter divided by
      that of their first.
  """

  max_norm: float
  misfit: str
  clipped: float
  clipped_later: float
  steps: int
  start: int
  start_level: float
  spikes: int
  nonfinite: int
  zeros: int
  quantiles: dict[int, float]
  drift: float

  def __str__(self) -> str:
    """Writes a summary for people; the fields hold all digits."""
    levels = "  ".join(f"{q}% {_digits(self.quantiles[q])}" for q in (5, 50, 95))
    later = f", {100 * self.clipped_later:.1f}% after the start" if self.start else ""
    spikes = f"{self.spikes} spike{'' if self.spikes == 1 else 's'}"
    # Norms of the start are not among the quantiles.
    whose = "after start" if self.start else "norms      "
    lines = [
      f"max_norm {_digits(self.max_norm)} would have clipped"
      f" {100 * self.clipped:.1f}% of the norms{later}",
      f"  steps       {self.steps}: {self.nonfinite} not finite, {self.zeros} of norm"
      f" 0, {spikes}",
      f"  {whose} {levels}  max {_digits(self.quantiles[100])}",
    ]
    if self.misfit:
      lines[:1] = [
        f"no max_norm fits these norms: {self.misfit}",
        "  instead     a limit that follows, as that of clip_by_history()",
      ]
    if self.start:
      middle = _digits(self.quantiles[50])
      lines.append(
        f"  left out    the first {self.start} steps: median"
        f" {_digits(self.start_level)}, later {middle}"
      )
    if not self.misfit and not 1 / _DRIFT <= self.drift <= _DRIFT:
      lines.append(
        f"  note        the level moved by a factor of {_digits(self.drift)}: observe"
        " longer,\n              or take a limit that follows, as clip_by_history()"
      )
    return "\n".join(lines)


def suggest_max_norm(
  norms: ArrayLike | Sequence[float], clipped_share: float = 0.05
) -> Suggestion:
  r"""Suggests a `max_norm` that clips all spikes, and few other norms.

  .. math::
      c = \text{quantile}_{1 - s} \{ n_t : t \geq t_0, \; \log n_t \leq Q_3 + 3
      (Q_3 - Q_1) \}

  with s the `clipped_share` and Q the quartiles of :math:`\log n_t, t \geq t_0`.
  The usual advice is a threshold that acts rarely in steady state and lies well below
  the spikes. Here is how this meets each half:

  * *Spikes* lie beyond Tukey's outer fence, on logarithms as norms spread by factors:
    for log-normal norms one in a million does. They are left out before the quantile
    is taken, which would lie among them wherever their share is above s. Up to a
    quarter of the norms may be spikes.
  * *The start* is left out only if it is on another level, as before a warm-up has
    ended: :math:`t_0` is the middle of the first 11 norms in a row whose median lies
    within the second half's 5% to 95% quantiles, or within 10% of these. It is 0 if
    that is so at once, and never beyond the half.

  No constant fits, and `max_norm` is NaN, if the start is more than a third of the
  run; if c would have clipped more than s + 15% of the norms that are not spikes, those
  of the start included; or if the level after the start moves by more than a factor of
  4. Then a threshold that follows fits, as `clip_by_history`.

  Norms that are not finite, and norms of 0, which say nothing, do not count.

  Args:
    norms: f[steps], the oldest first, from a run without clipping: what `norm_history`
      returns, or any sequence of numbers. With norms by layer take one column.
    clipped_share: s, from 0 to below 1. With 0, `max_norm` is the largest norm that
      is not a spike. Small shares mean little for the direction of training and only
      protect; large ones make clipping a part of the learning rate.

  Returns:
    A `Suggestion`: the threshold, what it would have done, and what is worth knowing
    about the history. It is as good as the history is typical: a clipped run may take
    another course.

  Raises:
    ValueError: if `norms` is not one-dimensional, has a negative number, is all zero,
      is mostly not finite, or has fewer than 100 norms that are finite and above 0, or
      fewer than 1 / s; or if `clipped_share` is not in [0, 1).
    TypeError: if `norms` are not real numbers, or are traced.

  ======================  =================================================
  history                 result
  ======================  =================================================
  equal norms             that norm, which clips none of them
  one spike or many       clipped, without influence on `max_norm`
  a level that moves      by up to a factor of 4: a quantile over all levels
                          after the start, and a note; else NaN, and `misfit`
  ======================  =================================================

  Example:
    >>> import numpy as np, optax_clip
    >>> norms = np.linspace(0.5, 1.5, 200)[np.arange(200) * 77 % 200]
    >>> norms[150] = 40.0
    >>> found = optax_clip.suggest_max_norm(norms)
    >>> print(round(found.max_norm, 2), found.spikes)
    1.45 1

  References:
    Tukey, Exploratory Data Analysis, 1977 (the fences).
  """
  if not 0 <= clipped_share < 1:
    raise ValueError(
      f"clipped_share must be at least 0 and below 1, got {clipped_share!r}. It is the"
      " share of steps to clip: 0.05 is one in twenty."
    )
  history = checked(norms)
  finite = np.isfinite(history)
  places = np.flatnonzero(finite & (history > 0))
  _require_enough(history, places, clipped_share)

  logs = np.log(history[places])
  start = _start(logs)
  settled = history[places[start:]]
  spikes = logs[start:] > _fence(logs[start:])
  max_norm = float(np.quantile(settled[~spikes], 1 - clipped_share))
  ordinary = np.concatenate([history[places[:start]], settled[~spikes]])
  quarter = len(settled) // 4
  drift = float(np.median(settled[-quarter:]) / np.median(settled[:quarter]))
  too_many = float(np.mean(ordinary > max_norm))
  misfit = ""
  if start > _LONGEST_START * len(logs):
    misfit = "their level settles late"
  elif too_many > clipped_share + _TOO_MANY:
    misfit = f"one for the later clips {100 * too_many:.0f}% of all"
  elif not 1 / _MOVED <= drift <= _MOVED:
    misfit = f"the level moved by {_digits(drift)} times"
  if misfit:
    max_norm = math.nan
  return Suggestion(
    max_norm=max_norm,
    misfit=misfit,
    clipped=math.nan if misfit else float(np.mean(history[finite] > max_norm)),
    clipped_later=math.nan if misfit else float(np.mean(settled > max_norm)),
    steps=len(history),
    start=int(places[start]) if start else 0,
    start_level=float(np.median(history[places[:start]])) if start else math.nan,
    spikes=int(spikes.sum()),
    nonfinite=int((~finite).sum()),
    zeros=int((history == 0).sum()),
    quantiles={q: float(np.percentile(settled, q)) for q in (*_PERCENTS, 100)},
    drift=drift,
  )


def _require_enough(history: np.ndarray, places: np.ndarray, share: float) -> None:
  wrong = int((~np.isfinite(history)).sum())
  if len(history) and wrong > len(history) / 2:
    raise ValueError(
      f"norms has {wrong} of {len(history)} that are NaN or inf: no threshold helps"
      " such a run. Lower the learning rate, or, with float16 gradients, scale the"
      " loss with optax_clip.dynamic_loss_scale; then observe again."
    )
  if len(history) and not history.any():
    raise ValueError(
      f"norms is zero at all {len(history)} steps: the loss does not depend on the"
      " parameters, or they are all frozen. Check what is differentiated."
    )
  needed = max(_FEWEST, math.ceil(1 / share) if share else 0)
  if len(places) < needed:
    reason = f" for clipped_share={share!r}" if needed > _FEWEST else ""
    raise ValueError(
      f"norms has {len(places)} that are finite and above 0, of {len(history)}, but"
      f" {needed} are needed{reason}: observe a longer run."
    )


def _fence(logs: np.ndarray) -> float:
  """Returns the level above which norms are spikes, beyond rounding errors."""
  first, third = np.percentile(logs, (25, 75))
  return float(third + _FENCE * (third - first) + _memory.NOISE)


def _start(logs: np.ndarray) -> int:
  """Counts the first norms that are on another level than the second half."""
  half = len(logs) // 2
  later = logs[half:]
  later = later[later <= _fence(later)]
  low, high = np.percentile(later, (5, 95))
  near = math.log(_NEAR)
  runs = np.lib.stride_tricks.sliding_window_view(logs[: half + _RUN - 1], _RUN)
  level = np.median(runs, axis=1)
  inside = (level >= low - near) & (level <= high + near)
  first = int(np.argmax(inside)) if inside.any() else half
  return min(first + _RUN // 2, half) if first else 0


def _digits(value: float) -> str:
  return f"{value:.3g}"
