"""Whether a short run says what a long one needs.

Limits that follow directions are known to judge by the next step only (Wu et al.,
Understanding Short-Horizon Bias in Stochastic Meta-Optimization, arXiv:1803.02021).
Three tasks of `untuned`, at 1, 4 and 16 times the steps, for the three methods with the
least mean regret there, and `thresholds.geometric`, which is a part of the library.
"""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

from studies import _small_tasks
from studies import untuned

TASKS = ("convolution", "recurrent", "muon")
FAULTS = ("clean", "heavy")
CONSTANTS = (0.03, 0.1, 0.3, 1.0, 3.0)
STEPS = 200
TIMES = (1, 4, 16)


def run(
  quick: bool = False,
  note: Callable[[str], None] = lambda text: None,
  *,
  names: tuple[str, ...] = (),
  tasks: tuple[str, ...] = TASKS,
  times: tuple[int, ...] = TIMES,
  seeds: int = 3,
) -> Iterator[dict[str, Any]]:
  """Yields rows as `untuned` does, at scale 1; without `names` of the best in it."""
  if quick:
    names, tasks, times, seeds = ("geometric",), TASKS[:1], (1,), 2
  fixed = ("none", *(f"constant {c:g}" for c in CONSTANTS))
  for task in tasks:
    for multiple in times:
      for name in (*fixed, *(names or _best())):
        note(f"horizon: {task}, {multiple} times the steps, {name}")
        yield from untuned.cells(
          "horizon",
          task,
          name,
          (1.0,),
          FAULTS,
          _small_tasks.TASKS[task]().rates,
          seeds,
          STEPS * multiple,
        )


def _best() -> tuple[str, ...]:
  """Returns the three methods with the least mean regret in the kept results."""
  import studies
  from studies import _regret

  best = _regret.Study(studies.load("untuned")).ranked()[:3]
  return best if "geometric" in best else (*best, "geometric")
