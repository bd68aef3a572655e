"""How clips help a small language model, on clean and on faulty batches.

It trains the byte-level transformer from `examples/language_model` on the source of
Python's standard library. In a run on faulty batches, one batch in 100 holds random
bytes and one in 100 counts 100 times as much; the gradient of the middle one is NaN.
"""

from collections.abc import Callable
from collections.abc import Iterator
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.language_model import _model
from examples.language_model import _text
import optax_clip
from studies import _sweep
from studies._compared import METHODS
from studies._compared import Transformation

Array = jax.Array

WIDTH, LAYERS, LENGTH, BATCH = 32, 2, 32, 16
RANDOM = 0.01
HEAVY = 0.01
HEAVY_WEIGHT = 100.0
BLOCK, SHARE = 4096, 5  # One block in five: such runs do not read more.
BARE = "none, bare"
OPTIMIZERS = {
  "sgd": (lambda rate: optax.sgd(rate, momentum=0.9), (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)),
  "adamw": (optax.adamw, (0.001, 0.003, 0.01, 0.03)),
}
# More rates for the methods that were best on faulty batches at the lowest of those:
# no method must lose because all its rates were too high.
LOWER = {
  ("sgd", name): (0.00625, 0.0125, 0.025)
  for name in ("none", "layer 1", "history", "skip_spikes")
}
NAMES = (
  BARE,
  "none",
  "global 0.1",
  "global 1",
  "layer 1",
  "tanh 1",
  "agc 0.01",
  "autoclip",
  "history",
  "zclip",
  "adagc",
  "skip_spikes",
  "skip_spikes, global 1",
  "geometric",
  "agreement",
)


@functools.cache
def texts() -> tuple[np.ndarray, np.ndarray]:
  """Loads bytes to train on, and 512 windows that no run has seen."""
  text = _text.load()
  held_out = next(_text.windows(text.held_out, 1, 512, LENGTH + 1, 0))
  whole = len(text.train) // BLOCK * BLOCK
  return text.train[:whole].reshape(-1, BLOCK)[::SHARE].ravel(), held_out


def around(name: str) -> Callable[[Transformation], Transformation]:
  """Returns the method inside `skip_nonfinite`, or `BARE` without it."""
  if name == BARE:
    return METHODS["none"].around
  return lambda optimizer: optax_clip.skip_nonfinite(METHODS[name].around(optimizer))


def task(steps: int) -> _sweep.Task:
  """Makes the language model's task; a member's `faults` says if batches are bad."""

  def build(seed: int) -> _model.Transformer:
    return _model.Transformer(WIDTH, LAYERS, LENGTH, nnx.Rngs(seed))

  graph, _ = nnx.split(nnx.eval_shape(lambda: build(0)))
  train, held_out = (jnp.asarray(x) for x in texts())

  def loss(params: Any, windows: Array) -> Array:
    return _model.loss(nnx.merge(graph, nnx.State(params)), windows)

  def gradient(params: Any, member: Any, key: Array, step: Array) -> Any:
    where, chance, noise = jax.random.split(key, 3)
    starts = jax.random.randint(where, (BATCH, 1), 0, len(train) - LENGTH - 1)
    windows = train[starts + jnp.arange(LENGTH + 1)]
    faults = member["faults"] == 1
    fate = jax.random.uniform(chance)
    junk = jax.random.bits(noise, windows.shape, jnp.uint8)
    windows = jnp.where(faults & (fate < RANDOM), junk, windows)
    heavy = faults & (fate >= RANDOM) & (fate < RANDOM + HEAVY)
    weight = jnp.where(heavy, HEAVY_WEIGHT, 1.0)
    weight = jnp.where(faults & (step == steps // 2), jnp.nan, weight)
    return jax.grad(lambda p: weight * loss(p, windows))(params)

  return _sweep.Task(
    lambda seed: nnx.to_pure_dict(nnx.state(build(seed))),
    gradient,
    lambda params: {"loss": loss(params, held_out)},
  )


def run(
  quick: bool = False,
  note: Callable[[str], None] = lambda text: None,
  *,
  names: tuple[str, ...] = NAMES,
  optimizers: tuple[str, ...] = tuple(OPTIMIZERS),
  seeds: int = 5,
  steps: int = 200,
) -> Iterator[dict[str, Any]]:
  """Yields one row for each optimizer, method, learning rate and kind of batches.

  ``loss`` is each seed's final held-out loss, in nats per byte; null where it is not
  finite.
  """
  if quick:
    names, seeds, steps = ("none", "global 1"), 2, 20
  for optimizer in optimizers:
    build, listed = OPTIMIZERS[optimizer]
    for name in names:
      rates = LOWER.get((optimizer, name), ()) + listed
      who = _sweep.members(
        faults=np.arange(2), rate=np.float32(rates), seed=np.arange(seeds)
      )
      note(f"language: {optimizer}, {name}")
      scores = _sweep.train(
        task(steps),
        lambda member, build=build, name=name: around(name)(build(member["rate"])),
        who,
        steps,
        steps,
      )
      for faults in range(2):
        for i, rate in enumerate(rates):
          first = (faults * len(rates) + i) * seeds
          mine = {k: v[first : first + seeds, -1] for k, v in scores.items()}
          yield {
            "study": "language",
            "optimizer": optimizer,
            "method": name,
            "batches": ("clean", "faulty")[faults],
            "rate": rate,
            "steps": steps,
            "loss": [
              round(float(x), 4) if np.isfinite(x) else None for x in mine["loss"]
            ],
            "clipped": mine["clipped"].tolist(),
            "idle": mine["idle"].tolist(),
          }
