"""What transformations and states print."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_clip

pytestmark = pytest.mark.house

PARAMS = {"w": jnp.ones((3, 400))}


@pytest.mark.parametrize(
  ("make", "text"),
  [
    (lambda: optax_clip.autoclip(), "autoclip(percentile=10.0, window=1000)"),
    (
      lambda: optax_clip.clip_by_global_norm(1.0, strict=True),
      "clip_by_global_norm(max_norm=1.0, strict=True)",
    ),
    (
      lambda: optax_clip.clip_by_global_norm(optax.linear_schedule(1, 0.1, 9)),
      "clip_by_global_norm(max_norm=schedule)",
    ),
    (
      lambda: optax_clip.clip_by_global_norm(jnp.float32(2)),
      "clip_by_global_norm(max_norm=2.0)",
    ),
    (
      lambda: optax_clip.skip_nonfinite(optax_clip.clip(0.5)),
      "skip_nonfinite(inner=clip(max_delta=0.5))",
    ),
    (
      lambda: optax_clip.observe(optax.sgd(0.1), window=5),
      "observe(inner=..., window=5)",
    ),
  ],
)
def test_a_transformation_prints_as_its_call(make, text):
  assert repr(make()) == text


def test_a_traced_argument_prints_as_its_type():
  texts = []

  @jax.jit
  def traced(limit):
    texts.append(repr(optax_clip.clip_by_global_norm(limit)))
    return limit

  traced(1.0)
  assert texts == ["clip_by_global_norm(max_norm=float32[])"]


def test_the_parts_of_a_named_one_are_as_before():
  """It is the named tuple that optax has: it unpacks, and JAX maps over it."""
  tx = optax_clip.clip(1.0)
  init, update = tx
  assert (init, update) == (tx.init, tx.update)
  assert isinstance(tx, optax.GradientTransformationExtraArgs)
  assert isinstance(jax.tree.map(lambda f: f, tx), type(tx))
  repr(jax.tree.map(lambda f: f, tx))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: (s, s), lambda s: {"s": s}])
def test_a_state_prints_no_long_array(wrap):
  tx = optax_clip.observe(
    optax_clip.skip_nonfinite(optax.chain(optax_clip.autoclip(), optax.adam(0.1)))
  )
  text = repr(wrap(tx.init(PARAMS)))
  assert len(text) < 1800
  assert "window=float32[1, 1000]" in text
  assert "mu={'w': float32[3, 400]}" in text
  assert "counts=[0, 0, 0, 0, 0, 0, 0]" in text


def test_a_state_of_shapes_prints():
  text = repr(jax.eval_shape(optax_clip.zclip().init, PARAMS))
  assert "mean=float32[1]" in text
  assert "counts=int32[7]" in text
