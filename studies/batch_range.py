"""At which learning rates a network without normalisation layers trains.

Scikit-learn's digits, a third of them in each batch, four hidden layers, SGD with
momentum.
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

BATCH = 512
NAMES = (
  "none",
  "global 0.1",
  "global 1",
  "global 10",
  "layer 0.1",
  "layer 1",
  "tanh 1",
  "agc 0.01",
  "agc 0.1",
  "autoclip",
  "zclip",
  "zclip, no cap",
  "adagc",
)
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


def gradient(params: Any, member: Any, key: jax.Array, step: jax.Array) -> Any:
  """Differentiates the mean loss over a large batch."""
  del member, step
  images, labels = _digits.batch(key, BATCH)
  return jax.grad(lambda p: jnp.mean(_digits.losses(p, images, labels)))(params)


def run(
  quick: bool = False,
  note: Callable[[str], None] = lambda text: None,
  *,
  names: tuple[str, ...] = NAMES,
  rates: tuple[float, ...] = RATES,
  seeds: int = 5,
  steps: int = 200,
) -> Iterator[dict[str, Any]]:
  """Yields one row for each method and learning rate, with a list over seeds.

  ``accuracy`` is taken after the last step on the test set, in percent.
  """
  if quick:
    names, rates, seeds, steps = ("none", "global 1"), (0.1, 1.0), 2, 30
  task = _sweep.Task(_digits.plain, gradient, _digits.accuracy)
  for name in names:
    note(f"batch_range: {name}")
    scores = _sweep.train(
      task,
      lambda member, name=name: METHODS[name].around(
        optax.sgd(member["rate"], momentum=0.9)
      ),
      _sweep.members(rate=np.float32(rates), seed=np.arange(seeds)),
      steps,
      steps,
    )
    for i, rate in enumerate(rates):
      mine = {k: v[i * seeds : (i + 1) * seeds] for k, v in scores.items()}
      yield {
        "study": "batch_range",
        "method": name,
        "rate": rate,
        "steps": steps,
        "accuracy": _digits.percent(mine["accuracy"]),
        "finite": mine["finite"][:, -1].tolist(),
        "clipped": mine["clipped"][:, -1].tolist(),
      }
