"""Gradient clipping for JAX: exact in every dtype, and it shows what it did."""

from optax_clip import actions as actions
from optax_clip import measures as measures
from optax_clip import thresholds as thresholds
from optax_clip._adaptive import adagc as adagc
from optax_clip._adaptive import zclip as zclip
from optax_clip._adaptive_windows import autoclip as autoclip
from optax_clip._adaptive_windows import clip_by_history as clip_by_history
from optax_clip._adaptive_windows import (
  clip_by_layer_percentile as clip_by_layer_percentile,
)
from optax_clip._core import Action as Action
from optax_clip._core import ClipState as ClipState
from optax_clip._core import Given as Given
from optax_clip._core import Measure as Measure
from optax_clip._core import Parts as Parts
from optax_clip._core import Threshold as Threshold
from optax_clip._core import clip_with as clip_with
from optax_clip._core import given as given
from optax_clip._elementwise import clip_element_spikes as clip_element_spikes
from optax_clip._elementwise import clippy as clippy
from optax_clip._extended import Extended as Extended
from optax_clip._functions import clip_tree as clip_tree
from optax_clip._functions import global_norm as global_norm
from optax_clip._functions import unitwise_clip as unitwise_clip
from optax_clip._functions import unitwise_norm as unitwise_norm
from optax_clip._guard import GuardState as GuardState
from optax_clip._guard import SkipReason as SkipReason
from optax_clip._guard import guarded_step as guarded_step
from optax_clip._layer_metrics import LayerMetrics as LayerMetrics
from optax_clip._layer_metrics import LayerReport as LayerReport
from optax_clip._layer_metrics import layer_metrics as layer_metrics
from optax_clip._layerwise import adaptive_grad_clip as adaptive_grad_clip
from optax_clip._layerwise import clip_by_block_rms as clip_by_block_rms
from optax_clip._layerwise import clip_by_group_norm as clip_by_group_norm
from optax_clip._layerwise import clip_by_layer_norm as clip_by_layer_norm
from optax_clip._loss_scale import LossScale as LossScale
from optax_clip._loss_scale import dynamic_loss_scale as dynamic_loss_scale
from optax_clip._metrics import loss_scale as loss_scale
from optax_clip._metrics import metrics as metrics
from optax_clip._observe import NormHistory as NormHistory
from optax_clip._observe import ObserveState as ObserveState
from optax_clip._observe import norm_history as norm_history
from optax_clip._observe import observe as observe
from optax_clip._paths import labels_by_path as labels_by_path
from optax_clip._paths import unit_axes_by_name as unit_axes_by_name
from optax_clip._per_example import (
  per_example_global_norm_clip as per_example_global_norm_clip,
)
from optax_clip._per_example import (
  per_example_layer_norm_clip as per_example_layer_norm_clip,
)
from optax_clip._record import LayerRecord as LayerRecord
from optax_clip._record import Record as Record
from optax_clip._record import SkipRecord as SkipRecord
from optax_clip._skip import skip_nonfinite as skip_nonfinite
from optax_clip._skip import skip_spikes as skip_spikes
from optax_clip._stable_spam import adaclip as adaclip
from optax_clip._stable_spam import adagn as adagn
from optax_clip._stable_spam import stable_spam as stable_spam
from optax_clip._suggest import Suggestion as Suggestion
from optax_clip._suggest import replay_limits as replay_limits
from optax_clip._suggest import suggest_max_norm as suggest_max_norm
from optax_clip._transforms import clip as clip
from optax_clip._transforms import clip_by_global_norm as clip_by_global_norm

__version__ = "0.1.0"
