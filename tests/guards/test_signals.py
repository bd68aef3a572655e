"""What is a spike: of losses of any sign and level, and by limits from before it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import thresholds

# The step at which most runs have one, and how many runs and steps there are.
SPIKE = 30
SHAPE = (16, 90)


def judged(losses=1.0, norms=1.0, *, threshold, factor=1.0, signals=("loss",)):
  """Of each step of ``[..., steps]`` losses and norms: skipped, why, and the limit."""
  pair = np.broadcast_arrays(losses, norms)
  # One shape for all, which is compiled once; what is added comes after the rest.
  padding = [
    (0, n - m) for n, m in zip(SHAPE, np.atleast_2d(pair[0]).shape, strict=True)
  ]
  wide = [np.pad(np.atleast_2d(x), padding, mode="edge") for x in pair]
  dtypes = (jnp.result_type(float), jnp.float32)
  arrays = [jnp.asarray(x, dtype) for x, dtype in zip(wide, dtypes, strict=True)]
  found = _judged(*arrays, jnp.float32(factor), threshold, signals)
  cut = tuple(slice(n) for n in np.atleast_2d(pair[0]).shape)
  return [np.asarray(x)[cut].reshape(pair[0].shape) for x in found]


@functools.partial(jax.jit, static_argnums=(3, 4))
def _judged(losses, norms, factor, threshold, signals):
  given = {} if threshold is None else {"threshold": THRESHOLDS[threshold]()}
  tx = optax_clip.skip_spikes(optax.sgd(1.0), factor=factor, signals=signals, **given)

  def step(state, now):
    loss, norm = now
    _, state = tx.update({"w": norm[None]}, state, loss=loss)
    record = optax_clip.metrics(state)
    return state, [record[f"skip_spikes/{x}"] for x in ("skipped", "reason", "limit")]

  def run(row):
    return jax.lax.scan(step, tx.init({"w": jnp.zeros(1)}), row)[1]

  return jax.lax.map(run, (losses, norms))


THRESHOLDS = {
  "history": lambda: thresholds.history(6, window=16),
  "zscore": lambda: thresholds.zscore(8.0, 0.9, 10, mode="percentile"),
  "average": lambda: thresholds.average(0.9),
  "half-way": lambda: thresholds.percentile(50, window=16),
  "largest": lambda: thresholds.percentile(100, 100),
  "nearly the largest": lambda: thresholds.percentile(95, 10),
  "capped": lambda: thresholds.at_most(thresholds.percentile(95, 10), 1e30),
  "after a warm-up": lambda: thresholds.warmup(thresholds.average(0.9), 3),
}


def places(skipped):
  """The steps that were skipped, of each row."""
  return [np.flatnonzero(row).tolist() for row in np.atleast_2d(skipped)]


def skipped_losses(losses, **keywords):
  return places(judged(losses, **keywords)[0])


def noise(seed, steps):
  """Values within 0.3 of 0, in steps of 1/64: any offset up to 2^17 is exact."""
  rng = np.random.default_rng(seed)
  return np.round(64 * rng.uniform(-0.3, 0.3, steps)) / 64


class TestLossesOfAnySign:
  @pytest.mark.parametrize("threshold", ["history", "zscore"])
  def test_a_spike_is_one_at_any_level(self, threshold):
    levels = np.array([-1e3, -5.0, -0.125, 0.0, 0.125, 5.0, 1e3])
    losses = noise(0, 40) + levels[:, None]
    losses[:, SPIKE] = 1e4
    assert skipped_losses(losses, threshold=threshold) == [[SPIKE]] * len(levels)

  def test_by_default_too(self):
    losses = noise(1, 90) + np.array([[-5.0], [0.0], [5.0]])
    losses[:, 80] = 1e4
    assert skipped_losses(losses, threshold=None) == [[80]] * 3

  @pytest.mark.parametrize(
    ("threshold", "factor"),
    [("history", 1.0), ("zscore", 1.0), ("average", 10.0), ("half-way", 5.0)],
  )
  def test_a_constant_that_is_added_to_all_losses_changes_no_decision(
    self, threshold, factor
  ):
    losses = noise(2, 60)
    losses[[25, 40, 41]] += [64, 512, 4096]
    # Among them those at which one of the losses is exactly 0.
    offsets = np.concatenate(
      [-losses[[0, 7, 24, 25, 33]], [-1000, -64, -1, 0, 1, 2, 64, 1000]]
    )
    found = skipped_losses(
      losses + offsets[:, None], threshold=threshold, factor=factor
    )
    assert found == [found[0]] * len(offsets)
    assert found[0]

  @pytest.mark.parametrize("level", [-5.0, 0.0, 5.0])
  def test_losses_that_were_all_equal_are_a_level_too(self, level):
    losses = np.full(40, level)
    losses[SPIKE] = 1e4
    assert skipped_losses(losses, threshold="history") == [[SPIKE]]

  def test_losses_that_cross_zero_as_they_fall_are_no_spikes(self):
    losses = np.linspace(3, -3, 60) + noise(3, 60)
    losses[50] = 1e4
    assert skipped_losses(losses, threshold="history") == [[50]]

  def test_beside_a_norm(self):
    losses = noise(4, 40) - 5
    losses[SPIKE] = 1e4
    norms = 1 + noise(5, 40)
    norms[35] = 1e4
    signals = ("norm", "loss")
    found, reasons, _ = judged(losses, norms, threshold="history", signals=signals)
    assert places(found) == [[SPIKE, 35]]
    assert reasons[SPIKE] == optax_clip.SkipReason.LOSS_SPIKE
    assert reasons[35] == optax_clip.SkipReason.NORM_SPIKE


class TestLossesInFloat64:
  @pytest.mark.parametrize("level", [1e300, -1e300])
  def test_a_finite_loss_is_finite_however_large(self, level):
    with jax.enable_x64(True):
      found, reasons, _ = judged([level] * 3, threshold="history")
    assert not np.any(found)
    assert not np.any(reasons)

  def test_losses_of_both_signs_however_large(self):
    with jax.enable_x64(True):
      found, _, limits = judged([1e300, -1e300, 1e300, 1.0], threshold="history")
    assert not np.any(found)
    assert not np.any(np.isnan(limits))

  def test_it_is_a_spike_and_not_a_loss_that_is_not_finite(self):
    with jax.enable_x64(True):
      losses = [*(1 + noise(6, 40)), 1e300, np.inf]
      found, reasons, limits = judged(losses, threshold="history")
    assert places(found) == [[40, 41]]
    assert reasons[40] == optax_clip.SkipReason.LOSS_SPIKE
    assert reasons[41] == optax_clip.SkipReason.NONFINITE_LOSS
    assert np.isfinite(limits[40])


SIZES = np.array([50.0, 1e3, 1e6, 1e30])


class TestLimitsFromTheStepsBefore:
  """No threshold, whatever it counts, may be asked about a norm it has learned."""

  @pytest.mark.parametrize(
    ("threshold", "factor"),
    [
      ("average", 10.0),
      ("largest", 2.0),
      ("nearly the largest", 2.0),
      ("capped", 2.0),
      ("after a warm-up", 10.0),
    ],
  )
  def test_a_spike_does_not_raise_the_limit_it_is_judged_by(self, threshold, factor):
    norms = np.tile(1 + noise(7, 60), (len(SIZES), 1))
    norms[:, 40] = SIZES
    found, _, limits = judged(
      norms=norms, threshold=threshold, factor=factor, signals=("norm",)
    )
    assert places(found) == [[40]] * len(SIZES)
    # Nor may the record show another limit than the one that was exceeded.
    assert np.all(limits[:, 40] < 20)

  @pytest.mark.parametrize("factor", [20.0, 40.0, 100.0])
  def test_so_many_times_the_running_mean_of_the_norms_before(self, factor):
    """The rule of AXLearn: compared with its formula, near its limit and beyond."""
    norms, mean, count = 1 + noise(8, 50), 0.0, 0
    skips, limits = [], []
    for step, _ in enumerate(norms):
      limit = factor * mean / (1 - 0.9**count) if count else np.inf
      if step in (20, 30, 40):
        norms[step] = limit * {20: 0.99, 30: 1.01, 40: 1e6}[step]
      norms[step] = np.float32(norms[step])
      limits.append(limit)
      if norms[step] > limit:
        skips.append(step)
      else:
        mean, count = 0.9 * mean + 0.1 * norms[step], count + 1
    found, _, shown = judged(
      norms=norms, threshold="average", factor=factor, signals=("norm",)
    )
    assert skips == [30, 40]
    assert places(found) == [skips]
    np.testing.assert_allclose(shown, limits, rtol=1e-5)

  @pytest.mark.parametrize("threshold", ["largest", "nearly the largest"])
  def test_twice_a_percentile_of_the_norms_before(self, threshold):
    q, window = {"largest": (100, 100), "nearly the largest": (95, 10)}[threshold]
    norms, taken, skips, limits = 1 + noise(9, 50), [], [], []
    norms[[20, 30, 31]] = [1.5, 2.9, 500.0]
    norms = norms.astype(np.float32)
    for step, norm in enumerate(norms.astype(np.float64)):
      last = taken[-window:]
      limits.append(2 * np.percentile(last, q) if last else np.inf)
      if norm > limits[-1]:
        skips.append(step)
      else:
        taken.append(norm)
    found, _, shown = judged(
      norms=norms, threshold=threshold, factor=2.0, signals=("norm",)
    )
    assert 31 in skips
    assert places(found) == [skips]
    np.testing.assert_allclose(shown, limits, rtol=1e-5)


def early(signals, spike_at, steps=20):
  """Which steps are skipped of a run with one norm of 100, where others are 1."""
  tx = optax_clip.skip_spikes(optax.sgd(0.1), signals=signals)
  grads = {"w": jnp.ones(steps).at[spike_at].set(100.0)[:, None]}
  loss = jnp.linspace(2.0, 1.0, steps)

  def step(state, x):
    g, loss = x
    updates, state = tx.update(g, state, loss=loss)
    return state, updates["w"][0] == 0

  state = tx.init({"w": jnp.zeros(1)})
  return jax.jit(lambda: jax.lax.scan(step, state, (grads, loss))[1])()


@pytest.mark.parametrize("place", [1, 2, 9])
def test_an_early_spike_is_skipped_by_default(place):
  (skipped,) = np.nonzero(early(("norm",), place))
  assert skipped.tolist() == [place]


def test_with_the_loss_as_a_signal_nothing_is_judged_early():
  assert not np.any(early(("norm", "loss"), 9))


class TestSchedulesAndFreshStarts:
  """After a lasting rise what was learned starts afresh; steps taken stay counted."""

  NORMS = np.float32([*[0.5] * 12, 3, 3, 3, 8, 8, 0.5])

  def limits(self, threshold, norms=NORMS):
    """The limit at each step, and which steps were skipped."""
    tx = optax_clip.skip_spikes(optax.sgd(0.1), threshold, max_consecutive=2)

    def step(state, norm):
      _, state = tx.update({"w": norm[None]}, state)
      found = optax_clip.metrics(state)
      return state, [found[f"skip_spikes/{key}"] for key in ("limit", "skipped")]

    start = tx.init({"w": jnp.zeros(1)})
    limits, skipped = jax.jit(lambda: jax.lax.scan(step, start, norms)[1])()
    return np.asarray(limits), np.flatnonzero(skipped).tolist()

  def test_a_schedule_follows_the_steps_taken(self):
    schedule = optax.linear_schedule(10, 1, 9)
    limits, skipped = self.limits(thresholds.scheduled(schedule))
    assert skipped == [12, 13, 15, 16]
    np.testing.assert_allclose(limits, [*range(10, 1, -1), *[1] * 9])

  def test_so_does_the_cap_of_a_threshold_that_learns(self):
    cap = optax.linear_schedule(10, 1, 9)
    capped = thresholds.at_most(thresholds.geometric(factor=100.0), cap)
    limits, skipped = self.limits(capped)
    assert skipped == [12, 13, 15, 16]
    np.testing.assert_allclose(limits[9:], 1)

  def test_and_the_limit_of_a_warm_up_and_one_until_there_is_another(self):
    early = optax.linear_schedule(10, 1, 9)
    for make in (
      lambda: thresholds.warmup(thresholds.constant(9.0), 100, early),
      lambda: thresholds.until_learned(thresholds.constant(float("inf")), early),
    ):
      assert self.limits(make())[1] == [12, 13, 15, 16]

  def test_what_is_learned_starts_afresh(self):
    limits, skipped = self.limits(thresholds.geometric(factor=2.0))
    assert skipped == [12, 13, 15, 16]
    assert limits[15] == 6  # Twice the norm of the step before, and of no other.

  def test_each_has_its_own_state_where_several_are_joined(self):
    learned = thresholds.geometric(factor=2.0)
    joined = thresholds.at_most(learned, optax.constant_schedule(100.0))
    assert self.limits(joined)[1] == self.limits(learned)[1]


class TestTheWait:
  """Nothing is judged before the threshold has a limit, and no longer than that."""

  @pytest.mark.parametrize("signals", [("loss",), ("norm", "loss")])
  @pytest.mark.parametrize("window", [8, 40])
  def test_follows_the_window_of_the_threshold(self, signals, window):
    threshold = thresholds.history(3, window=window)
    tx = optax_clip.skip_spikes(optax.sgd(0.1), threshold, signals=signals)
    # The first loss starts the level; half a window of distances from it follows.
    wait = 1 + window // 2
    losses = np.tile(2 + noise(11, 60), (2, 1)).astype(np.float32)
    losses[[0, 1], [wait - 1, wait]] = 1e9

    def step(state, loss):
      _, state = tx.update({"w": jnp.ones(1)}, state, loss=loss)
      return state, optax_clip.metrics(state)["skip_spikes/skipped"]

    def run(row):
      return jax.lax.scan(step, tx.init({"w": jnp.zeros(1)}), row)[1]

    skipped = jax.jit(lambda rows: jax.lax.map(run, rows))(losses)
    assert skipped[0, wait - 1] == 0
    assert skipped[1, wait] == 1
