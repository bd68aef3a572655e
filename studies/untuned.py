"""What a limit does for a learning rate that nobody tuned.

Six small tasks, each with four kinds of batches, at four learning rates over a factor
of 100, with gradients in three units. The best of nine constants and no limit, in each
cell, says what was possible there; a method's regret is what it loses to that.

Fixed before the first run, and not changed after it: tasks, cells, the methods in
`LEARNED`, all their constants, and `GATE`, what a method must do before this library
recommends it to people without a threshold. The rates, and no more, follow from runs
without a clip, at scale 1 and with other seeds: the best of them is neither the lowest
nor the highest.
"""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax

import optax_clip
from studies import _small_tasks
from studies import _sweep
from studies._compared import METHODS
from studies._compared import constant

# All gradients are multiplied by this before the clip, and divided by it after.
SCALES = (0.01, 1.0, 100.0)
# The oracle has the nine from 0.003 to 30; the others are for the best constant that is
# kept over all scales, as a limit c at the scale s is a limit c / s at the scale 1.
CONSTANTS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
ORACLE = CONSTANTS[4:]
LEARNED = (
  "autoclip",
  "layer percentile",
  "history",
  "history, early",
  "zclip, no cap",
  "zclip, early",
  "adagc, no cap",
  "adagc, early",
  "geometric",
  "geometric, layers",
  "agreement",
  "agreement 0.2",
  "agreement, all",
  "skip_spikes",
  "skip_spikes, geometric",
  "pair",
  "pair, geometric",
)
# Measured after the others: defaults that follow from them, and from logs of real runs.
ADDED = ("skip_spikes, early", "history, robust")
# A method passes if all hold: its mean regret over all cells is at most this part of
# that of the best constant kept over all cells; on no clean cell is it worse than no
# clipping by more percent than this; and so many of 16 seeds of the temporal-order
# problem of length 30 learn at its best rate.
GATE = {"regret": 1 / 3, "harm": 3.0, "solved": 12}


def around(name: str, task: _small_tasks.SmallTask) -> Callable[[Any], Any]:
  """Returns what maps a member to its clip and optimizer; NaNs are skipped for all."""
  method = METHODS[name] if name in METHODS else constant(float(name.split()[1]))

  def make(member: dict[str, jax.Array]) -> optax.GradientTransformation:
    scale = member["scale"]
    inner = optax.chain(optax.scale(1 / scale), task.optimizer(member["rate"]))
    guarded = optax_clip.skip_nonfinite(method.around(inner))
    return optax.chain(optax.scale(scale), guarded)

  return make


def cells(
  study: str,
  task_name: str,
  method: str,
  scales: tuple[float, ...],
  faults: tuple[str, ...],
  rates: tuple[float, ...],
  seeds: int,
  steps: int,
) -> Iterator[dict[str, Any]]:
  """Trains one method on one task; yields one row for each cell."""
  task = _small_tasks.TASKS[task_name]()
  who = _sweep.members(
    fault=np.array([_small_tasks.FAULTS.index(fault) for fault in faults]),
    rate=np.float32(rates),
    scale=np.float32(scales),
    seed=np.arange(seeds),
  )
  scores = _sweep.train(
    _small_tasks.swept(task), around(method, task), who, steps, steps
  )
  found = scores["score"][:, -1].reshape(len(faults), len(rates), len(scales), seeds)
  clipped = scores["clipped"][:, -1].reshape(found.shape)
  for i, fault in enumerate(faults):
    for j, rate in enumerate(rates):
      for k, scale in enumerate(scales):
        yield {
          "study": study,
          "task": task_name,
          "method": method,
          "fault": fault,
          "rate": rate,
          "scale": scale,
          "steps": steps,
          "nothing": round(task.nothing, 5),
          "score": [
            round(float(x), 5) if np.isfinite(x) else None for x in found[i, j, k]
          ],
          "clipped": clipped[i, j, k].tolist(),
        }


def run(
  quick: bool = False,
  note: Callable[[str], None] = lambda text: None,
  *,
  tasks: tuple[str, ...] = tuple(_small_tasks.TASKS),
  names: tuple[str, ...] = (*LEARNED, *ADDED),
  constants: tuple[float, ...] = CONSTANTS,
  seeds: int = 5,
  steps: int = 200,
) -> Iterator[dict[str, Any]]:
  """Yields one row for each cell and method, with a list of scores over seeds.

  Limits that do not learn run at scale 1 only: at another they are other limits.
  """
  if quick:
    tasks, names, constants, seeds, steps = ("regression",), names[:1], (1.0,), 2, 20
  for task in tasks:
    fixed = ("none", *(f"constant {c:g}" for c in constants))
    for name in (*fixed, *names):
      note(f"untuned: {task}, {name}")
      yield from cells(
        "untuned",
        task,
        name,
        (1.0,) if name in fixed else SCALES,
        _small_tasks.FAULTS,
        _small_tasks.TASKS[task]().rates,
        seeds,
        steps,
      )
