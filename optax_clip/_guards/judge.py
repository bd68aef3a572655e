"""What decides whether a step is taken, and what it says of a step."""

from collections.abc import Callable
import enum
from typing import Any
from typing import NamedTuple

import jax

from optax_clip._algebra.given import Given
from optax_clip._algebra.given import LayerNorms
from optax_clip._algebra.record import SkipRecord

Array = jax.Array


class SkipReason(enum.IntEnum):
  """Why a step was not taken, as in ``metrics(...)["<name>/reason"]``."""

  NONE = 0
  NONFINITE_NORM = 1
  NONFINITE_LOSS = 2
  NORM_SPIKE = 3
  LOSS_SPIKE = 4


class Verdict(NamedTuple):
  """What a judge says of a step.

  Attributes:
    take: bool[], whether it is taken.
    reason: i32[], why not; NONE if it is.
    norm: f32[], for the record.
    limit: f32[], for the record.
    memory: of the judge, after the step.
    known: what was measured of the updates.
    layers: what of each layer, if that is recorded.
    scale: `None`, or f32[]: what comes after this judge is given the updates divided
      by it.
  """

  take: Array
  reason: Array
  norm: Array
  limit: Array
  memory: Any
  known: Given
  layers: LayerNorms | None = None
  scale: Array | None = None


class Judge(NamedTuple):
  """What decides whether a step is taken.

  Attributes:
    name: the prefix of its metrics' keys.
    init: ``init(params)``: the memory before the first step.
    judge: ``judge(updates, params, memory, record, known, extra_args)``: a `Verdict`.
    stacks: from parameters to the layers that are recorded; `None`: none are.
  """

  name: str
  init: Callable[[Any], Any]
  judge: Callable[[Any, Any, Any, SkipRecord, Given, dict[str, Any]], Verdict]
  stacks: Callable[[Any], list[int]] | None = None
