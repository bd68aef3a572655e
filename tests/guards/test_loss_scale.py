"""Loss scales over their whole range; and what is promised of norms, behind one."""

from fractions import Fraction
import functools

from helpers import oracles
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import measures

# A scale and its inverse are both normal floats within these.
SMALLEST, LARGEST = 2.0**-126, 2.0**126


def unscaled(clip, measure, grads, limits, scales):
  """What leaves a strict clip for each of ``[runs, size]`` scaled gradients."""

  def run(row):
    grads, limit, scale = row
    tx = optax_clip.dynamic_loss_scale(
      clip(limit, strict=True), init_scale=scale, measure=measure()
    )
    return tx.update({"w": grads}, tx.init({"w": grads}))[0]["w"]

  # One after the other: of a batch both branches of every condition would run.
  rows = grads, jnp.asarray(limits, jnp.float32), jnp.asarray(scales, jnp.float32)
  return jax.jit(lambda *rows: jax.lax.map(run, rows))(*rows), rows[1]


# With the measure of the loss scale, which the clip takes over or does not.
PAIRS = {
  "global": (optax_clip.clip_by_global_norm, measures.global_norm),
  "layers": (optax_clip.clip_by_layer_norm, measures.layer_norm),
  "layers in global": (optax_clip.clip_by_layer_norm, measures.global_norm),
}


@pytest.mark.foreign  # About rounding; whether dtypes may mix is another test.
class TestStrict:
  """What leaves was unscaled and rounded: its norm is the one that is promised."""

  def check(self, pair, *rows):
    for row, limit in zip(*unscaled(*PAIRS[pair], *rows), strict=True):
      excess = oracles.exact_square([row]) / Fraction(float(limit)) ** 2
      assert excess <= 1, float(excess) ** 0.5

  @pytest.mark.parametrize("pair", PAIRS)
  def test_subnormals_of_float16(self, pair):
    # Unscaled, each element is half-way between two subnormals.
    grads = jnp.full((1, 100), 1.5 * 2.0**-9, jnp.float16)
    self.check(pair, grads, [1.1 * 1.5 * 2.0**-24 * 10], [2.0**15])

  @pytest.mark.parametrize(
    ("pair", "dtype"),
    [("global", "float16"), ("global", "bfloat16"), ("layers", "bfloat16")],
  )
  def test_scales_of_which_not_all_are_powers_of_two(self, pair, dtype):
    rng = np.random.default_rng(0)
    grads = jnp.asarray(rng.uniform(0.5, 2, (60, 64)), dtype)
    scales = np.repeat([3.0, 1000.0, 2.0**15], 20)
    norms = np.linalg.norm(np.float64(grads), axis=1) / scales
    # Just above the norm, where rounding decides; just below it, and far below.
    ratios = np.tile([1 + 5e-6, 1 + 2e-5, 1 + 1e-4, 1 - 1e-4, 0.3], 12)
    self.check(pair, grads, norms * ratios, scales)


@functools.partial(jax.jit, static_argnums=2)
def growing(start, most, steps):
  """Scales, updates and skips of steps of which each lets the scale grow."""
  tx = optax_clip.dynamic_loss_scale(
    optax.sgd(1.0), start, growth_interval=1, max_scale=most
  )
  params = {"w": jnp.zeros(3)}

  def step(state, _):
    scale = optax_clip.loss_scale(state)
    grads = {"w": jnp.float32([0.5, -1, 1.75]) * scale}
    updates, state = tx.update(grads, state, params)
    skipped = optax_clip.metrics(state)["dynamic_loss_scale/skipped"]
    return state, (scale, updates["w"], skipped)

  return jax.lax.scan(step, tx.init(params), length=steps)[1]


class TestRangeOfTheScale:
  def check(self, scales, updates, skipped):
    scales = np.asarray(scales, np.float64)
    assert np.all((scales >= SMALLEST) & (scales <= LARGEST))
    assert not np.any(skipped)
    np.testing.assert_array_equal(updates, [[-0.5, 1, -1.75]] * len(scales))

  @pytest.mark.parametrize("most", [2.0**127, 3e38, float("inf")])
  def test_it_stops_to_grow_where_its_inverse_is_a_float(self, most):
    """Traced, so that no constructor can refuse it."""
    scales, updates, skipped = growing(2.0**120, most, 12)
    self.check(scales, updates, skipped)
    assert scales[-1] > 2.0**120

  @pytest.mark.parametrize("most", [2.0**127, float("inf")])
  def test_a_bound_beyond_that_is_refused_or_means_it(self, most):
    keywords = {"init_scale": 2.0**125, "growth_interval": 1, "max_scale": most}
    refused = None
    try:
      tx = optax_clip.dynamic_loss_scale(optax.sgd(1.0), **keywords)
    except ValueError as error:
      refused = str(error)
    if refused is not None:
      assert "max_scale" in refused
      assert repr(most) in refused
      return
    state, update = tx.init(jnp.zeros(3)), jax.jit(tx.update)
    for _ in range(4):
      _, state = update(jnp.ones(3), state)
      assert optax_clip.loss_scale(state) <= LARGEST

  def test_a_step_at_the_largest_scale(self):
    self.check(*growing(LARGEST, LARGEST, 12))

  def test_the_default_bounds_are_finite(self):
    tx = optax_clip.dynamic_loss_scale(optax.sgd(1.0), growth_interval=1)
    update = jax.jit(tx.update)
    state = tx.init(jnp.zeros(1))
    for _ in range(40):
      _, state = update(jnp.ones(1), state)
    assert np.isfinite(optax_clip.loss_scale(state))
    assert optax_clip.loss_scale(state) <= LARGEST

  @pytest.mark.parametrize("least", [2.0**-127, 1e-45])
  def test_it_stops_to_fall_where_it_is_a_float(self, least):
    @jax.jit
    def run(least):
      tx = optax_clip.dynamic_loss_scale(
        optax.sgd(1.0), 2.0**-100, backoff_factor=2.0**-20, min_scale=least
      )
      state = tx.init(jnp.zeros(1))
      for _ in range(4):
        _, state = tx.update(jnp.full(1, jnp.nan), state)
      scale = optax_clip.loss_scale(state)
      return scale, tx.update(jnp.ones(1) * scale, state)

    scale, (updates, state) = run(least)
    assert scale >= SMALLEST
    np.testing.assert_array_equal(updates, [-1])
    assert optax_clip.metrics(state)["dynamic_loss_scale/skipped"] == 0


class TestScalesBelowOne:
  """Gradients are divided by them, and may then be too large for their dtype."""

  def run(self, gradients, **keywords):
    """Of each step: the parameters, the scale, and whether it was skipped."""
    tx = optax_clip.dynamic_loss_scale(optax.sgd(0.1), min_scale=2.0**-14, **keywords)
    params = {"w": jnp.ones(2, jnp.float16)}

    def step(carry, number):
      params, state = carry
      scale = optax_clip.loss_scale(state)
      exact = gradients(number) * jnp.stack([scale, 0 * scale])
      grads = exact.astype(jnp.float16)  # As from a backward pass: too large is inf.
      updates, state = tx.update({"w": grads}, state, params)
      params = optax.apply_updates(params, updates)
      skipped = optax_clip.metrics(state)["dynamic_loss_scale/skipped"]
      return (params, state), (params["w"], scale, skipped)

    start = params, tx.init(params)
    return jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(20))[1])()

  @pytest.mark.foreign  # The learning rate of optax is a float32.
  def test_what_its_dtype_cannot_hold_unscaled_is_skipped(self):
    weights, scales, skipped = self.run(lambda _: jnp.float32(1e6), init_scale=1.0)
    np.testing.assert_array_equal(weights, np.ones((20, 2)))
    assert np.all(skipped)
    # It stays where the scaled gradients are finite: a lower one would not help.
    assert scales[-1] == 2.0**-4

  @pytest.mark.foreign
  def test_the_steps_after_it_are_taken(self):
    weights, scales, skipped = self.run(
      lambda number: jnp.where(number < 10, 1e6, 1.0), init_scale=1.0
    )
    assert np.flatnonzero(skipped).tolist() == list(range(10))
    assert scales[-1] == 2.0**-4
    np.testing.assert_allclose(np.float32(weights[-1]), [0, 1], atol=2e-3)

  @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
  def test_elements_count_and_not_their_norm(self, dtype):
    tx = optax_clip.dynamic_loss_scale(
      optax.identity(), init_scale=0.25, min_scale=0.25
    )
    update, most = jax.jit(tx.update), float(jnp.finfo(dtype).max)
    # Divided by the scale, one is beyond the dtype; then only the norm of 100 is.
    one = jnp.zeros(100).at[0].set(most / 3).astype(dtype)
    updates, state = update(one, tx.init(one))
    found = optax_clip.metrics(state)
    np.testing.assert_array_equal(updates, jnp.zeros_like(one))
    assert found["dynamic_loss_scale/steps_inf"] == 1
    assert found["dynamic_loss_scale/scale"] == 0.25
    many = jnp.full(100, most / 8).astype(dtype)
    updates, state = update(many, tx.init(many))
    np.testing.assert_array_equal(updates, 4 * many)
    assert optax_clip.metrics(state)["dynamic_loss_scale/skipped"] == 0

  @pytest.mark.parametrize(("least", "reads"), [(1.0, 1), (0.5, 2)])
  def test_only_below_1_gradients_are_measured_twice(self, least, reads):
    calls, plain = [], measures.global_norm()

    def counting(*arguments, **keywords):
      calls.append(arguments)
      return plain.measure(*arguments, **keywords)

    tx = optax_clip.dynamic_loss_scale(
      optax.identity(), min_scale=least, measure=plain._replace(measure=counting)
    )
    grads = jnp.ones(3)
    jax.eval_shape(tx.update, grads, tx.init(grads))
    assert len(calls) == reads


class TestTheFirstScale:
  @pytest.mark.parametrize("scale", [2.0**127, float("inf"), 2.0**-127])
  def test_one_whose_inverse_is_no_float_is_refused(self, scale):
    with pytest.raises(ValueError, match="init_scale must be between"):
      optax_clip.dynamic_loss_scale(
        optax.sgd(0.1), scale, min_scale=2.0**-140, max_scale=float("inf")
      )

  def test_one_that_is_traced_is_bounded(self):
    @jax.jit
    def run(scale):
      tx = optax_clip.dynamic_loss_scale(optax.sgd(0.1), scale, max_scale=scale)
      state = tx.init(jnp.zeros(1))
      used = optax_clip.loss_scale(state)
      grads = jnp.float32([2.0**-10]) * used
      return used, tx.update(grads, state)[0]

    used, updates = run(2.0**127)
    assert used == LARGEST
    np.testing.assert_allclose(updates, [-0.1 * 2.0**-10], rtol=1e-6)
