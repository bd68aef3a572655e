"""How a judge says whether a step is taken, and why not."""

import enum
from typing import Any
from typing import NamedTuple

import jax

from optax_clip._algebra.handed import Known
from optax_clip._algebra.measured import LayerNorms

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
  """Holds the decision of a judge, and its measurements.

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
