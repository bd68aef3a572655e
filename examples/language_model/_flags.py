"""The command line: flags, what they mean together, and errors of one line."""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from typing import NoReturn
import zlib

import jax.numpy as jnp

from examples.language_model import _devices
from examples.language_model import _model
from examples.language_model import _numbers
from examples.language_model import _text
from examples.language_model._clips import METHODS
from examples.language_model._clips import OPTIMIZERS
from examples.language_model._clips import setting
from examples.language_model.checkpoints import Checkpoints

# What no flag sets: windows of so many bytes, and so many in a batch.
LENGTH = 64
BATCH = 16


class Parser(argparse.ArgumentParser):
  """Writes errors on one line, without the usage before it."""

  def error(self, message: str) -> NoReturn:
    """Exits with argparse's code."""
    self.exit(2, f"{self.prog}: error: {message}\n")


def methods(value: str) -> list[str]:
  """Parses a comma-separated list of names in `METHODS`."""
  names = [name.strip() for name in value.split(",")]
  for name in names:
    if name not in METHODS:
      raise argparse.ArgumentTypeError(
        f"unknown method {name!r}, choose from {', '.join(METHODS)}"
      )
    if names.count(name) > 1:
      raise argparse.ArgumentTypeError(f"{name!r} is named twice in {value!r}")
  return names


_WIDTH = _numbers.checked(
  int,
  lambda x: x >= 1 and x % _model.HEAD == 0,
  f"a positive multiple of {_model.HEAD}",
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Reads and checks all flags, the text and the folder of `--out`."""
  parser = Parser(
    prog="python -m examples.language_model",
    description="Trains a small language model without clipping and with it.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add(
    "--clip",
    type=methods,
    default="none,global",
    help=f"methods to compare, of {','.join(METHODS)}",
  )
  for name, method in METHODS.items():
    if method.flag:
      add(
        f"--{method.flag}",
        type=_numbers.threshold,
        default=method.default,
        help=f"threshold of '{name}'; its norm: {method.measured}",
      )
  add("--optimizer", choices=OPTIMIZERS, default="sgd", help="sgd has momentum")
  rates = ", ".join(f"{name} {rate:g}" for name, (_, _, rate) in OPTIMIZERS.items())
  add(
    "--lr",
    type=_numbers.rate,
    default=argparse.SUPPRESS,
    help=f"learning rate (default: {rates})",
  )
  add("--steps", type=_numbers.positive, default=300, help="steps of each run")
  add("--width", type=_WIDTH, default=64, help=f"a multiple of {_model.HEAD}")
  add("--layers", type=_numbers.positive, default=2, help="transformer blocks")
  add(
    "--broken-every",
    type=_numbers.natural,
    default=100,
    metavar="N",
    help="batches to one whose loss is NaN, as from a broken file; 0: none",
  )
  add("--seed", type=_numbers.natural, default=0, help="of the weights and the batches")
  add("--out", type=Path, default="out", help="folder of the results")
  add(
    "--checkpoint",
    type=Path,
    metavar="DIR",
    default=argparse.SUPPRESS,
    help="write checkpoints there, in a folder for each method",
  )
  add(
    "--checkpoint-every",
    type=_numbers.positive,
    metavar="N",
    default=argparse.SUPPRESS,
    help="steps between two checkpoints (default: 100); the last step has one too",
  )
  add(
    "--resume",
    action="store_true",
    default=argparse.SUPPRESS,
    help="go on from the latest checkpoints in DIR, if there are any",
  )
  low = parser.add_mutually_exclusive_group()
  for flag, dtype in (("--bf16", jnp.bfloat16), ("--fp16", jnp.float16)):
    low.add_argument(
      flag,
      dest="dtype",
      action="store_const",
      const=dtype,
      default=jnp.float32,
      help=f"loss and gradients in {jnp.dtype(dtype).name}, weights in float32",
    )
  _devices.add_arguments(parser)
  flags = parser.parse_args(argv)
  flags.devices = _devices.find(flags, BATCH, parser.error)
  every = flags.broken_every
  # In the middle of each hundred, not at the end of the run.
  flags.broken = range(every // 2, flags.steps, every) if every else range(0)
  if "lr" not in flags:
    *_, flags.lr = OPTIMIZERS[flags.optimizer]
  for method in METHODS.values():
    try:
      method.build(setting(method, flags))
    except ValueError as error:
      parser.error(f"argument --{method.flag}: {error}")
  try:
    if flags.devices.first:
      flags.out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    parser.error(f"argument --out: {flags.out}: {error.strerror}")
  try:
    flags.text = _text.load()
  except OSError as error:
    parser.error(f"no text to train on: {error}")
  find_checkpoints(flags, parser.error)
  settings = [configuration(name, flags) for name in flags.clip]
  _devices.check_same((flags.steps, settings), parser.error)
  return flags


def find_checkpoints(flags: argparse.Namespace, error: Callable[[str], Any]) -> None:
  """Opens the folders of all runs; whatever is wrong is said before the first."""
  flags.checkpoints = {}
  if "checkpoint" not in flags:
    for flag in ("checkpoint_every", "resume"):
      if flag in flags:
        error(f"argument --{flag.replace('_', '-')}: give --checkpoint DIR as well")
    flags.resume, flags.checkpoint_every = False, flags.steps
    return
  flags.resume = "resume" in flags
  flags.checkpoint_every = getattr(flags, "checkpoint_every", 100)
  for name in flags.clip:
    folder = flags.checkpoint / name
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError as failed:
      error(f"argument --checkpoint: {folder}: {failed.strerror}")
    found = Checkpoints(folder, configuration(name, flags))
    if found.latest is not None and not flags.resume:
      error(
        f"argument --checkpoint: {folder} holds a checkpoint of step"
        f" {found.latest}; go on from it with --resume, or name another folder"
      )
    if found.problem:
      error(f"argument --resume: {found.problem}, or name another --checkpoint")
    if (found.latest or 0) > flags.steps:
      error(
        f"argument --steps: {flags.steps}: the checkpoint in {folder} is of step"
        f" {found.latest}; ask for at least as many"
      )
    flags.checkpoints[name] = found


def configuration(name: str, flags: argparse.Namespace) -> dict[str, Any]:
  """All that a run's numbers depend on, except for how many steps it has."""
  method = METHODS[name]
  text = flags.text.train
  return {
    "clip": name,
    **({method.flag: setting(method, flags)} if method.flag else {}),
    "optimizer": flags.optimizer,
    "lr": flags.lr,
    "width": flags.width,
    "layers": flags.layers,
    "seed": flags.seed,
    "broken_every": flags.broken_every,
    "dtype": jnp.dtype(flags.dtype).name,
    "batch": BATCH,
    "length": LENGTH,
    "text": f"{len(text)} bytes, CRC {zlib.crc32(text):08x}",
  }
