"""Observing a run, reading its norms, and the threshold they suggest."""

import functools
import re

from flax import nnx
from flax.training import train_state
from helpers import learned_oracles
from helpers import oracles
from helpers.programs import adamw
from helpers.programs import bytes_accessed
from helpers.programs import compiled_step
from helpers.programs import reductions_by_size
from helpers.programs import temporary
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import ml_dtypes
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import measures
from optax_clip import norm_history
from optax_clip import observe
from optax_clip import suggest_max_norm

# Optax and Flax promote dtypes and ranks implicitly.
pytestmark = pytest.mark.foreign

PARAMS = {"w": jnp.ones(2), "b": jnp.ones(1)}


def gradient(norm):
  """A gradient of this norm, over both leaves."""
  return {"w": jnp.array([2.0, 2.0]) * norm / 3, "b": jnp.array([1.0]) * norm / 3}


def after(tx, norms, update=None):
  update = update or jax.jit(tx.update)
  state = tx.init(PARAMS)
  for norm in norms:
    _, state = update(gradient(norm), state, PARAMS)
  return state


# --- What is passed on ----------------------------------------------------------


@pytest.mark.parametrize(
  ("dtype", "jit"),
  [(name, True) for name in ("float16", "bfloat16", "float32", "float64")]
  + [("float32", False)],
)
def test_updates_are_passed_on_bit_for_bit(dtype, jit):
  info = ml_dtypes.finfo(np.dtype(dtype))
  values = [0.0, -0.0, 1.5, np.nan, np.inf, -np.inf, float(info.max)]
  values += [float(info.smallest_subnormal), -float(info.tiny)]
  with jax.enable_x64(dtype == "float64"):
    updates = {"w": jnp.asarray(values, dtype), "b": jnp.ones((2, 3), dtype)}
    updates |= {"none": jnp.zeros((0, 4), dtype), "c": jnp.asarray(2.0, dtype)}
    for measure in (None, measures.layer_norm()):
      tx = observe(optax.identity(), 4, measure=measure)
      update = jax.jit(tx.update) if jit else tx.update
      passed, _ = update(updates, tx.init(updates))
      oracles.assert_identical(updates, passed)


def test_the_optimizer_gets_parameters_and_extra_arguments():
  def update(updates, state, params=None, **extra_args):
    return jax.tree.map(lambda p: p * extra_args["loss"], params), state

  inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
  tx = observe(inner)
  got, _ = tx.update(gradient(1.0), tx.init(PARAMS), PARAMS, loss=jnp.float32(7))
  assert got["b"] == 7


# --- What is kept ---------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 3, 4, 11])
def test_the_last_norms_in_the_order_of_steps(steps):
  norms = np.arange(1, steps + 1, dtype=np.float32)
  got = norm_history(after(observe(optax.sgd(0.1), 4), norms))
  assert isinstance(got, np.ndarray)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, norms[-4:], rtol=1e-6)


def test_norms_that_are_not_finite_or_zero_are_kept():
  norms = [1.0, np.nan, 0.0, np.inf, 2.0]
  state = after(observe(optax.sgd(0.1)), norms)
  np.testing.assert_allclose(norm_history(state), norms, rtol=1e-6)
  values = optax_clip.metrics(state)
  assert values["observe/steps"] == 5
  assert values["observe/steps_nonfinite"] == 2
  assert values["observe/steps_clipped"] == 0
  assert values["observe/limit"] == np.inf
  assert values["observe/coefficient"] == 1


def test_a_finite_float64_norm_does_not_become_inf():
  with jax.enable_x64(True):
    tx = observe(optax.identity())
    g = {"w": jnp.array([1e200, 1e200])}
    _, state = tx.update(g, tx.init(g))
    assert norm_history(state) == np.finfo(np.float32).max


@pytest.mark.parametrize(
  ("measure", "wanted"),
  [
    (measures.layer_norm(), [1.0, 8**0.5]),
    (measures.global_norm(ord=1), 5.0),
    (measures.global_norm(ord=np.inf), 2.0),
    (measures.group_norm({"w": 0, "b": 1}, (0, 1)), [8**0.5, 1.0]),
  ],
)
def test_other_measures(measure, wanted):
  state = after(observe(optax.sgd(0.1), 8, measure=measure), [3.0, 6.0])
  got = norm_history(state)
  assert got.shape == (2, *np.shape(wanted))
  np.testing.assert_allclose(got, [np.array(wanted), 2 * np.array(wanted)], rtol=1e-6)


def test_scan_donation_and_vmap():
  tx = observe(optax.sgd(0.1), 4)
  norms = jnp.array([[3.0, 1.0, 4.0, 1.0, 5.0, 9.0], [2.0, 6.0, 5.0, 3.0, 5.0, 8.0]])

  def run(norms):
    def step(state, norm):
      return tx.update(gradient(norm), state, PARAMS)[1], None

    return jax.lax.scan(step, tx.init(PARAMS), norms)[0]

  wanted = norms[:, -4:]
  np.testing.assert_allclose(norm_history(jax.jit(run)(norms[0])), wanted[0], rtol=1e-6)
  together = jax.jit(jax.vmap(run))(norms)
  np.testing.assert_allclose(norm_history(together), wanted, rtol=1e-6)

  step = jax.jit(lambda g, s: tx.update(g, s, PARAMS)[1], donate_argnums=1)
  state = tx.init(PARAMS)
  for norm in norms[0]:
    state = step(gradient(norm), state)
  np.testing.assert_allclose(norm_history(state), wanted[0], rtol=1e-6)
  assert step._cache_size() == 1


@pytest.mark.mesh
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("mapped", [False, True], ids=["jit", "shard_map"])
def test_norms_of_sharded_updates_are_those_of_all_devices(axis_type, mapped):
  mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
  tx = observe(optax_clip.skip_nonfinite(optax.sgd(0.1)), 4)
  with jax.set_mesh(mesh):
    whole = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, P("d")))
    state, update = tx.init(whole), tx.update
    if mapped:
      cut = (P("d"), P())
      update = jax.shard_map(update, in_specs=cut, out_specs=cut)
    update = jax.jit(update)
    for scale in range(6):
      _, state = update(scale * whole, state)
  wanted = np.linalg.norm(np.arange(16)) * np.arange(2, 6)
  np.testing.assert_allclose(norm_history(state), wanted, rtol=1e-6)


@pytest.mark.mesh
def test_pmap():
  tx = observe(optax.sgd(0.1), measure=measures.global_norm(axis_name="d"))
  parts = jnp.arange(16.0).reshape(8, 2)
  state = jax.pmap(tx.init)(parts)
  _, state = jax.pmap(tx.update, axis_name="d")(parts, state)
  wanted = np.full((8, 1), np.linalg.norm(np.arange(16)))
  np.testing.assert_allclose(norm_history(state), wanted, rtol=1e-6)


# --- Where it is found ----------------------------------------------------------


WRAPPERS = {
  "alone": lambda tx: tx,
  "chain": lambda tx: optax.chain(optax.identity(), tx, optax.scale(2.0)),
  "masked": lambda tx: optax.masked(tx, {"w": True, "b": True}),
  "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
  "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
  "skip_nonfinite": optax_clip.skip_nonfinite,
  "around skip_nonfinite": lambda tx: observe(
    optax_clip.skip_nonfinite(optax.sgd(1.0))
  ),
  "inject_hyperparams": lambda tx: optax.inject_hyperparams(
    lambda rate: observe(optax.sgd(rate))
  )(rate=0.1),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_through_wrappers(wrapper):
  tx = WRAPPERS[wrapper](observe(optax.sgd(0.1)))
  state = after(tx, [3.0, 5.0])
  np.testing.assert_allclose(norm_history(state), [3, 5], rtol=1e-6)
  assert optax_clip.metrics(state)["observe/steps"] == 2


def test_guards_decide_what_is_observed():
  sgd = optax.sgd(0.1)
  inside = optax_clip.skip_nonfinite(observe(sgd))
  around = observe(optax_clip.skip_nonfinite(sgd))
  norms = [3.0, np.nan, 5.0]
  np.testing.assert_allclose(norm_history(after(inside, norms)), [3, 5], rtol=1e-6)
  np.testing.assert_allclose(norm_history(after(around, norms)), norms, rtol=1e-6)


def test_multi_steps_observes_means():
  tx = optax.MultiSteps(observe(optax.sgd(0.1)), 2)
  state = after(tx, [1.0, 3.0, 5.0, 7.0])
  np.testing.assert_allclose(norm_history(state), [2, 6], rtol=1e-6)


def test_flax():
  class Module(nnx.Module):
    def __init__(self):
      self.w = nnx.Param(jnp.array([3.0, 4.0]))

  model = Module()
  optimizer = nnx.Optimizer(model, observe(optax.sgd(0.0)), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    optimizer.update(model, nnx.grad(lambda m: 0.5 * jnp.sum(m.w[...] ** 2))(model))

  step(model, optimizer)
  step(model, optimizer)
  np.testing.assert_allclose(norm_history(optimizer), [5, 5])

  state = train_state.TrainState.create(
    apply_fn=None, params=PARAMS, tx=observe(optax.sgd(0.1))
  )
  state = state.apply_gradients(grads=gradient(3.0))
  np.testing.assert_allclose(norm_history(state), [3], rtol=1e-6)


def test_one_of_several_by_its_name():
  tx = optax.chain(
    observe(optax.scale(2.0), name="before"), observe(optax.sgd(0.1), name="after")
  )
  state = after(tx, [3.0])
  np.testing.assert_allclose(norm_history(state, "before"), [3], rtol=1e-6)
  np.testing.assert_allclose(norm_history(state, "after"), [6], rtol=1e-6)
  with pytest.raises(ValueError, match=r"2 histories .*'before', 'after'"):
    norm_history(state)
  with pytest.raises(ValueError, match=r"0 histories for name='other'"):
    norm_history(state, "other")


# --- What it costs --------------------------------------------------------------


LARGE = [jax.ShapeDtypeStruct((512, 1024), jnp.float32)] * 3
SIZE = 4 * sum(x.size for x in LARGE)


def clipped():
  return adamw(optax_clip.clip_by_global_norm(1.0))


@functools.cache
def program(name):
  tx = {
    "adamw": adamw,
    "observed": lambda: observe(adamw()),
    "clipped": clipped,
    "observed, clipped": lambda: observe(clipped()),
    "guarded": lambda: optax_clip.skip_nonfinite(clipped()),
    "observed, guarded": lambda: observe(optax_clip.skip_nonfinite(clipped())),
    "guarded, observed": lambda: optax_clip.skip_nonfinite(observe(clipped())),
  }[name]()
  return compiled_step(tx, LARGE)


@pytest.mark.parametrize(
  ("name", "like"),
  [
    ("observed", "clipped"),
    ("observed, clipped", "clipped"),
    ("observed, guarded", "guarded"),
    ("guarded, observed", "guarded"),
  ],
)
def test_the_norm_is_measured_once(name, like):
  """By bytes, reductions and copies it costs what the clip inside costs anyway."""
  new, old = program(name), program(like)
  assert abs(bytes_accessed(new) - bytes_accessed(old)) <= 0.01 * SIZE
  assert temporary(new) <= temporary(old) + 2**16
  large = [n for n in reductions_by_size(new) if n >= LARGE[0].size]
  assert large == [x.size for x in LARGE]


def test_observing_makes_no_copy_of_the_gradients():
  # Adam squares what it is given, as the norm does: see `_untouched`.
  assert temporary(program("observed")) <= temporary(program("adamw")) + 2**16


# --- Errors ---------------------------------------------------------------------


@pytest.mark.parametrize(
  ("call", "kind", "message"),
  [
    (lambda: observe(optax.sgd), TypeError, "inner must be a Grad"),
    (lambda: observe(optax.sgd(1.0), 0), ValueError, "window must be at least 1"),
    (lambda: observe(optax.sgd(1.0), 2.0), TypeError, "window must be a Python int"),
    (lambda: observe(optax.sgd(1.0), measure=1), TypeError, "measure must be a Meas"),
    (lambda: norm_history(optax.sgd(1.0).init(PARAMS)), ValueError, "no history"),
  ],
)
def test_bad_arguments(call, kind, message):
  with pytest.raises(kind, match=message):
    call()


def test_a_state_of_another_window_or_model():
  state = observe(optax.sgd(0.1), 4).init(PARAMS)
  with pytest.raises(ValueError, match=r"shape \[4\].*is \[5\]"):
    observe(optax.sgd(0.1), 5).update(gradient(1.0), state)
  layers = observe(optax.sgd(0.1), 4, measure=measures.layer_norm())
  with pytest.raises(ValueError, match=r"shape \[4\].*is \[4, 2\]"):
    layers.update(gradient(1.0), state)


def test_a_history_cannot_be_read_inside_jit():
  state = observe(optax.sgd(0.1)).init(PARAMS)
  with pytest.raises(TypeError, match=r"outside of jax\.jit"):
    jax.jit(norm_history)(state)


def test_an_ensemble_out_of_step():
  states = [after(observe(optax.sgd(0.1)), norms) for norms in ([1.0], [1.0, 2.0])]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
  with pytest.raises(ValueError, match=r"\[1, 2\] steps"):
    norm_history(stacked)


# --- The suggestion -------------------------------------------------------------


def noise(steps=1000, seed=0, sigma=0.3):
  return np.exp(sigma * np.random.default_rng(seed).standard_normal(steps))


def noise_by(level):
  """Norms whose level is a function of the time, from 0 to 1."""
  return noise() * level(np.linspace(0, 1, 1000))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.5])
def test_of_steady_norms_a_quantile(share):
  norms = noise()
  found = suggest_max_norm(norms, share)
  assert found.max_norm == np.quantile(norms, 1 - share)
  assert found.clipped == found.clipped_later == np.mean(norms > found.max_norm)
  assert found.clipped == pytest.approx(share, abs=1e-3)
  assert (found.start, found.spikes, found.nonfinite, found.zeros) == (0, 0, 0, 0)
  assert np.isnan(found.start_level)
  assert found.quantiles[50] == np.median(norms)
  assert found.quantiles[100] == norms.max()
  assert found.drift == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("share", [0.003, 0.03, 0.15])
def test_spikes_are_clipped_and_have_no_influence(share):
  norms = noise()
  spikes = np.random.default_rng(1).random(1000) < share
  found = suggest_max_norm(np.where(spikes, 50 * norms, norms))
  assert found.spikes == spikes.sum()
  assert found.max_norm == np.quantile(norms[~spikes], 0.95)
  assert found.start == 0


def test_what_is_not_finite_or_zero_does_not_count():
  norms = noise(300)
  bad = np.insert(norms, [0, 50, 100, 200, 200], [np.nan, np.inf, 0, np.nan, 0])
  got, wanted = suggest_max_norm(bad), suggest_max_norm(norms)
  assert (got.nonfinite, got.zeros, got.steps) == (3, 2, 305)
  assert got.max_norm == wanted.max_norm
  assert got.quantiles == wanted.quantiles
  # The share is of finite norms, with the zeros.
  assert got.clipped == wanted.clipped * 300 / 302


@pytest.mark.parametrize("factor", [20.0, 1 / 20])
def test_a_start_on_another_level_is_left_out(factor):
  norms = noise()
  norms[:100] *= np.geomspace(factor, 1, 100)
  found = suggest_max_norm(norms)
  assert 40 <= found.start <= 100
  assert found.max_norm == np.quantile(norms[found.start :], 0.95)
  assert found.start_level == np.median(norms[: found.start])
  assert f"the first {found.start} steps" in str(found)
  assert found.clipped_later == pytest.approx(0.05, abs=1e-3)
  assert (found.clipped > found.clipped_later) == (factor > 1)


def test_the_start_is_counted_in_steps_of_the_history():
  norms = noise()
  norms[:60] *= 30
  places = np.arange(10)
  moved = np.insert(norms, places, np.nan)
  assert suggest_max_norm(moved).start == suggest_max_norm(norms).start + 10


def test_nothing_is_left_out_without_a_reason():
  starts = [suggest_max_norm(noise(300, seed)).start for seed in range(200)]
  assert not any(starts)
  # Nor for a few spikes at the start, nor for a level that is 5% off.
  norms = noise()
  norms[:5] *= 100
  assert suggest_max_norm(norms).start == 0
  assert suggest_max_norm(np.where(np.arange(400) < 100, 1.05, 1.0)).start == 0


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_a_level_that_moves_is_noted(factor):
  found = suggest_max_norm(noise() * np.geomspace(1, factor, 1000))
  assert (found.drift > 2) == (factor > 1)
  assert (found.drift < 1 / 2) == (factor < 1)
  assert "the level moved" in str(found)
  assert "the level moved" not in str(suggest_max_norm(noise()))


MISFITS = {
  "a level that moves on": noise_by(lambda t: 20.0**t),
  "a level that falls": noise_by(lambda t: 20.0**-t),
  "a start of half of the run": noise_by(lambda t: np.where(t < 0.5, 4.0, 1.0)),
  "a low start of half of the run": noise_by(lambda t: np.where(t < 0.5, 0.2, 1.0)),
  "a start that would be clipped": noise_by(lambda t: np.where(t < 0.25, 4.0, 1.0)),
  "a run that collapses": noise_by(lambda t: np.where(t < 0.6, 1.0, 1e-4)),
}


@pytest.mark.parametrize("case", MISFITS)
def test_where_no_constant_fits_none_is_suggested(case):
  found = suggest_max_norm(MISFITS[case])
  assert np.isnan(found.max_norm)
  assert np.isnan(found.clipped)
  assert found.misfit
  assert "no max_norm fits these norms" in str(found)
  assert "clip_by_history()" in str(found)
  assert max(map(len, str(found).splitlines())) <= 80


@pytest.mark.parametrize("level", [4.0, 0.2])
def test_a_short_start_is_no_misfit(level):
  found = suggest_max_norm(noise_by(lambda t: np.where(t < 0.1, level, 1.0)))
  assert not found.misfit
  assert found.clipped_later == pytest.approx(0.05, abs=0.01)


def test_equal_norms_are_not_clipped():
  # Equal but for the rounding errors of norms.
  norms = 0.7 * (1 + 1e-7 * np.random.default_rng(0).standard_normal(200))
  found = suggest_max_norm(norms, 0.0)
  assert found.max_norm == norms.max()
  assert (found.clipped, found.spikes, found.start) == (0, 0, 0)
  assert suggest_max_norm(np.full(200, 0.7)).max_norm == 0.7


def test_the_limits_of_methods_that_learn():
  norms = noise(400)
  norms[300] = 40
  got = optax_clip.replay_limits(optax_clip.autoclip(), norms)
  assert got[-1] == pytest.approx(np.percentile(norms, 10), rel=1e-6)
  wanted = learned_oracles.zclip(norms)
  got = optax_clip.replay_limits(optax_clip.zclip(eps=1e-6, early_factor=None), norms)
  np.testing.assert_allclose(got, wanted, rtol=1e-4)
  history = optax_clip.replay_limits(
    optax_clip.clip_by_history(early_factor=None), norms
  )
  wanted = learned_oracles.history(norms, surprise=2.0)
  np.testing.assert_allclose(history, wanted, rtol=1e-5)


def test_a_history_of_any_kind():
  norms = noise(200)
  wanted = suggest_max_norm(norms).max_norm
  for same in (norms.tolist(), jnp.asarray(norms), np.float32(norms)):
    assert suggest_max_norm(same).max_norm == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e200])
def test_a_history_of_any_scale(scale):
  norms = noise(200)
  found = suggest_max_norm(norms * scale)
  assert found.max_norm == pytest.approx(scale * np.quantile(norms, 0.95), rel=1e-12)
  assert max(map(len, str(found).splitlines())) <= 80


def test_the_summary_fits_80_columns_and_names_all():
  norms = noise(1_000, sigma=1.0) * np.geomspace(1e-25, 1e-35, 1_000)
  norms[:100] *= 1e30
  norms[::7] = np.nan
  text = str(suggest_max_norm(norms))
  assert max(map(len, text.splitlines())) <= 80
  for word in ("fits", "not finite", "spikes", "left out"):
    assert word in text
  assert text.isascii()


def test_from_the_state_to_the_suggestion():
  norms = noise(150)
  state = after(observe(optax.sgd(0.1)), norms)
  found = suggest_max_norm(norm_history(state))
  assert found.max_norm == pytest.approx(np.quantile(norms, 0.95), rel=1e-5)


@pytest.mark.parametrize(
  ("norms", "share", "kind", "message"),
  [
    (np.ones(99), 0.05, ValueError, "has 99 .* 100 are needed: observe a longer"),
    ([], 0.05, ValueError, "has 0 .* 100 are needed"),
    (np.ones(200), 0.001, ValueError, r"1000 are needed for clipped_share=0\.001"),
    (np.r_[np.ones(99), np.zeros(400)], 0.05, ValueError, "has 99 .*above 0, of 499"),
    (np.r_[np.ones(150), np.full(151, np.nan)], 0.05, ValueError, "151 of 301 .*scale"),
    (np.zeros(200), 0.05, ValueError, "zero at all 200 steps.*frozen"),
    (np.ones((200, 2)), 0.05, ValueError, r"shape \[200, 2\].*norms\[:, 0\]"),
    (-np.ones(200), 0.05, ValueError, r"negative, got norms\[0\] = -1"),
    (["a"], 0.05, TypeError, "real numbers"),
    (np.ones(200), 1.0, ValueError, r"clipped_share .* got 1\.0"),
    (np.ones(200), -0.1, ValueError, r"clipped_share .* got -0\.1"),
    (np.ones(200), np.nan, ValueError, "clipped_share .* got nan"),
  ],
)
def test_histories_that_suggest_nothing(norms, share, kind, message):
  with pytest.raises(kind, match=re.compile(message, re.DOTALL)):
    suggest_max_norm(norms, share)


def test_traced_norms_and_unrecorded_limits():
  with pytest.raises(TypeError, match=r"outside of jax\.jit"):
    jax.jit(suggest_max_norm)(jnp.ones(200))
  for tx in (optax.sgd(0.1), optax_clip.autoclip(record=False)):
    with pytest.raises(ValueError, match="records 0"):
      optax_clip.replay_limits(tx, np.ones(3))
