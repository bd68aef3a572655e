"""A threshold that changes in training: by a schedule, or by hand from the loop.

A small network learns scikit-learn's handwritten digits three times::

    python threshold_schedule.py --max-norm 1 --end 0.2

* ``fixed``: one `max_norm` for the whole run.
* ``schedule``: `max_norm` is a schedule of optax, a function of the step, which the
  clip counts itself. It is for what is known in advance.
* ``by hand``: `optax.inject_hyperparams` keeps `max_norm` in the optimizer's state,
  where the loop changes it. It is for what only the run tells: here, every so many
  steps, the median of the norms since the last change.

JAX compiles each step once, as the last column says: what changes is a value that the
step reads, not a constant in the program.
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


def set_max_norm(state: Any, value: float) -> None:
  """Changes the threshold of the injected clip, the first of the chain."""
  # An array of the same dtype: for a number `jax.jit` would compile once more.
  hyperparams = state[0].hyperparams
  hyperparams["max_norm"] = jnp.asarray(value, hyperparams["max_norm"].dtype)


def train(way: str, flags: argparse.Namespace) -> dict[str, Any]:
  """Trains once; returns norms and limits, how often JAX traced, and the accuracy."""
  images, labels = load_digits(return_X_y=True)
  images, test_images, labels, test_labels = train_test_split(
    np.float32(images / 16), labels, test_size=0.2, random_state=0, stratify=labels
  )
  up, down = jax.random.normal(jax.random.key(flags.seed), (2, 64, 64)) / 8
  params = {"up": up, "down": down[:, :10]}
  clip, max_norm = optax_clip.clip_by_global_norm, flags.max_norm
  if way == "schedule":
    max_norm = optax.linear_schedule(flags.max_norm, flags.end, flags.steps)
  if way == "by hand":
    clip = optax.inject_hyperparams(clip)
  tx = optax.chain(clip(max_norm, name="clip"), optax.sgd(flags.lr, momentum=0.9))
  state, traces = tx.init(params), 0

  def scores(params: Any, images: jax.Array) -> jax.Array:
    return jax.nn.relu(images @ params["up"]) @ params["down"]

  @jax.jit
  def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
    nonlocal traces
    traces += 1  # Python runs this only while JAX traces, before it compiles.

    def loss_fn(params: Any) -> jax.Array:
      each = optax.softmax_cross_entropy_with_integer_labels
      return each(scores(params, images), labels).mean()

    updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
    return optax.apply_updates(params, updates), state, optax_clip.metrics(state)

  logs, random = [], np.random.default_rng(flags.seed)
  for number in progress(range(flags.steps), f"training, {way}"):
    if way == "by hand" and number and number % flags.every == 0:
      norms = jax.device_get([seen["clip/norm"] for seen in logs[-flags.every :]])
      set_max_norm(state, np.median(norms).item())
    picked = random.integers(len(labels), size=64)
    params, state, seen = step(params, state, images[picked], labels[picked])
    logs.append(seen)
  logs = jax.tree.map(lambda *values: np.stack(values), *jax.device_get(logs))
  right = jnp.argmax(scores(params, test_images), axis=-1) == test_labels
  share, accuracy = np.mean(logs["clip/clipped"]).item(), right.mean().item()
  return logs | {"share": share, "accuracy": accuracy, "traces": traces}


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
  """Trains three times and prints a table; returns the runs."""
  flags = parse(argv)
  done = {way: train(way, flags) for way in ("fixed", "schedule", "by hand")}
  print("            max_norm: first    last   clipped   right   traced")
  for way, run in done.items():
    first, last = (run["clip/limit"][i] for i in (0, -1))
    rest = f"{run['share']:9.0%} {run['accuracy']:7.1%} {run['traces']:8}"
    print(f"{way:12} {first:14.3g} {last:7.3g} {rest}")
  fixed, schedule, hand = (f"{run['share']:.0%}" for run in done.values())
  print(
    f"A fixed max_norm clipped {fixed} of {flags.steps} steps, a schedule {schedule},"
    f" and the median of the last {flags.every} norms {hand}."
  )
  return done


def progress(items: Sequence[Any], title: str) -> Any:
  """Shows a bar on a terminal, if rich is installed; elsewhere prints one line."""
  if sys.stdout.isatty() and importlib.util.find_spec("rich"):
    return importlib.import_module("rich.progress").track(items, title)
  print(f"{title}: {len(items)} steps", flush=True)
  return items


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Reads and checks the flags."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  add = parser.add_argument
  add("--max-norm", type=float, default=1.0, help="at the start")
  add("--end", type=float, default=0.2, help="max_norm that the schedule ends at")
  add("--every", type=int, default=100, help="steps between changes by hand")
  add("--lr", type=float, default=0.1, help="learning rate of SGD with momentum")
  add("--steps", type=int, default=500, help="of each run")
  add("--seed", type=int, default=0, help="of the weights and the batches")
  flags = parser.parse_args(argv)
  for name, value in vars(flags).items():
    least = 1 if name in ("every", "steps") else 0
    if not value >= least:
      parser.error(f"--{name.replace('_', '-')}: {value} is not at least {least}")
  return flags


if __name__ == "__main__":
  main()
