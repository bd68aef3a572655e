"""A test for each row of the documented edge cases, named after the row.

Those that are errors stand in `test_bad_input.py`.
"""

import functools
import math

from helpers import oracles
from helpers.registry import ROWS
from helpers.registry import ZERO_IS_MEANT
from helpers.registry import names
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip

every_row = pytest.mark.parametrize("row", ROWS, ids=names(ROWS))
every_dtype = pytest.mark.parametrize("dtype", oracles.LOW)
both_policies = pytest.mark.parametrize("nonfinite", ["propagate", "zero"])


def compiled(max_norm, **keywords):
  """`clip_by_global_norm`, and its jitted update."""
  tx = optax_clip.clip_by_global_norm(max_norm, **keywords)
  return tx, jax.jit(tx.update)


compiled_once = functools.cache(compiled)


def clip(updates, max_norm, **keywords):
  """One compiled step of `clip_by_global_norm`; the updates and the metrics."""
  make = compiled_once if type(max_norm) is float else compiled
  tx, update = make(max_norm, **keywords)
  new, state = update(updates, tx.init(updates))
  found = optax_clip.metrics(state)
  return new, {k.removeprefix("clip_by_global_norm/"): v for k, v in found.items()}


class TestTable:
  @both_policies
  @every_dtype
  def test_all_zero_is_unchanged_with_norm_0(self, dtype, nonfinite):
    updates = {"a": jnp.zeros(3, dtype), "b": -jnp.zeros((), dtype)}
    new, found = clip(updates, 1.0, nonfinite=nonfinite)
    oracles.assert_identical(updates, new)
    assert (found["norm"], found["coefficient"]) == (0, 1)
    assert found["steps_clipped"] == found["steps_nonfinite"] == 0

  @pytest.mark.parametrize("empty", [{}, (), [None]])
  def test_an_empty_tree_is_unchanged_with_norm_0(self, empty):
    new, found = clip(empty, 1.0)
    assert new == empty
    assert found["norm"] == 0

  @ZERO_IS_MEANT
  @both_policies
  @every_dtype
  def test_max_norm_0_gives_zeros(self, dtype, nonfinite):
    for value in (0.0, 1.0, float(oracles.finfo(dtype).max)):
      updates = jnp.full(4, value, dtype)
      new, found = clip(updates, 0.0, nonfinite=nonfinite)
      np.testing.assert_array_equal(new, np.zeros(4))
      assert np.isfinite(found["norm"])

  def test_max_norm_0_gives_zeros_for_norms_of_any_size(self):
    step = jax.jit(lambda tree, c: optax_clip.clip_tree(tree, c)[0])
    for magnitude in (1e-37, 1e-30, 1e-19, 1.0, 1e19, 1e30, 3e38):
      x = jnp.asarray([magnitude, -magnitude / 3], jnp.float32)
      np.testing.assert_array_equal(step(x, 0.0), np.zeros(2))

  @both_policies
  @every_dtype
  def test_max_norm_inf_is_unchanged(self, dtype, nonfinite):
    top = oracles.finfo(dtype).max
    for value in (0.0, -1.0, top):
      updates = jnp.asarray(np.full(4, value, np.dtype(dtype)))
      new, _ = clip(updates, math.inf, nonfinite=nonfinite)
      oracles.assert_identical(updates, new)

  def test_a_traced_negative_limit_counts_as_0(self):
    @jax.jit
    def step(updates, max_norm):
      tx = optax_clip.clip_by_global_norm(max_norm)
      return tx.update(updates, tx.init(updates))[0]

    for limit in (-1.0, -1e-30, -math.inf):
      new = step({"w": jnp.asarray([3.0, 4.0]), "z": jnp.zeros(2)}, limit)
      for x in jax.tree.leaves(new):
        np.testing.assert_array_equal(x, np.zeros(2))

  @every_dtype
  def test_a_nan_element_propagates_to_all(self, dtype):
    updates = {"a": jnp.asarray([1.0, jnp.nan], dtype), "b": jnp.ones(3, dtype)}
    new, found = clip(updates, 1.0)
    assert all(np.all(np.isnan(oracles.wide(x))) for x in jax.tree.leaves(new))
    assert np.isnan(found["norm"])
    assert found["steps_nonfinite"] == 1

  @every_dtype
  def test_an_inf_element_propagates_and_the_rest_is_0(self, dtype):
    updates = {"a": jnp.asarray([1.0, -jnp.inf], dtype), "b": jnp.ones(3, dtype)}
    new, found = clip(updates, 1.0)
    a = oracles.wide(new["a"])
    assert a[0] == 0
    assert not np.isfinite(a[1])
    np.testing.assert_array_equal(oracles.wide(new["b"]), np.zeros(3))
    assert found["norm"] == math.inf
    assert found["steps_nonfinite"] == 1

  @ZERO_IS_MEANT
  @every_dtype
  @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
  def test_a_nonfinite_element_gives_zeros_with_zero(self, dtype, bad):
    updates = {"a": jnp.asarray([1.0, bad], dtype), "b": jnp.ones(3, dtype)}
    for max_norm in (0.0, 1.0, math.inf):
      new, found = clip(updates, max_norm, nonfinite="zero")
      assert all(not np.any(oracles.wide(x)) for x in jax.tree.leaves(new))
      assert found["steps_nonfinite"] == 1

  @pytest.mark.parametrize("kind", [np.float32, jnp.float32, jnp.asarray, np.array])
  @every_dtype
  def test_array_thresholds_do_not_change_dtypes(self, kind, dtype):
    updates = {"low": jnp.asarray([3.0, 0.0], dtype), "f32": jnp.asarray([4.0])}
    new, found = clip(updates, kind(1.0))
    assert (new["low"].dtype, new["f32"].dtype) == (dtype, jnp.float32)
    np.testing.assert_allclose(
      oracles.wide(new["low"]), [0.6, 0], rtol=oracles.epsilon(dtype)
    )
    np.testing.assert_allclose(new["f32"], [0.8], rtol=1e-6)
    assert found["norm"] == 5

  def test_a_bfloat16_or_float16_threshold_limits_float32_leaves(self):
    for dtype in ("bfloat16", "float16"):
      new, _ = clip(jnp.asarray([3.0, 4.0]), jnp.asarray(1.0, dtype))
      np.testing.assert_allclose(new, [0.6, 0.8], rtol=1e-6)


class TestSchedules:
  @every_row
  def test_a_schedule_is_evaluated_at_each_step(self, row):
    if not row.scheduled:
      pytest.skip("takes numbers only; optax.inject_hyperparams makes schedules")
    if row.bounds is None:
      pytest.skip("has no oracle here; a threshold that learns takes no limit")
    steps = np.array([2.0, 1.0, 0.0, 3.0], np.float32)
    tx = row.make(lambda count: jnp.asarray(steps)[count])
    updates = {"w": jnp.asarray([30.0, -40.0], jnp.bfloat16)}
    state = tx.init(updates)
    update = jax.jit(tx.update)
    for limit in steps.tolist():
      new, state = update(updates, state, updates)
      (want,) = row.expected(updates, updates, threshold=limit)
      np.testing.assert_allclose(
        oracles.wide(new["w"]), want, rtol=oracles.epsilon("bfloat16")
      )

  def test_a_schedule_below_0_counts_as_0(self):
    new, _ = clip(jnp.ones(3), lambda count: -1 - count)
    np.testing.assert_array_equal(new, np.zeros(3))

  def test_optax_schedules_work(self):
    tx = optax_clip.clip_by_global_norm(optax.linear_schedule(4.0, 0.0, 4))
    updates = jnp.asarray([30.0, 40.0])
    state = tx.init(updates)
    update = jax.jit(tx.update)
    norms = []
    for _ in range(5):
      new, state = update(updates, state)
      norms.append(oracles.tree_norm([new]))
    np.testing.assert_allclose(norms, [4, 3, 2, 1, 0], rtol=1e-6)

  def test_traced_thresholds_do_not_recompile(self):
    traces = []

    @jax.jit
    def step(updates, max_norm):
      traces.append(1)
      return optax_clip.clip_tree(updates, max_norm)[0]

    for limit in np.linspace(0.1, 6, 7):
      new = step(jnp.asarray([3.0, 4.0]), limit)
      np.testing.assert_allclose(oracles.tree_norm([new]), min(limit, 5), rtol=1e-6)
    assert len(traces) == 1


class TestLowPrecision:
  """What a sum in the dtype of the leaves gets wrong."""

  def test_float16_300_is_clipped_to_1_not_to_0(self):
    x = jnp.asarray([300.0], jnp.float16)
    assert clip(x, 1.0)[0] == 1
    assert optax.clip_by_global_norm(1.0).update(x, optax.EmptyState())[0] == 0

  def test_a_million_small_float16_values_are_seen(self):
    x = jnp.full(10**6, 1e-4, jnp.float16)
    new, found = clip(x, 1e-3)
    np.testing.assert_allclose(found["norm"], oracles.tree_norm([x]), rtol=1e-6)
    # Each result is subnormal in float16, where one ulp is 6e-8.
    np.testing.assert_allclose(oracles.wide(new), 1e-6, atol=6e-8)

  @pytest.mark.parametrize(
    ("values", "max_norm"),
    [
      ([1e20, 1e20], 1.0),
      ([3e38] * 4, 1.0),
      ([1e-23] * 4, 1e-24),
      ([1e-37] * 4, 1e-37),
    ],
  )
  def test_float32_out_of_the_range_of_squares_keeps_its_direction(
    self, values, max_norm
  ):
    x = np.array(values, np.float32)
    new, found = clip(jnp.asarray(x), max_norm)
    assert found["steps_clipped"] == 1
    np.testing.assert_allclose(oracles.tree_norm([new]), max_norm, rtol=1e-6)
    np.testing.assert_allclose(
      oracles.wide(new) / max_norm,
      oracles.wide(x) / oracles.tree_norm([x]),
      rtol=1e-6,
    )


class TestEpsilonAndOrder:
  def test_eps_is_added_to_the_norm(self):
    new, _ = clip(jnp.asarray([3.0, 4.0]), 1.0, eps=0.5)
    np.testing.assert_allclose(new, np.array([3, 4]) / 5.5, rtol=1e-6)
    # Within the limit only without eps.
    new, _ = clip(jnp.asarray([3.0, 4.0]), 5.2, eps=0.5)
    np.testing.assert_allclose(new, np.array([3, 4]) * 5.2 / 5.5, rtol=1e-6)

  def test_eps_counts_in_the_units_of_tiny_and_of_huge_norms(self):
    for scale in (1e-30, 1e30):
      x = jnp.asarray([3 * scale, 4 * scale], jnp.float32)
      new, _ = clip(x, scale, eps=5 * scale)
      np.testing.assert_allclose(oracles.wide(new) / scale, [0.3, 0.4], rtol=1e-6)

  @pytest.mark.parametrize("eps", [-1e-6, math.nan])
  def test_a_negative_eps_is_an_error(self, eps):
    with pytest.raises(ValueError, match="eps"):
      optax_clip.clip_by_global_norm(1.0, eps=eps)

  @pytest.mark.parametrize("eps", [-1.0, math.nan])
  def test_adaptive_clipping_takes_no_negative_eps(self, eps):
    with pytest.raises(ValueError, match="eps"):
      optax_clip.adaptive_grad_clip(0.1, eps=eps)

  @pytest.mark.parametrize("ord", [0, -1, math.nan, 65, -math.inf])
  def test_an_unknown_order_is_an_error_with_its_value(self, ord):
    with pytest.raises(ValueError, match=f"ord.*{ord}"):
      optax_clip.clip_by_global_norm(1.0, ord=ord)

  def test_an_unknown_policy_is_an_error_with_its_value(self):
    with pytest.raises(ValueError, match=r"nonfinite.*'ignore'"):
      optax_clip.clip_by_global_norm(1.0, nonfinite="ignore")


class TestGroups:
  @pytest.mark.parametrize("labels", [{}, (), [], None])
  def test_empty_labels_are_an_error(self, labels):
    with pytest.raises(ValueError, match="labels"):
      optax_clip.clip_by_group_norm(labels, {"a": 1.0})

  def test_a_label_without_a_limit_is_an_error_that_names_it(self):
    with pytest.raises(ValueError, match="'b'"):
      optax_clip.clip_by_group_norm({"x": "a", "y": "b"}, {"a": 1.0})

  def test_labels_of_another_structure_are_an_error_in_init(self):
    tx = optax_clip.clip_by_group_norm({"x": "a", "y": "a"}, {"a": 1.0})
    with pytest.raises(ValueError, match="labels"):
      tx.init({"z": jnp.ones(2)})

  def test_no_limits_are_an_error(self):
    with pytest.raises(ValueError, match="max_norms"):
      optax_clip.clip_by_group_norm({"x": "a"}, {})

  def test_labels_may_be_a_prefix_and_limits_schedules_or_inf(self):
    tree = {
      "body": {"w": jnp.asarray([3.0]), "b": jnp.asarray([4.0])},
      "head": jnp.asarray([3.0, 4.0]),
      "rest": jnp.asarray([300.0]),
    }
    tx = optax_clip.clip_by_group_norm(
      {"body": "slow", "head": "fast", "rest": "free"},
      {"slow": 1.0, "fast": lambda count: 2 + count, "free": math.inf},
    )
    state = tx.init(tree)
    update = jax.jit(tx.update)
    new, state = update(tree, state)
    np.testing.assert_allclose(new["body"]["w"], [0.6], rtol=1e-6)
    np.testing.assert_allclose(new["head"], [1.2, 1.6], rtol=1e-6)
    oracles.assert_identical(new["rest"], tree["rest"])
    new, _ = update(tree, state)
    np.testing.assert_allclose(new["head"], [1.8, 2.4], rtol=1e-6)

  @ZERO_IS_MEANT
  def test_a_group_without_leaves_is_not_in_the_way(self):
    tx = optax_clip.clip_by_group_norm("a", {"a": 1.0, "unused": 0.0})
    x = {"w": jnp.asarray([3.0, 4.0])}
    new, state = tx.update(x, tx.init(x))
    np.testing.assert_allclose(new["w"], [0.6, 0.8], rtol=1e-6)
    assert optax_clip.metrics(state)["clip_by_group_norm/norm"] == 5


class TestAdaptive:
  @every_dtype
  def test_float16_weights_and_updates_are_measured_in_float32(self, dtype):
    updates = {"w": jnp.full((64, 2), 8.0, dtype)}
    params = {"w": jnp.full((64, 2), 1.0, dtype)}
    tx = optax_clip.adaptive_grad_clip(0.01)
    new, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    np.testing.assert_allclose(
      oracles.wide(new["w"]), 0.01, rtol=oracles.epsilon(dtype)
    )

  def test_weights_of_zeros_move_by_eps(self):
    tx = optax_clip.adaptive_grad_clip(0.5, eps=0.1)
    zero = {"w": jnp.zeros(2)}
    update = jax.jit(tx.update)
    new, _ = update({"w": jnp.asarray([3.0, 4.0])}, tx.init(zero), zero)
    np.testing.assert_allclose(new["w"], [0.03, 0.04], rtol=1e-6)

  def test_a_nan_unit_stays_alone(self):
    params = {"w": jnp.ones((2, 3))}
    updates = {"w": jnp.ones((2, 3)).at[0, 1].set(jnp.nan)}
    tx = optax_clip.adaptive_grad_clip(0.5)
    new, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    np.testing.assert_array_equal(np.isnan(new["w"]), [[False, True, False]] * 2)

  @pytest.mark.parametrize(
    ("shape", "axes"),
    [
      ((3, 4), (0,)),
      ((2, 3, 4), (0,)),
      ((2, 2, 3, 4), (0, 1, 2)),
      ((2, 2, 2, 3, 4), (0, 1, 2, 3)),
      ((1, 5, 1), (0, 1, 2)),
    ],
  )
  def test_units_go_by_rank(self, shape, axes):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    want = np.broadcast_to(oracles.norm(x, axis=axes), shape)
    np.testing.assert_allclose(optax_clip.unitwise_norm(x), want, rtol=1e-6)

  def test_rank_6_needs_an_axis(self):
    x = jnp.ones((2,) * 6)
    tx = optax_clip.adaptive_grad_clip(0.5)
    with pytest.raises(ValueError, match="axis="):
      tx.update(x, optax.EmptyState(), x)
    np.testing.assert_allclose(
      optax_clip.unitwise_norm(x, axis=(0, -1)), np.full(x.shape, 2.0)
    )
