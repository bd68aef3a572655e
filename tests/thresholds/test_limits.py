"""Limits from configurations: `None` is off, and 0 is not."""

import math
import warnings

from helpers import oracles
from helpers.registry import ZERO_IS_MEANT
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip

G = {"a": jnp.array([30.0, 40.0]), "b": jnp.array([-1e20, 3e38])}
LABELS = {"a": "x", "b": "y"}

# For each function with a fixed limit: the name of the argument, and a call with it.
FIXED = {
  "clip": ("max_delta", lambda c: optax_clip.clip(c, record=True)),
  "clip_by_global_norm": ("max_norm", optax_clip.clip_by_global_norm),
  "clip_by_layer_norm": ("max_norm", optax_clip.clip_by_layer_norm),
  "clip_by_group_norm": (
    "max_norms['x']",
    lambda c: optax_clip.clip_by_group_norm(LABELS, {"x": c, "y": None}),
  ),
  "clip_by_block_rms": ("threshold", optax_clip.clip_by_block_rms),
  "adaptive_grad_clip": ("clipping", optax_clip.adaptive_grad_clip),
}
every_fixed = pytest.mark.parametrize("name", FIXED)


def taken(tx):
  """One compiled step; the updates and the metrics."""
  updates, state = jax.jit(tx.update)(G, tx.init(G), G)
  return updates, optax_clip.metrics(state)


class TestNone:
  @every_fixed
  @pytest.mark.parametrize("off", [None, math.inf])
  def test_it_measures_and_never_clips(self, name, off):
    updates, found = taken(FIXED[name][1](off))
    oracles.assert_identical(updates, G)
    assert found[f"{name}/norm"] > 0
    assert found[f"{name}/limit"] == math.inf
    assert found[f"{name}/coefficient"] == 1
    assert found[f"{name}/steps"] == 1
    assert found[f"{name}/steps_clipped"] == 0

  def test_the_norm_is_recorded(self):
    tx = optax_clip.clip_by_global_norm(None)
    g = {"w": jnp.array([3.0, 4.0])}
    _, state = tx.update(g, tx.init(g))
    assert optax_clip.metrics(state)["clip_by_global_norm/norm"] == 5

  @every_fixed
  def test_its_state_is_that_of_a_number(self, name):
    make = FIXED[name][1]
    kinds = [jax.tree.structure(make(c).init(G)) for c in (None, 1.0)]
    assert kinds[0] == kinds[1]

  def test_with_strict_and_with_zero(self):
    for keywords in ({"strict": True}, {"nonfinite": "zero"}, {"ord": 1}):
      tx = optax_clip.clip_by_global_norm(None, **keywords)
      g = {"w": jnp.array([3e38, 1e-30, 0.0])}
      updates, _ = tx.update(g, tx.init(g))
      oracles.assert_identical(updates, g)

  def test_clip_tree(self):
    tree, norm = optax_clip.clip_tree({"w": jnp.array([3.0, 4.0])}, None)
    np.testing.assert_array_equal(tree["w"], [3, 4])
    assert norm == 5

  def test_it_prints_as_it_was_called(self):
    text = repr(optax_clip.clip_by_global_norm(None))
    assert text == "clip_by_global_norm(max_norm=None)"

  def test_inject_hyperparams(self):
    tx = optax.inject_hyperparams(optax_clip.clip_by_global_norm)(max_norm=None)
    g = {"w": jnp.array([3.0, 4.0])}
    updates, _ = tx.update(g, tx.init(g))
    oracles.assert_identical(updates, g)


class TestZero:
  @every_fixed
  @pytest.mark.parametrize("zero", [0, 0.0, -0.0, np.float32(0), np.array(0)], ids=repr)
  def test_it_warns_where_it_is_constructed(self, name, zero):
    argument, make = FIXED[name]
    with pytest.warns(UserWarning, match="into zeros") as caught:
      make(zero)
    (warning,) = caught
    message = str(warning.message)
    assert message.startswith(f"{argument}={zero!r} turns every update into zeros")
    for word in ("MaxText", "Levanter", "None", "float('inf')"):
      assert word in message
    assert warning.filename == __file__

  @ZERO_IS_MEANT
  @every_fixed
  def test_it_stays_0(self, name):
    updates, _ = taken(FIXED[name][1](0.0))
    assert not np.any(updates["a"])

  def test_clip_tree(self):
    with pytest.warns(UserWarning, match="max_norm=0 turns") as caught:
      tree, _ = optax_clip.clip_tree(G, 0)
    assert caught[0].filename == __file__
    assert not any(np.any(x) for x in jax.tree.leaves(tree))

  @every_fixed
  def test_what_is_traced_or_a_schedule_is_meant(self, name):
    make = FIXED[name][1]
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      for zero in (jnp.zeros(()), optax.constant_schedule(0.0)):
        updates, _ = taken(make(zero))
        assert not np.any(updates["a"])
      jax.eval_shape(lambda c: make(c).update(G, make(c).init(G), G), 0.0)

  def test_inject_hyperparams(self):
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      tx = optax.inject_hyperparams(optax_clip.clip_by_global_norm)(max_norm=0.0)
      updates, _ = tx.update(G, tx.init(G))
      updates, _ = jax.jit(tx.update)(G, tx.init(G))
    assert not any(np.any(x) for x in jax.tree.leaves(updates))


# --- Injected limits ----------------------------------------------------------

HALF = {"w": jnp.full(4, 100.0, jnp.float16)}


def injected(limit, **keywords):
  make = optax.inject_hyperparams(optax_clip.clip_by_global_norm, **keywords)
  tx = make(max_norm=limit)
  updates, state = jax.jit(tx.update)(HALF, tx.init(HALF), HALF)
  return updates["w"], optax_clip.metrics(state)["clip_by_global_norm/limit"]


@pytest.mark.parametrize("limit", [1e5, 1e-8])
def test_an_injected_limit_keeps_its_range_with_a_dtype_of_its_own(limit):
  """As docs/faq.md has it."""
  _, recorded = injected(limit, hyperparam_dtype=jnp.float32)
  np.testing.assert_allclose(recorded, limit, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_optax_gives_an_injected_limit_the_dtype_of_the_parameters():
  """What is then left of a limit in float16: all of the update, or nothing."""
  passed, limit = injected(1e5)
  assert np.isinf(limit)
  assert np.array_equal(passed, HALF["w"])
  zeroed, limit = injected(1e-8)
  assert limit == 0
  assert not np.any(zeroed)
