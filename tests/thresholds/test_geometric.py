"""The running geometric mean: its equation, its units, and what it ignores."""

from helpers import learned
from helpers import learned_oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_clip
from optax_clip import actions
from optax_clip import measures
from optax_clip import thresholds

CASES = ({}, {"factor": 1.3}, {"surprise": 10.0, "decay": 0.9})


@pytest.mark.parametrize("keywords", CASES)
def test_long_traces(keywords):
  """Against the equation in float64, in logarithms."""
  norms = np.stack([learned.trace(seed, 1500) for seed in range(4)])
  found, _ = learned.limits_of_each(thresholds.geometric(**keywords), norms)
  for seed in range(4):
    wanted = learned_oracles.geometric(norms[seed].astype(np.float64), **keywords)
    assert np.isinf(found[seed, 0])
    np.testing.assert_allclose(found[seed, 1:], wanted[1:], rtol=1e-6)
    assert np.sum(norms[seed] > found[seed]) > 10, seed


def test_the_second_step_has_a_limit():
  found, _ = learned.limits(thresholds.geometric(), np.float32([3, 100, 1, 1]))
  # After 3 and 100, which counts as 9, the mean is sqrt(27).
  np.testing.assert_allclose(found[1:3], [6, 2 * np.sqrt(27)], rtol=1e-6)


@pytest.mark.parametrize("power", [-100, -7, 7, 100])
def test_units_do_not_matter(power):
  norms = learned.trace(0, 500)
  found, _ = learned.limits(thresholds.geometric(), norms)
  scaled, _ = learned.limits(thresholds.geometric(), norms * np.float32(2.0**power))
  np.testing.assert_array_equal(scaled, found * 2.0**power)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_what_says_nothing_leaves_the_state(bad):
  norms = learned.trace(1, 40)
  for place in (0, 1, 20):
    with_bad = np.insert(norms, place, np.float32(bad))
    found, state = learned.limits(thresholds.geometric(), with_bad)
    wanted, without = learned.limits(thresholds.geometric(), norms)
    learned.assert_same_memory(state, without)
    np.testing.assert_array_equal(np.delete(found, place), wanted)


@pytest.mark.parametrize("largest", [1e3, 1e30, 3e38])
@pytest.mark.parametrize("place", [1, 5, 300])
def test_one_huge_norm_moves_the_mean_by_its_weight(largest, place):
  norms = np.ones(place + 2, np.float32)
  norms[place] = largest
  found, _ = learned.limits(thresholds.geometric(), norms)
  weight = max(0.02, 1 / (place + 1))
  np.testing.assert_allclose(found[-1] / found[-2], 3**weight, rtol=1e-5)


@pytest.mark.parametrize("first", [1e2, 1e30])
def test_a_first_norm_that_is_too_large_is_forgotten(first):
  norms = np.ones(400, np.float32)
  norms[0] = first
  found, _ = learned.limits(thresholds.geometric(), norms)
  # A geometric mean: the first one weighs 1 / t in its logarithm, until t = 50, and
  # 2% less in each step after.
  rest = abs(np.log(first)) / 50 * 0.98**350
  np.testing.assert_allclose(np.log(found[-1] / 2), 0, atol=1.1 * rest + 1e-6)
  after_ten = abs(np.log(found[10] / 2))
  np.testing.assert_allclose(after_ten, abs(np.log(first)) / 10, rtol=1e-4)


def test_a_first_norm_that_is_too_small_is_left_behind():
  """At the pace of a rise: 105 steps for each power of ten, fewer at first."""
  norms = np.ones(1200, np.float32)
  norms[0] = 1e-10
  found, _ = learned.limits(thresholds.geometric(), norms)
  np.testing.assert_allclose(found[-1], 2, rtol=0.1)
  np.testing.assert_allclose(found[600] / found[500], 3 ** (0.02 * 100), rtol=1e-4)


@pytest.mark.parametrize(("level", "steps"), [(30.0, 230), (1 / 30, 180)])
def test_a_level_that_changes_is_followed(level, steps):
  """Within 10%, from a mean that has seen 1,000 norms."""
  norms = np.ones(1000 + steps, np.float32)
  norms[1000:] = level
  found, _ = learned.limits(thresholds.geometric(), norms)
  np.testing.assert_allclose(found[-1], 2 * level, rtol=0.1)


def test_a_level_that_rose_is_soon_clipped_no_more():
  norms = np.ones(1300, np.float32)
  norms[1000:] = 30
  found, _ = learned.limits(thresholds.geometric(), norms)
  assert np.argmax(found[1000:] >= 30) in range(100, 135)


def test_nothing_leaves_the_range():
  """From the largest float to the smallest, and back."""
  norms = np.float32([3e38, 1e-38, 3e38, 1e-38] * 20)
  found, state = learned.limits(thresholds.geometric(), norms)
  assert np.all(found[1:] > 0)
  assert np.isfinite(np.asarray(state.memory.mean)).all()
  assert np.all(np.asarray(state.memory.mean) > 0)


def test_each_norm_has_a_mean_of_its_own():
  norms = np.stack([np.ones(30), np.full(30, 1e20)], 1).astype(np.float32)
  found, _ = learned.limits(thresholds.geometric(), norms)
  np.testing.assert_allclose(found[-1], [2, 2e20], rtol=1e-6)


def test_traced_numbers():
  norms = jnp.asarray(learned.trace(2, 50))

  @jax.jit
  def limits(factor, surprise, decay):
    return learned.scanned(thresholds.geometric(factor, surprise, decay), norms)[0]

  wanted = learned_oracles.geometric(np.asarray(norms, np.float64), 3.0, 4.0, 0.9)
  np.testing.assert_allclose(limits(3.0, 4.0, 0.9)[1:], wanted[1:], rtol=1e-6)


@pytest.mark.parametrize(
  ("keywords", "message"),
  [
    ({"factor": 0.0}, "factor must be positive"),
    ({"surprise": 1.0}, "surprise must be above 1"),
    ({"decay": 1.0}, "decay must be at least 0 and below 1"),
  ],
)
def test_bad_numbers(keywords, message):
  with pytest.raises(ValueError, match=message):
    thresholds.geometric(**keywords)


def test_a_clip_by_it_never_lengthens():
  tx = optax_clip.clip_with(
    measures.layer_norm(), thresholds.geometric(), actions.rescale()
  )
  rng = np.random.default_rng(0)
  grads = {
    "a": np.exp(2 * rng.normal(size=(200, 1))) * rng.normal(size=(200, 7)),
    "b": rng.normal(size=(200, 3, 2)),
  }
  grads = {k: v.astype(np.float32) for k, v in grads.items()}
  found, _ = learned.run(tx, jax.tree.map(jnp.asarray, grads))
  for key, g in grads.items():
    assert np.all(np.abs(np.asarray(found[key])) <= np.abs(g))


def spiked(place, steps=40, size=100.0):
  norms = np.ones(steps, np.float32)
  norms[place] = size
  return {"a": norms[:, None]}


EARLY = {
  "zclip": optax_clip.zclip,
  "clip_by_history": optax_clip.clip_by_history,
  "adagc": optax_clip.adagc,
}


@pytest.mark.parametrize("name", EARLY)
@pytest.mark.parametrize("place", [1, 3, 15])
def test_an_early_spike_is_bounded_by_the_first_norms(name, place):
  found, _ = learned.run(EARLY[name](), jax.tree.map(jnp.asarray, spiked(place)))
  np.testing.assert_allclose(found["a"][place], 2, rtol=1e-6)
  np.testing.assert_array_equal(np.delete(found["a"], place), 1)


@pytest.mark.parametrize("name", EARLY)
def test_without_a_factor_nothing_bounds_the_warm_up(name):
  tx = EARLY[name](early_factor=None)
  updates = jax.tree.map(jnp.asarray, spiked(3, steps=20))
  found, state = learned.run(tx, updates)
  np.testing.assert_array_equal(found["a"], updates["a"])
  # The state is that of the paper's threshold alone.
  assert state.threshold._fields == ("seen", "memory")


@pytest.mark.parametrize("name", EARLY)
def test_after_the_warm_up_it_is_the_papers_limit(name):
  keywords = {"window": 30} if name == "clip_by_history" else {"warmup": 15}
  norms = learned.trace(3, 60, spikes=0)[:, None]
  ours = EARLY[name](**keywords, early_factor=1e9)
  theirs = EARLY[name](**keywords, early_factor=None)
  found, _ = learned.run(ours, {"a": jnp.asarray(norms)})
  wanted, _ = learned.run(theirs, {"a": jnp.asarray(norms)})
  np.testing.assert_array_equal(found["a"][15:], wanted["a"][15:])


def test_a_warm_up_norm_is_the_papers_and_takes_no_early_factor():
  tx = optax_clip.adagc(warmup_norm=5.0)
  found, state = learned.run(tx, jax.tree.map(jnp.asarray, spiked(3)))
  np.testing.assert_allclose(found["a"][3], 5, rtol=1e-6)
  assert state.threshold._fields == ("seen", "memory")


@pytest.mark.parametrize("factor", [0.0, -1.0, np.nan])
def test_early_factors_that_mean_nothing(factor):
  with pytest.raises(ValueError, match="early_factor must be positive"):
    optax_clip.zclip(early_factor=factor)


def test_until_learned_takes_over_when_the_threshold_has_a_limit():
  threshold = thresholds.until_learned(thresholds.history(3, 8), 0.25)
  found, _ = learned.limits(threshold, np.ones(10, np.float32))
  np.testing.assert_allclose(found, [0.25] * 4 + [1] * 6)
