"""Clipping with weight decay, L1 and L2 penalties: what is clipped, and what is not.

A small network learns scikit-learn's handwritten digits by plain SGD, with a penalty in
each of the places where it may stand::

    python regularisation.py --max-norm 0.15

Without a clip, with ``--max-norm inf``, all orders end at the same weights.

* ``in loss``: the penalty counts in the norm, and the clip shrinks its gradient, too. A
  step takes less off the weights than the strength says.
* ``before``: `optax.add_decayed_weights` before the clip gives the same sum.
* ``after``: a step takes off what the strength says. Only the gradient of the data
  shrinks, so that the penalty weighs more. A clip before `optax.adamw` does the same.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_clip


def penalties(flags: argparse.Namespace) -> dict[str, tuple[Any, Any, Any]]:
  """Makes of each name: a loss, and what stands before and after the clip."""

  def none(params: Any) -> jax.Array:
    return jnp.zeros(())

  def add_signs(updates: Any, params: Any) -> Any:
    return jax.tree.map(lambda u, p: u + flags.l1 * jnp.sign(p), updates, params)

  norm, nothing = optax.tree.norm, optax.identity()
  decay = optax.add_decayed_weights(flags.l2)
  return {
    "none": (none, nothing, nothing),
    "L2 in loss": (lambda p: flags.l2 / 2 * norm(p, squared=True), nothing, nothing),
    "decay before": (none, decay, nothing),
    "decay after": (none, nothing, decay),
    "L1 in loss": (lambda p: flags.l1 * norm(p, ord=1), nothing, nothing),
    "L1 after": (none, nothing, optax.stateless(add_signs)),
  }


def train(name: str, flags: argparse.Namespace) -> dict[str, np.ndarray]:
  """Trains all seeds at once; returns f32[seeds, steps] and f32[seeds]."""
  images, labels = load_digits(return_X_y=True)
  split = train_test_split(
    np.float32(images / 16), labels, test_size=0.2, random_state=0, stratify=labels
  )
  images, test_images, labels, test_labels = map(jnp.asarray, split)
  penalty, before, after = penalties(flags)[name]
  clip = optax_clip.clip_by_global_norm(flags.max_norm, name="clip")
  tx = optax.chain(before, clip, after, optax.sgd(flags.lr))

  def scores(params: Any, images: jax.Array) -> jax.Array:
    return jax.nn.relu(images @ params["up"]) @ params["down"]

  def step(carry: Any, key: jax.Array) -> Any:
    params, state = carry
    picked = jax.random.randint(key, (64,), 0, len(images))

    def data_loss(params: Any) -> jax.Array:
      each = optax.softmax_cross_entropy_with_integer_labels
      return each(scores(params, images[picked]), labels[picked]).mean()

    data, rest = jax.grad(data_loss)(params), jax.grad(penalty)(params)
    updates, state = tx.update(jax.tree.map(jnp.add, data, rest), state, params)
    seen = optax_clip.metrics(state) | {"data": optax_clip.global_norm(data)}
    return (optax.apply_updates(params, updates), state), seen

  def one_seed(seed: jax.Array) -> Any:
    keys = jax.random.split(jax.random.key(seed), flags.steps + 1)
    up, down = jax.random.normal(keys[0], (2, 64, 64)) / 8
    params = {"up": up, "down": down[:, :10]}
    (params, _), logs = jax.lax.scan(step, (params, tx.init(params)), keys[1:])
    right = jnp.argmax(scores(params, test_images), axis=-1) == test_labels
    weights = optax_clip.global_norm(params)
    return logs | {"weights": weights, "accuracy": right.mean()}

  return jax.tree.map(np.asarray, jax.jit(jax.vmap(one_seed))(jnp.arange(flags.seeds)))


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, np.ndarray]]:
  """Trains in every order and prints a table; returns the runs."""
  flags = parse(argv)
  done, names = {}, list(penalties(flags))
  for number, name in enumerate(names, start=1):
    print(f"{number} of {len(names)}: {name}, {flags.seeds} seeds", flush=True)
    done[name] = train(name, flags)
  print("penalty        norm of data   of sum    kept   weights   right")
  keys = ("data", "clip/norm", "clip/coefficient", "weights", "accuracy")
  for name, run in done.items():
    data, norm, kept, weights, right = (run[key].mean() for key in keys)
    print(f"{name:12} {data:14.3f} {norm:8.3f} {kept:7.0%} {weights:9.2f} {right:7.1%}")
  ends = [done[name]["weights"].mean() for name in ("L2 in loss", "decay after")]
  print(
    f"With max_norm {flags.max_norm:g} the norm of the weights ends at {ends[0]:.2f}"
    f" where L2 is in the loss, and at {ends[1]:.2f} where decay follows the clip."
  )
  return done


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Reads and checks the flags."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  add = parser.add_argument
  add("--max-norm", type=float, default=0.15, help="of what the clip is given")
  add("--l2", type=float, default=0.01, help="strength of weight decay and L2")
  add("--l1", type=float, default=0.003, help="strength of L1")
  add("--lr", type=float, default=0.3, help="learning rate of SGD")
  add("--steps", type=int, default=1500, help="of each run")
  add("--seeds", type=int, default=5, help="how many, from 0")
  flags = parser.parse_args(argv)
  for name, value in vars(flags).items():
    least = 1 if name in ("steps", "seeds") else 0
    if not value >= least:
      parser.error(f"--{name.replace('_', '-')}: {value} is not at least {least}")
  return flags


if __name__ == "__main__":
  main()
