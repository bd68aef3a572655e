"""Any mesh, any cut: what comes out is what comes out on one device.

Random meshes of 1 to 8 devices and 1 to 3 axes, random specs and trees, in each of
the ways in which JAX runs a program on many devices; states too.
"""

import functools
import math
import re

from helpers import registry
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip

pytestmark = pytest.mark.mesh

# AGC, units and elements by their weights; thresholds that learn, with short
# memories; a stack of layers on axis 1.
STACKED = {"stack": 1}
METHODS = {
  row.name: row.make
  for row in registry.ROWS
  if row.takes("axis_name") and row.takes("specs")
}
STACKING = {
  name: functools.partial(make, stacked=STACKED, record="layers")
  for name, make in METHODS.items()
  if next(r for r in registry.ROWS if r.name == name).takes("stacked")
}
SHAPES = {"matrix": (8, 16), "stack": (8, 8, 4), "bias": (16,), "scalar": ()}


def tree(seed):
  rng = np.random.default_rng(seed)
  # Layers and leaves of unlike sizes, so that it matters which is clipped by which.
  scale = 10 ** rng.uniform(-1, 1, (1, 8, 1))
  return {
    name: jnp.asarray(
      rng.normal(size=shape) * (scale if name == "stack" else 1), jnp.float32
    )
    for name, shape in SHAPES.items()
  }


@st.composite
def meshes(draw):
  """Axis sizes, and a spec for each leaf."""
  sizes = draw(
    st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=3).filter(
      lambda s: math.prod(s) <= 8
    )
  )
  names = [f"m{i}" for i in range(len(sizes))]
  specs = {}
  for leaf, shape in SHAPES.items():
    free = draw(st.permutations(names))
    entries = [None] * len(shape)
    for name in free:
      place = draw(st.integers(0, len(shape)))
      if place < len(shape):
        before = entries[place] or ()
        total = math.prod(sizes[names.index(n)] for n in (*before, name))
        if shape[place] % total == 0:
          entries[place] = (*before, name)
    specs[leaf] = jax.P(*entries)
  return sizes, names, specs


@functools.cache
def alone(make):
  """A transformation, and its jitted update on one device."""
  tx = make()
  return tx, jax.jit(tx.update)


def expected(make, trees):
  """Two steps on one device."""
  tx, update = alone(make)
  state = tx.init(trees[0])
  for grads in trees:
    updates, state = update(grads, state, trees[0])
  return updates, state


def on_mesh(make, trees, sizes, names, specs, mode):
  """The same steps on a mesh, from arrays that are whole to arrays that are whole."""
  kinds = jax.sharding.AxisType
  kind = kinds.Explicit if mode == "explicit" else kinds.Auto
  mesh = jax.make_mesh(
    tuple(sizes),
    tuple(names),
    axis_types=(kind,) * len(sizes),
    devices=jax.devices()[: math.prod(sizes)],
  )
  manual = mode in ("checked", "unchecked")
  tx = make(specs=specs) if manual else make()

  def put(x, spec):
    return jax.device_put(x, jax.NamedSharding(mesh, spec))

  with jax.set_mesh(mesh):
    state, update = jax.jit(tx.init)(trees[0]), tx.update
    whole = jax.tree.map(lambda x: jax.P(), state)
    state = jax.tree.map(put, state, whole)
    if manual:
      update = jax.shard_map(
        update,
        mesh=mesh,
        in_specs=(specs, whole, specs),
        out_specs=(specs, whole),
        check_vma=mode == "checked",
      )
    else:
      trees = [jax.tree.map(put, t, specs) for t in trees]
    update = jax.jit(update)
    for grads in trees:
      updates, state = update(grads, state, trees[0])
  return updates, state


def close(found, expected):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-30)


def check(name, mode, mesh, seed):
  trees = [tree(seed), tree(seed + 1)]
  make = STACKING.get(name, METHODS[name])
  close(on_mesh(make, trees, *mesh, mode), expected(make, trees))


MODES = ("checked", "unchecked", "jit", "explicit")


@pytest.mark.parametrize("mode", MODES)
@hypothesis.settings(max_examples=4)
@hypothesis.given(
  name=st.sampled_from(sorted(METHODS)), mesh=meshes(), seed=st.integers(0, 100)
)
def test_many_devices_give_what_one_gives(mode, name, mesh, seed):
  check(name, mode, mesh, seed)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", METHODS)
@hypothesis.settings(max_examples=3)
@hypothesis.given(mesh=meshes(), seed=st.integers(0, 100))
def test_every_method_gives_what_it_gives_on_one_device(name, mode, mesh, seed):
  check(name, mode, mesh, seed)


def test_a_matrix_cut_into_rows_is_still_a_matrix():
  # One row looks like a vector, whose unit is the whole of it.
  mesh = ([8], ["m0"], {**dict.fromkeys(SHAPES, jax.P()), "matrix": jax.P("m0")})
  for mode in ("checked", "unchecked"):
    check("adaptive_grad_clip", mode, mesh, 0)


def by_pmap(make, trees, devices, specs):
  """The same steps under `pmap`, over an axis `m0`."""
  tx = make(specs=specs)

  def cut(x, spec):
    # The parts along a new first axis, or as many copies.
    for dim, entry in enumerate(spec):
      if entry is not None:
        return np.stack(np.split(np.asarray(x), devices, axis=dim))
    return np.stack([x] * devices)

  def whole(x, spec):
    for dim, entry in enumerate(spec):
      if entry is not None:
        return np.concatenate(list(np.asarray(x)), axis=dim)
    return x[0]

  parts = [jax.tree.map(cut, t, specs) for t in trees]
  state = jax.tree.map(lambda x: np.stack([x] * devices), tx.init(trees[0]))
  update = jax.pmap(tx.update, axis_name="m0", devices=jax.devices()[:devices])
  for grads in parts:
    updates, state = update(grads, state, parts[0])
  return jax.tree.map(whole, updates, specs), jax.tree.map(lambda x: x[0], state)


FAST = ("adaptive_grad_clip", "adagc", "zclip")


@pytest.mark.parametrize(
  "name",
  [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
    for name in METHODS
  ],
)
def test_pmap_gives_what_one_device_gives(name):
  specs = {
    "matrix": jax.P(None, "m0"),
    "stack": jax.P("m0"),
    "bias": jax.P("m0"),
    "scalar": jax.P(),
  }
  trees = [tree(0), tree(1)]
  make = STACKING.get(name, METHODS[name])
  close(by_pmap(make, trees, 4, specs), expected(make, trees))


@pytest.mark.parametrize("kind", list(jax.sharding.AxisType)[:2])
@pytest.mark.parametrize(
  ("method", "count"),
  [
    ("clip_by_global_norm", 2),
    ("clip_by_global_norm", 20),
    # A minute to compile.
    pytest.param("clip_by_global_norm", 400, marks=pytest.mark.slow),
    ("adagc", 2),
    ("adagc", 20),
  ],
)
def test_jit_collects_once_for_each_set_of_axes(method, count, kind):
  """XLA joins the sums of leaves that are cut alike, and gathers no gradient."""
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
  tx = METHODS[method]()
  shardings = [jax.NamedSharding(mesh, jax.P(name)) for name in "ab"]
  # float16 needs no second measurement, whose collectives would stand in a branch.
  grads = [
    jax.ShapeDtypeStruct((64, 32), jnp.float16, sharding=shardings[i % 2])
    for i in range(count)
  ]
  with jax.set_mesh(mesh):
    run = jax.jit(
      lambda grads: tx.update(grads, tx.init(grads))[0],
      out_shardings=[g.sharding for g in grads],
    )
    text = run.lower(grads).compile().as_text()
  assert len(re.findall(r"\ball-reduce(?:-start)?\(", text)) == 2
  assert not re.search(r"\b(all-gather|all-to-all|collective-permute)", text)


@pytest.mark.parametrize("count", [2, 40])
@pytest.mark.parametrize("method", ["clip_by_global_norm", "adaptive_grad_clip"])
def test_one_collective_for_each_set_of_axes(method, count):
  """Whatever the number of leaves; and no gradient is gathered."""
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  specs = [jax.P("a"), jax.P("b")] * (count // 2)
  grads = [jax.ShapeDtypeStruct((8, 16), jnp.float16)] * count
  tx = METHODS[method](specs=specs)

  def step(grads):
    return tx.update(grads, optax.EmptyState(), grads)[0]

  run = jax.shard_map(step, mesh=mesh, in_specs=(specs,), out_specs=specs)
  text = jax.jit(run).lower(grads).as_text()
  # float16 needs no second measurement, whose collectives would stand in a branch.
  measurements = 1 if method == "clip_by_global_norm" else 2
  assert text.count("stablehlo.all_reduce") == 2 * measurements
  assert "all_gather" not in text
  assert "all_to_all" not in text


def test_specs_mean_nothing_where_arrays_are_whole():
  grads = tree(0)
  specs = jax.P("nowhere")
  tx = optax_clip.adaptive_grad_clip(
    0.1, specs={**dict.fromkeys(SHAPES), "bias": specs}
  )
  same = optax_clip.adaptive_grad_clip(0.1)
  close(
    jax.jit(tx.update)(grads, tx.init(grads), grads)[0],
    jax.jit(same.update)(grads, same.init(grads), grads)[0],
  )


class TestBadInput:
  def sharded(self, make, specs=None):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(grads):
      tx = make(specs)
      return tx.update(grads, tx.init(grads), grads)[0]

    run = jax.shard_map(step, mesh=mesh, in_specs=(jax.P("d"),), out_specs=jax.P("d"))
    return run({"w": jnp.ones((4, 4))})

  def test_units_need_specs_where_a_leaf_is_cut(self):
    with pytest.raises(ValueError, match=r"\['w'\] may be cut .*specs="):
      self.sharded(lambda specs: optax_clip.adaptive_grad_clip(0.1))
    with pytest.raises(ValueError, match="over the mesh axes \\('d',\\)"):
      self.sharded(lambda specs: optax_clip.adaptive_grad_clip(0.1, axis_name="d"))

  def test_sums_that_are_not_summed_up_yet(self):
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
      x = jax.device_put(jnp.ones((4, 8)), jax.P(None, "a"))
      y = jax.device_put(jnp.ones((8, 4)), jax.P("a", None))

      @jax.jit
      def norm(x, y):
        parts = jax.P(None, None, unreduced={"a"})
        return optax_clip.global_norm({"w": jnp.dot(x, y, out_sharding=parts)})

      with pytest.raises(ValueError, match=r"\['w'\] is unreduced over .*jax.reshard"):
        norm(x, y)

  @pytest.mark.parametrize(
    ("specs", "error", "words"),
    [
      ("d", TypeError, "specs must hold PartitionSpecs, got 'd'"),
      ({"v": jax.P("d")}, ValueError, "specs must be a tree prefix"),
      (jax.P("d", None, None), ValueError, "has more dimensions than"),
    ],
  )
  def test_specs(self, specs, error, words):
    with pytest.raises(error, match=words):
      self.sharded(lambda s: optax_clip.clip_by_global_norm(1.0, specs=s), specs)


@pytest.mark.parametrize("row", registry.ROWS, ids=registry.names(registry.ROWS))
def test_explicit_shardings_need_no_mesh_that_is_set(row):
  """Types of arrays say which mesh they are on; not every trainer sets it."""
  kinds = (jax.sharding.AxisType.Explicit,)
  mesh = jax.make_mesh((8,), ("x",), axis_types=kinds)
  specs = {"matrix": jax.P(None, "x"), "stack": jax.P("x"), "bias": jax.P("x")}
  updates = {
    name: jax.device_put(jnp.ones(SHAPES[name]), jax.NamedSharding(mesh, spec))
    for name, spec in specs.items()
  }
  options = [{}, {"stacked": STACKED}] if row.takes("stacked") else [{}]
  for keywords in options:
    tx = row.make(record="layers", **keywords)
    state = jax.eval_shape(tx.init, updates)
    found, later = jax.eval_shape(jax.jit(tx.update), updates, state, updates)
    assert {name: x.sharding.spec for name, x in found.items()} == {
      name: x.aval.sharding.spec for name, x in updates.items()
    }
    assert jax.tree.structure(later) == jax.tree.structure(state)
