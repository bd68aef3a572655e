"""The laws that every transformation keeps, over the registry of them all."""

import functools
import math

from helpers import oracles
from helpers.registry import COLLECTED
from helpers.registry import FIXED
from helpers.registry import IN_PART
from helpers.registry import ORDERED
from helpers.registry import RESCALING
from helpers.registry import ROWS
from helpers.registry import names
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import optax_clip

over = functools.partial(pytest.mark.parametrize, "row")
every_row = over(ROWS, ids=names(ROWS))
fixed_rows = over(FIXED, ids=names(FIXED))
# And those that leave some leaves as they are.
leaf_rows = over((*FIXED, *IN_PART), ids=[*names(FIXED), "clip_by_group_norm in part"])
rescaling_rows = over(RESCALING, ids=names(RESCALING))
# What does not depend on the method is tested with one of each kind by default.
KINDS = ("clip_by_global_norm", "adaptive_grad_clip", "zclip", "stable_spam")
KIND = [row for row in ROWS if row.name in KINDS]
each_kind = over(
  [pytest.param(row, marks=() if row in KIND else pytest.mark.slow) for row in ROWS],
  ids=names(ROWS),
)
collected_rows = over(COLLECTED, ids=names(COLLECTED))
every_dtype = pytest.mark.parametrize("dtype", oracles.LOW)

SHAPES = {
  "bias": (4,),
  "kernel": (2, 2, 3, 4),
  "matrix": (8, 16),
  "scalar": (),
}


def tree(seed, dtype="float32", scale=1.0):
  rng = np.random.default_rng(seed)
  return {
    name: jnp.asarray(scale * rng.standard_normal(shape), dtype)
    for name, shape in SHAPES.items()
  }


@functools.cache
def compiled(row, **keywords):
  """A jitted `(limit, updates, params) -> (updates, state)` with a fresh state."""

  def run(limit, updates, params):
    tx = row.make(limit, **keywords)
    return tx.update(updates, tx.init(params), params)

  return jax.jit(run)


@functools.cache
def updater(row, **keywords):
  """A transformation that records, and its jitted update: one for all tests."""
  tx = row.make(record=True, **keywords)
  return tx, jax.jit(tx.update)


def step(row, updates, params, limit=None, **keywords):
  """The updates of one compiled step with a traced threshold."""
  limit = np.float64(row.threshold if limit is None else limit)
  return compiled(row, **keywords)(limit, updates, params)[0]


def assert_expected(row, new, updates, params=None, **keywords):
  """Each element within 1e-6 and half an ulp of what the oracle gives."""
  wanted = row.expected(updates, params, **keywords)
  leaves = jax.tree.leaves(new)
  assert len(leaves) == len(wanted)
  for got, want in zip(leaves, wanted, strict=True):
    assert np.all(np.isfinite(oracles.wide(got)))
    error = np.abs(oracles.wide(got) - want)
    bound = 1e-6 * np.abs(want) + 0.51 * oracles.ulps(np.asarray(got))
    # CPUs and TPUs flush float32 results (also on the way to a bfloat16) that
    # are not normal.
    flushed = (oracles.wide(got) == 0) & (np.abs(want) < TINY)
    assert np.all((error <= bound) | flushed), (got, want)


TINY = float(np.finfo(np.float32).tiny)


class TestResult:
  """What comes out is what the oracle says."""

  @leaf_rows
  @every_dtype
  def test_updates_are_those_of_the_oracle(self, row, dtype):
    updates, params = tree(0, dtype), tree(1, dtype)
    for share in (1e-3, 0.5, 1.0, 2.0, 1e3):
      limit = row.threshold * share
      new = step(row, updates, params, limit)
      assert_expected(row, new, updates, params, threshold=limit)

  @fixed_rows
  def test_without_jit_the_result_is_the_same(self, row):
    updates, params = tree(0), tree(1)
    tx, update = updater(row)
    state = tx.init(params)
    new, new_state = tx.update(updates, state, params)
    assert_expected(row, new, updates, params)
    assert_same_kind(state, new_state)
    expected, expected_state = update(updates, state, params)
    assert_close(new, expected)
    assert_close(new_state, expected_state)

  @over(ORDERED, ids=names(ORDERED))
  @pytest.mark.parametrize("ord", [0.5, 1, 3, math.inf])
  def test_every_order_is_that_of_the_oracle(self, row, ord):
    updates, params = tree(0), tree(1)
    new = step(row, updates, params, ord=ord)
    assert_expected(row, new, updates, params, ord=ord)

  @rescaling_rows
  def test_float64_stays_float64(self, row):
    with jax.enable_x64(True):
      updates, params = tree(0, "float64"), tree(1, "float64")
      new = step(row, updates, params)
      wanted = row.expected(updates, params)
      for got, want in zip(jax.tree.leaves(new), wanted, strict=True):
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, want, rtol=1e-12)

  @rescaling_rows
  def test_complex_updates_are_those_of_the_oracle(self, row):
    updates = jax.tree.map(jax.lax.complex, tree(0), tree(1))
    params = jax.tree.map(jax.lax.complex, tree(2), tree(3))
    new = step(row, updates, params)
    for got, want in zip(
      jax.tree.leaves(new), row.expected(updates, params), strict=True
    ):
      assert got.dtype == jnp.complex64
      np.testing.assert_allclose(got, want, rtol=1e-6)

  def test_elementwise_clipping_of_complex_leaves_names_the_alternative(self):
    z = jnp.ones(3, jnp.complex64)
    with pytest.raises(TypeError, match="clip_by_global_norm"):
      optax_clip.clip(1.0).update(z, optax.EmptyState())


class TestStructure:
  """Law 1: structure, shape, dtype, weak type and sharding are unchanged."""

  @every_row
  def test_mixed_dtypes_and_structure_stay(self, row):
    updates = {
      "half": jnp.ones((3, 4), "float16"),
      "brain": [jnp.ones((3, 4), "bfloat16"), None],
      "single": (jnp.ones((3, 4)), optax.MaskedNode()),
    }
    limit = np.float64(row.threshold)
    new, _ = jax.eval_shape(compiled(row), limit, updates, updates)
    assert jax.tree.structure(new) == jax.tree.structure(updates)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(new), strict=True):
      assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)

  @every_row
  def test_weak_types_stay(self, row):
    updates = {"weak": jnp.asarray(3.0), "strong": jnp.ones((), jnp.float32)}
    ways = [row.make(nonfinite=policy) for policy in ("propagate", "zero")]
    state = ways[0].init(updates)
    found = [jax.eval_shape(tx.update, updates, state, updates)[0] for tx in ways]
    if row in KIND:
      found.append(ways[0].update(updates, state, updates)[0])
    for new in found:
      assert new["weak"].weak_type
      assert not new["strong"].weak_type

  @every_row
  def test_empty_trees_pass(self, row):
    tx = row.make()
    empty = [{}, (), [None, {}], optax.MaskedNode()]

    def step(empty):
      new, state = tx.update(empty, tx.init(empty), empty)
      return new, optax_clip.metrics(state, allow_empty=True)

    for old, (new, found) in zip(
      empty, jax.jit(lambda: [*map(step, empty)])(), strict=True
    ):
      assert new == old
      for key, value in found.items():
        # Without a norm to learn from there is no limit.
        assert np.isfinite(value) or (row.stateful and key.endswith("/limit"))

  @every_row
  def test_arrays_without_elements_pass_and_do_not_count(self, row):
    rng = np.random.default_rng(0)
    full = {"a": jnp.asarray(rng.standard_normal((3, 4)), "float32")}
    hollow = {"y": jnp.zeros((0, 3), "float32"), "z": jnp.zeros((3, 0), "bfloat16")}

    @jax.jit
    def run(limit, full, hollow):
      tx = row.make(limit)
      trees = (full, full | hollow, hollow)
      return [tx.update(x, tx.init(x), x)[0] for x in trees]

    alone, both, nothing = run(np.float64(row.threshold), full, hollow)
    assert_close(both, alone | hollow)
    if row.bounds is not None:
      assert_expected(row, both, full | hollow, full | hollow)
    oracles.assert_identical(nothing, hollow)

  @fixed_rows
  def test_scalars_and_plain_arrays_are_trees(self, row):
    for x in (jnp.asarray(-7.0, jnp.float32), jnp.asarray([7.0, -1.0])):
      new = step(row, x, x)
      assert new.shape == x.shape
      assert_expected(row, new, x, x)

  @fixed_rows
  def test_numpy_leaves_and_python_floats_are_taken(self, row):
    updates = {"array": np.full(3, 7.0, np.float32), "float": 7.0}
    new = step(row, updates, updates)
    assert new["array"].dtype == jnp.float32
    assert_expected(row, new, updates, updates)

  @over([r for r in ROWS if r.needs_params], ids=lambda r: r.name)
  def test_missing_and_mismatched_params_are_errors(self, row):
    tx = row.make()
    updates = {"w": jnp.ones(2)}
    state = tx.init(updates)
    with pytest.raises(ValueError, match="params"):
      tx.update(updates, state)
    with pytest.raises(ValueError, match="structure"):
      tx.update(updates, state, {"v": jnp.ones(2)})


class TestPassThrough:
  """Law 2: what is within its limit comes out bit for bit."""

  @leaf_rows
  @every_dtype
  def test_within_the_limit_nothing_changes(self, row, dtype):
    info = oracles.finfo(dtype)
    special = [
      -0.0,
      0.0,
      info.tiny,
      -info.tiny,
      info.smallest_subnormal,
      -3 * info.smallest_subnormal,
      1.0,
      info.eps,
    ]
    # In the shapes of the other tests, so that one program serves them all.
    updates = tree(0, dtype)
    rows = updates["matrix"].at[0, : len(special)].set(np.array(special, dtype))
    updates["matrix"] = rows
    for limit in (1e6, 1e30, math.inf):
      oracles.assert_identical(updates, step(row, updates, updates, limit))

  @fixed_rows
  def test_within_the_limit_nothing_changes_without_jit(self, row):
    updates = {"w": jnp.asarray(np.array([-0.0, 1e-40, -1e-45, 1.0], np.float32))}
    tx = row.make(100.0)
    new, _ = tx.update(updates, tx.init(updates), updates)
    oracles.assert_identical(updates, new)

  @every_dtype
  @pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
  def test_a_norm_equal_to_the_limit_is_within_it(self, dtype, nonfinite):
    updates = {"a": jnp.asarray([3.0, -0.0], dtype), "b": jnp.asarray(4.0, dtype)}
    tx = optax_clip.clip_by_global_norm(5.0, nonfinite=nonfinite)
    new, _ = jax.jit(tx.update)(updates, tx.init(updates))
    oracles.assert_identical(updates, new)

  # Of what learns only float32, in which all of them remember.
  @pytest.mark.parametrize(
    ("row", "dtype"),
    [
      pytest.param(row, dtype, id=f"{row.name}-{dtype}")
      for row in ROWS
      for dtype in oracles.LOW
      if dtype == "float32" or not row.stateful
    ],
  )
  def test_zeros_stay_zeros_with_their_signs(self, row, dtype):
    updates = jax.tree.map(lambda x: x * jnp.asarray(0.0, dtype), tree(0, dtype))
    oracles.assert_identical(updates, step(row, updates, tree(1, dtype)))

  @rescaling_rows
  def test_complex_updates_within_the_limit_do_not_change(self, row):
    updates = np.array([3 - 0.0j, -0.0 + 4j, 1e-40 + 0j], np.complex64)
    updates = jnp.asarray(updates)
    oracles.assert_identical(updates, step(row, updates, updates, 100.0))


def extremes(dtype):
  """Finite inputs at the ends of a dtype, by name."""
  info = oracles.finfo(dtype)
  top, tiny, least = (float(x) for x in (info.max, info.tiny, info.smallest_subnormal))
  vectors = {
    "largest": [top] * 4,
    "largest and least": [top, least, -top, 0.0],
    "smallest normal": [tiny, -tiny, tiny, 0.0],
    "one subnormal": [least, 0.0, 0.0, 0.0],
    "whole range": [top, 1.0, tiny, -least],
    "300": [300.0, 0.0, 0.0, 0.0],
    "one": [1.0, -1.0, 1.0, 1.0],
  }
  if dtype != "float16":
    vectors |= {
      "square overflows": [1e20, -1e20, 1e20, 0.0],
      "norm overflows": [3e38, 3e38, -3e38, 3e38],
      "square underflows": [1e-23, 1e-23, -1e-23, 1e-23],
      "1e-37": [1e-37, -1e-37, 1e-37, 0.0],
      "huge and small": [1e30, 1e-30, 1.0, 0.0],
    }
  return {k: np.array(v, dtype) for k, v in vectors.items()}


class TestFinite:
  """Law 3: finite in, finite out; and clipped to the limit, not to zero."""

  @leaf_rows
  @every_dtype
  def test_finite_updates_are_clipped_to_the_limit(self, row, dtype):
    for case, vector in extremes(dtype).items():
      # In the shapes of the other tests, so that one program serves them all.
      updates = {name: np.zeros(shape, dtype) for name, shape in SHAPES.items()}
      updates["bias"] = vector
      updates["matrix"][:4, 0], updates["kernel"][0, 0, 0] = vector, vector
      updates["scalar"] = vector[0]
      params = jax.tree.map(np.ones_like, updates)
      for limit in (row.threshold, 2.0**-9, 300.0):
        new, state = compiled(row)(np.float64(limit), updates, params)
        assert_expected(row, new, updates, params, threshold=limit)
        for key, value in optax_clip.metrics(state, allow_empty=True).items():
          assert np.isfinite(value), (case, limit, key)

  @rescaling_rows
  def test_limits_and_norms_of_any_size_go_together(self, row):
    rng = np.random.default_rng(0)
    for magnitude in (1e-30, 1e-19, 1.0, 1e19, 3e38):
      values = magnitude * rng.uniform(0.3, 1, (4, 3))
      updates = jnp.asarray(values, jnp.float32)
      params = jnp.ones_like(updates)
      for limit in (1e-34, 1e-24, 1e-6, 1e30, 3e38):
        new = step(row, updates, params, limit)
        assert_expected(row, new, updates, params, threshold=limit)

  @rescaling_rows
  def test_float64_over_its_whole_range(self, row):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
      for magnitude in (1e-300, 1e-160, 1.0, 1e160, 1e307):
        updates = jnp.asarray(magnitude * rng.uniform(0.3, 1, (4, 3)))
        params = jnp.ones_like(updates)
        for limit in (1e-290, 1e-6, 1.0, 1e200):
          new = step(row, updates, params, limit)
          (want,) = row.expected(updates, params, threshold=limit)
          np.testing.assert_allclose(new, want, rtol=1e-12)

  def test_a_float64_norm_beyond_float64_is_clipped_to_the_limit(self):
    with jax.enable_x64(True):
      updates = jnp.full(4, 1.7e308)
      new, norm = optax_clip.clip_tree(updates, 1.0)
      np.testing.assert_allclose(new, np.full(4, 0.5), rtol=1e-15)
      assert norm == np.finfo(np.float64).max


class TestDerivatives:
  """Law 7: derivatives through a transformation are finite, also at zero."""

  @every_row
  def test_grad_and_jvp_are_finite(self, row):
    def some(tree):
      return {name: x for name, x in tree.items() if name != "kernel"}

    @jax.jit
    def derivatives(limit, updates, params, tangents):
      def clipped(u):
        tx = row.make(limit)
        return tx.update(u, tx.init(params), params)[0]

      _, forward = jax.jvp(clipped, (updates,), (tangents,))
      return forward, jax.vjp(clipped, updates)[1](tangents)

    for scale in (0.0, 1e-30, 1.0, 1e30):
      for limit in row.extremes:
        trees = [some(tree(0, scale=scale)), some(tree(1)), some(tree(2))]
        result = derivatives(np.float64(limit), *trees)
        for x in jax.tree.leaves(result):
          assert np.all(np.isfinite(x)), (scale, limit)

  @over(ORDERED, ids=names(ORDERED))
  @pytest.mark.parametrize("ord", [0.5, 1, 2, 3, math.inf])
  def test_every_order_has_a_finite_derivative_at_zero(self, row, ord):
    zero = {"w": jnp.zeros((3, 4)), "b": jnp.zeros(4)}

    @jax.jit
    def derivative(updates):
      def total(u):
        tx = row.make(ord=ord)
        new, _ = tx.update(u, tx.init(zero), zero)
        return sum(jnp.sum(x) for x in jax.tree.leaves(new))

      return jax.grad(total)(updates)

    for x in jax.tree.leaves(derivative(zero)):
      np.testing.assert_array_equal(x, np.ones_like(x))

  @pytest.mark.parametrize("ord", [1, 2, 3])
  def test_grad_through_the_clip_is_that_of_the_formula(self, ord):
    with jax.enable_x64(True):
      x = jnp.asarray(np.random.default_rng(0).standard_normal(5)) * 3

      def ours(x):
        clipped, _ = optax_clip.clip_tree(x, 1.0, ord=ord)
        return jnp.sum(clipped**3)

      def formula(x):
        n = jnp.sum(jnp.abs(x) ** ord) ** (1 / ord)
        return jnp.sum((x / n) ** 3)

      np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(formula)(x), rtol=1e-12)


def assert_same_kind(a, b):
  """States of identical structure, shape, dtype and weak type."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)


def buffers(state):
  return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]


class TestState:
  """Law 8: states keep their kind, and share no buffers."""

  @every_row
  @every_dtype
  def test_init_and_update_return_states_of_one_kind(self, row, dtype):
    tx = row.make(record=True)
    updates, params = tree(0, dtype), tree(1, dtype)
    first = tx.init(params)
    _, second = jax.eval_shape(tx.update, updates, first, params)
    _, third = jax.eval_shape(tx.update, updates, second, params)
    assert_same_kind(first, second)
    assert_same_kind(second, third)
    assert_same_kind(first, jax.eval_shape(tx.init, params))
    # By default too, as a fixed elementwise clip records nothing.
    _, later = jax.eval_shape(compiled(row), np.float64(row.threshold), updates, params)
    assert_same_kind(row.make().init(params), later)

  @every_row
  def test_states_of_one_kind_with_float64(self, row):
    with jax.enable_x64(True):
      tx = row.make(record=True)
      params = {"w": jnp.ones(3)}
      state = tx.init(params)
      _, later = jax.eval_shape(tx.update, params, state, params)
      assert_same_kind(state, later)

  @every_row
  def test_schedules_keep_the_kind_of_state(self, row):
    if not row.scheduled:
      pytest.skip("takes numbers only; optax.inject_hyperparams makes schedules")
    tx = row.make(optax.linear_schedule(1.0, 0.1, 10))
    params = tree(1)
    state = tx.init(params)
    _, new = jax.eval_shape(tx.update, tree(0), state, params)
    assert_same_kind(state, new)

  @every_row
  def test_no_two_fields_share_a_buffer(self, row):
    tx, update = updater(row)
    params = tree(1)
    state = tx.init(params)
    for _ in range(2):
      assert len(set(buffers(state))) == len(buffers(state))
      _, state = update(tree(0), state, params)

  @every_row
  def test_donated_updates_and_states_work(self, row):
    tx, update = updater(row)
    params = tree(1)
    traces = []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def donated(updates, state, params):
      traces.append(1)
      return tx.update(updates, state, params)

    expected, wanted_state = update(tree(0), tx.init(params), params)
    new, state = donated(tree(0), tx.init(params), params)
    assert_close((new, state), (expected, wanted_state))
    expected, wanted_state = update(tree(2), wanted_state, params)
    new, state = donated(tree(2), state, params)
    assert_close((new, state), (expected, wanted_state))
    assert len(traces) == 1

  @every_row
  def test_without_record_the_state_of_a_fixed_threshold_is_that_of_optax(self, row):
    if row.stateful:
      pytest.skip("a threshold that learns has a memory")
    assert row.make(record=False).init(tree(0)) == optax.EmptyState()

  @every_row
  def test_a_restored_state_continues_bit_for_bit(self, row):
    tx, update = updater(row)
    params = tree(1)

    def run(state, seeds):
      outputs = []
      for seed in seeds:
        new, state = update(tree(seed), state, params)
        outputs.append(new)
      return outputs, state

    _, middle = run(tx.init(params), range(5))
    saved = jax.tree.map(np.asarray, middle)
    straight, end = run(middle, range(5, 10))
    resumed, end_of_resumed = run(jax.tree.map(jnp.asarray, saved), range(5, 10))
    oracles.assert_identical(straight, resumed)
    oracles.assert_identical(end, end_of_resumed)


def assert_close(a, b, rtol=1e-6):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    rtol = max(rtol, oracles.epsilon(x.dtype) if x.dtype.kind != "i" else 0)
    np.testing.assert_allclose(oracles.wide(x), oracles.wide(y), rtol=rtol)


class TestTransforms:
  """Law 8: under `jit`, `scan`, `vmap` and `pmap` as without them."""

  # The tests of learned thresholds scan all that learn.
  @each_kind
  def test_scan_over_steps(self, row):
    tx, update = updater(row)
    params = tree(1)
    steps = [tree(seed, scale=seed) for seed in range(4)]
    state, expected = tx.init(params), []
    for updates in steps:
      new, state = update(updates, state, params)
      expected.append(new)

    def body(state, updates):
      new, state = tx.update(updates, state, params)
      return state, new

    stacked = jax.tree.map(lambda *xs: np.stack(xs), *steps)
    end, new = jax.lax.scan(body, tx.init(params), stacked)
    assert_close(new, jax.tree.map(lambda *xs: np.stack(xs), *expected))
    assert_close(end, state)

  @every_row
  def test_vmap_is_a_loop(self, row):
    tx, update = updater(row)
    # The members leave the safe range in both directions, and stay in it.
    members = [tree(seed, scale=s) for seed, s in enumerate((1, 1e30, 1e-30, 0))]
    params = [tree(seed + 10) for seed in range(4)]
    stack = functools.partial(jax.tree.map, lambda *xs: np.stack(xs))
    states = [tx.init(p) for p in params]
    new, state = jax.jit(jax.vmap(tx.update))(
      stack(*members), stack(*states), stack(*params)
    )
    single = [update(*x) for x in zip(members, states, params, strict=True)]
    expected, expected_state = stack(*single)
    assert_close(new, expected)
    assert_close(state, expected_state)

  @pytest.mark.mesh
  @each_kind
  def test_pmap_clips_each_device_on_its_own(self, row):
    tx = row.make()
    count = jax.device_count()
    stack = functools.partial(jax.tree.map, lambda *xs: np.stack(xs))
    members = [tree(seed) for seed in range(count)]
    params = tree(20)
    states = stack(*[tx.init(params)] * count)
    new, _ = jax.pmap(tx.update)(stack(*members), states, stack(*[params] * count))
    expected = stack(*[step(row, u, params) for u in members])
    assert_close(jax.device_get(new), jax.device_get(expected))


class TestWrappers:
  """Law 8: inside the wrappers of optax."""

  @fixed_rows
  def test_chain(self, row):
    tx = optax.chain(row.make(record=True), optax.scale(-1.0), row.make(record=True))
    updates, params = tree(0), tree(1)
    state = tx.init(params)
    new, state = jax.jit(tx.update)(updates, state, params)
    flipped = jax.tree.map(jnp.negative, new)
    once = step(row, updates, params)
    for a, b in zip(jax.tree.leaves(flipped), jax.tree.leaves(once), strict=True):
      # Rounding may have left the norm a little above the limit.
      moved = np.abs(oracles.wide(a) - oracles.wide(b))
      slack = np.maximum(1e-6 * np.abs(oracles.wide(b)), oracles.ulps(np.asarray(b)))
      assert np.all(moved <= slack)
    keys = {key.split("/")[0] for key in optax_clip.metrics(state)}
    assert keys == {row.name, f"{row.name}_1"}

  @fixed_rows
  def test_masked_clips_only_what_is_selected(self, row):
    mask = {name: name != "scalar" for name in SHAPES}
    tx = optax.masked(row.make(), mask)
    updates, params = tree(0), tree(1)
    new, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    oracles.assert_identical(new["scalar"], updates["scalar"])
    kept = [{k: x[k] for k in SHAPES if mask[k]} for x in (new, updates, params)]
    assert_expected(row, *kept)

  @fixed_rows
  def test_multi_transform_clips_each_label_on_its_own(self, row):
    labels = {name: "big" if "m" in name else "small" for name in SHAPES}
    tx = optax.multi_transform(
      {"big": row.make(record=True), "small": row.make(row.threshold / 2)}, labels
    )
    updates, params = tree(0), tree(1)
    state = tx.init(params)
    new, state = jax.jit(tx.update)(updates, state, params)
    for label, limit in (("big", row.threshold), ("small", row.threshold / 2)):
      part = {k: v for k, v in updates.items() if labels[k] == label}
      assert_expected(
        row,
        {k: new[k] for k in part},
        part,
        {k: params[k] for k in part},
        threshold=limit,
      )
    assert f"{row.name}/norm" in optax_clip.metrics(state)

  @pytest.mark.foreign  # optax mixes dtypes here.
  @fixed_rows
  def test_inject_hyperparams_with_mixed_dtypes(self, row):
    arguments = row.arguments(row.threshold)
    static = tuple(k for k, v in arguments.items() if callable(v))
    updates = tree(0, "bfloat16") | {"single": tree(0)}
    params = tree(1, "bfloat16") | {"single": tree(1)}
    tx = optax.inject_hyperparams(row.factory, static_args=static)(
      **arguments, record=True
    )
    state = tx.init(params)
    new, state = jax.jit(tx.update)(updates, state, params)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(new), strict=True):
      assert a.dtype == b.dtype
    # As optax rounded it; limits in a dict are not hyperparameters to it.
    injected = [k for k, v in arguments.items() if isinstance(v, float)]
    limit = float(state.hyperparams[injected[0]]) if injected else row.threshold
    assert_expected(row, new, updates, params, threshold=limit)

  @fixed_rows
  def test_injected_thresholds_change_without_recompiling(self, row):
    arguments = row.arguments(row.threshold)
    injected = [k for k, v in arguments.items() if isinstance(v, float)]
    if not injected:
      pytest.skip("limits in a dict are not hyperparameters to optax")
    tx = optax.inject_hyperparams(row.factory)(**arguments)
    updates, params = tree(0), tree(1)
    state = tx.init(params)
    traces = []

    @jax.jit
    def update(updates, state, params):
      traces.append(1)
      return tx.update(updates, state, params)

    for limit in (0.01, 0.02, 1e9):
      state.hyperparams[injected[0]] = jnp.asarray(limit, jnp.float32)
      new, state = update(updates, state, params)
      assert_expected(row, new, updates, params, threshold=float(np.float32(limit)))
    assert len(traces) == 1

  @pytest.mark.foreign  # optax mixes dtypes here.
  @each_kind
  def test_multi_steps_clips_the_mean(self, row):
    tx = optax.MultiSteps(row.make(), every_k_schedule=2)
    params = tree(9)
    first, second = tree(0), tree(1)
    state = tx.init(params)
    update = jax.jit(tx.update)
    quiet, state = update(first, state, params)
    assert all(not np.any(x) for x in jax.tree.leaves(quiet))
    new, state = update(second, state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    assert_close(new, step(row, mean, params), rtol=3e-6)
    if found := optax_clip.metrics(state, allow_empty=True):
      assert [found[f"{name}/steps"] for name in row.recorded()] == [1] * len(row.parts)

  @each_kind
  def test_apply_if_finite_rejects_and_goes_on(self, row):
    tx = optax.apply_if_finite(row.make(), max_consecutive_errors=3)
    params = tree(9)
    good, bad = tree(0), tree(1) | {"scalar": jnp.asarray(jnp.nan)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    wanted = step(row, good, params)
    _, state = update(good, state, params)
    rejected, state = update(bad, state, params)
    assert all(not np.any(x) for x in jax.tree.leaves(rejected))
    new, state = update(good, state, params)
    if not row.stateful:
      assert_close(new, wanted)

  @pytest.mark.foreign  # optax mixes dtypes here.
  @each_kind
  def test_metrics_are_read_through_every_wrapper(self, row):
    inner = row.make(record=True, name="inner")
    params = tree(1)
    wrapped = {
      "masked": optax.masked(inner, jax.tree.map(lambda x: True, params)),
      "steps": optax.MultiSteps(inner, 1),
      "finite": optax.apply_if_finite(inner, 3),
      "chain": optax.chain(optax.scale(1.0), optax.chain(inner, optax.sgd(0.1))),
    }
    _, state = updater(row, name="inner")[1](tree(0), inner.init(params), params)
    expected = optax_clip.metrics(state)
    assert {key.split("/")[0] for key in expected} == set(row.recorded("inner"))
    states = {name: tx.init(params) for name, tx in wrapped.items()}

    @jax.jit
    def read(updates, states, params):
      later = {n: tx.update(updates, states[n], params)[1] for n, tx in wrapped.items()}
      return {name: optax_clip.metrics(state) for name, state in later.items()}

    for name, found in read(tree(0), states, params).items():
      assert found.keys() == expected.keys()
      for key, value in found.items():
        np.testing.assert_allclose(
          value, expected[key], rtol=3e-6, err_msg=f"{name}: {key}"
        )


class TestMemory:
  """Law 9: a step with non-finite norms is as if it had not been."""

  @every_row
  @pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
  def test_the_step_after_a_non_finite_one_does_not_know_of_it(self, row, nonfinite):
    # To propagate is the default, whose program other tests have compiled.
    keywords = {} if nonfinite == "propagate" else {"nonfinite": nonfinite}
    tx, update = updater(row, **keywords)
    params = tree(9)
    broken = [
      tree(0) | {"scalar": jnp.asarray(x, jnp.float32)}
      for x in (np.nan, np.inf, -np.inf)
    ]

    def run(steps):
      state, outputs = tx.init(params), []
      for updates in steps:
        new, state = update(updates, state, params)
        outputs.append(new)
      return outputs, state

    sound = [tree(seed) for seed in range(4)]
    expected, _ = run(sound)
    outputs, state = run(
      [sound[0], broken[0], sound[1], broken[1], sound[2], broken[2], sound[3]]
    )
    oracles.assert_identical(outputs[::2], expected)
    found = optax_clip.metrics(state)
    # With "zero", what comes after the first part of a chain sees zeros.
    first = row.recorded()[0]
    assert found[f"{first}/steps"] == 7
    assert found[f"{first}/steps_nonfinite"] == 3
    if nonfinite == "zero":
      assert all(not np.any(x) for x in jax.tree.leaves(outputs[1::2]))


def mesh_of(kind):
  return jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))


SPECS = {
  "bias": P("y"),
  "kernel": P(None, None, None, "y"),
  "matrix": P("x", "y"),
  "scalar": P(),
}


def placed(tree, mesh):
  return {
    name: jax.device_put(x, NamedSharding(mesh, SPECS[name]))
    for name, x in tree.items()
  }


@pytest.mark.mesh
class TestSharding:
  """Laws 1 and 10: sharded equals unsharded, and stays sharded as it was."""

  # `test_meshes.py` has random meshes for all methods.
  @each_kind
  @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
  def test_on_a_mesh(self, row, kind):
    tx, update = updater(row)
    mesh = mesh_of(kind)
    for scale in (1.0, 1e30):
      updates, params = tree(0, scale=scale), tree(1)
      expected = update(updates, tx.init(params), params)
      with jax.set_mesh(mesh):
        ours, theirs = placed(updates, mesh), placed(params, mesh)
        state = tx.init(theirs)
        new, state = update(ours, state, theirs)
        _, again = update(ours, state, theirs)
      for name, x in new.items():
        assert x.sharding.is_equivalent_to(ours[name].sharding, x.ndim), name
      assert_same_kind(state, again)
      assert_close(jax.device_get((new, state)), jax.device_get(expected), rtol=2e-6)

  # A chain, as the one of two parts, brings no other operation.
  @over([row for row in KIND if len(row.parts) == 1], ids=lambda row: row.name)
  def test_on_a_mesh_without_jit(self, row):
    # Both kinds of axes: each operation is compiled alone, for each again.
    tx = row.make()
    mesh = jax.make_mesh(
      (2, 4), ("x", "y"), axis_types=(AxisType.Explicit, AxisType.Auto)
    )
    updates, params = ({"matrix": tree(s)["matrix"]} for s in range(2))
    with jax.set_mesh(mesh):
      ours, theirs = placed(updates, mesh), placed(params, mesh)
      new, _ = tx.update(ours, tx.init(theirs), theirs)
    assert new["matrix"].sharding.is_equivalent_to(ours["matrix"].sharding, 2)
    expected = step(row, updates, params)
    assert_close(jax.device_get(new), jax.device_get(expected), rtol=2e-6)

  @collected_rows
  def test_shard_map_reads_the_axes_from_the_types(self, row):
    tx, alone = updater(row)
    params = tree(1)
    replicated = jax.tree.map(lambda _: P(), tx.init(params))
    update = jax.jit(
      jax.shard_map(
        tx.update,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(SPECS, replicated, SPECS),
        out_specs=(SPECS, replicated),
      )
    )
    for scale in (1.0, 1e30, 1e-30):
      updates = tree(0, scale=scale)
      expected = alone(updates, tx.init(params), params)
      found = update(updates, tx.init(params), params)
      assert_close(jax.device_get(found), jax.device_get(expected), rtol=2e-6)

  @collected_rows
  def test_shard_map_with_unchecked_types_takes_a_named_axis(self, row):
    specs = {"matrix": P("x", "y"), "kernel": P("x", None, None, "y")}
    updates = {name: tree(0)[name] for name in specs}
    tx = row.make(axis_name=("x", "y"))
    update = jax.shard_map(
      lambda u: tx.update(u, tx.init(u), u)[0],
      mesh=mesh_of(AxisType.Auto),
      in_specs=(specs,),
      out_specs=specs,
      check_vma=False,
    )
    expected = step(row, updates, updates)
    assert_close(
      jax.device_get(jax.jit(update)(updates)), jax.device_get(expected), rtol=2e-6
    )

  @collected_rows
  def test_no_axes_clip_each_device_on_its_own(self, row):
    x = tree(0)["matrix"]
    tx = row.make(axis_name=(), record=False)
    update = jax.shard_map(
      lambda u: tx.update(u, optax.EmptyState(), u)[0],
      mesh=jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)),
      in_specs=P("x"),
      out_specs=P("x"),
    )
    parts = [step(row, part, part) for part in jnp.split(x, 8)]
    expected = jnp.concatenate(parts)
    assert_close(jax.device_get(jax.jit(update)(x)), jax.device_get(expected))

  @collected_rows
  def test_pmap_with_a_named_axis_collects_the_norm(self, row):
    count = jax.device_count()
    whole = {"stack": tree(0)["matrix"], "other": tree(1)["matrix"]}
    tx = row.make(axis_name="devices")
    new = jax.pmap(lambda u: tx.update(u, tx.init(u), u)[0], axis_name="devices")(
      jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), whole)
    )
    new = jax.tree.map(lambda x, y: x.reshape(y.shape), jax.device_get(new), whole)
    assert_close(new, jax.device_get(step(row, whole, whole)), rtol=2e-6)

  @collected_rows
  def test_a_named_axis_counts_each_device_once(self, row):
    x = tree(0)["matrix"]
    tx = row.make(axis_name="x", record=False)
    update = jax.shard_map(
      lambda u: tx.update(u, optax.EmptyState(), u)[0],
      mesh=jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)),
      in_specs=P("x"),
      out_specs=P("x"),
    )
    assert_close(
      jax.device_get(jax.jit(update)(x)),
      jax.device_get(step(row, x, x)),
      rtol=2e-6,
    )
