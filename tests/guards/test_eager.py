"""Outside `jax.jit` nothing is compiled after the second update, nor kept."""

from helpers import registry
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import thresholds

PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
compiled = []


def _note(event, duration, **kwargs):
  del duration, kwargs
  if event == "/jax/core/compile/backend_compile_duration":
    compiled.append(event)


jax.monitoring.register_event_duration_secs_listener(_note)


def chain():
  return optax.chain(optax_clip.clip_by_global_norm(1.0), optax.trace(0.9))


GUARDS = {
  "skip": lambda: optax_clip.skip_nonfinite(chain()),
  "spikes": lambda: optax_clip.skip_spikes(
    chain(), thresholds.history(6, window=8), signals=("norm", "loss")
  ),
  "scale": lambda: optax_clip.dynamic_loss_scale(chain(), 1.0),
  "guards": lambda: optax_clip.dynamic_loss_scale(
    optax_clip.skip_nonfinite(chain()), 1.0
  ),
  "observe": lambda: optax_clip.observe(optax_clip.skip_nonfinite(chain()), 4),
  "protect": lambda: optax_clip.protect(optax.trace(0.9), 1.0),
  "layers": lambda: optax_clip.skip_nonfinite(chain(), record="layers"),
}


def run(tx, steps, params=PARAMS):
  """Updates, states, and how many programs each step compiled."""
  state, found = tx.init(params), []
  for i in range(steps):
    grads = jax.tree.map(lambda x, i=i: jnp.full_like(x, 0.1 * (i + 1)), params)
    before = len(compiled)
    updates, state = tx.update(grads, state, params, loss=jnp.float32(i))
    found.append(len(compiled) - before)
  return updates, state, found


def test_what_is_counted():
  """A branch of new functions is compiled each time."""
  tx = optax.apply_if_finite(optax.identity(), 3)
  assert run(tx, 4)[2][2:] != [0, 0]


@pytest.mark.parametrize("name", GUARDS)
def test_guards(name):
  assert run(GUARDS[name](), 4)[2][2:] == [0, 0]


@pytest.mark.parametrize("method", registry.ROWS, ids=lambda row: row.name)
def test_methods(method):
  assert run(method.make(), 4)[2][2:] == [0, 0]


def test_a_step_that_is_skipped_compiles_nothing_either():
  tx, params = GUARDS["layers"](), {"w": jnp.ones(5)}
  state, found = tx.init(params), []
  for x in (1.0, np.nan, 1.0, np.nan, 2.0):
    before = len(compiled)
    updates, state = tx.update({"w": jnp.full(5, x, jnp.float32)}, state, params)
    found.append(len(compiled) - before)
    assert np.all(np.asarray(updates["w"]) == 0) == np.isnan(x)
  assert found[2:] == [0, 0, 0]
  assert optax_clip.metrics(state)["skip_nonfinite/steps_skipped"] == 2


@pytest.mark.parametrize("name", GUARDS)
def test_eager_and_compiled_steps_agree(name):
  """In values, types, and in what a skipped step leaves behind."""
  tx, params = GUARDS[name](), {"w": jnp.ones(3), "b": jnp.ones(())}
  one = other = tx.init(params)
  update = jax.jit(tx.update)
  for x in (1.0, 0.5, np.nan, 3.0):
    grads = {"w": jnp.full(3, x, jnp.float32), "b": jnp.float32(x)}
    first, one = tx.update(grads, one, params, loss=jnp.float32(x))
    second, other = update(grads, other, params, loss=jnp.float32(x))
    for a, b in zip(
      jax.tree.leaves((first, one)), jax.tree.leaves((second, other)), strict=True
    ):
      assert (a.dtype, a.shape, a.weak_type) == (b.dtype, b.shape, b.weak_type)
      np.testing.assert_allclose(a, b, rtol=1e-6)
  assert jax.tree.structure(one) == jax.tree.structure(other)
