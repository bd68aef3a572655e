"""Flax NNX: clipping, a guard and their metrics in a training script.

A small network learns scikit-learn's handwritten digits. In a few of the batches one
pixel is NaN, as from a broken file::

    python examples/flax_nnx.py
    python examples/flax_nnx.py --broken 0 --max-norm 0.2

What belongs to clipping is two lines. `skip_nonfinite` around the optimizer leaves out
steps whose gradients hold a NaN, and changes nothing then: no weight, no moment, no
count. `optax_clip.metrics` reads what was done from the `nnx.Optimizer` as it is.

An `nnx.Optimizer` calls ``tx.update``. For large models `optax_clip.guarded_step` is
cheaper, see ``flax_linen.py``, where it stands in place of ``apply_gradients``.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import _digits
import _flags
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_clip

BATCH = 64
WIDTH = 64


class Network(nnx.Module):
  """Two layers, from pixels to a score for each digit."""

  def __init__(self, rngs: nnx.Rngs):
    self.hidden = nnx.Linear(64, WIDTH, rngs=rngs)
    self.output = nnx.Linear(WIDTH, 10, rngs=rngs)

  def __call__(self, images: jax.Array) -> jax.Array:
    """The scores, f32[batch, 10]."""
    return self.output(nnx.relu(self.hidden(images)))


def loss_fn(model: Network, images: jax.Array, labels: jax.Array) -> jax.Array:
  """The mean cross-entropy of a batch."""
  scores = model(images)
  return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


@nnx.jit
def train_step(
  model: Network, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array
) -> dict[str, jax.Array]:
  """One step; returns scalars to log."""
  loss, grads = nnx.value_and_grad(loss_fn)(model, images, labels)
  optimizer.update(model, grads)
  return {"loss": loss, **optax_clip.metrics(optimizer)}


@nnx.jit
def accuracy(model: Network, images: jax.Array, labels: jax.Array) -> jax.Array:
  """The share of images that are recognised."""
  return jnp.mean(jnp.argmax(model(images), axis=-1) == labels)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Trains and prints; returns the last metrics, and the accuracy."""
  flags = parse(argv)
  digits = _digits.load()
  model = Network(nnx.Rngs(flags.seed))
  tx = optax_clip.skip_nonfinite(
    optax.chain(optax_clip.clip_by_global_norm(flags.max_norm), optax.adamw(flags.lr))
  )
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  batches = _digits.batches(digits, flags.steps, BATCH, flags.seed)
  broken = np.linspace(0, flags.steps, flags.broken, endpoint=False, dtype=int)
  print("step    loss    norm   clipped   skipped   accuracy")
  for step, (images, labels) in enumerate(batches):
    if step in broken:
      images[0, 0] = np.nan
    logs = train_step(model, optimizer, images, labels)
    # Only here does Python wait for the device.
    if (step + 1) % flags.every == 0 or step + 1 == flags.steps:
      seen = {name: value.item() for name, value in logs.items()}
      taken = max(1, seen["clip_by_global_norm/steps"])
      seen["accuracy"] = accuracy(model, *digits[2:]).item()
      print(
        f"{step + 1:4} {seen['loss']:7.3f} {seen['clip_by_global_norm/norm']:7.3f}"
        f" {seen['clip_by_global_norm/steps_clipped'] / taken:9.1%}"
        f" {seen['skip_nonfinite/steps_skipped']:9} {seen['accuracy']:10.1%}"
      )
  return seen


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Reads and checks the flags."""
  parser = _flags.Parser(
    description=__doc__.partition("\n")[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add("--max-norm", type=_flags.threshold, default=0.5, help="of the gradients")
  add("--lr", type=_flags.rate, default=3e-3, help="learning rate of AdamW")
  add("--steps", type=_flags.positive, default=500, help="how many")
  add("--broken", type=_flags.natural, default=5, help="batches with a NaN")
  add("--every", type=_flags.positive, default=100, help="steps between lines")
  add("--seed", type=_flags.natural, default=0, help="of the weights and the batches")
  flags = parser.parse_args(argv)
  if flags.broken > flags.steps:
    parser.error(f"argument --broken: {flags.broken} is more than --steps")
  return flags


if __name__ == "__main__":
  try:
    main()
  except KeyboardInterrupt:
    raise SystemExit(130) from None
