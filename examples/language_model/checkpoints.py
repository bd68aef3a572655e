"""Writes checkpoints that survive a kill at any moment, for any training loop.

To use them in your own loop, copy this file::

    with Checkpoints("out/run", {"seed": 0, "lr": 0.1}) as checkpoints:
      step, state = 0, initial_state()
      if checkpoints.latest is not None:
        step, state, _ = checkpoints.restore(state)
      else:
        checkpoints.begin()
      while step < 1000:
        state, measured = train_step(state, batch(seed, step))
        step += 1
        checkpoints.record([measured])
        if step % 100 == 0:
          checkpoints.save(step, state)

A killed and resumed run ends with the same bits as an uninterrupted one, on the same
machine with the same versions, if

* the state is all that a step depends on: the weights, the whole optimizer state
  (with what clipping has learned), the keys of dropout;
* the batch depends on the seed and the step alone;
* a checkpoint is whole or is not there: Orbax writes into a temporary folder and
  renames it, in the background;
* a step's measurements are on the disk before a checkpoint that counts it, and those
  of steps beyond the checkpoint are cut off before the run makes them again.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import csv
import os
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

# The second last remains in case the disk damages the last.
KEPT = 2


class Checkpoints:
  """Keeps one run's checkpoints, and what it measured at each step.

  Its folder holds ``steps.csv``, and ``states`` with a folder for each kept step.

  Args:
    folder: for this run alone. `begin` makes it.
    config: all that the results depend on, in JSON's types. Each checkpoint holds it.

  Attributes:
    latest: the latest checkpoint's step, `None` without one.
    problem: why `restore` refuses it; empty if it does not.
  """

  def __init__(self, folder: str | os.PathLike[str], config: Mapping[str, Any]):
    self.folder = Path(folder)
    self.metrics = self.folder / "steps.csv"
    self.config = dict(config)
    self.latest: int | None = None
    self.problem = ""
    self._states = self.folder.absolute() / "states"
    self._recorded = 0
    self._manager: Any = None
    self._file: Any = None
    if self._states.is_dir():
      self._look()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *unused: object) -> None:
    self.close()

  def begin(self) -> None:
    """Starts a run at its first step, with an empty ``steps.csv``.

    Raises:
      FileExistsError: if the folder holds a checkpoint, which is left alone.
    """
    if self.latest is not None:
      raise FileExistsError(
        f"{self.folder} holds a checkpoint of step {self.latest}. Continue it with"
        " restore(), or begin in another folder."
      )
    self.folder.mkdir(parents=True, exist_ok=True)
    self._open("w")

  def restore(self, like: Any) -> tuple[int, Any, list[dict[str, float]]]:
    """Restores the latest checkpoint, and cuts ``steps.csv`` off behind it.

    Args:
      like: a state of the run, for its structure, shapes and dtypes.

    Returns:
      The number of finished steps, the state, and their measurements.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      ValueError: if there is a `problem` with it.
    """
    if self.latest is None:
      raise FileNotFoundError(f"{self.folder} holds no checkpoint. Call begin().")
    if self.problem:
      raise ValueError(self.problem)
    lines = self._lines()
    os.truncate(self.metrics, sum(map(len, lines[: 1 + self.latest])))
    with self.metrics.open(newline="") as file:
      rows = [
        {key: _number(value) for key, value in row.items() if key != "step"}
        for row in csv.DictReader(file)
      ]
    self._open("a")
    self._recorded = self.latest
    args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
    return self.latest, self._manager.restore(self.latest, args=args)["state"], rows

  def record(self, rows: Sequence[Mapping[str, float]]) -> None:
    """Appends the next steps' measurements."""
    writer = csv.writer(self._file, lineterminator="\n")
    for row in rows:
      if self._recorded == 0:
        writer.writerow(("step", *row))
      self._recorded += 1
      writer.writerow((self._recorded, *row.values()))
    # From here on they survive this process.
    self._file.flush()

  def save(self, step: int, state: Any) -> None:
    """Writes a checkpoint after `step` steps, all of them recorded.

    Returns while Orbax still writes; the state may change nevertheless.
    """
    if step != self._recorded:
      raise ValueError(f"Step {step} cannot be saved: {self._recorded} are recorded.")
    # And from here on a power failure.
    os.fsync(self._file.fileno())
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(self.config)
    )
    self._manager.save(step, args=args)

  def close(self) -> None:
    """Waits until the last checkpoint is written."""
    if self._manager is not None:
      self._manager.close()
      self._manager = None
    if self._file is not None:
      self._file.close()
      self._file = None

  def _look(self) -> None:
    """Finds the latest checkpoint; changes nothing on the disk."""
    options = ocp.CheckpointManagerOptions(create=False, save_root_metadata=False)
    with ocp.CheckpointManager(self._states, options=options) as manager:
      self.latest = manager.latest_step()
      if self.latest is None:
        return
      args = ocp.args.Composite(config=ocp.args.JsonRestore())
      try:
        saved = manager.restore(self.latest, args=args)["config"]
      except (OSError, KeyError, ValueError) as error:
        self.problem = (
          f"{self._states / str(self.latest)} is damaged ({error}); remove it to go"
          " on from the checkpoint before it"
        )
        return
    different = []
    for key in sorted(saved.keys() | self.config.keys()):
      there, here = (repr(x.get(key, "not set")) for x in (saved, self.config))
      if there != here:
        different.append(f"{key} is {there} there and {here} here")
    if different:
      self.problem = (
        f"the checkpoint in {self.folder} is of another run: {'; '.join(different)}"
      )
    elif len(self._lines()) <= self.latest:
      self.problem = (
        f"{self.metrics} does not reach the checkpoint of step {self.latest} next to"
        " it: lines were removed; bring them back"
      )

  def _lines(self) -> list[bytes]:
    if not self.metrics.exists():
      return []
    return self.metrics.read_bytes().splitlines(keepends=True)

  def _open(self, mode: str) -> None:
    # Nobody can use what a killed process left half written.
    options = ocp.CheckpointManagerOptions(
      max_to_keep=KEPT, cleanup_tmp_directories=True
    )
    self._manager = ocp.CheckpointManager(self._states, options=options)
    self._file = self.metrics.open(mode, newline="")


def _number(text: str) -> float:
  """Undoes `str`; a count stays an integer, so that it is written as one again."""
  try:
    return int(text)
  except ValueError:
    return float(text)
