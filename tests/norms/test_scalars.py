"""Arithmetic on a few numbers of each leaf, laid out for the compiler of a GPU."""

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
  ("forms", "record"), [("gpu", True), ("gpu", "layers"), ("tpu", "layers")]
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
  wanted = [leaf_by_leaf(record)(*case, params) for case in cases]
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
