"""What thresholds that learn cost, read from the compiled AdamW step: no timing."""

from helpers import learned
from helpers.programs import adamw
from helpers.programs import compiled_step
from helpers.programs import temporary
import jax
import jax.numpy as jnp
import pytest

import optax_clip

pytestmark = pytest.mark.optimized

WIDTH, LAYERS = 1024, 3

# SPAM's elements are compared with a memory of each of them. XLA writes the new
# memory where the old one is, which Adam still needs for the clipped updates.
BY_ELEMENT = ("clip_element_spikes",)
# The modes of a method are other arithmetic with as many numbers.
BY_NORM = [
  name
  for name, (factory, *_) in learned.METHODS.items()
  if name == factory.__name__ and name not in BY_ELEMENT
]


@pytest.fixture(scope="module")
def params():
  """Six million parameters in 7 leaves."""
  layer = {
    "w": jax.ShapeDtypeStruct((WIDTH, 2 * WIDTH), jnp.float32),
    "b": jax.ShapeDtypeStruct((2 * WIDTH,), jnp.float32),
  }
  return [*[layer] * LAYERS, jax.ShapeDtypeStruct((WIDTH,), jnp.float32)]


@pytest.fixture(scope="module")
def plain(params):
  """Bytes of temporaries of a step with a fixed limit."""
  return temporary(compiled_step(adamw(optax_clip.clip_by_global_norm(1.0)), params))


@pytest.mark.foreign  # AdamW of optax mixes dtypes.
@pytest.mark.parametrize("name", BY_NORM)
def test_no_temporary_of_the_size_of_the_gradients(params, plain, name):
  factory, keywords, _ = learned.METHODS[name]
  del keywords  # The defaults: windows of their real length.
  assert temporary(compiled_step(adamw(factory()), params)) <= plain + 2**20
