"""Fine-tuning: a frozen layer, and a threshold for each group of layers.

A network of three layers learns the digits 0 to 4. Then its first layer is frozen, its
last one begins anew, and it learns the digits 5 to 9, once for each way to clip::

    python fine_tuning.py --max-norm 1

JAX computes a gradient for a frozen layer too, and the clip decides if it counts:

* ``all``: `clip_by_global_norm` before anything else. The frozen layer counts.
* ``counted``: the norm of the layers that are trained, by ``counted``.
* ``groups``: a norm and a limit for each group; ``inf`` measures and never clips.
* ``inside``: a clip for each group, inside `optax.multi_transform`. The updates are
  those of ``groups``; the metrics have each group apart.
"""

import argparse
from collections.abc import Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_clip

# The first expression that is found in the path of a leaf says its group.
GROUPS = optax_clip.labels_by_path({"^stem": "frozen", "^head": "head", "": "body"})
WAYS = ("all", "counted", "groups", "inside")
FIELDS = ("norm", "coefficient", "clipped")


def init(seed: int) -> dict[str, jax.Array]:
  """Makes the weights before training: the head has a score for each digit."""
  stem, body, head = jax.random.normal(jax.random.key(seed), (3, 64, 64)) / 6
  return {"stem": stem, "body": body, "head": head[:, :5]}


def scores(params: dict[str, jax.Array], images: jax.Array) -> jax.Array:
  """Maps f32[batch, 64] to f32[batch, 5]."""
  hidden = jax.nn.relu(jax.nn.relu(images @ params["stem"]) @ params["body"])
  return hidden @ params["head"]


def optimizer(way: str, flags: argparse.Namespace) -> optax.GradientTransformation:
  """Makes the clip and the optimizer of one of `WAYS`; the metrics have its name."""
  limits = {"body": 0.6 * flags.max_norm, "head": 0.8 * flags.max_norm}
  # The weights of the body are trained already, and move a tenth as fast.
  groups = {"body": optax.adamw(flags.lr / 10), "head": optax.adamw(flags.lr)}
  groups["frozen"] = optax.set_to_zero()
  by_norm, by_group = optax_clip.clip_by_global_norm, optax_clip.clip_by_group_norm
  if way == "inside":
    for group, limit in limits.items():
      groups[group] = optax.chain(by_norm(limit, name=group), groups[group])
  trained = {"stem": False, "body": True, "head": True}
  clips = {
    "all": by_norm(flags.max_norm, name=way),
    "counted": by_group("one", {"one": flags.max_norm}, counted=trained, name=way),
    "groups": by_group(GROUPS, limits | {"frozen": math.inf}, name=way),
    "inside": optax.identity(),
  }
  return optax.chain(clips[way], optax.multi_transform(groups, GROUPS))


def train(params: Any, tx: Any, first: int, flags: argparse.Namespace) -> Any:
  """Learns five digits; returns weights, metrics of all steps, and the accuracy."""
  images, labels = load_digits(return_X_y=True)
  kept = (first <= labels) & (labels < first + 5)
  images, test_images, labels, test_labels = train_test_split(
    np.float32(images[kept] / 16), labels[kept] - first, test_size=0.2, random_state=0
  )

  @jax.jit
  def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
    def loss_fn(params: Any) -> jax.Array:
      each = optax.softmax_cross_entropy_with_integer_labels
      return each(scores(params, images), labels).mean()

    updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
    seen = optax_clip.metrics(state, allow_empty=True)
    return optax.apply_updates(params, updates), state, seen

  state, logs, random = tx.init(params), [], np.random.default_rng(flags.seed)
  for _ in range(flags.steps):
    at = random.integers(len(labels), size=64)
    params, state, seen = step(params, state, images[at], labels[at])
    logs.append(seen)
  logs = jax.tree.map(lambda *values: np.stack(values), *jax.device_get(logs))
  right = jnp.argmax(scores(params, test_images), axis=-1) == test_labels
  return params, logs, right.mean().item()


def main(argv: Sequence[str] | None = None) -> Any:
  """Trains, fine-tunes in each way and prints; returns where it began, and runs."""
  flags = parse(argv)
  start, _, known = train(init(flags.seed), optax.adamw(flags.lr), 0, flags)
  print(f"The digits 0 to 4 are learned: {known:.1%} of those held out are right.")
  start["head"] = init(flags.seed + 1)["head"]
  done = {}
  for number, way in enumerate(WAYS, start=1):
    print(f"{number} of {len(WAYS)}: learning 5 to 9, {flags.steps} steps, clip: {way}")
    done[way] = train(start, optimizer(way, flags), 5, flags)
  print("clip            norm    kept   clipped   right")
  for _, logs, right in done.values():
    for name in sorted({key.partition("/")[0] for key in logs}):
      norm, kept, clipped = (np.mean(logs[f"{name}/{field}"]) for field in FIELDS)
      print(f"{name:12} {norm:7.2f} {kept:7.0%} {clipped:9.0%} {right:7.1%}")
  kept = [np.mean(done[way][1][f"{way}/coefficient"]) for way in ("all", "counted")]
  print(
    f"A clip kept {kept[0]:.0%} of the updates where the frozen layer counts, and"
    f" {kept[1]:.0%} where it does not."
  )
  return start, done


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Reads and checks the flags."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  add = parser.add_argument
  add("--max-norm", type=float, default=1.0, help="of all; the body gets 0.6 of it")
  add("--lr", type=float, default=3e-3, help="of AdamW; of the body a tenth")
  add("--steps", type=int, default=300, help="of each run")
  add("--seed", type=int, default=0, help="of the weights and the batches")
  flags = parser.parse_args(argv)
  for name, value in vars(flags).items():
    least = 1 if name == "steps" else 0
    if not value >= least:
      parser.error(f"--{name.replace('_', '-')}: {value} is not at least {least}")
  return flags


if __name__ == "__main__":
  main()
