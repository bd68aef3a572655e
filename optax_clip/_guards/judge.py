"""What a judge of steps needs, and what it says about one."""

from collections.abc import Callable
import enum
from typing import Any
from typing import NamedTuple

import jax

from optax_clip._algebra.handed import Known
from optax_clip._algebra.measured import LayerNorms
from optax_clip._algebra.record import SkipRecord

Array = jax.Array


class SkipReason(enum.IntEnum):
  """Says why a step was skipped, as ``metrics(...)["<name>/reason"]`` does."""

  NONE = 0
  NONFINITE_NORM = 1
  NONFINITE_LOSS = 2
  NORM_SPIKE = 3
  LOSS_SPIKE = 4

  def __str__(self) -> str:
    """Returns the name: where reasons are read by people, a number says nothing."""
    return self.name

  def __format__(self, spec: str) -> str:
    return format(self.value if spec else self.name, spec)


class Verdict(NamedTuple):
  """Says what a judge decided, and what it measured.

  Attributes:
    take: bool[], whether to take the step.
    reason: i32[], why not; NONE if it is taken.
    norm: f32[], for the record.
    limit: f32[], for the record.
    is_nan: bool[], if something is not finite, whether it is a NaN.
    memory: the judge's memory after the step.
    known: the norms that it measured.
    layers: each layer's norm, if that is recorded.
    scale: `None`, or f32[]: later judges and `inner` get the updates divided by it.
  """

  take: Array
  reason: Array
  norm: Array
  limit: Array
  is_nan: Array
  memory: Any
  known: Known
  layers: LayerNorms | None = None
  scale: Array | None = None


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
