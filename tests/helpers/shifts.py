"""How long each method takes to follow norms that change for good, measured.

`python -m helpers.shifts`, in `tests`, prints the tables of docs/learned.md.
"""

import jax
import jax.numpy as jnp
import numpy as np

from helpers import learned
from optax_clip import thresholds

# With the defaults of the named transformations; no cap, which is not memory.
METHODS = {
  "autoclip": thresholds.percentile(),
  "clip_by_layer_percentile": thresholds.percentile(5.0, 100),
  "clip_by_history": thresholds.history(surprise=2.0),
  "clip_by_history, surprise=None": thresholds.history(),
  "zclip": thresholds.zscore(),
  'zclip, mode="mean"': thresholds.zscore(mode="mean"),
  'zclip, mode="percentile"': thresholds.zscore(mode="percentile"),
  "adagc": thresholds.clipped_mean(warmup_norm=1e9),
  "adaclip": thresholds.average(),
  "thresholds.geometric": thresholds.geometric(),
}

BEFORE, AFTER = 2000, 8000


def noise(seed=0):
  """Healthy norms: log-normal, 10%, no spikes."""
  rng = np.random.default_rng(seed)
  return np.exp(0.1 * rng.standard_normal(BEFORE + AFTER)).astype(np.float32)


def shift(factor):
  level = np.where(np.arange(BEFORE + AFTER) < BEFORE, 1.0, factor)
  return noise() * level.astype(np.float32)


def drift(factor, steps=2000):
  t = np.clip((np.arange(BEFORE + AFTER) - BEFORE) / steps, 0, 1)
  return noise() * (factor**t).astype(np.float32)


def smooth(x):
  """Running medians of 25."""
  windows = np.lib.stride_tricks.sliding_window_view(np.minimum(x, 1e30), 25)
  return np.median(windows, axis=1)


def steps_to_follow(threshold, norms, factor, start):
  """Steps after `start` until limits are within 10% of those of the new level.

  What those are is measured on norms that were there from the first step. `None`
  if it takes more than are measured.
  """
  limits, _ = learned.limits(threshold, norms)
  home, _ = learned.limits(threshold, noise() * np.float32(factor))
  target = np.median(home[start:])
  near = np.abs(smooth(limits)[start:] / target - 1) < 0.1
  return int(np.argmax(near)) if np.any(near) else None


def kept_while_drifting(threshold, factor, steps=2000):
  """The least share of a norm that was kept, median of 25, as norms rise."""
  norms = drift(factor, steps)
  limits, _ = learned.limits(threshold, norms)
  share = smooth(np.minimum(limits / norms, 1))
  return float(np.min(share[BEFORE : BEFORE + steps]))


def measured():
  """A row for each method: steps after x30, after /30, after a drift, share kept."""
  rows = {}
  for name, threshold in METHODS.items():
    rows[name] = (
      steps_to_follow(threshold, shift(30), 30, BEFORE),
      steps_to_follow(threshold, shift(1 / 30), 1 / 30, BEFORE),
      steps_to_follow(threshold, drift(100), 100, BEFORE + 2000),
      kept_while_drifting(threshold, 100),
    )
  return rows


def table():
  """The rows in Markdown."""
  lines = [
    "| method | x30 | /30 | after x100 in 2,000 steps | kept meanwhile |",
    "|---|---|---|---|---|",
  ]
  for name, (up, down, after, kept) in measured().items():
    cells = [f"> {AFTER:,}" if x is None else f"{x:,}" for x in (up, down)]
    cells.append(f"> {AFTER - 2000:,}" if after is None else f"{after:,}")
    lines.append(f"| `{name}` | {' | '.join(cells)} | {kept:.2f} |")
  return "\n".join(lines)


if __name__ == "__main__":
  print(f"jax {jax.__version__}, {jnp.zeros(()).devices()}")
  print(table())
