"""What thresholds that learn cost, read from the compiled AdamW step: no timing."""

from helpers import learned
import jax
import jax.numpy as jnp
import optax
import pytest

import optax_clip

pytestmark = pytest.mark.optimized

WIDTH, LAYERS = 256, 30

# SPAM's elements are compared with a memory of each of them. XLA writes the new
# memory where the old one is, which Adam still needs for the clipped updates.
BY_ELEMENT = ("clip_element_spikes",)
BY_NORM = [name for name in learned.METHODS if name not in BY_ELEMENT]


@pytest.fixture(scope="module")
def params():
  """Four million parameters in 61 leaves."""
  layer = {
    "w": jax.ShapeDtypeStruct((WIDTH, 2 * WIDTH), jnp.float32),
    "b": jax.ShapeDtypeStruct((2 * WIDTH,), jnp.float32),
  }
  return [*[layer] * LAYERS, jax.ShapeDtypeStruct((WIDTH,), jnp.float32)]


def temporary(tx, params):
  """Bytes of temporaries of the compiled step, with donation as in training."""
  tx = optax.chain(tx, optax.adamw(1e-3))

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = jax.eval_shape(tx.init, params)
  lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
  return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.foreign  # AdamW of optax mixes dtypes.
@pytest.mark.parametrize("name", BY_NORM)
def test_no_temporary_of_the_size_of_the_gradients(params, name):
  plain = temporary(optax_clip.clip_by_global_norm(1.0), params)
  factory, keywords, _ = learned.METHODS[name]
  del keywords  # The defaults: windows of their real length.
  assert temporary(factory(), params) <= plain + 2**20
