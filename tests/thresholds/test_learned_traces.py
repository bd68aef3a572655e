"""Long random traces with spikes, against float64 transcriptions of each paper.

The tolerance on limits is 1e-5 relative; where the worst case of a method is far
below it, the bound is tighter, to notice a loss of precision.
"""

from helpers import learned
from helpers import learned_oracles
import jax.numpy as jnp
import numpy as np
import pytest

import optax_clip
from optax_clip import thresholds

STEPS = 1500
seeds = pytest.mark.parametrize("seed", range(4))


def deviation(found, wanted):
  """The largest relative difference; both must be infinite in the same places."""
  np.testing.assert_array_equal(np.isinf(found), np.isinf(wanted))
  finite = np.isfinite(wanted)
  return np.max(np.abs(found[finite] / wanted[finite] - 1))


@seeds
@pytest.mark.parametrize("q", [10.0, 50.0, 97.5])
@pytest.mark.parametrize("window", [100, 2000])
def test_percentile(seed, q, window):
  norms = learned.trace(seed, STEPS)
  found, _ = learned.limits(thresholds.percentile(q, window), norms)
  wanted = learned_oracles.autoclip(norms.astype(np.float64), q, window)
  assert deviation(found, wanted) < 1e-5


@seeds
def test_history(seed):
  norms = learned.trace(seed, STEPS)
  found, _ = learned.limits(thresholds.history(), norms)
  wanted = learned_oracles.history(norms.astype(np.float64))
  assert deviation(found, wanted) < 5e-6


ZCLIP = [
  ({}, {}),
  ({"mode": "mean"}, {"mode": "mean"}),
  ({"mode": "percentile"}, {"mode": "percentile"}),
  ({"clip_factor": 0.7}, {"factor": 0.7}),
  ({"skip_update_on_spike": True}, {"skip": True}),
  (
    {"z_threshold": 2.0, "decay": 0.9, "warmup": 60, "eps": 1e-3},
    {"z": 2.0, "alpha": 0.9, "warmup": 60, "eps": 1e-3},
  ),
]


@seeds
@pytest.mark.parametrize(("ours", "theirs"), ZCLIP)
def test_zscore(seed, ours, theirs):
  norms = learned.trace(seed, STEPS)
  found, _ = learned.limits(thresholds.zscore(**{"eps": 1e-6, **ours}), norms)
  wanted = learned_oracles.zclip(norms.astype(np.float64), **theirs)
  assert deviation(found, wanted) < 1e-5
  assert np.sum(norms > found) > 10  # There were spikes to disagree about.


@seeds
def test_zscore_has_a_memory_for_each_entry(seed):
  norms = learned.trace(seed, STEPS, (3,))
  found, _ = learned.limits(thresholds.zscore(eps=1e-6), norms)
  for i in range(3):
    wanted = learned_oracles.zclip(norms[:, i].astype(np.float64))
    assert deviation(found[:, i], wanted) < 1e-5


@seeds
def test_adagc(seed):
  norms = learned.trace(seed, STEPS, (5,)) * np.float32([1, 0.1, 3, 1e-3, 30])
  found, state = learned.limits(thresholds.clipped_mean(warmup_norm=1.0), norms)
  scales, gamma = learned_oracles.adagc(norms.astype(np.float64))
  assert np.max(np.abs(np.minimum(found / norms, 1) / scales - 1)) < 1e-5
  assert np.max(np.abs(state.memory.gamma / gamma - 1)) < 1e-5
  assert np.mean(scales < 1) > 0.05


def gradients(seed, steps, size):
  rng = np.random.default_rng(seed)
  g = rng.standard_normal((steps, size)) * learned.trace(seed, steps)[:, None]
  return g.astype(np.float32)


@seeds
def test_adaclip_and_adagn(seed):
  g = gradients(seed, STEPS, 7)
  once = learned_oracles.adaclip(g.astype(np.float64))
  found, _ = learned.run(optax_clip.adaclip(), {"w": jnp.asarray(g)})
  np.testing.assert_allclose(found["w"], once, rtol=1e-5)
  found, _ = learned.run(optax_clip.stable_spam(eps=1e-8), {"w": jnp.asarray(g)})
  np.testing.assert_allclose(found["w"], learned_oracles.adagn(once), rtol=1e-5)
  assert np.mean(once != g) > 0.01


@seeds
@pytest.mark.parametrize(("theta", "warmup"), [(5000.0, 1), (50.0, 20)])
def test_element_spikes(seed, theta, warmup):
  g = gradients(seed, STEPS, 7)
  wanted, v = learned_oracles.spam(g.astype(np.float64), theta, 0.999, warmup)
  tx = optax_clip.clip_element_spikes(theta, warmup=warmup)
  found, state = learned.run(tx, {"w": jnp.asarray(g)})
  np.testing.assert_allclose(found["w"], wanted, rtol=1e-5)
  np.testing.assert_allclose(state.rms["w"] ** 2, v, rtol=2e-5)
  assert np.any(wanted != g)


@seeds
def test_clippy(seed):
  rng = np.random.default_rng(seed)
  tx = optax_clip.clippy(0.1, 1e-4, 1e-3)
  for _ in range(20):
    u, p, v = (
      (rng.standard_normal(50) * 10 ** rng.uniform(-3, 1, 50)).astype(np.float32)
      for _ in range(3)
    )
    u, v = u * (rng.random(50) < 0.7), v**2 + np.float32(1e-8)
    scale = learned_oracles.clippy(
      *(x.astype(np.float64) for x in (u, p)), 0.1, 1e-4, 1e-3, v.astype(np.float64)
    )
    params = {"w": jnp.asarray(p)}
    new, _ = tx.update(
      {"w": jnp.asarray(u, jnp.float32)},
      tx.init(params),
      params,
      accumulator={"w": jnp.asarray(v)},
    )
    np.testing.assert_allclose(new["w"], u * scale, rtol=2e-6)


@pytest.mark.parametrize("name", learned.METHODS)
@pytest.mark.parametrize("size", [1e30, 3.4e38])
@pytest.mark.parametrize("when", [0, 3, 60])
def test_a_huge_finite_norm_leaves_a_useful_memory(name, size, when):
  """No memory becomes non-finite, and each method recovers to catch a spike."""
  steps, spike = 3200, 3100
  rng = np.random.default_rng(0)
  g = rng.uniform(0.5, 1.5, (steps, 3)).astype(np.float32)
  g[when] = size
  g[spike] *= 1000
  found, state = learned.run(
    learned.make(name), {"a": jnp.asarray(g), "b": jnp.asarray(g[::-1].copy())}
  )
  assert all(np.all(np.isfinite(x)) for x in learned.memory(state))
  new = np.asarray(found["a"], np.float64)
  assert np.all(np.isfinite(new))
  assert np.linalg.norm(new[spike]) < 0.1 * np.linalg.norm(g[spike])
