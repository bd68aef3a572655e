"""Units are the user's: gradients times a power of two are clipped alike."""

from helpers import learned
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import thresholds

POWERS = np.arange(-100, 101)
STEPS = 60

# What comes out of these has no units, nor have their limits.
NORMALIZING = ("adagn", "stable_spam")


def trace():
  """Gradients of two leaves around 1, some of them in spikes."""
  rng = np.random.default_rng(0)
  size = np.exp(0.2 * rng.standard_normal((STEPS, 1)))
  size[[25, 40, 41]] *= [[10], [1000], [30]]

  def leaf(count):
    away = rng.choice([-1, 1], (STEPS, count)) * rng.uniform(0.25, 1, (STEPS, count))
    return jnp.asarray(size * away, jnp.float32)

  return {"a": leaf(3), "b": leaf(5)}


def at_all_powers(run):
  """``run`` of the trace times each power of two, one after the other."""
  units = jnp.asarray(np.ldexp(1.0, POWERS), jnp.float32)
  return jax.jit(lambda u: jax.lax.map(run, u))(units), np.ldexp(1.0, POWERS)


@pytest.mark.parametrize("name", learned.METHODS)
def test_limits_and_updates_have_the_units_of_gradients(name):
  tx = learned.make(name)
  gradients = trace()

  def run(unit):
    def step(state, g):
      new, state = tx.update(jax.tree.map(lambda x: x * unit, g), state)
      record = optax_clip.metrics(state)
      limits = [value for key, value in record.items() if key.endswith("/limit")]
      return state, (limits, new)

    start = tx.init(jax.tree.map(lambda x: x[0], gradients))
    return jax.lax.scan(step, start, gradients)[1]

  (limits, updates), units = at_all_powers(run)
  assert limits
  middle = len(POWERS) // 2
  given = np.concatenate([gradients["a"], gradients["b"]], axis=1)
  assert np.any(np.concatenate([updates["a"], updates["b"]], axis=2)[middle] != given)
  # Ratios to a limit, which is then 1, have no units either.
  unitless = (*NORMALIZING, "clip_element_spikes")
  pairs = [(x, name in NORMALIZING) for x in updates.values()]
  pairs += [(x, name in unitless) for x in limits[-1:]]
  for x, plain in pairs:
    x = np.float64(x)
    shape = (-1, *[1] * (x.ndim - 1))
    scaled = x if plain else x / units.reshape(shape)
    np.testing.assert_allclose(
      scaled, np.broadcast_to(scaled[middle], x.shape), rtol=1e-5
    )


@pytest.mark.parametrize("signal", ["norm", "loss"])
def test_so_have_decisions(signal):
  tx = optax_clip.skip_spikes(
    optax.sgd(1.0), thresholds.history(6, window=16), signals=(signal,)
  )
  values = jnp.sqrt(sum(jnp.sum(x**2, axis=1) for x in trace().values()))

  def run(unit):
    def step(state, value):
      _, state = tx.update(value[None] * unit, state, loss=value * unit)
      return state, optax_clip.metrics(state)["skip_spikes/skipped"]

    return jax.lax.scan(step, tx.init(jnp.zeros(1)), values)[1]

  skipped, _ = at_all_powers(run)
  np.testing.assert_array_equal(skipped, np.broadcast_to(skipped[0], skipped.shape))
  assert np.flatnonzero(skipped[0]).tolist() == [25, 40, 41]


def test_so_has_a_suggestion():
  norms = np.exp(0.2 * np.random.default_rng(0).standard_normal(200))
  plain, small = (optax_clip.suggest_max_norm(norms * x) for x in (1, 2.0**-60))
  np.testing.assert_allclose(small.max_norm, plain.max_norm * 2.0**-60, rtol=1e-5)


class TestConstantsOfThePapers:
  """They are in the units of somebody's gradients: by keyword, and not by default."""

  NORMS = (4.0, 2.0, 8.0, 3.0)

  def run(self, tx, norms):
    """Updates of two leaves whose norms are as these, and half as large."""
    state, update = tx.init({"a": jnp.zeros(2), "b": jnp.zeros(2)}), jax.jit(tx.update)
    found = []
    for norm in norms:
      leaf = jnp.float32([0.6, 0.8]) * norm
      new, state = update({"a": leaf, "b": leaf / 2}, state)
      found.append((leaf, new, optax_clip.metrics(state)))
    return found

  def test_adagc_learns_in_its_warm_up_and_clips_nothing(self):
    tx = optax_clip.adagc(1.05, warmup=3, early_factor=None)
    *warm, (leaf, new, record) = self.run(tx, self.NORMS)
    for given, passed, _ in warm:
      np.testing.assert_array_equal(passed["a"], given)
      np.testing.assert_array_equal(passed["b"], given / 2)
    # 1.05 times the least norm of the warm-up, for each leaf.
    np.testing.assert_allclose(new["a"], leaf * (1.05 * 2 / 3), rtol=1e-5)
    np.testing.assert_allclose(new["b"], leaf / 2 * (1.05 * 1 / 1.5), rtol=1e-5)
    np.testing.assert_allclose(record["adagc/limit"], 1.05, rtol=1e-5)

  def test_adagc_with_a_limit_in_its_warm_up(self):
    tx = optax_clip.adagc(warmup=3, warmup_norm=1.0)
    for _, new, _ in self.run(tx, self.NORMS[:3]):
      size = np.linalg.norm(np.concatenate([new["a"], new["b"]]))
      np.testing.assert_allclose(size, 1, rtol=1e-5)

  def test_zclip_without_a_cap_and_with_one(self):
    free = optax_clip.zclip(warmup=4, early_factor=None)
    for leaf, new, _ in self.run(free, self.NORMS):
      np.testing.assert_array_equal(new["a"], leaf)
    for _, new, _ in self.run(optax_clip.zclip(warmup=4, max_norm=1.0), self.NORMS):
      size = np.linalg.norm(np.concatenate([new["a"], new["b"]]))
      np.testing.assert_allclose(size, 1, rtol=1e-5)

  @pytest.mark.parametrize("eps", [0.0, 1e-6])
  def test_zclip_adds_what_it_is_given_to_deviations(self, eps):
    tx = optax_clip.zclip(1.0, warmup=2, max_norm=None, eps=eps)
    # Mean 1.5e-6, deviation 5e-7 of half-way norms: times the root of 1.25 for both.
    root = np.sqrt(1.25)
    *_, (_, _, record) = self.run(tx, (1e-6, 2e-6, 1e-3))
    mean, std, norm = root * 1.5e-6, root * 5e-7, root * 1e-3
    expected = mean + std * (std + eps) / (norm - mean)
    np.testing.assert_allclose(record["zclip/limit"], expected, rtol=1e-4)

  def test_adagn_adds_what_it_is_given_to_the_root(self):
    ((_, plain, _),) = self.run(optax_clip.adagn(), (1e-8,))
    np.testing.assert_allclose(plain["a"], [0.6, 0.8], rtol=1e-5)
    ((_, halved, _),) = self.run(optax_clip.adagn(eps=1e-8), (1e-8,))
    np.testing.assert_allclose(halved["a"], [0.3, 0.4], rtol=1e-5)

  def test_thresholds_have_them_by_keyword_too(self):
    thresholds.zscore(eps=0.0)
    thresholds.mean_over_rms(eps=0.0)
    adagc = thresholds.clipped_mean(warmup=2, warmup_norm=None)
    state = adagc.init(jnp.zeros(2))
    limits, _ = adagc.update(jnp.float32([1.0, 2.0]), state)
    assert np.all(limits >= jnp.float32([1.0, 2.0]))
