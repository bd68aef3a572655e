"""Arithmetic on a few numbers of each leaf, laid out for compilers of GPUs and TPUs."""

import functools

from helpers.programs import equations
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip._norms import scalars as _scalars

P = jax.sharding.PartitionSpec
SHAPES = [(8, 16)] * 2 + [(16,), (3, 3, 4, 8), (16, 8), (8, 16), (), (5, 8)]


@pytest.mark.parametrize("count", [1, 16, 17, 256, 257, 600])
def test_a_vector_is_taken_apart_bit_for_bit(monkeypatch, count):
  monkeypatch.setenv("OPTAX_CLIP_FORMS", "gpu")
  numbers = np.random.default_rng(0).normal(size=(2, count)).astype(np.float32)
  numbers[:, 0] = 1e-40, np.nan
  vectors = [jnp.asarray(x) for x in numbers]
  found = jax.jit(_scalars.columns)(vectors)
  got = np.asarray(found, np.float32).reshape(count, 2).T
  assert got.tobytes() == numbers.tobytes()
  if count > 1:
    reductions = [
      len(eqn.outvars)
      for eqn in equations(jax.make_jaxpr(_scalars.columns)(vectors).jaxpr)
      if eqn.primitive.name == "reduce"
    ]
    # The results of one with 60 do not fit the shared memory of a GPU.
    assert reductions
    assert all(n <= 16 for n in reductions)


def one_device(run):
  """A function within a mesh of one device, where it is known that there is one."""
  mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
  return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P()))


def of_one_device(tx, updates, state, params):
  return one_device(tx.update)(updates, state, params)


def clipped(record):
  """From a limit, updates and parameters to the updates and the state of AGC."""

  def run(limit, updates, params):
    tx = optax_clip.adaptive_grad_clip(limit, record=record)
    return tx.update(updates, tx.init(params), params)

  return run


@functools.cache
def leaf_by_leaf(record):
  return jax.jit(clipped(record))


@pytest.mark.parametrize(
  ("forms", "record"),
  [
    ("cpu", True),
    ("cpu", "layers"),
    ("gpu", True),
    ("gpu", "layers"),
    ("tpu", "layers"),
  ],
)
def test_units_side_by_side_are_as_leaf_by_leaf(monkeypatch, forms, record):
  rng = np.random.default_rng(0)
  params = [rng.normal(size=s).astype(np.float32) for s in SHAPES]
  sizes = [10 ** rng.normal() for _ in params]
  # Each is compiled once for all scales, the first before there are other forms.
  cases = [
    (np.float32(0.5 * scale), [np.float32(scale * n) * abs(p) for n, p in sized])
    for scale in (1e-30, 1.0, 1e30)
    for sized in [list(zip(sizes, params, strict=True))]
  ]
  # As on several devices.
  monkeypatch.setattr(_scalars._backend, "keeps_functions", lambda: False)
  wanted = [leaf_by_leaf(record)(*case, params) for case in cases]
  monkeypatch.setattr(_scalars._backend, "keeps_functions", lambda: forms == "cpu")
  monkeypatch.setenv("OPTAX_CLIP_FORMS", forms)
  side_by_side = one_device(clipped(record))
  for (limit, updates), want in zip(cases, wanted, strict=True):
    found = side_by_side(limit, updates, params)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-6, err_msg=f"limit {limit}")
    if limit == 0.5:
      peer = optax.adaptive_grad_clip(0.5)
      like = jax.jit(peer.update)(updates, peer.init(params), params)[0]
      for x, y in zip(found[0], like, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6)


def test_on_a_gpu_arithmetic_is_done_once_for_each_shape(monkeypatch):
  def operations(copies):
    tx = optax_clip.adaptive_grad_clip(0.01, record=False)
    tree = [jnp.ones(s) for s in [(8, 16), (16, 8)] * copies]
    jaxpr = jax.make_jaxpr(lambda u: of_one_device(tx, u, tx.init(u), u))(tree)
    return sum(eqn.primitive.name == "div" for eqn in equations(jaxpr.jaxpr))

  monkeypatch.setenv("OPTAX_CLIP_FORMS", "gpu")
  assert operations(2) == operations(8) > 0
  monkeypatch.setenv("OPTAX_CLIP_FORMS", "cpu")
  assert operations(2) < operations(8)


class TestPairs:
  """Single numbers beside an idle entry, as a TPU computes them."""

  def pieces(self, x, tree):
    """Results of several shapes and dtypes, from numbers of several."""
    count, (window, flag) = tree
    mean = jnp.mean(window) + x
    return {"more": count + 1, "flag": ~flag & (x > 0)}, (mean, window * x)

  def arguments(self, x):
    return jnp.float32(x), (jnp.int32(2), (jnp.arange(3.0)[None], jnp.asarray(True)))

  @pytest.mark.parametrize("x", [-2.5, 0.0, np.nan, np.inf])
  def test_results_are_those_of_the_function(self, monkeypatch, x):
    arguments = self.arguments(x)
    wanted = self.pieces(*arguments)
    monkeypatch.setenv("OPTAX_CLIP_FORMS", "tpu")
    found = jax.jit(_scalars.paired(self.pieces))(*arguments)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
      assert (new.shape, new.dtype) == (old.shape, old.dtype)
      np.testing.assert_array_equal(new, old)

  def test_each_number_has_an_entry_beside_it(self, monkeypatch):
    monkeypatch.setenv("OPTAX_CLIP_FORMS", "tpu")
    jaxpr = jax.make_jaxpr(_scalars.paired(lambda x: jnp.sqrt(x) + 1))(1.0)
    (root,) = (x for x in equations(jaxpr.jaxpr) if x.primitive.name == "sqrt")
    assert root.invars[0].aval.shape == (2,)

  def test_derivatives_are_those_of_the_function(self, monkeypatch):
    def loss(x, factor):
      return _scalars.paired(lambda n: factor * jnp.sqrt(n))(x)

    monkeypatch.setenv("OPTAX_CLIP_FORMS", "tpu")
    # The idle entry adds nothing to the derivative of what both entries read.
    found = jax.grad(jax.jit(loss), (0, 1))(jnp.float32(4.0), jnp.float32(3.0))
    np.testing.assert_allclose(found, [0.75, 2.0])

  def test_thresholds_learn_the_same(self, monkeypatch):
    history = optax_clip.thresholds.history(6.0, 4)
    tx = optax_clip.skip_spikes(optax_clip.zclip(warmup=2), history)
    updates = [jnp.ones(3), jnp.ones((2, 2))]

    def steps(scales):
      def step(state, scale):
        new, state = tx.update([scale * u for u in updates], state)
        return state, new

      return jax.lax.scan(step, tx.init(updates), scales)

    scales = jnp.asarray([1.0, 2.0, 0.5, 0.0, jnp.nan, 3.0, 1e4, 1.5])
    wanted = jax.jit(steps)(scales)
    monkeypatch.setenv("OPTAX_CLIP_FORMS", "tpu")
    found = jax.jit(lambda x: steps(x))(scales)
    for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
      np.testing.assert_allclose(new, old, rtol=2e-6)
