"""What a guard's state holds: no NaN in healthy runs, and each kind of skipped step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import thresholds

PARAMS = {"w": jnp.ones(2)}


def constant_spikes(inner, **keywords):
  return optax_clip.skip_spikes(inner, thresholds.constant(5.0), **keywords)


GUARDS = {
  "skip_nonfinite": optax_clip.skip_nonfinite,
  "skip_spikes": constant_spikes,
  "dynamic_loss_scale": functools.partial(
    optax_clip.dynamic_loss_scale, init_scale=1.0
  ),
}
guards = pytest.mark.parametrize("guard", GUARDS)


@functools.cache
def updating(guard, record=True):
  inner = optax.chain(
    optax_clip.clip_by_global_norm(1.0, record=record), optax.sgd(0.1)
  )
  tx = GUARDS[guard](inner, record=record)
  return tx, jax.jit(tx.update)


def recorded(state, guard):
  prefix = f"{guard}/"
  return {
    key.removeprefix(prefix): np.asarray(value)
    for key, value in optax_clip.metrics(state).items()
    if key.startswith(prefix)
  }


def nans(state):
  return [
    jax.tree_util.keystr(path)
    for path, x in jax.tree_util.tree_leaves_with_path(state)
    if np.any(np.isnan(x))
  ]


def ran(guard, sizes, losses=None, **options):
  tx, update = updating(guard, **options)
  state = tx.init(PARAMS)
  for i, size in enumerate(sizes):
    extra = {} if losses is None else {"loss": jnp.float32(losses[i])}
    _, state = update({"w": jnp.float32([size, 0])}, state, PARAMS, **extra)
  return state


class TestAHealthyStateHoldsNoNaN:
  @guards
  @pytest.mark.parametrize("record", [True, "layers"])
  def test_before_the_first_step_and_after_steps(self, guard, record):
    tx, _ = updating(guard, record)
    assert not nans(tx.init(PARAMS))
    assert not nans(ran(guard, [1.0, 2.0], record=record))
    assert not nans(ran(guard, [1.0, 2.0], [3.0, 2.0], record=record))

  @guards
  @pytest.mark.parametrize("losses", [None, [3.0, np.nan, 1.0, 1.0]])
  def test_nor_once_a_step_that_was_not_finite_is_over(self, guard, losses):
    state = ran(guard, [1.0, np.nan, 1e3, 1.0], losses)
    assert recorded(state, guard)["last_nonfinite"] == 2
    assert not nans(state)
    # As frameworks check that the copies of a state are equal.
    total = sum(float(jnp.sum(x)) for x in jax.tree.leaves(state))
    assert total == total

  @guards
  @pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jitted"])
  def test_debugging_of_nans_passes_a_healthy_run(self, guard, jitted):
    with jax.debug_nans(True):
      tx = GUARDS[guard](optax.chain(optax_clip.clip_by_global_norm(1.0)))
      update = jax.jit(tx.update) if jitted else tx.update
      state = tx.init(PARAMS)
      for size in (1.0, 1e3):  # The second one is a spike; no loss is passed.
        _, state = update({"w": jnp.float32([size, 0])}, state, PARAMS)
      jax.block_until_ready(state)


class TestKindsOfSkippedSteps:
  """Three counters, whose sum is that of all skipped steps."""

  SIZES = (1.0, np.nan, np.inf, 1.0, np.inf, 1e3, np.inf)
  COUNTS = ("steps_nan", "steps_inf", "steps_spike", "steps_skipped")

  @guards
  def test_are_counted_each(self, guard):
    found = recorded(ran(guard, self.SIZES), guard)
    spikes = int(guard == "skip_spikes")
    assert [int(found[x]) for x in self.COUNTS] == [1, 3, spikes, 4 + spikes]

  def test_a_loss_counts_as_what_it_is(self):
    tx = constant_spikes(optax.sgd(0.1), signals=("norm", "loss"), warmup=1)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for loss in (1.0, np.nan, np.inf, 1e3, -np.inf):
      _, state = update(PARAMS, state, PARAMS, loss=jnp.float32(loss))
    found = recorded(state, "skip_spikes")
    assert [int(found[x]) for x in self.COUNTS] == [1, 2, 1, 4]

  def test_a_step_that_is_taken_after_all_is_none(self):
    tx = optax_clip.skip_nonfinite(optax.sgd(0.1), max_consecutive=1)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for _ in range(2):
      _, state = update({"w": jnp.full(2, jnp.nan)}, state, PARAMS)
    found = recorded(state, "skip_nonfinite")
    assert [int(found[x]) for x in self.COUNTS] == [1, 0, 0, 1]


class TestTheLossOfASkippedStep:
  def test_is_that_of_the_step_finite_or_not(self):
    found = recorded(ran("skip_nonfinite", [np.nan], [670.0]), "skip_nonfinite")
    assert found["nonfinite_step_loss"] == 670

  @pytest.mark.parametrize(
    ("loss", "wanted"), [(np.nan, np.inf), (np.inf, np.inf), (-np.inf, -np.inf)]
  )
  def test_a_nan_is_kept_as_inf(self, loss, wanted):
    found = recorded(ran("skip_nonfinite", [np.nan], [loss]), "skip_nonfinite")
    assert found["nonfinite_step_loss"] == wanted

  def test_is_0_where_none_was_passed(self):
    found = recorded(ran("skip_spikes", [np.nan, 1e3]), "skip_spikes")
    assert found["nonfinite_step_loss"] == found["spike_loss"] == 0
    assert (found["last_nonfinite"], found["last_spike"]) == (1, 2)


class TestALossOfNaNBesideAFiniteGradient:
  def updates(self, tx):
    nan = jnp.float32(jnp.nan)
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS, loss=nan)

  def test_is_taken_by_a_guard_that_judges_gradients(self):
    updates, _ = self.updates(optax_clip.skip_nonfinite(optax.sgd(1.0)))
    np.testing.assert_array_equal(updates["w"], [-1, -1])

  def test_is_skipped_by_one_that_judges_the_loss_and_calls_nothing_a_spike(self):
    tx = optax_clip.skip_spikes(
      optax.sgd(1.0), thresholds.constant(jnp.inf), signals=("loss",)
    )
    updates, state = self.updates(tx)
    np.testing.assert_array_equal(updates["w"], [0, 0])
    assert recorded(state, "skip_spikes")["steps_nan"] == 1
    _, state = tx.update(PARAMS, state, PARAMS, loss=jnp.float32(1e30))
    assert recorded(state, "skip_spikes")["skipped"] == 0


class TestValueIsTheLoss:
  """By the name that optax has for it: line searches, plateaus, polyak."""

  def run(self, **extra):
    tx = constant_spikes(optax.sgd(0.1), signals=("loss",), warmup=1)
    state = tx.init(PARAMS)
    for _ in range(2):
      _, state = tx.update(PARAMS, state, PARAMS, **extra)
    return tx, state

  def test_where_there_is_no_loss(self):
    tx, state = self.run(value=jnp.float32(1))
    _, state = tx.update(PARAMS, state, PARAMS, value=jnp.float32(1e3))
    found = recorded(state, "skip_spikes")
    assert (found["skipped"], found["spike_loss"]) == (1, 1e3)

  def test_a_loss_beside_it_is_the_one(self):
    loss = {"loss": jnp.float32(1)}
    tx, state = self.run(value=jnp.float32(5e3), **loss)
    _, state = tx.update(PARAMS, state, PARAMS, value=jnp.float32(9e3), **loss)
    assert recorded(state, "skip_spikes")["skipped"] == 0

  @pytest.mark.foreign  # The plateau promotes.
  def test_it_reaches_the_transformation_inside(self):
    plateau = optax.contrib.reduce_on_plateau(patience=1)
    tx = optax_clip.skip_nonfinite(optax.chain(optax.sgd(0.1), plateau))
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=jnp.float32(7))
    assert state.inner[1].best_value == 7

  def test_the_error_of_a_missing_loss_names_both(self):
    with pytest.raises(TypeError, match=r"loss=loss.*value="):
      self.run()


def test_reasons_are_written_by_name():
  reason = optax_clip.SkipReason(3)
  assert str(reason) == f"{reason}" == "NORM_SPIKE"
  assert f"{reason:d}" == "3"
  assert int(reason) == 3
