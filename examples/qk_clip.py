"""QK-Clip in a training loop: attention logits that cannot explode.

A small transformer learns the source of Python's `argparse`, with Adam at a high
learning rate and no norm of queries and keys, so that its attention logits grow; once
without a bound, and once with `optax_clip.qk_clip` after each step::

    python examples/qk_clip.py
    python examples/qk_clip.py --tau 10 --lr 0.03

What belongs to the clip is marked with (1), (2) and (3). The file needs no other: copy
it. It takes half a minute on two cores.
"""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_clip

WIDTH, HEADS, KEY_HEADS, DIM, LAYERS = 32, 4, 2, 8, 2
LENGTH, BATCH = 32, 16


def init(seed: int) -> dict[str, Any]:
  """Weights, layers stacked in one leaf each, for `jax.lax.scan`."""
  random = np.random.default_rng(seed)

  def weights(*shape: int, inputs: int = WIDTH) -> jax.Array:
    return jnp.float32(random.normal(size=shape) * inputs**-0.5)

  return {
    "bytes": weights(256, WIDTH),
    "places": weights(LENGTH, WIDTH),
    "layers": {
      "query": weights(LAYERS, WIDTH, HEADS, DIM),
      "key": weights(LAYERS, WIDTH, KEY_HEADS, DIM),  # Each for two query heads.
      "value": weights(LAYERS, WIDTH, KEY_HEADS, DIM),
      "merge": weights(LAYERS, HEADS, DIM, WIDTH),
      "up": weights(LAYERS, WIDTH, 4 * WIDTH),
      "down": weights(LAYERS, 4 * WIDTH, WIDTH, inputs=4 * WIDTH),
    },
    "logits": weights(WIDTH, 256),
  }


def loss_fn(params: dict[str, Any], windows: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The loss in nats a byte, and the largest attention logits, f32[layers, heads]."""
  x = params["bytes"][windows[:, :-1]] + params["places"]

  def layer(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    y = jax.nn.standardize(x)
    query, key, value = (
      jnp.einsum("bte,ehd->bthd", y, w[name]) for name in ("query", "key", "value")
    )
    # (1) The forward pass measures. What is measured needs no derivative.
    largest = optax_clip.max_attention_logits(
      *jax.lax.stop_gradient((query, key)), is_causal=True
    )
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x = x + jnp.einsum("bthd,hde->bte", mixed, w["merge"])
    x = x + jax.nn.gelu(jax.nn.standardize(x) @ w["up"]) @ w["down"]
    return x, largest

  x, largest = jax.lax.scan(layer, x, params["layers"])
  scores = jax.nn.standardize(x) @ params["logits"]
  losses = optax.softmax_cross_entropy_with_integer_labels(scores, windows[:, 1:])
  return jnp.mean(losses), largest


def make_step(tx: optax.GradientTransformation, tau: float) -> Callable[..., Any]:
  """One step, and after it QK-Clip."""

  @jax.jit
  def step(params: Any, state: Any, windows: jax.Array) -> Any:
    # (2) It comes out of the loss beside it.
    (loss, largest), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, windows)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    # (3) The new weights are scaled: axis 0 has the layers, the next to last the heads.
    layers = dict(params["layers"])
    layers["query"], layers["key"] = optax_clip.qk_clip(
      layers["query"], layers["key"], largest, tau, head_axis=(0, -2)
    )
    return {**params, "layers": layers}, state, loss, jnp.max(largest)

  return step


def train(tau: float, flags: argparse.Namespace) -> tuple[list[float], float]:
  """The largest logit of each step, and the held-out loss at the end."""
  text = np.frombuffer(pathlib.Path(argparse.__file__).read_bytes(), np.uint8)
  text, held_out = np.split(text.astype(np.int32), [len(text) * 9 // 10])
  random = np.random.default_rng(flags.seed)

  def windows(text: np.ndarray, count: int) -> np.ndarray:
    starts = random.integers(0, len(text) - LENGTH, count)
    return text[starts[:, None] + np.arange(LENGTH + 1)]

  params, tx = init(flags.seed), optax.adam(flags.lr)
  state, step = tx.init(params), make_step(tx, tau)
  seen = []
  for _ in range(flags.steps):
    params, state, _, largest = step(params, state, windows(text, BATCH))
    seen.append(largest)  # Read when all is done: no step waits for Python.
  loss, _ = jax.jit(loss_fn)(params, windows(held_out, 256))
  return [float(x) for x in seen], float(loss)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Trains without a bound and with it, and prints; returns what was seen."""
  flags = parse(argv)
  free, free_loss = train(float("inf"), flags)
  bound, bound_loss = train(flags.tau, flags)
  print("largest attention logit, over all layers, heads and positions")
  print(f"  step   no bound   tau = {flags.tau:g}")
  shown = {int(x) for x in np.linspace(0, flags.steps - 1, 7)}
  for i in sorted(shown):
    print(f"{i + 1:6} {free[i]:10.1f} {bound[i]:10.1f}")
  print(
    f"In {flags.steps} steps of Adam at {flags.lr:g} the largest attention logit came"
    f" to {max(free):.0f} without a bound and to {max(bound):.0f} with"
    f" tau = {flags.tau:g}, and the held-out loss to {free_loss:.3f} and"
    f" {bound_loss:.3f} nats/byte."
  )
  return {"free": free, "bound": bound, "losses": (free_loss, bound_loss)}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Reads and checks the flags."""
  parser = argparse.ArgumentParser(
    description=__doc__.partition("\n")[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add("--tau", type=float, default=30.0, help="the largest logit allowed")
  add("--lr", type=float, default=0.02, help="learning rate of Adam")
  add("--steps", type=int, default=300, help="how many")
  add("--seed", type=int, default=0, help="of the weights and the batches")
  flags = parser.parse_args(argv)
  for name in ("tau", "lr", "steps"):
    if not getattr(flags, name) > 0:
      parser.error(f"argument --{name}: {getattr(flags, name)} is not positive")
  if flags.seed < 0:
    parser.error(f"argument --seed: {flags.seed} is negative")
  return flags


if __name__ == "__main__":
  try:
    main()
  except KeyboardInterrupt:
    raise SystemExit(130) from None
