"""Checkpoints that survive a kill at any moment; for any training loop.

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

A run that was killed and resumed so ends with the same bits as one that was not,
on the same machine with the same versions, if

* the state is all that a step depends on: the weights, the whole state of the
  optimizer (what clipping has learnt is a part of it), the keys of dropout;
* the batch is a function of the seed and the step alone;
* a checkpoint is whole or is not there. Orbax writes into a temporary folder and
  renames it, in the background;
* the measurements of a step are on the disk before a checkpoint that counts it,
  and those of steps beyond the checkpoint are cut off before they are made again.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import csv
import os
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

# The second last is there in case that the disk damages the last.
KEPT = 2


class Checkpoints:
  """The checkpoints of one run, and what it measured at each step.

  The folder then holds ``steps.csv``, and ``states`` with a folder for each step
  that is kept.

  Args:
    folder: of this run alone. It is made by `begin`.
    config: all that the results depend on, in JSON's types. It is written into
      each checkpoint.

  Attributes:
    latest: the step of the latest checkpoint, `None` without one.
    problem: why it cannot be restored; empty if it can.
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
    """The latest checkpoint; cuts ``steps.csv`` off behind it.

    Args:
      like: a state of the run, for its structure, shapes and dtypes.

    Returns:
      The number of steps that are done, the state, and their measurements.

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
    """Appends the measurements of the next steps."""
    writer = csv.writer(self._file, lineterminator="\n")
    for row in rows:
      if self._recorded == 0:
        writer.writerow(("step", *row))
      self._recorded += 1
      writer.writerow((self._recorded, *row.values()))
    # From here on they survive the end of this process.
    self._file.flush()

  def save(self, step: int, state: Any) -> None:
    """Writes a checkpoint of `step` steps, all of which are recorded.

    Returns while Orbax still writes; the state may change nevertheless.
    """
    if step != self._recorded:
      raise ValueError(f"Step {step} cannot be saved: {self._recorded} are recorded.")
    # And from here on a loss of power.
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
    # What a killed process left half written is of no use to anyone.
    options = ocp.CheckpointManagerOptions(
      max_to_keep=KEPT, cleanup_tmp_directories=True
    )
    self._manager = ocp.CheckpointManager(self._states, options=options)
    self._file = self.metrics.open(mode, newline="")


def _number(text: str) -> float:
  """Undoes `str`; a count stays one, to be written as one again."""
  try:
    return int(text)
  except ValueError:
    return float(text)
