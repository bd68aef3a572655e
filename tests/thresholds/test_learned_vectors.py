"""The reference numbers of each method, produced by its authors' code or equation."""

import functools
import itertools

from helpers import learned
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_clip
from optax_clip import actions
from optax_clip import measures
from optax_clip import thresholds

NORMS = [1.0, 1.2, 0.8, 1.1, 0.9, 5.0, 1.0, 10.0, 1.05]


def drive(tx, norms):
  """Limits by the record, lengths of the updates, and the state."""

  def body(state, n):
    updates, state = tx.update({"w": n * jnp.array([0.6, 0.8])}, state)
    (limit,) = [v for k, v in optax_clip.metrics(state).items() if k.endswith("/limit")]
    return state, (limit, updates["w"])

  start = tx.init({"w": jnp.zeros(2)})
  state, (limits, updates) = jax.lax.scan(body, start, jnp.asarray(norms))
  lengths = np.linalg.norm(np.asarray(updates, np.float64), axis=1)
  return np.asarray(limits, np.float64), lengths, state


def test_autoclip():
  wanted = [1, 1.02, 0.84, 0.86, 0.84, 0.85, 0.86, 0.87, 0.88]
  limits, lengths, _ = drive(optax_clip.autoclip(), NORMS)
  np.testing.assert_allclose(limits, wanted, rtol=1e-6)
  np.testing.assert_allclose(lengths, np.minimum(wanted, NORMS), rtol=1e-6)


@pytest.mark.parametrize(
  ("keywords", "at_5", "at_10"),
  [
    ({}, 1.040009237, 1.017881191),
    ({"mode": "mean"}, 0.999910000, 0.999912700),
    ({"mode": "percentile"}, 1.400409132, 1.433933882),
    ({"clip_factor": 0.5}, 0.520004618, 0.503533350),
  ],
)
def test_zclip(keywords, at_5, at_10):
  tx = optax_clip.zclip(warmup=3, **{"eps": 1e-6, **keywords})
  limits, lengths, _ = drive(tx, NORMS)
  np.testing.assert_allclose(limits[[5, 7]], [at_5, at_10], rtol=2e-6)
  np.testing.assert_allclose(lengths[[5, 7]], [at_5, at_10], rtol=2e-6)
  others = [0, 1, 2, 3, 4, 6, 8]
  np.testing.assert_allclose(lengths[others], np.array(NORMS)[others], rtol=1e-6)


def test_zclip_moments():
  tx = optax_clip.zclip(warmup=3, eps=1e-6, early_factor=None)
  _, _, state = drive(tx, NORMS[:3])
  mean, std = state.threshold.memory
  np.testing.assert_allclose(mean, 1.0, rtol=1e-6)
  np.testing.assert_allclose(std**2, 0.026666666667, rtol=2e-6)
  _, _, state = drive(tx, NORMS)
  mean, std = state.threshold.memory
  np.testing.assert_allclose(mean, 1.003036126825, rtol=1e-6)
  np.testing.assert_allclose(std**2, 0.022835445982, rtol=2e-6)


def test_zclip_max_norm_is_applied_and_not_remembered():
  limits, lengths, capped = drive(
    optax_clip.zclip(warmup=3, max_norm=1.0, early_factor=None), NORMS
  )
  _, _, free = drive(optax_clip.zclip(warmup=3, eps=1e-6, early_factor=None), NORMS)
  np.testing.assert_allclose(lengths, np.minimum(NORMS, 1.0), rtol=1e-6)
  assert np.all(limits <= 1)
  mine, reference = capped.threshold.threshold.memory, free.threshold.memory
  np.testing.assert_array_equal(mine.mean, reference.mean)
  np.testing.assert_array_equal(mine.std, reference.std)


def test_zclip_skip_update_on_spike():
  _, _, state = drive(
    optax_clip.zclip(warmup=3, eps=1e-6, early_factor=None, skip_update_on_spike=True),
    NORMS,
  )
  _, _, without = drive(
    optax_clip.zclip(warmup=3, eps=1e-6, early_factor=None), [n for n in NORMS if n < 2]
  )
  np.testing.assert_array_equal(
    state.threshold.memory.mean, without.threshold.memory.mean
  )


def test_adagc():
  a = np.array([1, 0.9, 0.8, 0.85, 4, 0.8])
  b = np.array([2, 1.5, 0.5, 0.5, 0.5, 5])
  # T_start 3 counts from 1: two steps are global.
  tx = optax_clip.adagc(warmup=2, warmup_norm=1.0)
  state = tx.init({"a": jnp.zeros(1), "b": jnp.zeros(1)})
  update = jax.jit(tx.update)
  scales, gammas = [], []
  for x, y in zip(a, b, strict=True):
    updates, state = update({"a": jnp.array([x]), "b": jnp.array([y])}, state)
    scales.append([float(updates["a"][0]) / x, float(updates["b"][0]) / y])
    gammas.append(np.asarray(state.threshold.memory.gamma))
  np.testing.assert_allclose(scales[2][0], 0.586967844, rtol=1e-6)
  np.testing.assert_allclose(gammas[2], [0.447660809, 0.850343067], rtol=1e-6)
  np.testing.assert_allclose(scales[4][0], 0.117628473, rtol=1e-6)
  np.testing.assert_allclose(scales[5][1], 0.175658591, rtol=1e-6)
  np.testing.assert_allclose(gammas[5][1], 0.837305951, rtol=1e-6)


def test_element_spikes():
  tx = optax_clip.clip_element_spikes()
  state = tx.init({"w": jnp.zeros(2)})
  # (1 - 0.999) g^2 = 1e-4.
  _, state = tx.update({"w": jnp.full(2, np.sqrt(0.1), jnp.float32)}, state)
  np.testing.assert_allclose(state.rms["w"] ** 2, 1e-4, rtol=1e-5)
  updates, _ = tx.update({"w": jnp.array([1.0, 0.1])}, state)
  np.testing.assert_allclose(updates["w"], [0.70710678, 0.1], rtol=1e-5)


def test_element_spikes_with_a_given_second_moment():
  tx = optax_clip.clip_element_spikes(decay=None)
  g = {"w": jnp.array([1.0, 0.1])}
  updates, _ = tx.update(g, tx.init(g), second_moment={"w": jnp.full(2, 1e-4)})
  np.testing.assert_allclose(updates["w"], [0.70710678, 0.1], rtol=1e-6)
  with pytest.raises(ValueError, match="second_moment=v"):
    tx.update(g, tx.init(g))


def test_stable_spam():
  grads = [[3.0, -4, 0], [0.3, -0.4, 0], [30.0, -0.4, 0.1]]
  wanted = [
    [0.6, -0.8, 0],
    [0.407988967, -0.54398529, 0],
    [0.869323813, -0.03030233, 0.007575583],
  ]
  tx = optax_clip.stable_spam(eps=1e-8)
  state = tx.init({"w": jnp.zeros(3)})
  update = jax.jit(tx.update)
  for g, want in zip(grads, wanted, strict=True):
    updates, state = update({"w": jnp.array(g)}, state)
    np.testing.assert_allclose(updates["w"], want, rtol=1e-6)
  found = optax_clip.metrics(state)["stable_spam_adaclip/limit"]
  np.testing.assert_allclose(found, 11.475339514, rtol=1e-6)


def test_adaclip_limits():
  found, _ = learned.limits(thresholds.average(), np.float32([4, 0.4, 30]))
  np.testing.assert_allclose(found, [4, 2.199099550, 11.475339514], rtol=1e-6)


@pytest.mark.parametrize(
  ("u", "p", "r", "a", "wanted"),
  [
    ([1, 1], [1, 0.1], 0.1, 0.01, [0.02, 0.02]),
    ([-2], [4], 0.1, 0.02, [-0.42]),
    ([1, 1, 0, 0], [1, 0.1, 1, 0], 0.1, 0.0, [0.01, 0.01, 0, 0]),
  ],
)
def test_clippy(u, p, r, a, wanted):
  tx = optax_clip.clippy(r, a)
  params = {"w": jnp.array(p, jnp.float32)}
  updates, _ = tx.update({"w": jnp.array(u, jnp.float32)}, tx.init(params), params)
  np.testing.assert_allclose(updates["w"], wanted, rtol=1e-6)


def test_clippy_accumulator():
  tx = optax_clip.clippy(0.1, 0.01, 0.5)
  params = {"w": jnp.ones(1)}
  u = {"w": jnp.array([4.0])}
  updates, _ = tx.update(u, tx.init(u), params, accumulator={"w": jnp.array([4.0])})
  np.testing.assert_allclose(updates["w"], [0.1 + 0.5 / 2 + 0.01], rtol=1e-6)
  with pytest.raises(ValueError, match="accumulator=v"):
    tx.update(u, tx.init(u), params)


SOFT = {
  "rational": (actions.rational(), lambda n, c: c / (c + n)),
  "square_root": (actions.square_root(), lambda n, c: 1 / np.sqrt(1 + (n / c) ** 2)),
  "tanh": (actions.tanh(), lambda n, c: c / n * np.tanh(n / c)),
  "floored": (actions.floored(0.1), lambda n, c: max(0.1, min(1, c / n))),
  "normalize": (actions.normalize(), lambda n, c: c / n),
}
soft = pytest.mark.parametrize("name", SOFT)


def applied(name, g, limit):
  """One vector after an action, with a traced limit."""
  action, _ = SOFT[name]
  tx = optax_clip.clip_with(measures.global_norm(), thresholds.constant(limit), action)
  return tx.update({"w": g}, tx.init({"w": g}))[0]["w"]


@functools.cache
def compiled(name):
  return jax.jit(functools.partial(applied, name))


def act(name, g, limit, dtype=jnp.float32):
  return np.asarray(compiled(name)(jnp.asarray(g, dtype), limit), np.float64)


NORMS_AND_LIMITS = list(
  itertools.product(
    (1e-37, 1e-20, 1e-3, 1.0, 7.0, 1e5, 1e18, 1e25, 2e38), (1e-10, 1.0, 3.0, 1e10)
  )
)


@soft
def test_soft_actions(name):
  _, formula = SOFT[name]
  for n, c in NORMS_AND_LIMITS:
    g = np.float32(n) * np.float32([0.6, -0.8])
    exact = g.astype(np.float64)
    wanted = exact * formula(np.linalg.norm(exact), c)
    # Results that are no normal floats may be flushed to zero.
    np.testing.assert_allclose(
      act(name, g, c), wanted, rtol=1e-6, atol=1.2e-38, err_msg=f"norm {n}, limit {c}"
    )


@soft
def test_soft_actions_at_the_edges(name):
  g = [0.6, -0.8]
  np.testing.assert_array_equal(act(name, g, np.inf), np.float32(g))
  np.testing.assert_array_equal(act(name, [0.0, 0.0], 1.0), [0, 0])
  np.testing.assert_array_equal(act(name, [0.0, 0.0], 0.0), [0, 0])
  assert np.all(np.isnan(act(name, [np.nan, 1.0], 1.0)))
  kept = 0.1 if name == "floored" else 0.0
  np.testing.assert_allclose(act(name, g, 0.0), kept * np.float32(g), rtol=1e-6)
  # Four elements of 3e38 have a norm that is no float.
  out = act(name, np.full(4, 3e38), 1.0)
  scale = 0.1 * 6e38 if name == "floored" else 1.0
  np.testing.assert_allclose(out, 0.5 * scale, rtol=1e-6)


@soft
def test_soft_actions_differentiate_at_zero(name):
  _, formula = SOFT[name]
  slope = jax.jit(jax.grad(lambda g: applied(name, g, 1.0).sum()))
  at_zero = slope(jnp.zeros(3))
  np.testing.assert_allclose(at_zero, np.ones(3), rtol=1e-6)
  # And where it is smooth, by differences in float64.
  g = np.array([0.9, -1.4, 0.3])

  def exact(x):
    return np.sum(x) * formula(np.linalg.norm(x), 1.0)

  steps = 1e-6 * np.eye(3)
  slopes = [(exact(g + s) - exact(g - s)) / 2e-6 for s in steps]
  np.testing.assert_allclose(
    slope(jnp.asarray(g, jnp.float32)), slopes, rtol=1e-4, atol=1e-5
  )


@soft
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_soft_actions_in_half_precision(name, dtype):
  _, formula = SOFT[name]
  g = np.asarray(jnp.asarray([3.0, 4.0], dtype), np.float64)
  wanted = g * formula(5.0, 2.0)
  eps = float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(act(name, g, 2.0, dtype), wanted, rtol=eps / 2 + 1e-6)
