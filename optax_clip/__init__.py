"""Gradient clipping for JAX: exact in every dtype, and it shows what it did."""

from optax_clip import actions
from optax_clip import measures
from optax_clip import states
from optax_clip import thresholds
from optax_clip._algebra.clip_with import clip_with
from optax_clip._algebra.types import Action
from optax_clip._algebra.types import Measure
from optax_clip._algebra.types import Parts
from optax_clip._algebra.types import Threshold
from optax_clip._functions.attention_logits import max_attention_logits
from optax_clip._functions.clip_tree import clip_tree
from optax_clip._functions.global_norm import global_norm
from optax_clip._functions.per_example import per_example_global_norm_clip
from optax_clip._functions.per_example import per_example_layer_norm_clip
from optax_clip._functions.qk_clip import qk_clip
from optax_clip._guards.guard import guarded_step
from optax_clip._guards.loss_scale import dynamic_loss_scale
from optax_clip._guards.nonfinite import skip_nonfinite
from optax_clip._guards.observe import observe
from optax_clip._guards.spikes import skip_spikes
from optax_clip._guards.verdict import SkipReason
from optax_clip._methods.adagc import adagc
from optax_clip._methods.agc import adaptive_grad_clip
from optax_clip._methods.agc import unitwise_clip
from optax_clip._methods.agc import unitwise_norm
from optax_clip._methods.autoclip import autoclip
from optax_clip._methods.autoclip import clip_by_layer_percentile
from optax_clip._methods.clippy import clippy
from optax_clip._methods.element_spikes import clip_element_spikes
from optax_clip._methods.fixed import clip
from optax_clip._methods.fixed import clip_by_global_norm
from optax_clip._methods.history import clip_by_history
from optax_clip._methods.layers import clip_by_block_rms
from optax_clip._methods.layers import clip_by_group_norm
from optax_clip._methods.layers import clip_by_layer_norm
from optax_clip._methods.spectral import clip_by_spectral_norm
from optax_clip._methods.spectral import spectral_clip
from optax_clip._methods.stable_spam import adaclip
from optax_clip._methods.stable_spam import adagn
from optax_clip._methods.stable_spam import stable_spam
from optax_clip._methods.zclip import zclip
from optax_clip._norms.extended import Extended
from optax_clip._protect import protect
from optax_clip._report.convert import convert_state
from optax_clip._report.history import norm_history
from optax_clip._report.layer_report import layer_metrics
from optax_clip._report.metrics import loss_scale
from optax_clip._report.metrics import metrics
from optax_clip._report.replay import replay_limits
from optax_clip._report.suggest import suggest_max_norm
from optax_clip._trees.labels import labels_by_path
from optax_clip._trees.paths import unit_axes_by_name

__version__ = "0.2.0"

__all__ = [
  "Action",
  "Extended",
  "Measure",
  "Parts",
  "SkipReason",
  "Threshold",
  "actions",
  "adaclip",
  "adagc",
  "adagn",
  "adaptive_grad_clip",
  "autoclip",
  "clip",
  "clip_by_block_rms",
  "clip_by_global_norm",
  "clip_by_group_norm",
  "clip_by_history",
  "clip_by_layer_norm",
  "clip_by_layer_percentile",
  "clip_by_spectral_norm",
  "clip_element_spikes",
  "clip_tree",
  "clip_with",
  "clippy",
  "convert_state",
  "dynamic_loss_scale",
  "global_norm",
  "guarded_step",
  "labels_by_path",
  "layer_metrics",
  "loss_scale",
  "max_attention_logits",
  "measures",
  "metrics",
  "norm_history",
  "observe",
  "per_example_global_norm_clip",
  "per_example_layer_norm_clip",
  "protect",
  "qk_clip",
  "replay_limits",
  "skip_nonfinite",
  "skip_spikes",
  "spectral_clip",
  "stable_spam",
  "states",
  "suggest_max_norm",
  "thresholds",
  "unit_axes_by_name",
  "unitwise_clip",
  "unitwise_norm",
  "zclip",
]
