"""Which sums each GPU gets, and that they are right: lowered for it, run on a CPU."""

import functools
import math

from helpers import oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_clip
from optax_clip._norms import rows as _rows

P = jax.sharding.PartitionSpec


def lowered(tx, platform, dtype="float32"):
  """A step of matrices and vectors, lowered for a platform."""
  shapes = [(512, 256), (256, 512), (512,), (512, 3, 128)]
  tree = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes]
  traced = jax.jit(tx.update).trace(tree, jax.eval_shape(tx.init, tree), tree)
  return traced.lower(lowering_platforms=(platform,)).as_text()


CLIPS = {
  "global": lambda: optax_clip.clip_by_global_norm(1.0),
  "layers": lambda: optax_clip.clip_by_layer_norm(1.0),
  "units": lambda: optax_clip.adaptive_grad_clip(0.01),
  "guard": lambda: optax_clip.skip_spikes(optax_clip.zclip()),
}


@pytest.mark.parametrize("clip", CLIPS)
class TestForms:
  @pytest.mark.parametrize("platform", ["cuda", "rocm", "oneapi"])
  @pytest.mark.parametrize("speed", ["fast", "slow"])
  def test_no_gpu_waits_for_the_host(self, monkeypatch, clip, platform, speed):
    monkeypatch.setenv("OPTAX_CLIP_FLOAT64", speed)
    # The choice of the platform is one, too, with an index that is known.
    found = {
      name: lowered(CLIPS[clip](), name).count("stablehlo.case")
      for name in (platform, "tpu", "cpu")
    }
    assert found[platform] == found["tpu"] < found["cpu"]

  @pytest.mark.parametrize("platform", ["cuda", "rocm"])
  def test_a_gpu_with_fast_float64_sums_in_it(self, monkeypatch, clip, platform):
    monkeypatch.setenv("OPTAX_CLIP_FLOAT64", "fast")
    assert "f64>" in lowered(CLIPS[clip](), platform)

  @pytest.mark.parametrize("platform", ["cuda", "rocm"])
  def test_a_gpu_with_slow_float64_sums_columns_in_it(
    self, monkeypatch, clip, platform
  ):
    # Three sums along an axis would be two reads.
    monkeypatch.setenv("OPTAX_CLIP_FLOAT64", "slow")
    assert ("f64>" in lowered(CLIPS[clip](), platform)) is (clip == "units")

  def test_a_gpu_of_intel_does_without(self, monkeypatch, clip):
    # Some have none, and a kernel that asks for it does not run.
    monkeypatch.setenv("OPTAX_CLIP_FLOAT64", "fast")
    assert "f64>" not in lowered(CLIPS[clip](), "oneapi")


SHAPES = {
  "rows that divide": ((1024, 96), (0,)),
  "a prime number of rows": ((1021, 96), (0,)),
  "few columns": ((40_009, 2), (0,)),
  "one column": ((100_003, 1), (0,)),
  "a convolution": ((3, 3, 96, 128), (0, 1, 2)),
  "stacked layers": ((3, 700, 64), (1,)),
  "axes apart": ((64, 48, 64), (0, 2)),
  "the last axis": ((96, 1024), (1,)),
  "no axis": ((300, 300), ()),
  "no rows": ((0, 300), (0,)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_rows_first_are_the_sums(shape):
  shape, dims = SHAPES[shape]
  x = np.random.default_rng(0).random(shape, np.float32)
  found = jax.jit(functools.partial(_rows.total, dims=dims, sums=12 << 10))(x)
  wanted = x.astype(np.float64).sum(dims, keepdims=True)
  assert found.shape == wanted.shape
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


def one_device(run):
  """A function within a mesh of one device, where it is known that there is one."""
  mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
  return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P()))


@functools.cache
def norms_of_columns(forms, speed, dtype, shape):
  """From a leaf to the largest norm of its columns, and the clipped leaf."""
  del forms, speed, dtype

  def run(limit, x):
    tx = optax_clip.adaptive_grad_clip(limit, record="layers")
    ones = [jnp.ones(shape, x.dtype)]
    return tx.update([x], tx.init([x]), ones)

  return one_device(run)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(4096, 32), (3, 3, 96, 128), (1021, 100)], ids=str)
@pytest.mark.parametrize(
  ("forms", "speed"),
  [("gpu", "fast"), ("gpu", "slow"), ("rocm", "fast"), ("oneapi", "fast")],
)
def test_columns_are_those_of_float64(monkeypatch, forms, speed, dtype, shape, scale):
  monkeypatch.setenv("OPTAX_CLIP_FORMS", forms)
  monkeypatch.setenv("OPTAX_CLIP_FLOAT64", speed)
  values = np.random.default_rng(0).normal(size=shape) * scale
  x = jnp.asarray(values, dtype)
  run = norms_of_columns(forms, speed, dtype, shape)
  (got,), state = run(np.float32(1e-3 * scale), x)
  axes = tuple(range(len(shape) - 1))
  rows = math.sqrt(math.prod(shape[:-1]))
  wide = np.asarray(x, np.float64)
  norms = np.sqrt((wide**2).sum(axes, keepdims=True))
  wanted = wide * (1e-3 * scale * rows) / norms
  rounding = float(oracles.finfo(dtype).eps)
  np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=rounding + 1e-6)
  found = optax_clip.metrics(state)["adaptive_grad_clip/norm"]
  np.testing.assert_allclose(found, norms.max() / rows, rtol=1e-6)


@pytest.mark.mesh
@pytest.mark.parametrize("forms", ["gpu", "rocm", "oneapi"])
def test_rows_that_are_sharded_are_not_gathered(monkeypatch, forms):
  """First sums of some rows would gather them."""
  monkeypatch.setenv("OPTAX_CLIP_FORMS", forms)
  mesh = jax.make_mesh((8,), ("data",))
  tx = optax_clip.adaptive_grad_clip(0.01)

  def placed(spec):
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  leaves = [jnp.zeros((4096, 32)), jnp.zeros((2048, 256))]
  tree = list(map(placed(P("data", None)), leaves))
  state = jax.tree.map(placed(P()), jax.eval_shape(tx.init, leaves))
  program = jax.jit(tx.update).lower(tree, state, tree).compile().as_text()
  assert program.count(" all-reduce(") == 1
  assert not [x for x in ("all-gather", "all-to-all", "permute") if f"{x}(" in program]
