"""LoRA: fine-tuning by small matrices beside frozen ones, each clipped on its own.

A network of three layers learns scikit-learn's handwritten digits. Then all images are
turned by 90 degrees, and it learns again, by an update A B of rank 4 to each matrix W::

    python lora.py --rank 4 --max-norm 0.3

* `optax.multi_transform` gives the frozen matrices to `optax.set_to_zero`, and A and B
  to a clip and to AdamW. The clip stands inside: frozen matrices count in no norm.
* `clip_by_layer_norm` has a norm for each matrix. B begins at zero, and so does the
  gradient of A: a norm for all would be that of the B's alone in the first step.
* ``record="layers"`` keeps what the clip did to each matrix, in the optimizer's state.
  `layer_metrics` takes the part of the parameters that the clip sees.
"""

import argparse
from collections.abc import Sequence
import importlib.util
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_clip

SHAPES = {"stem": (64, 128), "body": (128, 128), "head": (128, 10)}


def init(key: jax.Array, rank: int) -> dict[str, Any]:
  """Makes the matrices, and beside each an update of low rank that is zero."""
  keys = jax.random.split(key, (len(SHAPES), 2))
  return {
    "base": {
      name: jax.random.normal(keys[i, 0], shape) * (2 / shape[0]) ** 0.5
      for i, (name, shape) in enumerate(SHAPES.items())
    },
    "lora": {
      name: {
        "a": jax.random.normal(keys[i, 1], (rows, rank)) / rows**0.5,
        "b": jnp.zeros((rank, columns)),
      }
      for i, (name, (rows, columns)) in enumerate(SHAPES.items())
    },
  }


def scores(params: dict[str, Any], images: jax.Array) -> jax.Array:
  """Maps f32[batch, 64] to f32[batch, 10]."""
  x = images
  for name in SHAPES:
    w, low = params["base"][name], params["lora"][name]
    x = x @ w + x @ low["a"] @ low["b"]
    x = x if name == "head" else jax.nn.relu(x)
  return x


def train(
  params: Any, tx: Any, data: tuple[Any, Any], flags: argparse.Namespace, title: str
) -> Any:
  """Trains for so many steps; returns the weights and the optimizer's state."""

  @jax.jit
  def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
    def loss_fn(params: Any) -> jax.Array:
      each = optax.softmax_cross_entropy_with_integer_labels
      return each(scores(params, images), labels).mean()

    updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
    return optax.apply_updates(params, updates), state

  (images, labels), random = data, np.random.default_rng(flags.seed)
  state = tx.init(params)
  for _ in progress(range(flags.steps), title):
    at = random.integers(len(labels), size=64)
    params, state = step(params, state, images[at], labels[at])
  return params, state


def main(argv: Sequence[str] | None = None) -> Any:
  """Trains, fine-tunes, prints; returns where it began, where it came to, a report."""
  flags = parse(argv)
  images, labels = load_digits(return_X_y=True)
  images, test_images, labels, test_labels = train_test_split(
    np.float32(images / 16), labels, test_size=0.2, random_state=0, stratify=labels
  )

  def turned(images: np.ndarray) -> np.ndarray:
    return np.rot90(images.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)

  def right(params: Any, images: np.ndarray) -> float:
    return jnp.mean(jnp.argmax(scores(params, images), axis=-1) == test_labels).item()

  def only(part: str, tx: Any) -> optax.GradientTransformation:
    rest = {"base": "frozen", "lora": "frozen"} | {part: part}
    return optax.multi_transform({part: tx, "frozen": optax.set_to_zero()}, rest)

  params = init(jax.random.key(flags.seed), flags.rank)
  tx = only("base", optax.adamw(flags.lr))
  start, _ = train(params, tx, (images, labels), flags, "learning the digits")
  clip = optax_clip.clip_by_layer_norm(flags.max_norm, record="layers")
  tx = only("lora", optax.chain(clip, optax.adamw(flags.lr)))
  data = turned(images), labels
  end, state = train(start, tx, data, flags, "turned by 90 degrees")
  report = optax_clip.layer_metrics(state, {"lora": end["lora"]})
  print(report)
  sizes = [sum(x.size for x in jax.tree.leaves(end[part])) for part in ("lora", "base")]
  before, after = (right(params, turned(test_images)) for params in (start, end))
  print(
    f"Of the turned digits held out, the network recognised {before:.1%} before and"
    f" {after:.1%} after {flags.steps} steps that trained {sizes[0]} weights and kept"
    f" {sizes[1]} frozen."
  )
  return start, end, report


def progress(items: Sequence[Any], title: str) -> Any:
  """Shows a bar on a terminal, if rich is installed; elsewhere prints one line."""
  if sys.stdout.isatty() and importlib.util.find_spec("rich"):
    return importlib.import_module("rich.progress").track(items, title)
  print(f"{title}: {len(items)} steps", flush=True)
  return items


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Reads and checks the flags."""
  parser = argparse.ArgumentParser(
    description=__doc__.partition("\n")[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add("--rank", type=int, default=4, help="of the update of each matrix")
  add("--max-norm", type=float, default=0.3, help="of the gradient of each A and B")
  add("--lr", type=float, default=3e-3, help="learning rate of AdamW")
  add("--steps", type=int, default=400, help="of either training")
  add("--seed", type=int, default=0, help="of the weights and the batches")
  flags = parser.parse_args(argv)
  for name, value in vars(flags).items():
    least = 1 if name in ("rank", "steps") else 0
    if not value >= least:
      parser.error(f"--{name.replace('_', '-')}: {value} is not at least {least}")
  return flags


if __name__ == "__main__":
  main()
