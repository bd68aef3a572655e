"""Equinox: clipping, a guarded step and their metrics for a model that is a tree.

A small network learns scikit-learn's handwritten digits. In one batch of a hundred
one pixel is NaN, as from a broken file::

    python equinox_mlp.py --broken-every 100 --max-norm 0.5

An Equinox model is a tree of arrays and of what is none, such as functions.
`eqx.partition` takes the arrays out: these are what the optimizer and the clip see.
`optax_clip.guarded_step` takes the whole step or, if the gradients hold a NaN, changes
no weight, no moment and no count. With ``record="layers"`` the guard says which layer
the NaN came from; Equinox's names of the layers are those of the report.
"""

import argparse
from collections.abc import Sequence
import importlib.util
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_clip


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Trains and prints; returns the last metrics, and the accuracy."""
  flags = parse(argv)
  images, labels = load_digits(return_X_y=True)
  images, test_images, labels, test_labels = train_test_split(
    np.float32(images / 16), labels, test_size=0.2, random_state=0, stratify=labels
  )
  model = eqx.nn.MLP(64, 10, width_size=64, depth=1, key=jax.random.key(flags.seed))
  params, static = eqx.partition(model, eqx.is_inexact_array)
  clip = optax_clip.clip_by_global_norm(flags.max_norm)
  tx = optax_clip.skip_nonfinite(
    optax.chain(clip, optax.adamw(flags.lr)), record="layers"
  )
  state = tx.init(params)

  @eqx.filter_jit
  def train_step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
    def loss_fn(params: Any) -> jax.Array:
      scores = jax.vmap(eqx.combine(params, static))(images)
      return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    params, state = optax_clip.guarded_step(tx, grads, state, params)
    return params, state, {"loss": loss, **optax_clip.metrics(state)}

  random = np.random.default_rng(flags.seed)
  for step in progress(range(flags.steps), "training"):
    picked = random.integers(len(labels), size=64)
    batch = images[picked]
    if flags.broken_every and step % flags.broken_every == 0:
      batch[0, 0] = np.nan
    params, state, logs = train_step(params, state, batch, labels[picked])
  seen = {name: value.item() for name, value in logs.items()}
  scores = jax.vmap(eqx.combine(params, static))(test_images)
  seen["accuracy"] = jnp.mean(jnp.argmax(scores, axis=-1) == test_labels).item()
  print(optax_clip.layer_metrics(state, params))
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
