"""What a judge of steps is made of."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax

from optax_clip._guards.record import SkipRecord
from optax_clip._guards.verdict import Verdict

Array = jax.Array


class LossScale(NamedTuple):
  """Holds what `dynamic_loss_scale` remembers.

  Attributes:
    scale: f32[], the factor for the next loss.
    finite_steps: i32[], steps taken since the scale last changed.
  """

  scale: Array
  finite_steps: Array


class Judge(NamedTuple):
  """Decides whether a step is taken.

  Attributes:
    name: the prefix of its metrics' keys.
    init: ``init(params)``: returns the memory before the first step.
    judge: ``judge(updates, params, memory, record, extra_args)``: returns a `Verdict`.
    stacks: maps parameters to the layers that are recorded; `None`: none are.
    scales: whether it unscales the updates for all others; its memory is then
      ``{name: LossScale}``.
  """

  name: str
  init: Callable[[Any], Any]
  judge: Callable[[Any, Any, Any, SkipRecord, dict[str, Any]], Verdict]
  stacks: Callable[[Any], list[tuple[int, ...]]] | None = None
  scales: bool = False
