"""Flax NNX: clipping, a guard and their metrics in a training script.

A small network learns scikit-learn's handwritten digits. In one batch of a hundred
one pixel is NaN, as from a broken file::

    python flax_nnx.py --broken-every 100 --max-norm 0.5

What belongs to clipping is two lines. `skip_nonfinite` around the optimizer leaves out
steps whose gradients hold a NaN, and changes nothing then: no weight, no moment, no
count. `optax_clip.metrics` reads what was done from the `nnx.Optimizer` as it is.

For large models `optax_clip.guarded_step` is cheaper than ``tx.update``, which an
`nnx.Optimizer` calls: see ``flax_linen.py``.
"""

import argparse
from collections.abc import Sequence
import importlib.util
import sys
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_clip


class Network(nnx.Module):
  """Two layers, from 64 pixels to a score for each digit."""

  def __init__(self, rngs: nnx.Rngs):
    self.hidden = nnx.Linear(64, 64, rngs=rngs)
    self.output = nnx.Linear(64, 10, rngs=rngs)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps f32[batch, 64] to f32[batch, 10]."""
    return self.output(nnx.relu(self.hidden(images)))


@nnx.jit
def train_step(
  model: Network, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array
) -> dict[str, jax.Array]:
  """Takes one step; returns scalars to log."""

  def loss_fn(model: Network) -> jax.Array:
    scores = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

  loss, grads = nnx.value_and_grad(loss_fn)(model)
  optimizer.update(model, grads)
  return {"loss": loss, **optax_clip.metrics(optimizer)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Trains and prints; returns the last metrics, and the accuracy."""
  flags = parse(argv)
  images, labels = load_digits(return_X_y=True)
  images, test_images, labels, test_labels = train_test_split(
    np.float32(images / 16), labels, test_size=0.2, random_state=0, stratify=labels
  )
  model = Network(nnx.Rngs(flags.seed))
  tx = optax_clip.skip_nonfinite(
    optax.chain(optax_clip.clip_by_global_norm(flags.max_norm), optax.adamw(flags.lr))
  )
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  random = np.random.default_rng(flags.seed)
  for step in progress(range(flags.steps), "training"):
    picked = random.integers(len(labels), size=64)
    batch = images[picked]
    if flags.broken_every and step % flags.broken_every == 0:
      batch[0, 0] = np.nan
    logs = train_step(model, optimizer, batch, labels[picked])
    # Only here does Python wait for the device.
    if (step + 1) % 100 == 0 or step + 1 == flags.steps:
      seen = {name: value.item() for name, value in logs.items()}
      right = jnp.argmax(model(test_images), axis=-1) == test_labels
      seen["accuracy"] = right.mean().item()
      print(
        f"step {step + 1:5}   loss {seen['loss']:.3f}"
        f"   norm {seen['clip_by_global_norm/norm']:.3f}"
        f"   right {seen['accuracy']:.1%}"
      )
  print(
    f"The network recognises {seen['accuracy']:.1%} of the digits held out:"
    f" {seen['skip_nonfinite/steps_skipped']} of {flags.steps} steps were skipped,"
    f" and {seen['clip_by_global_norm/steps_clipped']} were clipped."
  )
  return seen


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
  add("--max-norm", type=float, default=0.5, help="of the gradients")
  add("--lr", type=float, default=3e-3, help="learning rate of AdamW")
  add("--steps", type=int, default=500, help="how many")
  add("--broken-every", type=int, default=100, help="batches to one NaN; 0: none")
  add("--seed", type=int, default=0, help="of the weights and the batches")
  flags = parser.parse_args(argv)
  for name, value in vars(flags).items():
    least = 1 if name == "steps" else 0
    if not value >= least:
      parser.error(f"--{name.replace('_', '-')}: {value} is not at least {least}")
  return flags


if __name__ == "__main__":
  main()
