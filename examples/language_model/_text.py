"""Loads real text that every machine has: the source of Python's standard library."""

from collections.abc import Iterator
from pathlib import Path
import sysconfig
from typing import NamedTuple

import numpy as np

# Installed packages are no part of the library. Its tests are, but they make up two
# thirds of it and hold many tables.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib"}

# The last part of each file, 1 byte in so many, is held out. (With whole files the two
# parts would be of different kinds: some files are one large table.)
_HELD_OUT = 10


class Text(NamedTuple):
  """Holds bytes to train on, and other bytes from the same files to test on.

  Attributes:
    train: u8[n].
    held_out: u8[m].
  """

  train: np.ndarray
  held_out: np.ndarray


def load(root: Path | None = None) -> Text:
  """Reads the source of the running Python's standard library.

  Args:
    root: where to look instead.

  Raises:
    FileNotFoundError: if there is too little, as in Pythons that ship only compiled
      files.
  """
  root = root or Path(sysconfig.get_paths()["stdlib"])
  files = [
    path
    for path in sorted(root.rglob("*.py"))
    if not _LEFT_OUT & set(path.relative_to(root).parts)
  ]
  train, held_out = bytearray(), bytearray()
  for path in files:
    source = path.read_bytes()
    cut = len(source) - len(source) // _HELD_OUT
    train += source[:cut]
    held_out += source[cut:]
  if min(len(train), len(held_out)) < 100_000:
    raise FileNotFoundError(
      f"{root} holds less than 200 kB of Python sources to train on"
    )
  return Text(np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8))


def windows(
  text: np.ndarray, count: int, batch: int, length: int, seed: int, first: int = 0
) -> Iterator[np.ndarray]:
  """Yields the batches from `first` to before `count`, u8[batch, length].

  A batch depends on the seed and its number alone, not on `first`: this draws the
  random places of those before, too, which costs microseconds.
  """
  generator = np.random.default_rng(seed)
  offsets = np.arange(length)
  for number in range(count):
    starts = generator.integers(len(text) - length, size=(batch, 1))
    if number >= first:
      yield text[starts + offsets]
