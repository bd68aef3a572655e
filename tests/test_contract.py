"""The laws that every transformation keeps, over the registry of them all."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import oracles
import pytest
from registry import COLLECTED
from registry import FIXED
from registry import ORDERED
from registry import RESCALING
from registry import ROWS
from registry import names

import optax_clip

over = functools.partial(pytest.mark.parametrize, "row")
every_row = over(ROWS, ids=names(ROWS))
fixed_rows = over(FIXED, ids=names(FIXED))
rescaling_rows = over(RESCALING, ids=names(RESCALING))
collected_rows = over(COLLECTED, ids=names(COLLECTED))
every_dtype = pytest.mark.parametrize("dtype", oracles.LOW)

SHAPES = {
    "bias": (4,),
    "kernel": (2, 2, 3, 4),
    "matrix": (8, 16),
    "scalar": (),
    "stack": (3, 8, 8),
}


def tree(seed, dtype="float32", scale=1.0):
  rng = np.random.default_rng(seed)
  return {
      name: jnp.asarray(scale * rng.standard_normal(shape), dtype)
      for name, shape in SHAPES.items()
  }


def step(tx, updates, params):
  return tx.update(updates, tx.init(params), params)[0]


def assert_expected(row, new, updates, params=None, **keywords):
  """Each element within 1e-6 and half an ulp of what the oracle gives."""
  wanted = row.expected(updates, params, **keywords)
  leaves = jax.tree.leaves(new)
  assert len(leaves) == len(wanted)
  for got, want in zip(leaves, wanted, strict=True):
    # 1e-6 may move a value across a rounding boundary: one ulp, then.
    error = np.abs(oracles.wide(got) - want)
    spacing = oracles.ulps(np.asarray(got))
    assert np.all(error <= 1e-6 * np.abs(want) + 0.51 * spacing), error.max()


class TestResult:
  """What comes out is what the oracle says."""

  @fixed_rows
  @every_dtype
  @pytest.mark.parametrize("share", [1e-3, 0.5, 1.0, 2.0, 1e3])
  def test_updates_are_those_of_the_oracle(self, row, dtype, share):
    updates, params = tree(0, dtype), tree(1, dtype)
    limit = row.threshold * share
    new = step(row.make(limit), updates, params)
    assert_expected(row, new, updates, params, threshold=limit)

  @over(ORDERED, ids=names(ORDERED))
  @every_dtype
  @pytest.mark.parametrize("ord", [1, 2, 3, 2.5, math.inf])
  def test_every_order_is_that_of_the_oracle(self, row, dtype, ord):
    updates, params = tree(0, dtype), tree(1, dtype)
    new = step(row.make(ord=ord), updates, params)
    assert_expected(row, new, updates, params, ord=ord)

  @rescaling_rows
  def test_float64_stays_float64(self, row):
    with jax.enable_x64(True):
      updates, params = tree(0, "float64"), tree(1, "float64")
      new = step(row.make(), updates, params)
      wanted = row.expected(updates, params)
      for got, want in zip(jax.tree.leaves(new), wanted, strict=True):
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, want, rtol=1e-12)

  @rescaling_rows
  def test_complex_updates_are_those_of_the_oracle(self, row):
    updates = jax.tree.map(jax.lax.complex, tree(0), tree(1))
    params = jax.tree.map(jax.lax.complex, tree(2), tree(3))
    new = step(row.make(), updates, params)
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
  @pytest.mark.parametrize("compiled", [False, True])
  def test_mixed_dtypes_and_structure_stay(self, row, compiled):
    def of(seed):
      return {
          "half": tree(seed, "float16"),
          "brain": [tree(seed, "bfloat16"), None],
          "single": (tree(seed), optax.MaskedNode()),
      }

    tx = row.make()
    updates, params = of(0), of(1)
    state = tx.init(params)
    update = jax.jit(tx.update) if compiled else tx.update
    new, _ = update(updates, state, params)
    assert jax.tree.structure(new) == jax.tree.structure(updates)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(new), strict=True):
      assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)

  @every_row
  @pytest.mark.parametrize("compiled", [False, True])
  @pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
  def test_weak_types_stay(self, row, compiled, nonfinite):
    tx = row.make(nonfinite=nonfinite)
    updates = {"weak": jnp.asarray(3.0), "strong": jnp.ones((), jnp.float32)}
    state = tx.init(updates)
    update = jax.jit(tx.update) if compiled else tx.update
    new, _ = update(updates, state, updates)
    assert new["weak"].weak_type
    assert not new["strong"].weak_type

  @every_row
  @pytest.mark.parametrize("empty", [{}, (), None, [None, {}], optax.MaskedNode()])
  def test_empty_trees_pass(self, row, empty):
    tx = row.make()
    new, state = tx.update(empty, tx.init(empty), empty)
    assert new == empty
    for value in optax_clip.metrics(state).values():
      assert np.isfinite(value)

  @every_row
  @every_dtype
  @pytest.mark.parametrize("strict", [False, True])
  def test_arrays_without_elements_pass_and_do_not_count(self, row, dtype, strict):
    rng = np.random.default_rng(0)
    full = {"z": jnp.asarray(rng.standard_normal((3, 4)), dtype)}
    hollow = {"e": jnp.zeros((0, 3), dtype), "f": jnp.zeros((3, 0), dtype)}
    tx = row.make(strict=strict)
    alone = step(tx, full, full)
    both = step(tx, full | hollow, full | hollow)
    oracles.assert_identical(both, alone | hollow)
    oracles.assert_identical(step(tx, hollow, hollow), hollow)

  @fixed_rows
  @every_dtype
  def test_scalars_and_plain_arrays_are_trees(self, row, dtype):
    for x in (jnp.asarray(-7.0, dtype), jnp.asarray([7.0, -1.0], dtype)):
      new = step(row.make(), x, x)
      assert new.shape == x.shape
      assert_expected(row, new, x, x)

  @fixed_rows
  def test_numpy_leaves_and_python_floats_are_taken(self, row):
    updates = {"array": np.full(3, 7.0, np.float32), "float": 7.0}
    new = step(row.make(), updates, updates)
    assert new["array"].dtype == jnp.float32
    for got, want in zip(
        jax.tree.leaves(new), row.expected(updates, updates), strict=True
    ):
      np.testing.assert_allclose(got, want, rtol=1e-6)

  @every_row
  @pytest.mark.parametrize("dtype", ["int32", "bool", "uint8"])
  def test_integer_leaves_are_an_error_that_names_their_path(self, row, dtype):
    good = {"layer": {"w": jnp.ones(2), "n": jnp.ones(2)}}
    bad = {"layer": {"w": jnp.ones(2), "n": jnp.ones(2, dtype)}}
    tx = row.make()
    with pytest.raises(TypeError, match=r"\['layer'\]\['n'\].*optax\.masked"):
      tx.update(bad, tx.init(good), good)

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

  @fixed_rows
  @every_dtype
  @pytest.mark.parametrize("compiled", [False, True])
  @pytest.mark.parametrize("limit", [1e6, math.inf])
  def test_within_the_limit_nothing_changes(self, row, dtype, compiled, limit):
    info = oracles.finfo(dtype)
    special = [-0.0, 0.0, info.tiny, -info.tiny, info.smallest_subnormal,
               -3 * info.smallest_subnormal, 1.0, info.eps]
    updates = tree(0, dtype) | {"special": jnp.asarray(np.array(special, dtype))}
    tx = row.make(limit)
    update = jax.jit(tx.update) if compiled else tx.update
    new, _ = update(updates, tx.init(updates), updates)
    oracles.assert_identical(updates, new)

  @every_dtype
  @pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
  def test_a_norm_equal_to_the_limit_is_within_it(self, dtype, nonfinite):
    updates = {"a": jnp.asarray([3.0, -0.0], dtype), "b": jnp.asarray(4.0, dtype)}
    tx = optax_clip.clip_by_global_norm(5.0, nonfinite=nonfinite)
    oracles.assert_identical(updates, step(tx, updates, updates))

  @every_row
  @every_dtype
  def test_zeros_stay_zeros_with_their_signs(self, row, dtype):
    updates = jax.tree.map(lambda x: x * jnp.asarray(0.0, dtype), tree(0, dtype))
    oracles.assert_identical(updates, step(row.make(), updates, tree(1, dtype)))

  @pytest.mark.parametrize("dtype", ["complex64"])
  def test_complex_updates_within_the_limit_do_not_change(self, dtype):
    updates = jnp.asarray([3 - 0.0j, -0.0 + 4j, 1e-40 + 0j], dtype)
    for row in RESCALING:
      new = step(row.make(100.0), updates, updates)
      oracles.assert_identical(updates, new)


def extremes(dtype):
  """Finite inputs at the ends of a dtype, by name."""
  info = oracles.finfo(dtype)
  top, tiny, least = (
      float(x) for x in (info.max, info.tiny, info.smallest_subnormal)
  )
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
  return {k: jnp.asarray(np.array(v, dtype)) for k, v in vectors.items()}


class TestFinite:
  """Law 3: finite in, finite out; and clipped to the limit, not to zero."""

  @fixed_rows
  @pytest.mark.parametrize(
      ("dtype", "case"),
      [(dtype, case) for dtype in oracles.LOW for case in extremes(dtype)],
  )
  def test_finite_updates_are_clipped_to_the_limit(self, row, dtype, case):
    vector = extremes(dtype)[case]
    updates = {"a": vector, "b": vector[:1], "c": vector.reshape(2, 2)}
    params = jax.tree.map(jnp.ones_like, updates)
    tx = row.make()
    update = jax.jit(tx.update)
    # 2^-60 of the largest value cannot be told from zero after clipping.
    for limit in (row.threshold, 2.0**-9, 300.0):
      tx = row.make(limit)
      new, state = jax.jit(tx.update)(updates, tx.init(params), params)
      assert_expected_flushing(row, new, updates, params, threshold=limit)
      for key, value in optax_clip.metrics(state).items():
        assert np.isfinite(value), key
    del update

  @rescaling_rows
  @pytest.mark.parametrize("limit", [1e-24, 1e-30, 1e-37, 1e30, 3e38])
  @pytest.mark.parametrize("magnitude", [1e-30, 1e-19, 1.0, 1e19, 3e38])
  def test_limits_and_norms_of_any_size_go_together(self, row, limit, magnitude):
    rng = np.random.default_rng(0)
    updates = jnp.asarray(magnitude * rng.uniform(0.3, 1, (4, 3)), jnp.float32)
    params = jnp.ones_like(updates)
    new = step(row.make(limit), updates, params)
    assert_expected_flushing(row, new, updates, params, threshold=limit)

  @rescaling_rows
  @pytest.mark.parametrize("magnitude", [1e-300, 1e-160, 1.0, 1e160, 1.7e308])
  @pytest.mark.parametrize("limit", [1e-300, 1e-6, 1.0, 1e200])
  def test_float64_over_its_whole_range(self, row, magnitude, limit):
    with jax.enable_x64(True):
      rng = np.random.default_rng(0)
      updates = jnp.asarray(magnitude * rng.uniform(0.3, 1, (4, 3)))
      params = jnp.ones_like(updates)
      new = step(row.make(limit), updates, params)
      (want,) = row.expected(updates, params, threshold=limit)
      np.testing.assert_allclose(new, want, rtol=1e-12, atol=3e-308)


def assert_expected_flushing(row, new, updates, params, threshold):
  """As `assert_expected`; a subnormal result may be flushed to zero."""
  wanted = row.expected(updates, params, threshold=threshold)
  for got, want in zip(jax.tree.leaves(new), wanted, strict=True):
    assert np.all(np.isfinite(oracles.wide(got)))
    tiny = max(float(oracles.finfo(got.dtype).tiny), float(np.finfo("f4").tiny))
    spacing = oracles.ulps(np.asarray(got))
    error = np.abs(oracles.wide(got) - want)
    slack = 1e-6 * np.abs(want) + 0.51 * spacing
    flushed = (oracles.wide(got) == 0) & (np.abs(want) < tiny)
    assert np.all((error <= slack) | flushed), (got, want)


class TestDerivatives:
  """Law 7: derivatives through a transformation are finite, also at zero."""

  @every_row
  @pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
  @pytest.mark.parametrize("limit", [0.0, 1.0, math.inf])
  def test_grad_and_jvp_are_finite(self, row, scale, limit):
    updates, params = tree(0, scale=scale), tree(1)
    tx = row.make(limit)
    state = tx.init(params)

    def clipped(u):
      return tx.update(u, state, params)[0]

    def total(u):
      return sum(jnp.sum(x) for x in jax.tree.leaves(clipped(u)))

    tangents = tree(2)
    _, forward = jax.jvp(clipped, (updates,), (tangents,))
    for x in jax.tree.leaves((jax.grad(total)(updates), forward)):
      assert np.all(np.isfinite(x))

  @over(ORDERED, ids=names(ORDERED))
  @pytest.mark.parametrize("ord", [0.5, 1, 2, 3, math.inf])
  def test_every_order_has_a_finite_derivative_at_zero(self, row, ord):
    zero = jax.tree.map(jnp.zeros_like, tree(0))
    tx = row.make(ord=ord)
    state = tx.init(zero)

    def total(u):
      return sum(jnp.sum(x) for x in jax.tree.leaves(tx.update(u, state, u)[0]))

    for x in jax.tree.leaves(jax.grad(total)(zero)):
      assert np.all(np.isfinite(x))

  @pytest.mark.parametrize("ord", [1, 2, 3])
  def test_grad_through_the_clip_is_that_of_the_formula(self, ord):
    with jax.enable_x64(True):
      x = jnp.asarray(np.random.default_rng(0).standard_normal(5))

      def ours(x):
        clipped, _ = optax_clip.clip_tree(x, 1.0, ord=ord)
        return jnp.sum(clipped**3)

      def formula(x):
        n = jnp.sum(jnp.abs(x) ** ord) ** (1 / ord)
        return jnp.sum((x / n) ** 3)

      np.testing.assert_allclose(
          jax.grad(ours)(x), jax.grad(formula)(x), rtol=1e-12
      )


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
  @pytest.mark.parametrize("compiled", [False, True])
  def test_init_and_update_return_states_of_one_kind(self, row, dtype, compiled):
    tx = row.make()
    updates, params = tree(0, dtype), tree(1, dtype)
    init, update = tx.init, tx.update
    if compiled:
      init, update = jax.jit(init), jax.jit(update)
    first = init(params)
    _, second = update(updates, first, params)
    _, third = update(updates, second, params)
    assert_same_kind(first, second)
    assert_same_kind(second, third)

  @every_row
  def test_schedules_keep_the_kind_of_state(self, row):
    tx = row.make(optax.linear_schedule(1.0, 0.1, 10))
    params = tree(1)
    state = tx.init(params)
    _, new = tx.update(tree(0), state, params)
    assert_same_kind(state, new)

  @every_row
  def test_no_two_fields_share_a_buffer(self, row):
    tx = row.make(record=True)
    params = tree(1)
    state = tx.init(params)
    for _ in range(2):
      assert len(set(buffers(state))) == len(buffers(state))
      _, state = jax.jit(tx.update)(tree(0), state, params)

  @every_row
  def test_donated_updates_and_states_work(self, row):
    tx = row.make(record=True)
    params = tree(1)
    update = jax.jit(tx.update, donate_argnums=(0, 1))
    expected, wanted_state = tx.update(tree(0), tx.init(params), params)
    updates, state = tree(0), tx.init(params)
    new, new_state = update(updates, state, params)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert_close((new, new_state), (expected, wanted_state))

  @every_row
  def test_without_record_the_state_of_a_fixed_threshold_is_that_of_optax(
      self, row
  ):
    if row.stateful:
      pytest.skip("a threshold that learns has a memory")
    assert row.make(record=False).init(tree(0)) == optax.EmptyState()

  @every_row
  def test_a_restored_state_continues_bit_for_bit(self, row):
    tx = row.make(record=True)
    params = tree(1)
    update = jax.jit(tx.update)

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

  @every_row
  def test_scan_over_steps(self, row):
    tx = row.make()
    params = tree(1)
    steps = [tree(seed, scale=seed) for seed in range(4)]
    state, expected = tx.init(params), []
    for updates in steps:
      new, state = tx.update(updates, state, params)
      expected.append(new)

    def body(state, updates):
      new, state = tx.update(updates, state, params)
      return state, new

    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *steps)
    end, new = jax.lax.scan(body, tx.init(params), stacked)
    assert_close(new, jax.tree.map(lambda *xs: jnp.stack(xs), *expected))
    assert_close(end, state)

  @every_row
  def test_vmap_is_a_loop(self, row):
    tx = row.make()
    # The members leave the safe range in both directions, and stay in it.
    members = [tree(seed, scale=s) for seed, s in enumerate((1, 1e30, 1e-30, 0))]
    params = [tree(seed + 10) for seed in range(4)]
    stack = functools.partial(jax.tree.map, lambda *xs: jnp.stack(xs))
    states = [tx.init(p) for p in params]
    new, state = jax.vmap(tx.update)(stack(*members), stack(*states), stack(*params))
    single = [
        tx.update(u, s, p) for u, s, p in zip(members, states, params, strict=True)
    ]
    expected, expected_state = stack(*single)
    assert_close(new, expected)
    assert_close(state, expected_state)

  @every_row
  def test_pmap_clips_each_device_on_its_own(self, row):
    tx = row.make()
    count = jax.device_count()
    stack = functools.partial(jax.tree.map, lambda *xs: jnp.stack(xs))
    members = [tree(seed) for seed in range(count)]
    params = tree(20)
    states = stack(*[tx.init(params)] * count)
    new, _ = jax.pmap(tx.update)(stack(*members), states, stack(*[params] * count))
    expected = stack(*[step(tx, u, params) for u in members])
    assert_close(jax.device_get(new), jax.device_get(expected))


class TestWrappers:
  """Law 8: inside the wrappers of optax."""

  @fixed_rows
  @every_dtype
  def test_chain(self, row, dtype):
    tx = optax.chain(row.make(record=True), optax.scale(-1.0), row.make(record=True))
    updates, params = tree(0, dtype), tree(1, dtype)
    state = tx.init(params)
    new, state = jax.jit(tx.update)(updates, state, params)
    flipped = jax.tree.map(jnp.negative, new)
    once = step(row.make(), updates, params)
    for a, b in zip(jax.tree.leaves(flipped), jax.tree.leaves(once), strict=True):
      gap = np.abs(oracles.wide(a) - oracles.wide(b))
      assert np.all(gap <= oracles.ulps(np.asarray(b)))
    keys = {key.split("/")[0] for key in optax_clip.metrics(state)}
    assert keys == {row.name, f"{row.name}_1"}

  @fixed_rows
  def test_masked_clips_only_what_is_selected(self, row):
    mask = {name: name != "scalar" for name in SHAPES}
    tx = optax.masked(row.make(), mask)
    updates, params = tree(0), tree(1)
    new = step(tx, updates, params)
    kept = {k: v for k, v in updates.items() if mask[k]}
    expected = step(row.make(), kept, {k: params[k] for k in kept})
    oracles.assert_identical(new, expected | {"scalar": updates["scalar"]})

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
          row, {k: new[k] for k in part}, part, {k: params[k] for k in part},
          threshold=limit,
      )
    assert f"{row.name}/norm" in optax_clip.metrics(state)

  @fixed_rows
  @pytest.mark.parametrize("record", [False, True])
  def test_inject_hyperparams_with_mixed_dtypes(self, row, record):
    arguments = row.arguments(row.threshold)
    static = tuple(k for k, v in arguments.items() if callable(v))
    updates = tree(0, "bfloat16") | {"single": tree(0)}
    params = tree(1, "bfloat16") | {"single": tree(1)}
    tx = optax.inject_hyperparams(row.factory, static_args=static)(
        **arguments, record=record
    )
    state = tx.init(params)
    new, state = jax.jit(tx.update)(updates, state, params)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(new), strict=True):
      assert a.dtype == b.dtype
    # optax rounds hyperparameters to the dtype of the first leaf.
    limit = float(jnp.asarray(row.threshold, jnp.bfloat16))
    if isinstance(arguments.get("max_norms"), dict):
      limit = row.threshold
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
      assert_expected(
          row, new, updates, params, threshold=float(np.float32(limit))
      )
    assert len(traces) == 1

  @every_row
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
    assert_close(new, step(row.make(), mean, params), rtol=3e-6)
    if optax_clip.metrics(state):
      assert optax_clip.metrics(state)[f"{row.name}/steps"] == 1

  @every_row
  def test_apply_if_finite_rejects_and_goes_on(self, row):
    tx = optax.apply_if_finite(row.make(), max_consecutive_errors=3)
    params = tree(9)
    good, bad = tree(0), tree(1) | {"scalar": jnp.asarray(jnp.nan)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    wanted = step(row.make(), good, params)
    _, state = update(good, state, params)
    rejected, state = update(bad, state, params)
    assert all(not np.any(x) for x in jax.tree.leaves(rejected))
    new, state = update(good, state, params)
    if not row.stateful:
      assert_close(new, wanted)

  @every_row
  def test_metrics_are_read_through_every_wrapper(self, row):
    inner = row.make(record=True, name="inner")
    params = tree(1)
    wrapped = {
        "masked": optax.masked(inner, jax.tree.map(lambda x: True, params)),
        "steps": optax.MultiSteps(inner, 1),
        "finite": optax.apply_if_finite(inner, 3),
        "chain": optax.chain(optax.scale(1.0), optax.chain(inner, optax.sgd(0.1))),
    }
    expected = optax_clip.metrics(inner.update(tree(0), inner.init(params), params)[1])
    assert {key.split("/")[0] for key in expected} == {"inner"}
    for tx in wrapped.values():
      state = tx.init(params)
      _, state = jax.jit(tx.update)(tree(0), state, params)
      found = jax.jit(optax_clip.metrics)(state)
      assert found.keys() == expected.keys()
      for key, value in found.items():
        np.testing.assert_allclose(value, expected[key], rtol=3e-6, err_msg=key)


class TestMemory:
  """Law 9: a step with non-finite norms is as if it had not been."""

  @every_row
  @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
  @pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
  def test_the_step_after_a_non_finite_one_does_not_know_of_it(
      self, row, bad, nonfinite
  ):
    tx = row.make(nonfinite=nonfinite, record=True)
    params = tree(9)
    broken = tree(0) | {"scalar": jnp.asarray(bad, jnp.float32)}
    update = jax.jit(tx.update)

    def run(steps):
      state, outputs = tx.init(params), []
      for updates in steps:
        new, state = update(updates, state, params)
        outputs.append(new)
      return outputs, state

    sound = [tree(seed) for seed in range(4)]
    expected, _ = run(sound)
    outputs, state = run([sound[0], broken, sound[1], broken, *sound[2:]])
    oracles.assert_identical([outputs[i] for i in (0, 2, 4, 5)], expected)
    found = optax_clip.metrics(state)
    assert found[f"{row.name}/steps"] == 6
    assert found[f"{row.name}/steps_nonfinite"] == 2
    if nonfinite == "zero":
      assert all(not np.any(x) for x in jax.tree.leaves(outputs[1]))


def mesh_of(kind):
  return jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))


SPECS = {
    "bias": P("y"),
    "kernel": P(None, None, None, "y"),
    "matrix": P("x", "y"),
    "scalar": P(),
    "stack": P(None, ("x", "y")),
}


def placed(tree, mesh):
  return {
      name: jax.device_put(x, NamedSharding(mesh, SPECS[name]))
      for name, x in tree.items()
  }


class TestSharding:
  """Laws 1 and 10: sharded equals unsharded, and stays sharded as it was."""

  @every_row
  @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
  @pytest.mark.parametrize("compiled", [False, True])
  @pytest.mark.parametrize("scale", [1.0, 1e30])
  def test_on_a_mesh(self, row, kind, compiled, scale):
    tx = row.make()
    mesh = mesh_of(kind)
    updates, params = tree(0, scale=scale), tree(1)
    expected, expected_state = tx.update(updates, tx.init(params), params)
    update = jax.jit(tx.update) if compiled else tx.update
    with jax.set_mesh(mesh):
      ours, theirs = placed(updates, mesh), placed(params, mesh)
      state = tx.init(theirs)
      new, state = update(ours, state, theirs)
      _, again = update(ours, state, theirs)
    for name, x in new.items():
      assert x.sharding.is_equivalent_to(ours[name].sharding, x.ndim), name
    assert_same_kind(state, again)
    assert_close(jax.device_get(new), jax.device_get(expected), rtol=2e-6)
    assert_close(jax.device_get(state), jax.device_get(expected_state), rtol=2e-6)

  @collected_rows
  @pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
  def test_shard_map_reads_the_axes_from_the_types(self, row, scale):
    tx = row.make()
    updates, params = tree(0, scale=scale), tree(1)
    expected, expected_state = tx.update(updates, tx.init(params), params)
    state = tx.init(params)
    replicated = jax.tree.map(lambda _: P(), state)
    update = jax.shard_map(
        lambda u, s: tx.update(u, s),
        mesh=mesh_of(AxisType.Auto),
        in_specs=(SPECS, replicated),
        out_specs=(SPECS, replicated),
    )
    new, state = jax.jit(update)(updates, state)
    assert_close(jax.device_get(new), jax.device_get(expected), rtol=2e-6)
    assert_close(jax.device_get(state), jax.device_get(expected_state), rtol=2e-6)

  @collected_rows
  def test_shard_map_with_unchecked_types_takes_a_named_axis(self, row):
    specs = {"matrix": P("x", "y"), "stack": P(None, "x", "y")}
    updates = {name: tree(0)[name] for name in specs}
    tx = row.make(axis_name=("x", "y"))
    update = jax.shard_map(
        lambda u: tx.update(u, tx.init(u))[0],
        mesh=mesh_of(AxisType.Auto),
        in_specs=(specs,),
        out_specs=specs,
        check_vma=False,
    )
    expected = step(row.make(), updates, updates)
    assert_close(
        jax.device_get(jax.jit(update)(updates)), jax.device_get(expected), rtol=2e-6
    )

  @collected_rows
  def test_no_axes_clip_each_device_on_its_own(self, row):
    x = tree(0)["matrix"]
    tx = row.make(axis_name=(), record=False)
    update = jax.shard_map(
        lambda u: tx.update(u, optax.EmptyState())[0],
        mesh=jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)),
        in_specs=P("x"),
        out_specs=P("x"),
    )
    expected = jnp.concatenate([step(row.make(), part, part) for part in
                                jnp.split(x, 8)])
    assert_close(jax.device_get(jax.jit(update)(x)), jax.device_get(expected))

  @collected_rows
  def test_pmap_with_a_named_axis_collects_the_norm(self, row):
    count = jax.device_count()
    whole = {"stack": tree(0)["matrix"], "other": tree(1)["matrix"]}
    tx = row.make(axis_name="devices")
    new = jax.pmap(lambda u: tx.update(u, tx.init(u))[0], axis_name="devices")(
        jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), whole)
    )
    new = jax.tree.map(lambda x, y: x.reshape(y.shape), jax.device_get(new), whole)
    assert_close(new, jax.device_get(step(row.make(), whole, whole)), rtol=2e-6)

  @collected_rows
  def test_a_named_axis_counts_each_device_once(self, row):
    x = tree(0)["matrix"]
    tx = row.make(axis_name="x", record=False)
    update = jax.shard_map(
        lambda u: tx.update(u, optax.EmptyState())[0],
        mesh=jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)),
        in_specs=P("x"),
        out_specs=P("x"),
    )
    assert_close(
        jax.device_get(jax.jit(update)(x)), jax.device_get(step(row.make(), x, x)),
        rtol=2e-6,
    )
