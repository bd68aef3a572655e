"""What a state says of the steps behind it: rates, last steps, spikes, losses."""

import math

from helpers import oracles
from helpers import registry
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import thresholds

PARAMS = {"embed": jnp.ones((4, 4)), "head": jnp.full(4, 2.0)}


def recorded(tx, state, name):
  return {
    key.removeprefix(f"{name}/"): np.asarray(value)
    for key, value in optax_clip.metrics(state).items()
    if key.startswith(f"{name}/")
  }


class TestNormAfter:
  """It is the norm that the updates have when they come out."""

  @pytest.mark.parametrize("row", registry.FIXED, ids=registry.names(registry.FIXED))
  def test_is_the_norm_of_what_comes_out(self, row):
    keywords = {"record": True} if row.name == "clip" else {}
    tx = row.make(**keywords)
    key = jax.random.key(0)
    updates = {
      name: jax.random.normal(jax.random.fold_in(key, i), x.shape)
      for i, (name, x) in enumerate(PARAMS.items())
    }
    clipped, state = jax.jit(tx.update)(updates, tx.init(PARAMS), PARAMS)
    found = recorded(tx, state, row.name)
    assert found["norm_after"] < found["norm"]
    leaves, weights = (oracles.wide_leaves(tree) for tree in (clipped, PARAMS))
    ord = math.inf if row.name == "clip" else 2.0
    if row.name == "clip":
      norms = [oracles.tree_norm(leaves, ord)]
    elif row.name in ("adaptive_grad_clip", "clippy"):
      # Their norms are ratios, to weights and to the bound of Clippy.
      share = row.threshold if row.name == "clippy" else 1.0
      pairs = row.bounds(leaves, weights, share, 2.0)
      norms = [np.max(np.asarray(norm) / np.asarray(bound)) for norm, bound in pairs]
    else:
      norms = [np.max(norm) for norm, _ in row.bounds(leaves, weights, 1.0, 2.0)]
    np.testing.assert_allclose(found["norm_after"], max(norms), rtol=1e-6)

  def test_is_the_norm_where_nothing_is_clipped(self):
    tx = optax_clip.clip_by_global_norm(1e9)
    _, state = tx.update(PARAMS, tx.init(PARAMS))
    found = recorded(tx, state, "clip_by_global_norm")
    assert found["norm_after"] == found["norm"] == np.float32(math.sqrt(32))

  @pytest.mark.parametrize("size", [3e38, 1e-37, 1e30])
  @pytest.mark.parametrize("limit", [1.0, 1e-30, 1e30])
  def test_over_the_range_of_floats(self, size, limit):
    tx = optax_clip.clip_by_global_norm(limit)
    _, state = tx.update(jnp.full(4, size), tx.init(jnp.zeros(4)))
    wanted = min(2 * size, limit)
    found = recorded(tx, state, "clip_by_global_norm")["norm_after"]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)

  @pytest.mark.parametrize(
    ("nonfinite", "wanted"), [("zero", 0.0), ("propagate", None)]
  )
  def test_of_a_step_that_is_not_finite(self, nonfinite, wanted):
    tx = optax_clip.clip_by_global_norm(1.0, nonfinite=nonfinite)
    _, state = tx.update(jnp.array([jnp.nan, 1.0]), tx.init(jnp.zeros(2)))
    found = recorded(tx, state, "clip_by_global_norm")["norm_after"]
    np.testing.assert_equal(found, 0.0 if nonfinite == "zero" else np.nan)


def run(tx, sizes, name, losses=None):
  """What is recorded after each step of a run with given norms."""
  losses = [0.0] * len(sizes) if losses is None else losses

  def step(state, now):
    size, loss = now
    _, state = tx.update({"w": size[None]}, state, {"w": jnp.ones(1)}, loss=loss)
    return state, optax_clip.metrics(state)

  arrays = jnp.asarray(sizes, jnp.float32), jnp.asarray(losses, jnp.float32)
  _, found = jax.lax.scan(step, tx.init({"w": jnp.ones(1)}), arrays)
  return {
    key.removeprefix(f"{name}/"): np.asarray(value) for key, value in found.items()
  }


# Long enough that the rate forgets: clipped at first, then rarely, one NaN, one inf.
SIZES = [2.0] * 60 + [0.5, 0.5, 2.0, 0.5, math.nan, 0.5] * 40 + [math.inf, 2.0]


class TestOfSteps:
  def test_flags_and_last_steps(self):
    tx = optax_clip.clip_by_global_norm(1.0)
    found = run(tx, SIZES, "clip_by_global_norm")
    clipped = np.isfinite(SIZES) & (np.nan_to_num(SIZES) > 1)
    broken = ~np.isfinite(SIZES)
    steps = np.arange(1, len(SIZES) + 1)
    for flag, happened in (("clipped", clipped), ("nonfinite", broken)):
      np.testing.assert_array_equal(found[flag], happened)
      latest = np.maximum.accumulate(np.where(happened, steps, 0))
      np.testing.assert_array_equal(found[f"last_{flag}"], latest)

  def test_rates_are_running_averages_that_know_when_they_began(self):
    tx = optax_clip.clip_by_global_norm(1.0)
    found = run(tx, SIZES, "clip_by_global_norm")
    clips = [math.isfinite(size) and size > 1 for size in SIZES]
    broken = [not math.isfinite(size) for size in SIZES]
    for key, happened in (("clip_rate", clips), ("nonfinite_rate", broken)):
      rate, weight, wanted = 0.0, 0.0, []
      for now in happened:
        rate, weight = 0.99 * rate + 0.01 * now, 0.99 * weight + 0.01
        wanted.append(rate / weight)
      np.testing.assert_allclose(found[key], wanted, atol=2e-6)

  def test_a_rate_is_the_share_of_all_steps_at_first(self):
    found = run(
      optax_clip.clip_by_global_norm(1.0), [2.0, *[0.5] * 9] * 10, "clip_by_global_norm"
    )
    assert found["clip_rate"][0] == 1
    np.testing.assert_allclose(found["clip_rate"][99], 0.1, atol=0.005)

  def test_nothing_has_happened_before_the_first_step(self):
    tx = optax_clip.clip_by_global_norm(1.0)
    found = recorded(tx, tx.init(PARAMS), "clip_by_global_norm")
    assert found["clipped"] == found["nonfinite"] == found["last_clipped"] == 0

  def test_of_a_guard(self):
    tx = optax_clip.skip_spikes(
      optax.sgd(0.1), thresholds.constant(1.0), max_consecutive=None
    )
    losses = np.arange(len(SIZES)) / 7
    found = run(tx, SIZES, "skip_spikes", losses)
    broken = ~np.isfinite(SIZES)
    spikes = ~broken & (np.nan_to_num(SIZES) > 1)
    steps = np.arange(1, len(SIZES) + 1)
    for kind, happened in (("nonfinite", broken), ("spike", spikes)):
      latest = np.maximum.accumulate(np.where(happened, steps, 0))
      np.testing.assert_array_equal(found[f"last_{kind}"], latest)
      shown = np.float32(np.where(latest > 0, losses[latest - 1], 0))
      key = {"nonfinite": "nonfinite_step_loss", "spike": "spike_loss"}[kind]
      np.testing.assert_array_equal(found[key], shown)
      if kind == "spike":
        norms = np.float32(np.where(latest > 0, np.array(SIZES)[latest - 1], 0))
        np.testing.assert_array_equal(found["spike_norm"], norms)
    # The running average of ones is rounded once a step.
    np.testing.assert_allclose(found["skip_rate"][59], 1, atol=2e-6)

  @pytest.mark.mesh
  def test_a_loss_that_differs_over_a_mesh_is_averaged(self):
    """The state of a guard is the same on all devices."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("data",), axis_types=auto)
    spec = jax.sharding.PartitionSpec
    tx = optax_clip.skip_nonfinite(optax.sgd(0.1))

    def step(grads, loss):
      grads = jax.lax.pmean(grads, "data")
      _, state = tx.update(grads, tx.init(grads), loss=loss[0])
      return optax_clip.metrics(state)["skip_nonfinite/nonfinite_step_loss"]

    shard = jax.shard_map(
      step, mesh=mesh, in_specs=(spec("data"), spec("data")), out_specs=spec()
    )
    assert jax.jit(shard)(jnp.full(8, jnp.nan), jnp.arange(8.0)) == 3.5


def test_an_alert_is_one_comparison_inside_jit():
  """Stop when nearly all of the last steps were clipped."""
  tx = optax_clip.clip_by_global_norm(1.0)

  def going_on(carry):
    return optax_clip.metrics(carry)["clip_by_global_norm/clip_rate"] <= 0.9

  def step(state):
    number = optax_clip.metrics(state)["clip_by_global_norm/steps"]
    size = jnp.where(number < 200, 0.5, 2.0)
    return tx.update(size[None], state)[1]

  state = jax.jit(lambda s: jax.lax.while_loop(going_on, step, s))(tx.init(jnp.ones(1)))
  # 1 - 0.99**n, of the weights of all steps, is above 0.9 for n = 217.
  assert recorded(tx, state, "clip_by_global_norm")["steps"] == 200 + 217


def a_bad_run(measure=None, inside=lambda tx: tx):
  """NaN in one layer at step 100, a spike in another at step 200."""
  tx = optax_clip.skip_spikes(
    inside(optax.chain(optax_clip.clip_by_global_norm(1.0), optax.adam(1e-3))),
    signals=("norm", "loss"),
    record="layers",
    measure=measure,
  )

  def step(carry, number):
    params, state = carry
    key = jax.random.fold_in(jax.random.key(0), number)
    grads = jax.tree.map(lambda p: 1 + 0.1 * jax.random.normal(key, p.shape), params)
    # Two spikes in a row: the second is not measured against the first.
    embed = jnp.where((number == 200) | (number == 201), 300.0, 1.0) * grads["embed"]
    head = jnp.where(number == 100, jnp.nan, 1.0) * grads["head"]
    grads = {"embed": embed, "head": head}
    loss = jnp.where(number == 100, jnp.nan, 2 + 0.01 * jax.random.normal(key))
    updates, state = tx.update(grads, state, params, loss=loss)
    return (optax.apply_updates(params, updates), state), loss

  start = PARAMS, tx.init(PARAMS)
  (_, state), losses = jax.lax.scan(step, start, jnp.arange(1, 301))
  return state, np.asarray(losses)


@pytest.mark.foreign  # Adam promotes.
def test_which_step_which_layer_was_it_skipped_and_what_was_the_loss():
  state, losses = a_bad_run()
  report = optax_clip.layer_metrics(state, PARAMS)
  assert (report.nonfinite, report.nonfinite_step) == ("head", 100)
  assert (report.spike, report.spike_step) == ("embed", 201)
  assert report.spike_growth == pytest.approx(300, rel=0.2)
  assert report.skips["spike_loss"] == losses[200]
  assert str(report).splitlines()[-2:] == [
    "step 100 was not finite: first head; skipped, loss not finite",
    f"step 201 was a spike: embed grew x{report.spike_growth:.3g};"
    f" skipped, loss {losses[200]:.4g}",
  ]
  found = optax_clip.metrics(state)
  assert found["skip_spikes/steps_skipped"] == 3
  assert found["clip_by_global_norm/steps"] == 297


def test_a_clip_says_nothing_of_spikes():
  tx = optax_clip.clip_by_global_norm(1.0, record="layers")
  nan = {"embed": PARAMS["embed"], "head": jnp.full(4, jnp.nan)}
  _, state = tx.update(nan, tx.init(PARAMS))
  report = optax_clip.layer_metrics(state, PARAMS)
  assert (report.spike, report.skips) == (None, {})
  assert str(report).endswith("step 1 was not finite: first head")
