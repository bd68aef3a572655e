"""How clips help with the temporal-order problem in Pascanu et al. (2013).

A sequence of random symbols holds two that matter, A or B, one in its second tenth and
one in its fifth. After the last symbol a recurrent network says which of the four
pairs it was.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from studies import _sweep
from studies._compared import METHODS

Array = jax.Array

UNITS = 50
RADIUS = 0.95
BATCH = 20
TEST = 1000
SOLVED = 0.99
NAMES = (
  "none",
  "global 0.1",
  "global 1",
  "global 10",
  "layer 1",
  "tanh 1",
  "autoclip",
  "zclip",
  "zclip, no cap",
  "adagc",
)
# These are at the shortest length only, which `untuned` asks for.
MORE = (
  "agreement",
  "agreement 0.2",
  "agreement, all",
  "geometric",
  "geometric, layers",
  "adagc, early",
  "layer percentile",
  "zclip, early",
)
# The methods at each length. The longest is costly: "none", and three that did well.
LENGTHS = {
  30: (*NAMES, *MORE),
  50: NAMES,
  100: ("none", "global 1", "layer 1", "adagc"),
}


def sequences(key: Array, count: int, length: int) -> tuple[Array, Array]:
  """Draws symbols i32[count, length], where 0 and 1 matter, and classes i32[count]."""
  noise, where, what = jax.random.split(key, 3)
  symbols = jax.random.randint(noise, (count, length), 2, 6)
  tenth = length // 10
  places = jax.random.randint(where, (count, 2), 0, tenth) + jnp.array([[1, 4]]) * tenth
  pair = jax.random.randint(what, (count, 2), 0, 2)
  rows = jnp.arange(count)[:, None]
  return symbols.at[rows, places].set(pair), 2 * pair[:, 0] + pair[:, 1]


def init(seed: int) -> dict[str, Array]:
  """Draws weights: inside with spectral radius `RADIUS`, the others small Gaussians."""
  random = np.random.default_rng(seed)
  inside = random.normal(size=(UNITS, UNITS))
  inside *= RADIUS / np.abs(np.linalg.eigvals(inside)).max()
  return {
    "in": jnp.float32(random.normal(size=(6, UNITS)) * 0.1),
    "inside": jnp.float32(inside),
    "bias": jnp.zeros(UNITS),
    "out": jnp.float32(random.normal(size=(UNITS, 4)) * 0.1),
    "out_bias": jnp.zeros(4),
  }


def logits(params: dict[str, Array], symbols: Array) -> Array:
  """Computes the network's logits after the last symbol, f32[count, 4]."""

  def step(hidden: Array, symbol: Array) -> Any:
    return jnp.tanh(
      params["in"][symbol] + hidden @ params["inside"] + params["bias"]
    ), None

  hidden, _ = jax.lax.scan(step, jnp.zeros((len(symbols), UNITS)), symbols.T)
  return hidden @ params["out"] + params["out_bias"]


def task(length: int) -> _sweep.Task:
  """Makes the problem at one length; the test sequences are the same for all."""
  test, classes = sequences(jax.random.key(2**31 - 1), TEST, length)

  def gradient(params: Any, member: Any, key: Array, step: Array) -> Any:
    del member, step
    symbols, truth = sequences(key, BATCH, length)

    def loss(params: Any) -> Array:
      return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(logits(params, symbols), truth)
      )

    return jax.grad(loss)(params)

  def score(params: Any) -> dict[str, Array]:
    right = jnp.argmax(logits(params, test), -1) == classes
    return {"accuracy": jnp.mean(right)}

  return _sweep.Task(init, gradient, score)


def run(
  quick: bool = False,
  note: Callable[[str], None] = lambda text: None,
  *,
  lengths: Mapping[int, tuple[str, ...]] = LENGTHS,
  rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3),
  seeds: int = 16,
  steps: int = 3000,
  every: int = 250,
) -> Iterator[dict[str, Any]]:
  """Yields one row for each length, method and learning rate, with a list over seeds.

  ``solved_at`` is the first check at which a member gets `SOLVED` of the test sequences
  right, which ends its training; null if it never does.
  """
  if quick:
    lengths, seeds, steps, every = {20: ("none", "global 1")}, 2, 500, 250
  for length, names in lengths.items():
    for name in names:
      note(f"temporal_order: length {length}, {name}")
      scores = _sweep.train(
        task(length),
        lambda member, name=name: METHODS[name].around(optax.sgd(member["rate"])),
        _sweep.members(rate=np.float32(rates), seed=np.arange(seeds)),
        steps,
        every,
        lambda now: now["accuracy"] >= SOLVED,
      )
      checks = (1 + np.arange(scores["accuracy"].shape[1])) * every
      for i, rate in enumerate(rates):
        mine = {k: v[i * seeds : (i + 1) * seeds] for k, v in scores.items()}
        solved = mine["accuracy"] >= SOLVED
        ends = np.where(solved.any(1), checks[solved.argmax(1)], 0)
        yield {
          "study": "temporal_order",
          "length": length,
          "method": name,
          "rate": rate,
          "steps": steps,
          "solved_at": [int(end) or None for end in ends],
          "best_accuracy": [round(float(x), 4) for x in mine["accuracy"].max(1)],
          "finite": mine["finite"][:, -1].tolist(),
        }
