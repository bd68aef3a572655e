"""What clipping did, in TensorBoard, in Weights & Biases, and in a CSV file.

A small network learns scikit-learn's handwritten digits. `optax_clip.metrics` is a flat
dictionary of scalars, so that a logger needs a few lines::

    python examples/logging_metrics.py
    python examples/logging_metrics.py --to csv,tensorboard,wandb
    tensorboard --logdir out                  # after `pip install tensorboard`
    wandb sync out/wandb/offline-run-*

Nothing here needs a network: Weights & Biases writes a file, which ``wandb sync`` sends
when you want it to.

No step waits for Python. Scalars stay on the device until a portion of steps is full,
and are fetched while the next portion is computed; see `Late`.
"""

import argparse
from collections.abc import Sequence
import contextlib
import csv
import importlib.util
from pathlib import Path
from typing import Any
from typing import Protocol

import _digits
import _flags
import jax
import optax

import optax_clip

BATCH = 64
WIDTH = 64

Row = dict[str, int | float]


class Writer(Protocol):
  """What a logger needs to do here."""

  def write(self, step: int, row: Row) -> None:
    """Takes the scalars of one step."""

  def close(self) -> None:
    """Leaves everything on disk."""


class Csv:
  """A line for each step, whose columns are those of the first."""

  def __init__(self, out: Path, flags: argparse.Namespace):
    self._file = (out / "metrics.csv").open("w", newline="")
    self._table: csv.DictWriter[str] | None = None

  def write(self, step: int, row: Row) -> None:
    """Takes the scalars of one step."""
    if self._table is None:
      self._table = csv.DictWriter(self._file, ["step", *row])
      self._table.writeheader()
    self._table.writerow({"step": step, **row})

  def close(self) -> None:
    """Leaves everything on disk."""
    self._file.close()


class TensorBoard:
  """Event files, by tensorboardX, which needs no TensorFlow.

  The part of a name before the slash is the section that TensorBoard shows it in.
  """

  def __init__(self, out: Path, flags: argparse.Namespace):
    import tensorboardX

    self._writer = tensorboardX.SummaryWriter(str(out / "tensorboard"))

  def write(self, step: int, row: Row) -> None:
    """Takes the scalars of one step."""
    for name, value in row.items():
      self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    """Leaves everything on disk."""
    self._writer.close()


class WeightsAndBiases:
  """A run of Weights & Biases in a file."""

  def __init__(self, out: Path, flags: argparse.Namespace):
    import wandb

    self._run = wandb.init(
      project="optax-clip",
      # "online" sends it at once.
      mode="offline",
      dir=str(out),
      config={"max_norm": flags.max_norm, "lr": flags.lr, "seed": flags.seed},
      settings=wandb.Settings(silent=True),
    )

  def write(self, step: int, row: Row) -> None:
    """Takes the scalars of one step."""
    self._run.log(row, step=step)

  def close(self) -> None:
    """Leaves everything on disk."""
    self._run.finish()


WRITERS = {"csv": Csv, "tensorboard": TensorBoard, "wandb": WeightsAndBiases}

# The packages that they import, which are also what pip calls them.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Late:
  """Gives scalars to writers in portions, one portion late.

  To fetch a value is to wait for the step that computes it, and for all before. When
  a portion is full, that before it is fetched: it is long done by then, and the device
  goes on with what it was given since.
  """

  def __init__(self, writers: Sequence[Writer], portion: int):
    self._writers, self._portion = writers, portion
    self._done: list[tuple[int, dict[str, jax.Array]]] = []
    self._filling: list[tuple[int, dict[str, jax.Array]]] = []

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
      values = {name: value.item() for name, value in row.items()}
      for writer in self._writers:
        writer.write(step, values)
    self._done, self._filling = self._filling, []


def init(seed: int) -> dict[str, jax.Array]:
  """Two layers, from pixels to a score for each digit."""
  up, down = jax.random.split(jax.random.key(seed))
  return {
    "up": jax.random.normal(up, (64, WIDTH)) * (2 / 64) ** 0.5,
    "down": jax.random.normal(down, (WIDTH, 10)) * (1 / WIDTH) ** 0.5,
  }


def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
  """The mean cross-entropy of a batch."""
  scores = jax.nn.relu(images @ params["up"]) @ params["down"]
  return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


def train(flags: argparse.Namespace, log: Late) -> None:
  """The training loop."""
  tx = optax.chain(
    optax_clip.clip_by_global_norm(flags.max_norm), optax.adamw(flags.lr)
  )
  params = init(flags.seed)
  state = tx.init(params)

  @jax.jit
  def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
    loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return params, state, {"loss": loss, **optax_clip.metrics(state)}

  batches = _digits.batches(_digits.load(), flags.steps, BATCH, flags.seed)
  for number, batch in enumerate(batches, start=1):
    params, state, row = step(params, state, *batch)
    log.write(number, row)


def main(argv: Sequence[str] | None = None) -> None:
  """Trains, logs, and says where."""
  flags = parse(argv)
  with contextlib.ExitStack() as stack:
    writers = []
    for name in flags.to:
      writers.append(WRITERS[name](flags.out, flags))
      stack.callback(writers[-1].close)
    log = Late(writers, flags.portion)
    stack.callback(log.close)
    train(flags, log)
  print(f"Logged {flags.steps} steps to {', '.join(flags.to)} in {flags.out}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Reads and checks the flags, the packages and the folder of `--out`."""
  parser = _flags.Parser(
    description=__doc__.partition("\n")[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add("--to", type=loggers, default="csv", help=f"one or more of {','.join(WRITERS)}")
  add("--portion", type=_flags.positive, default=50, help="steps fetched at once")
  add("--max-norm", type=_flags.threshold, default=0.5, help="of the gradients")
  add("--lr", type=_flags.rate, default=3e-3, help="learning rate of AdamW")
  add("--steps", type=_flags.positive, default=500, help="how many")
  add("--seed", type=_flags.natural, default=0, help="of the weights and the batches")
  add("--out", type=Path, default="out", help="folder of the logs of one run")
  flags = parser.parse_args(argv)
  try:
    flags.out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    parser.error(f"argument --out: {flags.out}: {error.strerror}")
  return flags


def loggers(value: str) -> list[str]:
  """A comma-separated list of names of `WRITERS` whose packages are installed."""
  names = [name.strip() for name in value.split(",")]
  for name in names:
    if name not in WRITERS:
      raise argparse.ArgumentTypeError(
        f"unknown logger {name!r}, choose from {', '.join(WRITERS)}"
      )
    package = PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
      raise argparse.ArgumentTypeError(f"{name} needs `pip install {package}`")
  # Each once, also if it is named twice.
  return list(dict.fromkeys(names))


if __name__ == "__main__":
  try:
    main()
  except KeyboardInterrupt:
    raise SystemExit(130) from None
