"""How often a layout is made, and that norms are those of the plain version."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_clip
from optax_clip import measures
from optax_clip._norms import mesh as _mesh
from optax_clip._norms import norm as _norm

GRADS = {
  "kernel": jnp.float32([[3.0, -0.5], [4.0, 0.25], [1.0, 2.0]]),
  "bias": jnp.float32([6.0, -8.0]),
  "gain": jnp.float32(0.5),
  "wide": jnp.float32(np.linspace(-2, 2, 24).reshape(2, 3, 4)),
}
LABELS = {"kernel": "a", "bias": "b", "gain": "a", "wide": "b"}
CLIPS = {
  "global": optax_clip.clip_by_global_norm(1.0),
  "global, layers": optax_clip.clip_by_global_norm(1.0, record="layers"),
  "layers": optax_clip.clip_by_layer_norm(1.0, record="layers"),
  "rms": optax_clip.clip_by_block_rms(1.0),
  "groups": optax_clip.clip_by_group_norm(LABELS, {"a": 1.0, "b": 2.0}),
  "units": optax_clip.adaptive_grad_clip(0.1),
  "learned": optax_clip.zclip(),
}
GUARDED = {
  f"{name}, guarded": optax_clip.skip_nonfinite(clip, record="layers")
  for name, clip in CLIPS.items()
  if name.startswith("global")
}


@pytest.mark.parametrize("name", CLIPS | GUARDED)
def test_one_layout_is_made_in_a_trace(name, monkeypatch):
  tx = (CLIPS | GUARDED)[name]
  state = jax.eval_shape(tx.init, GRADS)
  made, cuts = [], _mesh.cuts

  # Each layout asks once how a mesh divides the leaves.
  def counted(*arguments):
    made.append(arguments)
    return cuts(*arguments)

  monkeypatch.setattr(_mesh, "cuts", counted)
  jax.eval_shape(tx.update, GRADS, state, GRADS)
  assert len(made) == 1


MEASURES = {
  "global": measures.global_norm,
  "layers": measures.layer_norm,
  "stacked": lambda ord: measures.layer_norm(ord=ord, stacked={"wide": 0}),
  "groups": lambda ord: measures.group_norm(LABELS, ("a", "b", "c"), ord=ord),
  "units": lambda ord: measures.unit_norm(ord=ord),
}


@pytest.mark.parametrize("ord", [0.5, 2.0, math.inf])
@pytest.mark.parametrize("name", MEASURES)
def test_norms_are_those_of_the_plain_version(name, ord):
  measure = MEASURES[name](ord=ord)
  plain = _norm.plain(jax.tree.leaves(GRADS), measure.layout(GRADS), ord)
  for x, norm in zip(plain, measure.measure(GRADS), strict=True):
    np.testing.assert_allclose(norm.value * norm.unit, x, rtol=1e-6)
