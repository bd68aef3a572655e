"""Counters stand still at the largest integer, and all goes on."""

import functools

from helpers import registry
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import thresholds

LAST = np.iinfo(np.int32).max

EVERY = {
  # With short memories, which are full long before.
  **{
    row.name: functools.partial(
      row.make, record=True, **({"window": 4} if row.takes("window") else {})
    )
    for row in registry.ROWS
  },
  "a schedule": lambda: optax_clip.clip_by_global_norm(optax.constant_schedule(1.0)),
  "a warm-up": lambda: optax_clip.clip_with(
    optax_clip.measures.global_norm(),
    thresholds.warmup(thresholds.average(), 3, 1.0),
    optax_clip.actions.rescale(),
  ),
  "skip_nonfinite": lambda: optax_clip.skip_nonfinite(optax.sgd(1.0), 5),
  "skip_spikes": lambda: optax_clip.skip_spikes(
    optax.sgd(1.0), thresholds.history(6, window=4), warmup=2, cooldown=2
  ),
  "dynamic_loss_scale": lambda: optax_clip.dynamic_loss_scale(optax.sgd(1.0)),
  "observe": lambda: optax_clip.observe(optax.sgd(1.0), window=4),
}

PARAMS = {"a": jnp.float32([1.0, 2.0, 2.0])}


def late(state, count):
  """As after two thousand million steps."""
  return jax.tree.map(
    lambda x: jnp.full_like(x, count) if x.dtype == jnp.int32 else x, state
  )


@pytest.mark.parametrize("name", EVERY)
def test_steps_go_on(name):
  tx = EVERY[name]()
  update = jax.jit(
    lambda factor, state: tx.update({"a": factor * PARAMS["a"]}, state, PARAMS)
  )
  fresh = tx.init(PARAMS)
  for factor in (1.0, 1.1, 0.9, 1.2, 1.0):
    _, fresh = update(factor, fresh)
  for count in (LAST - 1, LAST):
    state = late(fresh, count)
    for factor in (1.1, 0.9, 1.0):
      updates, state = update(factor, state)
      assert np.all(np.isfinite(updates["a"]))
      assert np.any(updates["a"])
      for path, x in jax.tree_util.tree_leaves_with_path(state):
        where = jax.tree_util.keystr(path)
        # Some counters count down, and some begin anew. None is ever negative. The
        # losses that a guard keeps are NaN until a step is skipped.
        wrong = x < 0 if x.dtype == jnp.int32 else np.isnan(x)
        assert not np.any(wrong[::2] if where.endswith(".kept") else wrong), where
    record = optax_clip.metrics(state)
    for key, value in record.items():
      if key.endswith("/steps"):
        assert value == LAST, key


@pytest.mark.parametrize("name", ["autoclip", "clip_by_history"])
def test_a_full_window_still_has_a_limit(name):
  """Of equal norms, to which it makes no difference which of them are kept."""
  tx = getattr(optax_clip, name)(50, window=4)
  update = jax.jit(tx.update)
  state = tx.init(jnp.zeros(2))
  for step in range(12):
    state = late(state, LAST) if step == 6 else state
    _, state = update(jnp.float32([3, 4]), state)
    if step >= 6:
      found = optax_clip.metrics(state)[f"{name}/limit"]
      np.testing.assert_allclose(found, 5, rtol=1e-5)
