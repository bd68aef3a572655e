"""Flax Linen: clipping, a guarded step and their metrics, with a `TrainState`.

A small network learns scikit-learn's handwritten digits. In a few of the batches one
pixel is NaN, as from a broken file::

    python examples/flax_linen.py
    python examples/flax_linen.py --broken 0 --max-norm 0.2

`optax_clip.guarded_step` takes the whole step or, if the gradients hold a NaN, changes
no weight, no moment and no count. It stands in place of ``state.apply_gradients``,
which works too and gives the same numbers, but makes a copy of the updates for a guard
(docs/skipping.md has the costs). ``state.step`` counts batches, left out or not; what
counts steps taken is in the metrics.
"""

import argparse
from collections.abc import Sequence
import functools
from typing import Any

import _digits
import _flags
import flax.linen as nn
from flax.training.train_state import TrainState
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_clip

BATCH = 64
WIDTH = 64


class Network(nn.Module):
  """Two layers, from pixels to a score for each digit."""

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """The scores, f32[batch, 10]."""
    return nn.Dense(10)(nn.relu(nn.Dense(WIDTH)(images)))


def create(flags: argparse.Namespace) -> TrainState:
  """The weights and the optimizer before the first step."""
  network = Network()
  tx = optax_clip.skip_nonfinite(
    optax.chain(optax_clip.clip_by_global_norm(flags.max_norm), optax.adamw(flags.lr))
  )
  variables = network.init(jax.random.key(flags.seed), jnp.zeros((1, 64)))
  return TrainState.create(apply_fn=network.apply, params=variables["params"], tx=tx)


# The old state's memory is used for the new one.
@functools.partial(jax.jit, donate_argnums=0)
def train_step(
  state: TrainState, images: jax.Array, labels: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One step; returns scalars to log as well."""

  def loss_fn(params: Any) -> jax.Array:
    scores = state.apply_fn({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

  loss, grads = jax.value_and_grad(loss_fn)(state.params)
  params, opt_state = optax_clip.guarded_step(
    state.tx, grads, state.opt_state, state.params
  )
  state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
  return state, {"loss": loss, **optax_clip.metrics(state)}


@jax.jit
def accuracy(state: TrainState, images: jax.Array, labels: jax.Array) -> jax.Array:
  """The share of images that are recognised."""
  scores = state.apply_fn({"params": state.params}, images)
  return jnp.mean(jnp.argmax(scores, axis=-1) == labels)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Trains and prints; returns the last metrics, and the accuracy."""
  flags = parse(argv)
  digits = _digits.load()
  state = create(flags)

  batches = _digits.batches(digits, flags.steps, BATCH, flags.seed)
  broken = np.linspace(0, flags.steps, flags.broken, endpoint=False, dtype=int)
  print("step    loss    norm   clipped   skipped   accuracy")
  for step, (images, labels) in enumerate(batches):
    if step in broken:
      images[0, 0] = np.nan
    state, logs = train_step(state, images, labels)
    # Only here does Python wait for the device.
    if (step + 1) % flags.every == 0 or step + 1 == flags.steps:
      seen = {name: value.item() for name, value in logs.items()}
      taken = max(1, seen["clip_by_global_norm/steps"])
      seen["accuracy"] = accuracy(state, *digits[2:]).item()
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
