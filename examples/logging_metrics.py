"""What clipping did, in TensorBoard, in Weights & Biases, and in a CSV file.

A small network learns scikit-learn's handwritten digits. `optax_clip.metrics` is a flat
dictionary of scalars, so that a logger needs a few lines::

    python logging_metrics.py --to csv,tensorboard,wandb
    tensorboard --logdir out                  # after `pip install tensorboard`
    wandb sync out/wandb/offline-run-*        # nothing is sent before

No step waits for Python. Scalars stay on the device until a portion of steps is full.
The script fetches them while the device computes the next portion; see `Late`.
"""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import csv
import importlib.util
from pathlib import Path
import sys
from typing import Any

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_clip


@contextlib.contextmanager
def to_csv(out: Path) -> Any:
  """Writes a line for each step, below the names of the metrics."""
  with (out / "metrics.csv").open("w", newline="") as file:
    lines = csv.writer(file)

    def write(step: int, row: dict[str, float]) -> None:
      if file.tell() == 0:
        lines.writerow(["step", *row])
      lines.writerow([step, *row.values()])

    yield write


@contextlib.contextmanager
def to_tensorboard(out: Path) -> Any:
  """Writes event files by tensorboardX, which needs no TensorFlow."""
  import tensorboardX

  with tensorboardX.SummaryWriter(str(out / "tensorboard")) as writer:
    yield lambda step, row: [writer.add_scalar(k, v, step) for k, v in row.items()]


@contextlib.contextmanager
def to_wandb(out: Path) -> Any:
  """Writes a run of Weights & Biases into a file; mode "online" sends it at once."""
  import wandb

  quiet = wandb.Settings(silent=True)
  with wandb.init(mode="offline", dir=str(out), settings=quiet) as run:
    yield lambda step, row: run.log(row, step=step)


WRITERS = {"csv": to_csv, "tensorboard": to_tensorboard, "wandb": to_wandb}
PACKAGES = {"csv": "csv", "tensorboard": "tensorboardX", "wandb": "wandb"}


class Late:
  """Gives scalars to writers in portions, one portion late.

  To fetch a value is to wait for the step that computes it, and for all before. When
  a portion is full, `Late` fetches the one before it, which is long done by then.
  """

  def __init__(self, writers: Sequence[Callable[..., Any]], portion: int):
    self._writers, self._portion = writers, portion
    self._done: list[tuple[int, Any]] = []
    self._filling: list[tuple[int, Any]] = []

  def write(self, step: int, row: dict[str, jax.Array]) -> None:
    """Keeps the scalars of one step, as they are on the device."""
    self._filling.append((step, row))
    if len(self._filling) == self._portion:
      self._fetch()

  def close(self) -> None:
    """Writes what is left, also after an error in the loop."""
    self._fetch()
    self._fetch()

  def _fetch(self) -> None:
    for step, row in jax.device_get(self._done):
      for write in self._writers:
        write(step, {name: value.item() for name, value in row.items()})
    self._done, self._filling = self._filling, []


def main(argv: Sequence[str] | None = None) -> None:
  """Trains, logs, and says where."""
  flags = parse(argv)
  images, labels = load_digits(return_X_y=True)
  images, random = np.float32(images / 16), np.random.default_rng(flags.seed)
  tx = optax.chain(optax_clip.clip_by_global_norm(flags.max_norm), optax.adamw(3e-3))
  up, down = jax.random.normal(jax.random.key(flags.seed), (2, 64, 64)) / 8
  params = {"up": up, "down": down[:, :10]}
  state = tx.init(params)

  @jax.jit
  def train_step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
    def loss_fn(params: Any) -> jax.Array:
      scores = jax.nn.relu(images @ params["up"]) @ params["down"]
      return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = tx.update(grads, state, params)
    row = {"loss": loss, **optax_clip.metrics(state)}
    return optax.apply_updates(params, updates), state, row

  with contextlib.ExitStack() as stack:
    writers = [stack.enter_context(WRITERS[name](flags.out)) for name in flags.to]
    log = Late(writers, flags.portion)
    stack.callback(log.close)
    for step in progress(range(1, flags.steps + 1), "training"):
      at = random.integers(len(labels), size=64)
      params, state, row = train_step(params, state, images[at], labels[at])
      log.write(step, row)
  print(
    f"The loss came to {row['loss']:.3f} in {flags.steps} steps, of which"
    f" {row['clip_by_global_norm/steps_clipped']} were clipped: all are logged to"
    f" {', '.join(flags.to)} in {flags.out}."
  )


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
  add("--to", default="csv", help=f"one or more of {','.join(WRITERS)}")
  add("--portion", type=int, default=50, help="steps fetched at once")
  add("--max-norm", type=float, default=0.5, help="of the gradients")
  add("--steps", type=int, default=500, help="how many")
  add("--seed", type=int, default=0, help="of the weights and the batches")
  add("--out", type=Path, default="out", help="folder of the logs of one run")
  flags = parser.parse_args(argv)
  for name in ("portion", "steps", "max_norm", "seed"):
    value, least = getattr(flags, name), int(name in ("portion", "steps"))
    if not value >= least:
      parser.error(f"--{name.replace('_', '-')}: {value} is not at least {least}")
  # Each once, also if it is named twice.
  flags.to = list(dict.fromkeys(name.strip() for name in flags.to.split(",")))
  for name in flags.to:
    if name not in WRITERS:
      parser.error(f"--to: unknown {name!r}, choose from {', '.join(WRITERS)}")
    if importlib.util.find_spec(PACKAGES[name]) is None:
      parser.error(f"--to: {name} needs `pip install {PACKAGES[name]}`")
  try:
    flags.out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    parser.error(f"--out: {flags.out}: {error.strerror}")
  return flags


if __name__ == "__main__":
  main()
