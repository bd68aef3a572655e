"""Names the types of states and results, for annotations and for reading.

Transformations keep states, and functions return results. `metrics`,
`layer_metrics` and `norm_history` find states inside others, as of a chain.
"""

from optax_clip._algebra.clip_with import ClipState
from optax_clip._algebra.layers import LayerRecord
from optax_clip._algebra.record import Record
from optax_clip._guards.guard import GuardState
from optax_clip._guards.judge import LossScale
from optax_clip._guards.observe import NormHistory
from optax_clip._guards.observe import ObserveState
from optax_clip._guards.record import SkipRecord
from optax_clip._report.layer_report import LayerMetrics
from optax_clip._report.layer_report import LayerReport
from optax_clip._report.suggest import Suggestion

__all__ = [
  "ClipState",
  "GuardState",
  "LayerMetrics",
  "LayerRecord",
  "LayerReport",
  "LossScale",
  "NormHistory",
  "ObserveState",
  "Record",
  "SkipRecord",
  "Suggestion",
]
