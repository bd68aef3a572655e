"""Long random traces with spikes, against float64 transcriptions of each paper.

The tolerance on limits is 1e-5 relative. Where a method's worst case is far below
that, its bound is tighter, so that a loss of precision shows.

Seeds, quantiles and magnitudes are data: each method is compiled once for all cases.
"""

import itertools

from helpers import learned
from helpers import learned_oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_clip
from optax_clip import thresholds

STEPS = 1500
SEEDS = range(4)


def traces(shape=()):
  """Norms for each seed, float32[seeds, steps, ...]."""
  return np.stack([learned.trace(seed, STEPS, shape) for seed in SEEDS])


def deviation(found, wanted):
  """The largest relative difference; both must be infinite in the same places."""
  np.testing.assert_array_equal(np.isinf(found), np.isinf(wanted))
  finite = np.isfinite(wanted)
  return np.max(np.abs(found[finite] / wanted[finite] - 1))


QUANTILES = (10.0, 50.0, 97.5)


@pytest.mark.parametrize("window", [100, 2000])
def test_percentile(window):
  norms = traces()

  # Quantiles share a window, which `vmap` sorts once for all of them.
  def limits(norms):
    def of(q):
      return learned.scanned(thresholds.percentile(q, window), norms)[0]

    return jax.vmap(of)(jnp.float32(QUANTILES))

  found = learned.each(limits, norms)
  for seed in SEEDS:
    wanted = learned_oracles.autoclip(norms[seed].astype(np.float64), QUANTILES, window)
    for i, q in enumerate(QUANTILES):
      assert deviation(found[seed, i], wanted[:, i]) < 1e-5, (seed, q)


@pytest.mark.parametrize("surprise", [None, 2.0])
def test_history(surprise):
  norms = traces()
  found, _ = learned.limits_of_each(thresholds.history(surprise=surprise), norms)
  for seed in SEEDS:
    past = norms[seed].astype(np.float64)
    wanted = learned_oracles.history(past, surprise=surprise)
    assert deviation(found[seed], wanted) < 5e-6, seed


@pytest.mark.parametrize("share", [0.12, 0.2, 0.35])
def test_frequent_spikes_do_not_blind_a_history_that_is_surprised(share):
  random = np.random.default_rng(0)
  norms = np.exp(0.1 * random.standard_normal(600)).astype(np.float32)
  spikes = random.random(600) < share
  norms[spikes] *= 10
  found, _ = learned.limits(thresholds.history(surprise=2.0), norms)
  later = np.arange(600) >= 128
  assert np.all(norms[spikes & later] > found[spikes & later])
  assert np.mean(norms[~spikes & later] > found[~spikes & later]) < 0.02
  # Without it they lift the limit out of their own reach.
  blind, _ = learned.limits(thresholds.history(), norms)
  assert np.mean(norms[spikes & later] > blind[spikes & later]) < 0.5


def test_a_history_that_is_surprised_follows_within_half_a_window():
  norms = np.where(np.arange(400) < 200, 1.0, 30.0).astype(np.float32)
  found, _ = learned.limits(thresholds.history(surprise=2.0), norms)
  (clipped,) = np.nonzero(norms > found)
  np.testing.assert_array_equal(clipped, np.arange(200, 264))


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


@pytest.mark.parametrize(("ours", "theirs"), ZCLIP)
def test_zscore(ours, theirs):
  norms = traces()
  found, _ = learned.limits_of_each(thresholds.zscore(**{"eps": 1e-6, **ours}), norms)
  for seed in SEEDS:
    wanted = learned_oracles.zclip(norms[seed].astype(np.float64), **theirs)
    assert deviation(found[seed], wanted) < 1e-5, seed
    # There were spikes to disagree about.
    assert np.sum(norms[seed] > found[seed]) > 10, seed


def test_zscore_has_a_memory_for_each_entry():
  norms = traces((3,))
  found, _ = learned.limits_of_each(thresholds.zscore(eps=1e-6), norms)
  for seed, i in itertools.product(SEEDS, range(3)):
    wanted = learned_oracles.zclip(norms[seed, :, i].astype(np.float64))
    assert deviation(found[seed, :, i], wanted) < 1e-5, (seed, i)


def test_adagc():
  norms = traces((5,)) * np.float32([1, 0.1, 3, 1e-3, 30])
  every, state = learned.limits_of_each(thresholds.clipped_mean(warmup_norm=1.0), norms)
  for seed in SEEDS:
    found, n = every[seed], norms[seed]
    scales, gamma = learned_oracles.adagc(n.astype(np.float64))
    assert np.max(np.abs(np.minimum(found / n, 1) / scales - 1)) < 1e-5, seed
    assert np.max(np.abs(state.memory.gamma[seed] / gamma - 1)) < 1e-5, seed
    assert np.mean(scales < 1) > 0.05, seed


def gradients(size):
  """Gradients of one leaf for each seed, float32[seeds, steps, size]."""

  def of(seed):
    rng = np.random.default_rng(seed)
    g = rng.standard_normal((STEPS, size)) * learned.trace(seed, STEPS)[:, None]
    return g.astype(np.float32)

  return np.stack([of(seed) for seed in SEEDS])


def test_adaclip_and_adagn():
  grads = gradients(7)
  clipped, _ = learned.run_each(optax_clip.adaclip(), {"w": grads})
  both, _ = learned.run_each(optax_clip.stable_spam(eps=1e-8), {"w": grads})
  for seed in SEEDS:
    g = grads[seed]
    once = learned_oracles.adaclip(g.astype(np.float64))
    twice = learned_oracles.adagn(once)
    np.testing.assert_allclose(
      clipped["w"][seed], once, rtol=1e-5, err_msg=f"seed {seed}"
    )
    np.testing.assert_allclose(
      both["w"][seed], twice, rtol=1e-5, err_msg=f"seed {seed}"
    )
    assert np.mean(once != g) > 0.01, seed


@pytest.mark.parametrize(("theta", "warmup"), [(5000.0, 1), (50.0, 20)])
def test_element_spikes(theta, warmup):
  grads = gradients(7)
  tx = optax_clip.clip_element_spikes(theta, warmup=warmup)
  found, state = learned.run_each(tx, {"w": grads})
  for seed in SEEDS:
    g, case = grads[seed], f"seed {seed}"
    wanted, v = learned_oracles.spam(g.astype(np.float64), theta, 0.999, warmup)
    np.testing.assert_allclose(found["w"][seed], wanted, rtol=1e-5, err_msg=case)
    np.testing.assert_allclose(state.rms["w"][seed] ** 2, v, rtol=2e-5, err_msg=case)
    assert np.any(wanted != g), case


def test_clippy():
  cases = list(itertools.product(SEEDS, range(20)))
  updates, params, moments = [], [], []
  for seed in SEEDS:
    rng = np.random.default_rng(seed)
    for _ in range(20):
      u, p, v = (
        (rng.standard_normal(50) * 10 ** rng.uniform(-3, 1, 50)).astype(np.float32)
        for _ in range(3)
      )
      updates.append(np.float32(u * (rng.random(50) < 0.7)))
      params.append(p)
      moments.append(v**2 + np.float32(1e-8))
  tx = optax_clip.clippy(0.1, 1e-4, 1e-3)

  def clipped(u, p, v):
    params = {"w": p}
    new, _ = tx.update({"w": u}, tx.init(params), params, accumulator={"w": v})
    return new["w"]

  arrays = [np.stack(x) for x in (updates, params, moments)]
  found = learned.each(clipped, *arrays)
  for case, new, u, p, v in zip(cases, found, *arrays, strict=True):
    wide = (x.astype(np.float64) for x in (u, p))
    scale = learned_oracles.clippy(*wide, 0.1, 1e-4, 1e-3, v.astype(np.float64))
    np.testing.assert_allclose(new, u * scale, rtol=2e-6, err_msg=str(case))


@pytest.mark.parametrize("name", learned.METHODS)
def test_a_huge_finite_norm_leaves_a_useful_memory(name):
  """No memory becomes non-finite, and each method recovers to catch a spike."""
  steps, spike = 3200, 3100
  cases = list(itertools.product((1e30, 3.4e38), (0, 3, 60)))  # Its size, and when.
  rng = np.random.default_rng(0)
  g = rng.uniform(0.5, 1.5, (steps, 3)).astype(np.float32)
  every = np.stack([g] * len(cases))
  for one, (size, when) in zip(every, cases, strict=True):
    one[when] = size
    one[spike] *= 1000
  found, state = learned.run_each(
    learned.make(name), {"a": every, "b": every[:, ::-1].copy()}
  )
  for i, case in enumerate(cases):
    kept = learned.memory(jax.tree.map(lambda x, i=i: x[i], state))
    assert all(np.all(np.isfinite(x)) for x in kept), case
    new = np.float64(found["a"][i])
    assert np.all(np.isfinite(new)), case
    before = np.linalg.norm(every[i, spike])
    assert np.linalg.norm(new[spike]) < 0.1 * before, case
