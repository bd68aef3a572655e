"""What a guard measures, once for itself and for the clip inside."""

from typing import Any
from typing import NamedTuple
from typing import cast

import jax

from optax_clip import _validate
from optax_clip import measures
from optax_clip._algebra import measured as _measured
from optax_clip._algebra.handed import Known
from optax_clip._algebra.measured import LayerNorms
from optax_clip._algebra.types import Measure
from optax_clip._types import Params
from optax_clip._types import Updates

Array = jax.Array


class Seen(NamedTuple):
  """Holds the measurements of a guard.

  Attributes:
    sizes: f[norms], all norms by its measure.
    known: norms that nobody needs to measure again.
    layers: each layer's norm, if that is recorded.
  """

  sizes: Array
  known: Known
  layers: LayerNorms | None


class Measuring(NamedTuple):
  """Measures for a guard, which always keeps a record.

  Attributes:
    measure: measures for the judge.
    by_layer: whether to record layers.
  """

  measure: Measure
  by_layer: bool

  @classmethod
  def of(cls, measure: object, record: object) -> "Measuring":
    """Makes one from a guard's arguments."""
    _validate.choice((True, "layers"), record=record)
    return cls(checked_measure(measure), record == "layers")

  @property
  def stacks(self) -> Any:
    """Returns what maps parameters to the recorded layers; `None` if none are."""
    if not self.by_layer:
      return None

    def stacks(params: Params) -> list[tuple[int, ...]]:
      return _measured.of_layers(self.measure, params).stacks()

    return stacks

  def measured(
    self, updates: Updates, params: Params, extra_args: dict[str, Any]
  ) -> Seen:
    """Measures the updates, once for the guard and for all inside it."""
    norms, layers = _measured.measured(
      self.measure, self.by_layer, updates, params, extra_args
    )
    handed = _measured.known_of(self.measure, updates, params, norms, layers)
    return Seen(
      sizes=norms.table().ravel(),
      known=handed,
      layers=None if layers is None else _measured.layer_norms(self.measure, layers),
    )


def checked_measure(measure: object) -> Measure:
  """Checks a measure; returns the global norm for `None`."""
  if measure is None:
    return measures.global_norm()
  _validate.instance(Measure, "optax_clip.measures", measure=measure)
  return cast(Measure, measure)
