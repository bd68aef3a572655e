"""Singular values are clipped: the promise, the identity, and what stays exact."""

import functools
import re

from helpers import oracles
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from benchmarks import _matrices as matrices
import optax_clip
from optax_clip import actions
from optax_clip import measures
from optax_clip import thresholds

ROWS, COLUMNS, COUNT = 24, 32, 48
PROMISE = {"float32": 1e-3, "float16": 1e-3, "bfloat16": 2.0**-8}
every_dtype = pytest.mark.parametrize("dtype", list(PROMISE))


@functools.cache
def clipping(**keywords):
  """A jitted ``(stack of matrices, limit) -> updates, state`` with its records."""

  def run(stack, limit):
    tx = optax_clip.spectral_clip(
      limit, stacked={"": 0}, record="layers", name="s", **keywords
    )
    return tx.update(stack, tx.init(stack))

  return jax.jit(run)


def clipped(stack, limit=1.0, **keywords):
  """The updates of a stack, which is a leaf of its own."""
  new, _ = clipping(**keywords)({"w": stack}, np.float32(limit))
  return new["w"]


def stack_of(dtype, seed=0, count=COUNT):
  """A stack of matrices of all kinds, and their names."""
  x, kinds = matrices.many(count, ROWS, COLUMNS, seed)
  return jnp.asarray(x, dtype), kinds


def auto_mesh():
  """A mesh over which the compiler, or `shard_map`, divides arrays."""
  return jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))


class TestPromise:
  @every_dtype
  @pytest.mark.parametrize("limit", [1.0, 0.37])
  def test_no_result_exceeds_its_limit_and_what_is_within_passes(self, dtype, limit):
    stack, _ = stack_of(dtype)
    new = clipped(stack, limit)
    before, after = matrices.values(stack)[:, 0], matrices.values(new)[:, 0]
    assert np.all(after <= limit * (1 + PROMISE[dtype]))
    inside = before <= limit
    assert 0 < np.sum(inside) < COUNT
    oracles.assert_identical(np.asarray(stack)[inside], np.asarray(new)[inside])

  @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
  def test_strict_leaves_nothing_above(self, dtype):
    stack, _ = stack_of(dtype)
    new = clipped(stack, 1.0, strict=True)
    assert np.all(matrices.values(new)[:, 0] <= 1)
    inside = matrices.values(stack)[:, 0] <= 1 - 2 * PROMISE[dtype]
    oracles.assert_identical(np.asarray(stack)[inside], np.asarray(new)[inside])

  def test_what_is_below_the_limit_keeps_its_value(self):
    stack, _ = stack_of("float32", seed=1)
    before, after = matrices.values(stack), matrices.values(clipped(stack))
    moved = np.where(before < 0.99, np.abs(after - before), 0)
    # A spike of s costs rounding errors of its size.
    exact = before[:, 0] <= 100
    assert np.max(moved[exact]) <= 1e-5
    assert np.max(moved / np.maximum(before[:, :1], 100)) <= 1e-7
    assert np.max(np.where(before < 1e-3, moved, 0)) <= 1e-5

  @pytest.mark.parametrize("top", [1.2, 3.9])
  def test_where_most_are_above_the_matrix_is_that_of_an_svd(self, top):
    # Of more directions than a block has columns a CPU finds the eigenvectors.
    values = np.concatenate([np.geomspace(1e-3, 0.9, 4), np.linspace(1.02, top, 20)])
    x = matrices.with_values(np.random.default_rng(3), ROWS, COLUMNS, values)
    x = x.astype(np.float32)
    new = np.asarray(clipped(jnp.asarray(x)[None]))[0].astype(np.float64)
    u, s, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    assert np.linalg.norm(new - (u * np.minimum(s, 1)) @ v, 2) < 5e-6

  def test_results_are_those_of_an_svd(self):
    stack, kinds = stack_of("float32", seed=2)
    error = np.linalg.norm(
      np.asarray(clipped(stack)) - matrices.hard(stack, 1.0), 2, (1, 2)
    )
    spiky = np.asarray([kind in ("one spike", "few spikes") for kind in kinds])
    assert np.max(error[~spiky]) <= 5e-3
    assert np.median(error) <= 1e-4

  @pytest.mark.parametrize("scale", [-100, 100])
  def test_scales_change_nothing(self, scale):
    stack, _ = stack_of("float32")
    new = clipped(stack * jnp.float32(2.0**scale), 2.0**scale)
    oracles.assert_identical(new, clipped(stack) * jnp.float32(2.0**scale))

  @pytest.mark.parametrize("size", [3e38, 1e30, 1e-37])
  @pytest.mark.parametrize("limit", [1e-30, 1e-3])
  def test_limits_far_below_the_norm_hold(self, size, limit):
    stack, _ = stack_of("float32")
    stack = stack / jnp.max(jnp.abs(stack), axis=(1, 2), keepdims=True)
    new = clipped(stack * jnp.float32(size), limit)
    assert np.all(np.isfinite(np.asarray(new)))
    assert np.all(matrices.values(new)[:, 0] <= limit * (1 + 1e-3))

  @every_dtype
  def test_zero_and_no_limit(self, dtype):
    stack, _ = stack_of(dtype)
    assert not np.any(clipped(stack, 0.0))
    oracles.assert_identical(clipped(stack, np.inf), stack)

  def test_float16_limits_near_its_subnormals_hold(self):
    x = np.random.default_rng(0).standard_normal((COUNT, ROWS, COLUMNS))
    for limit in (3e-7, 1e-5, 1e-3):
      new = clipped(jnp.asarray(x, "float16"), limit)
      assert np.all(matrices.values(new)[:, 0] <= limit * (1 + 1e-3))

  def test_what_is_not_finite_passes_and_the_others_are_clipped(self):
    stack, _ = stack_of("float32")
    bad = stack.at[3, 0, 0].set(jnp.nan).at[5, 1, 2].set(jnp.inf)
    new = np.asarray(clipped(bad))
    oracles.assert_identical(new[[3, 5]], np.asarray(bad)[[3, 5]])
    rest = [i for i in range(COUNT) if i not in (3, 5)]
    oracles.assert_identical(new[rest], np.asarray(clipped(stack))[rest])

  def test_in_the_form_of_gpus_the_promise_is_the_same(self, monkeypatch):
    monkeypatch.setenv("OPTAX_CLIP_FORMS", "gpu")
    stack, _ = stack_of("float32")
    tx = optax_clip.spectral_clip(1.0, stacked={"": 0})
    new, _ = jax.jit(lambda x: tx.update(x, tx.init(x)))(stack)
    before, after = matrices.values(stack)[:, 0], matrices.values(new)[:, 0]
    assert np.all(after <= 1 + 1e-3)
    inside = before <= 1
    oracles.assert_identical(np.asarray(stack)[inside], np.asarray(new)[inside])
    error = np.abs(matrices.values(new) - np.minimum(matrices.values(stack), 1))
    assert np.max(error[before <= 100]) <= 1e-3

  @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
  def test_the_soft_form_is_that_of_its_formula(self, dtype):
    stack, _ = stack_of(dtype)
    new = clipped(stack, 1.0, soft=True)
    assert np.all(matrices.values(new)[:, 0] <= 1 + PROMISE[dtype])
    error = np.asarray(new).astype(np.float64) - matrices.soft(stack, 1.0)
    share = np.linalg.norm(error, axis=(1, 2)) / np.linalg.norm(
      matrices.soft(stack, 1.0), axis=(1, 2)
    )
    # In bfloat16 aimed half an epsilon below, and rounded.
    assert np.max(share) <= {"float32": 5e-3, "bfloat16": 2.0**-7}[dtype]

  @pytest.mark.slow
  @every_dtype
  def test_two_thousand_matrices_keep_the_promise(self, dtype):
    for seed in range(42):
      stack, _ = stack_of(dtype, seed=100 + seed)
      after = matrices.values(clipped(stack))[:, 0]
      assert np.all(after <= 1 + PROMISE[dtype]), seed
      assert np.all(matrices.values(clipped(stack, strict=True))[:, 0] <= 1), seed


@pytest.fixture(scope="module")
def found():
  """A tree with every kind of leaf, its updates and the state after them."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  tree = {
    "bias": normal(9),
    "column": normal(9, 1),
    "conv": normal(3, 3, 2, 5),
    "experts": normal(2, 3, 6, 7),
    "heads": normal(8, 2, 6),
    "layers": normal(7, 3, 6),
    "scalar": jnp.asarray(3.0, jnp.float32),
    "tall": normal(12, 5),
    "complex": jax.lax.complex(normal(5, 7), normal(5, 7)),
  }
  tx = optax_clip.spectral_clip(
    1.0,
    axis={"heads": optax.contrib.MuonDimensionNumbers(0, 2)},
    stacked={"experts": (0, 1), "layers": 1},
    record="layers",
  )
  new, state = jax.jit(tx.update)(tree, tx.init(tree))
  return tree, new, state


class TestLeaves:
  def check(self, found, name, reshaped):
    tree, new, _ = found
    np.testing.assert_allclose(
      reshaped(np.asarray(new[name], np.float64)),
      matrices.hard(reshaped(np.asarray(tree[name], np.float64)), 1.0),
      atol=2e-4,
    )

  def test_matrices_stacks_and_kernels(self, found):
    self.check(found, "tall", lambda x: x)
    self.check(found, "layers", lambda x: x.transpose(1, 0, 2))
    self.check(found, "conv", lambda x: x.reshape(18, 5))

  def test_experts_and_heads_are_matrices_each(self, found):
    self.check(found, "experts", lambda x: x)
    self.check(found, "heads", lambda x: x.transpose(1, 0, 2))

  def test_complex_matrices(self, found):
    tree, new, _ = found
    left, s, right = np.linalg.svd(
      np.asarray(tree["complex"], np.complex128), full_matrices=False
    )
    np.testing.assert_allclose(
      new["complex"], (left * np.minimum(s, 1)) @ right, atol=2e-4
    )

  def test_vectors_and_scalars_have_their_norm(self, found):
    tree, new, _ = found
    for name in ("bias", "column", "scalar"):
      x = np.asarray(tree[name], np.float64)
      np.testing.assert_allclose(new[name], x / np.linalg.norm(x), rtol=1e-6)

  def test_records_name_the_proven_norm_of_each_layer(self, found):
    tree, _, state = found
    layers = optax_clip.layer_metrics(state, tree).layers
    true = matrices.values(tree["tall"])[0]
    assert true <= layers["tall"].norm <= np.linalg.norm(tree["tall"])
    assert layers["layers[2]"].limit == 1
    summary = optax_clip.metrics(state)
    assert float(summary["spectral_clip/limit"]) == 1
    np.testing.assert_allclose(
      float(summary["spectral_clip/coefficient"])
      * float(summary["spectral_clip/norm"]),
      1,
      rtol=1e-5,
    )

  def test_a_matrix_that_passes_is_not_recorded_as_clipped(self):
    x = jnp.asarray(matrices.with_values(np.random.default_rng(0), 24, 32, np.ones(24)))
    tx = optax_clip.spectral_clip(1.0005)
    x = {"w": x.astype(jnp.float32)}
    new, state = jax.jit(tx.update)(x, tx.init(x))
    oracles.assert_identical(new, x)
    assert float(optax_clip.metrics(state)["spectral_clip/coefficient"]) == 1
    assert int(optax_clip.metrics(state)["spectral_clip/steps_clipped"]) == 0


class TestCombinations:
  def test_every_threshold_works(self):
    x = {"w": jnp.diag(jnp.asarray([9.0, 0.5, 0.25])), "tall": jnp.ones((2, 8))}
    for threshold in (
      thresholds.by_shape(1.0),
      thresholds.scheduled(lambda step: jnp.where(step > 0, 9.0, 1.0)),
      thresholds.at_most(thresholds.percentile(50.0, 4), thresholds.by_shape(1.0)),
    ):
      tx = optax_clip.clip_with(
        measures.layer_norm(), threshold, actions.clip_singular_values()
      )
      new, _ = tx.update(x, tx.init(x))
      np.testing.assert_allclose(new["w"], np.diag([1.0, 0.5, 0.25]), atol=1e-4)

  def test_limits_by_shape_are_those_of_the_formula(self):
    tree = {
      "conv": jnp.ones((3, 3, 2, 72)),
      "tall": jnp.ones((8, 2)),
      "vector": jnp.ones(9),
      "wide": jnp.ones((2, 8)),
    }
    tx = optax_clip.spectral_clip(thresholds.by_shape(0.5), record="layers")
    _, state = tx.update(tree, tx.init(tree))
    (record,) = [v for k, v in state.record.items() if k.endswith("/layers")]
    np.testing.assert_allclose(record.limit, [1.0, 0.5, 0.5, 1.0])

  def test_limits_by_shape_need_matrices(self):
    tx = optax_clip.clip_with(
      measures.global_norm(), thresholds.by_shape(1.0), actions.rescale()
    )
    x = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="by_shape needs norms of single matrices"):
      tx.update(x, tx.init(x))

  def test_units_are_no_matrices(self):
    tx = optax_clip.clip_with(
      measures.unit_norm(), thresholds.constant(1.0), actions.clip_singular_values()
    )
    x = {"w": jnp.full((4, 4), 2.0)}
    with pytest.raises(ValueError, match="of a matrix"):
      tx.update(x, tx.init(x))

  def test_one_norm_of_all_decides_for_all(self):
    x = {"a": jnp.diag(jnp.asarray([3.0, 0.1])), "b": jnp.diag(jnp.asarray([0.5, 0.2]))}
    tx = optax_clip.clip_with(
      measures.global_norm(), thresholds.constant(1.0), actions.clip_singular_values()
    )
    new, _ = tx.update(x, tx.init(x))
    np.testing.assert_allclose(new["a"], np.diag([1, 0.1]), atol=1e-4)
    oracles.assert_identical(new["b"], x["b"])

  def test_rescaling_keeps_the_direction(self):
    x = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((6, 9)), "float32")}
    tx = optax_clip.clip_by_spectral_norm(1.0)
    new, _ = jax.jit(tx.update)(x, tx.init(x))
    top = matrices.values(x["w"])[0]
    np.testing.assert_allclose(new["w"], x["w"] / top, rtol=1e-3)
    assert matrices.values(new["w"])[0] <= 1 + 1e-6


class TestTransforms:
  @pytest.mark.parametrize("soft", [False, True])
  def test_derivatives_are_differences(self, soft):
    rng = np.random.default_rng(0)
    x = matrices.with_values(rng, 6, 9, [3.0, 2.0, 1.5, 0.7, 0.4, 0.4])
    change = rng.standard_normal(x.shape)
    tx = optax_clip.spectral_clip
    oracle = matrices.soft if soft else matrices.hard

    def f(x, c):
      t = tx(c, soft=soft)
      return t.update({"w": x}, t.init({"w": x}))[0]["w"]

    args = (jnp.asarray(x, jnp.float32), jnp.float32(1.0))
    _, got = jax.jvp(f, args, (jnp.asarray(change, jnp.float32), jnp.float32(0.3)))
    h = 1e-6
    after, before = (oracle(x + k * change, 1 + 0.3 * k) for k in (h, -h))
    want = (after - before) / (2 * h)
    np.testing.assert_allclose(got, want, atol=3e-4)
    # Equal values, and none at all.
    for y in (jnp.eye(6, 9) * 2, jnp.zeros((6, 9))):
      grad = jax.grad(lambda y: jnp.sum(f(y, jnp.float32(1.0)) ** 2))(y)
      assert np.all(np.isfinite(grad))

  def test_models_side_by_side(self):
    stack, _ = stack_of("float32", count=4)
    tx = optax_clip.spectral_clip(1.0, record=False)
    new = jax.jit(jax.vmap(lambda x: tx.update(x, tx.init(x))[0]))(stack)
    np.testing.assert_allclose(new, clipped(stack_of("float32")[0])[:4], atol=2e-3)
    assert np.all(matrices.values(new)[:, 0] <= 1 + 1e-3)


@pytest.mark.mesh
class TestMeshes:
  @pytest.mark.parametrize("spec", [P("d"), P(None, "d"), P("d", None)])
  def test_sharded_matrices_are_as_on_one_device(self, spec):
    mesh = auto_mesh()
    rng = np.random.default_rng(0)
    x = {"w": jnp.asarray(rng.standard_normal((24, 32)), jnp.float32)}
    tx = optax_clip.spectral_clip(1.0)
    want, _ = jax.jit(tx.update)(x, tx.init(x))
    there = jax.device_put(x, NamedSharding(mesh, spec))
    new, _ = jax.jit(tx.update)(there, tx.init(x))
    np.testing.assert_allclose(new["w"], want["w"], atol=1e-6)

  @pytest.mark.parametrize("specs", [P("d"), P(None, "d")])
  def test_inside_shard_map_as_outside(self, specs):
    mesh = auto_mesh()
    rng = np.random.default_rng(0)
    x = {"w": jnp.asarray(rng.standard_normal((24, 32)), jnp.float32)}
    tx = optax_clip.spectral_clip(1.0, specs=specs)
    state = tx.init(x)
    want, after = jax.jit(optax_clip.spectral_clip(1.0).update)(x, state)
    sharded = jax.jit(
      jax.shard_map(tx.update, mesh=mesh, in_specs=(specs, P()), out_specs=(specs, P()))
    )
    new, state = sharded(x, state)
    np.testing.assert_allclose(new["w"], want["w"], atol=1e-6)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6)

  def test_experts_on_different_devices_take_their_own_way(self):
    mesh = auto_mesh()
    stack, _ = stack_of("float32")
    tx = optax_clip.spectral_clip(1.0, stacked={"": 0}, specs=P("d"))
    sharded = jax.shard_map(
      tx.update, mesh=mesh, in_specs=(P("d"), P()), out_specs=(P("d"), P())
    )
    new, _ = jax.jit(sharded)(stack, tx.init(stack))
    np.testing.assert_allclose(new, clipped(stack), atol=1e-6)

  def test_cut_matrices_without_specs_are_an_error(self):
    mesh = auto_mesh()
    tx = optax_clip.spectral_clip(1.0)
    x = jnp.ones((24, 32))
    with pytest.raises(ValueError, match="specs="):
      jax.eval_shape(
        jax.shard_map(
          lambda x: tx.update(x, tx.init(x))[0],
          mesh=mesh,
          in_specs=P("d"),
          out_specs=P("d"),
        ),
        x,
      )

  @pytest.mark.parametrize("spec", [P("d"), P(None, "d")])
  def test_outside_branches_there_is_one_all_reduce_of_one_number(self, spec):
    x = jax.ShapeDtypeStruct(
      (32, 64), jnp.float32, sharding=NamedSharding(auto_mesh(), spec)
    )
    tx = optax_clip.spectral_clip(1.0, record=False)
    state = jax.eval_shape(tx.init, x)
    program = jax.jit(tx.update).lower(x, state).compile().as_text()
    always = program[program.index("\nENTRY") :]
    found = re.findall(r" = (\S+) (all-\w+|collective-\w+|reduce-scatter)\(", always)
    assert found == [("f32[]", "all-reduce")]
