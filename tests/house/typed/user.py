"""A training script that uses every public name, for type checkers to read."""

import jax
import jax.numpy as jnp
import optax

import optax_clip
from optax_clip import Action
from optax_clip import Extended
from optax_clip import Measure
from optax_clip import Parts
from optax_clip import SkipReason
from optax_clip import Threshold
from optax_clip import actions
from optax_clip import measures
from optax_clip import states
from optax_clip import thresholds

Tree = dict[str, jax.Array]


def clips(schedule: optax.Schedule, traced: jax.Array) -> list[object]:
  """Every transformation of gradients."""
  labels = optax_clip.labels_by_path({"head": "head", "": "body"})
  axes = optax_clip.unit_axes_by_name({"w": ("mlp", "embed")}, {"mlp"})
  return [
    optax_clip.clip(1.0, nonfinite="zero"),
    optax_clip.clip_by_global_norm(schedule, strict=True, axis_name=("data", "model")),
    optax_clip.spectral_clip(traced, soft=True, axis=(0, 1), stacked={"blocks/": 0}),
    optax_clip.clip_by_spectral_norm(optax_clip.thresholds.by_shape(1.0)),
    optax_clip.clip_by_layer_norm(traced, ord=float("inf"), stacked={"blocks/": 0}),
    optax_clip.clip_by_group_norm(labels, {"head": 0.1, "body": 1.0}),
    optax_clip.clip_by_group_norm(
      labels, {"head": None, "body": 1.0}, scaled={"w": False}
    ),
    optax_clip.clip_by_block_rms(1.0, record="layers"),
    optax_clip.adaptive_grad_clip(0.01, axis=axes),
    optax_clip.autoclip(10, window=500),
    optax_clip.clip_by_layer_percentile(),
    optax_clip.clip_by_history(3.0),
    optax_clip.zclip(mode="mean", max_norm=None),
    optax_clip.adagc(record=False),
    optax_clip.clippy(),
    optax_clip.clip_element_spikes(),
    optax_clip.adaclip(),
    optax_clip.adagn(),
    optax_clip.stable_spam(name="spam"),
  ]


def custom(norms: jax.Array) -> tuple[Measure, Threshold, Action]:
  """Parts of a method."""
  known = Extended(norms, jnp.ones_like(norms))
  measure = measures.layer_norm()._replace(measure=lambda updates, params: [known])
  parts = Parts(measures.layer_norm(), None)
  threshold = thresholds.at_most(thresholds.percentile(20.0), 1.0)
  return measure._replace(parts=parts), threshold, actions.floored(0.1)


def train(params: Tree, grads: Tree, loss: jax.Array) -> tuple[Tree, float]:
  """One step, and what there is to read after it."""
  clip = optax_clip.clip_with(*custom(jnp.ones(1)))
  inner = optax_clip.protect(optax.adamw(1e-3), clip, guard=None)
  inner = optax_clip.skip_nonfinite(inner, record="layers")
  spikes = optax_clip.skip_spikes(inner, signals=("norm", "loss"), name="spikes")
  tx = optax_clip.observe(optax_clip.dynamic_loss_scale(spikes), window=100)
  state = optax_clip.convert_state(
    tx, params, inner.init(params), drop=("",), report=print
  )
  norm = optax_clip.global_norm(grads) * optax_clip.loss_scale(state)
  grads, _ = optax_clip.clip_tree(grads, 1.0, norm=norm)
  updates, state = tx.update(grads, state, params, loss=loss)
  params, state = optax_clip.guarded_step(tx, grads, state, params, loss=loss)
  row: dict[str, jax.Array] = optax_clip.metrics(state)
  report: states.LayerReport = optax_clip.layer_metrics(state, params)
  found: states.Suggestion = optax_clip.suggest_max_norm(optax_clip.norm_history(state))
  limits = optax_clip.replay_limits(optax_clip.zclip(), [1.0, found.max_norm])
  clipped, _ = optax_clip.clip_tree(updates, found.max_norm)
  unit = optax_clip.unitwise_norm(clipped["w"])
  optax_clip.unitwise_clip(unit, unit, clipped["w"])
  total, _ = optax_clip.per_example_global_norm_clip(grads, 1.0)
  optax_clip.per_example_layer_norm_clip(total, 1.0)
  largest = optax_clip.max_attention_logits(params["q"], params["k"], is_causal=True)
  query, key = optax_clip.qk_clip(params["q"], params["k"], largest, tau=30.0)
  params = {**params, "q": query, "k": key}
  if int(row["skip_nonfinite/reason"]) == SkipReason.NONFINITE_NORM:
    print(report.nonfinite)
  return params, float(limits[-1])
