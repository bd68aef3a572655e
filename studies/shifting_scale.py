"""Which thresholds need no tuning: one task, with gradients scaled up and down.

It multiplies gradients by a scale before clipping, and divides steps by it after, so
that nothing changes without clipping: only the threshold's fit does. Of every 50
batches one has random labels and counts 100 times as much, as otherwise no method
would have anything to do.
"""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from studies import _digits
from studies import _sweep
from studies._compared import METHODS

Array = jax.Array

BATCH = 64
BAD = 0.02
BAD_WEIGHT = 100.0
# The scale at the first and at the last step; in between it moves geometrically.
SCALES = {
  "0.01": (0.01, 0.01),
  "1": (1.0, 1.0),
  "100": (100.0, 100.0),
  "rising": (0.01, 100.0),
  "falling": (100.0, 0.01),
}
NAMES = (
  "none",
  "global 0.1",
  "global 1",
  "global 10",
  "layer 1",
  "tanh 1",
  "agc 0.01",
  "agc 0.1",
  "autoclip",
  "layer percentile",
  "history",
  "zclip",
  "zclip, no cap",
  "adagc",
  "adagc, no cap",
  "skip_spikes",
  "history, early",
  "history, robust",
  "zclip, early",
  "adagc, early",
  "geometric",
  "geometric, layers",
  "agreement",
  "pair, geometric",
)


def task(steps: int) -> _sweep.Task:
  """Makes the digits' task; a member's `scale` is its place in `SCALES`."""
  ends = np.log(np.float32(list(SCALES.values())))

  def scale(member: Any, step: Array) -> Array:
    first, last = jnp.asarray(ends)[member["scale"]]
    return jnp.exp(first + (last - first) * step / max(steps - 1, 1))

  def gradient(params: Any, member: Any, key: Array, step: Array) -> Any:
    picks, chance, wrong = jax.random.split(key, 3)
    images, labels = _digits.batch(picks, BATCH)
    bad = jax.random.uniform(chance) < BAD
    labels = jnp.where(bad, jax.random.randint(wrong, labels.shape, 0, 10), labels)
    size = scale(member, step) * jnp.where(bad, BAD_WEIGHT, 1.0)
    return jax.grad(lambda p: size * jnp.mean(_digits.losses(p, images, labels)))(
      params
    )

  return _sweep.Task(
    _digits.plain,
    gradient,
    _digits.accuracy,
    lambda member, step: 1 / scale(member, step),
  )


def run(
  quick: bool = False,
  note: Callable[[str], None] = lambda text: None,
  *,
  names: tuple[str, ...] = NAMES,
  rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
  seeds: int = 5,
  steps: int = 400,
) -> Iterator[dict[str, Any]]:
  """Yields one row for each method, scale and learning rate, with a list over seeds."""
  if quick:
    names, rates, seeds, steps = ("none", "global 1"), (0.1,), 2, 30
  who = _sweep.members(
    scale=np.arange(len(SCALES)), rate=np.float32(rates), seed=np.arange(seeds)
  )
  for name in names:
    note(f"shifting_scale: {name}")
    scores = _sweep.train(
      task(steps),
      lambda member, name=name: METHODS[name].around(optax.sgd(member["rate"])),
      who,
      steps,
      steps,
    )
    for i, label in enumerate(SCALES):
      for j, rate in enumerate(rates):
        first = (i * len(rates) + j) * seeds
        mine = {k: v[first : first + seeds] for k, v in scores.items()}
        yield {
          "study": "shifting_scale",
          "method": name,
          "scale": label,
          "rate": rate,
          "steps": steps,
          "accuracy": _digits.percent(mine["accuracy"]),
          "finite": mine["finite"][:, -1].tolist(),
          "clipped": mine["clipped"][:, -1].tolist(),
          "idle": mine["idle"][:, -1].tolist(),
        }
