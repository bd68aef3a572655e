"""Stacked layers: a scanned model is clipped as the model with separate layers is."""

import functools

from flax import nnx
import flax.linen as nn
from helpers import registry
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip

LAYERS = 4
ROWS = [row for row in registry.ROWS if row.takes("stacked")]
STACKED = {"blocks/w": 0, "blocks/b": 1}


def separate(seed, exploding=None):
  """A list of layers and a head."""
  rng = np.random.default_rng(seed)

  def leaf(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  layers = [{"w": leaf(4, 6), "b": leaf(6)} for _ in range(LAYERS)]
  if exploding is not None:
    layers[exploding] = jax.tree.map(lambda x: 1e3 * x, layers[exploding])
  return {"blocks": layers, "head": leaf(6, 3)}


def stack(tree):
  """The same with layers along axis 0 of matrices and axis 1 of biases."""
  layers = tree["blocks"]
  return {
    "blocks": {
      "w": jnp.stack([layer["w"] for layer in layers]),
      "b": jnp.stack([layer["b"] for layer in layers], axis=1),
    },
    "head": tree["head"],
  }


@pytest.mark.parametrize("row", ROWS, ids=registry.names(ROWS))
def test_stacked_layers_are_clipped_as_separate_ones(row):
  ours, theirs = row.make(stacked=STACKED), row.make()
  params = separate(0)
  state, plain = ours.init(stack(params)), theirs.init(params)
  for step in range(4):
    grads = separate(step + 1, exploding=step)
    updates, state = jax.jit(ours.update)(stack(grads), state, stack(params))
    expected, plain = jax.jit(theirs.update)(grads, plain, params)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), updates, stack(expected)
    )
  a, b = optax_clip.metrics(state), optax_clip.metrics(plain)
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_allclose(a[key], b[key], rtol=2e-6, err_msg=key)


class Block(nnx.Module):
  """A pre-norm transformer block."""

  def __init__(self, rngs):
    self.norm = nnx.LayerNorm(16, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
    self.up = nnx.Linear(16, 32, rngs=rngs)
    self.down = nnx.Linear(32, 16, rngs=rngs)

  def __call__(self, x):
    x = x + self.attention(self.norm(x))
    return x + self.down(nnx.relu(self.up(x)))


class Transformer(nnx.Module):
  """Four blocks that are one, scanned."""

  def __init__(self, rngs):
    blocks = nnx.vmap(Block, in_axes=0, out_axes=0)
    self.blocks = nnx.split_rngs(splits=LAYERS)(blocks)(rngs)
    self.head = nnx.Linear(16, 5, rngs=rngs)

  def __call__(self, x):
    scanned = nnx.scan(
      lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )
    return self.head(scanned(x, self.blocks))


EXPLODING = 2


@functools.cache
def exploding():
  """Parameters and gradients of the transformer, one layer's 10,000 times too large."""
  model = nnx.jit(lambda: Transformer(nnx.Rngs(0)))()
  x = jax.random.normal(jax.random.key(1), (2, 7, 16))
  grads = nnx.jit(nnx.grad(lambda model: jnp.mean(model(x) ** 2)))(model)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  # Healthy layers then have norms of 1e-7 to 0.2.
  grads = jax.tree.map(lambda g: np.float32(1e-3) * g, nnx.to_pure_dict(grads))
  grads["blocks"] = jax.tree.map(lambda g: scaled(g, 1e4), grads["blocks"])
  return params, grads


def scaled(leaf, factor):
  """A stacked leaf whose one layer is scaled."""
  factors = np.where(np.arange(LAYERS) == EXPLODING, factor, 1).astype(np.float32)
  return np.asarray(leaf) * factors.reshape(-1, *[1] * (leaf.ndim - 1))


@pytest.mark.programs
@pytest.mark.foreign
class TestScannedTransformer:
  """One of the scanned layers explodes, and only that one is scaled."""

  def kept(self, tx, params, grads, warm=0):
    """The share of each layer's gradient that is kept, the least over leaves."""
    update = jax.jit(tx.update)
    state = tx.init(params)
    healthy = {
      **grads,
      "blocks": jax.tree.map(lambda g: scaled(g, 1e-4), grads["blocks"]),
    }
    for _ in range(warm):
      _, state = update(healthy, state, params)
    updates, _ = update(grads, state, params)

    def share(new, old):
      norms = [np.linalg.norm(np.reshape(x, (LAYERS, -1)), axis=1) for x in (new, old)]
      return np.where(norms[1] > 0, norms[0] / np.where(norms[1] > 0, norms[1], 1), 1)

    shares = jax.tree.leaves(jax.tree.map(share, updates["blocks"], grads["blocks"]))
    return np.min(shares, axis=0)

  @pytest.mark.parametrize(
    ("make", "warm"),
    [
      pytest.param(
        lambda **k: optax_clip.clip_by_block_rms(0.1, **k), 0, marks=pytest.mark.slow
      ),
      pytest.param(
        lambda **k: optax_clip.clip_by_layer_norm(1.0, **k), 0, marks=pytest.mark.slow
      ),
      (lambda **k: optax_clip.adaptive_grad_clip(1.0, eps=1.0, **k), 0),
      (lambda **k: optax_clip.adagc(warmup=2, warmup_norm=1e9, **k), 3),
    ],
    ids=["block_rms", "layer_norm", "agc", "adagc"],
  )
  def test_only_the_layer_that_explodes_is_scaled(self, make, warm):
    kept = self.kept(make(stacked={"^blocks/": 0}), *exploding(), warm)
    others = np.delete(kept, EXPLODING)
    np.testing.assert_array_equal(others, 1)
    assert kept[EXPLODING] < 0.1

  def test_without_it_all_layers_pay(self):
    for tx in (optax.clip_by_block_rms(0.1), optax_clip.clip_by_block_rms(0.1)):
      kept = self.kept(tx, *exploding())
      assert np.delete(kept, EXPLODING).max() < 0.1


@pytest.mark.foreign
@pytest.mark.parametrize("axis", [0, 1])
def test_linen_scan(axis):
  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return x + nn.Dense(6)(x), None

  scanned = nn.scan(
    Layer, variable_axes={"params": axis}, split_rngs={"params": True}, length=3
  )()
  params = scanned.init(jax.random.key(0), jnp.ones((2, 6)), None)
  tx = optax_clip.clip_by_layer_norm(1.0, stacked={"kernel": axis, "bias": axis})
  grads = jax.tree.map(jnp.ones_like, params)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params))
  kernel = updates["params"]["Dense_0"]["kernel"]
  norms = np.linalg.norm(np.moveaxis(kernel, axis, 0).reshape(3, -1), axis=1)
  np.testing.assert_allclose(norms, 1, rtol=1e-6)


def test_a_function_may_say_which_leaves():
  grads = stack(separate(0))
  by_regex = optax_clip.clip_by_layer_norm(1.0, stacked=STACKED)

  def stacked(path, leaf):
    if path.startswith("blocks/"):
      return leaf.ndim - 3 if leaf.ndim == 3 else -1
    return None

  by_function = optax_clip.clip_by_layer_norm(1.0, stacked=stacked)
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.jit(by_regex.update)(grads, by_regex.init(grads))[0],
    jax.jit(by_function.update)(grads, by_function.init(grads))[0],
  )


@pytest.mark.parametrize(
  ("stacked", "error", "words"),
  [
    ({"block[": 0}, ValueError, "is not a regular expression"),
    (
      {"blocks": "0"},
      TypeError,
      r"stacked\['blocks'\] must be an integer, or several as .*, got '0'",
    ),
    (["blocks"], TypeError, "stacked must map path regexes to axes"),
    (
      {"layers/": 0},
      ValueError,
      "'layers/' is found in no path. The paths are blocks/",
    ),
    ({"blocks/": 2}, ValueError, "stacked=2 is out of range for blocks/b"),
  ],
)
def test_bad_input(stacked, error, words):
  with pytest.raises(error, match=words):
    optax_clip.clip_by_layer_norm(1.0, stacked=stacked).init(stack(separate(0)))


# --- Layers and experts in one leaf ---------------------------------------------

MOE = {"moe": (0, 1)}


def experts(seed=0):
  """Two layers of three experts, of which one explodes, and a head."""
  rng = np.random.default_rng(seed)
  leaf = rng.normal(size=(2, 3, 4, 5))
  leaf[1, 2] *= 1e3
  return {
    "head": jnp.asarray(rng.normal(size=(5, 2)), jnp.float32),
    "moe": jnp.asarray(leaf, jnp.float32),
  }


def in_a_row(tree):
  """The same with all experts of all layers along one axis."""
  return {**tree, "moe": jnp.reshape(tree["moe"], (6, 4, 5))}


@pytest.mark.parametrize("row", ROWS, ids=registry.names(ROWS))
def test_layers_and_experts_are_layers(row):
  two, one = (row.make(stacked=x, record="layers") for x in (MOE, {"moe": 0}))
  grads = experts()
  state, plain = two.init(grads), one.init(in_a_row(grads))

  def described(tree):
    return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]

  new, later = jax.eval_shape(two.update, grads, state, grads)
  assert described(new) == described(grads)
  assert described(later) == described(state)
  # What is remembered does not depend on how layers are counted; a record says it.
  kept = [x for x in described(state) if x[0] != (2, 2)]
  assert kept == [x for x in described(plain) if x != ((2,), jnp.int32)]


@pytest.mark.parametrize("name", ["clip_by_layer_norm", "adaptive_grad_clip", "adagc"])
def test_one_expert_of_one_layer_explodes(name):
  row = next(row for row in ROWS if row.name == name)
  two, one = row.make(stacked=MOE), row.make(stacked={"moe": 0})

  @jax.jit
  def both(grads, params):
    new, _ = two.update(grads, two.init(params), params)
    flat, flat_params = in_a_row(grads), in_a_row(params)
    expected, _ = one.update(flat, one.init(flat_params), flat_params)
    return new, expected

  new, expected = both(experts(), experts(1))
  np.testing.assert_allclose(in_a_row(new)["moe"], expected["moe"], rtol=2e-6)
  np.testing.assert_allclose(new["head"], expected["head"], rtol=2e-6)


def test_their_names():
  tx = optax_clip.clip_by_layer_norm(
    1.0, stacked=lambda name, leaf: MOE.get(name), record="layers"
  )
  grads = experts()
  _, state = jax.jit(tx.update)(grads, tx.init(grads))
  layers = optax_clip.layer_metrics(state, grads).layers
  expected = [f"moe[{layer}][{expert}]" for layer in range(2) for expert in range(3)]
  assert list(layers) == ["head", *expected]
  for name in expected:
    index = int(name[4]), int(name[7])
    norm = np.linalg.norm(np.float64(grads["moe"][index]))
    assert layers[name].norm == pytest.approx(norm, rel=1e-6)


def test_beside_leaves_that_stack_along_one_axis():
  params = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 2, 3)), "c": jnp.ones(3)}
  tx = optax_clip.clip_by_layer_norm(
    1.0, stacked={"a": 0, "b": (-3, 1)}, record="layers"
  )
  names = optax_clip.layer_metrics(tx.init(params), params).layers
  assert list(names) == [
    *("a[0]", "a[1]", "b[0][0]", "b[0][1]", "b[1][0]", "b[1][1]", "c")
  ]


def test_axes_of_layers_that_cannot_be():
  make = optax_clip.clip_by_layer_norm
  for axes in ((), (0, 0.5), (0, True), "0"):
    with pytest.raises(TypeError, match=r"stacked\['moe'\] must be an integer, or"):
      make(1.0, stacked={"moe": axes})
  for axes, words in {
    (0, 4): "is out of range for moe",
    (0, -4): "of moe twice",
  }.items():
    with pytest.raises(ValueError, match=words):
      make(1.0, stacked={"moe": axes}).init(experts())


@pytest.mark.mesh
def test_layers_and_experts_over_two_mesh_axes():
  specs = {"head": jax.P(), "moe": jax.P("layers", "experts")}
  make = next(row for row in ROWS if row.name == "adagc").make
  sharded = make(stacked=MOE, specs=specs, record="layers")
  plain = make(stacked=MOE, record="layers")
  grads = experts()

  def step(tx, grads):
    new, state = tx.update(grads, tx.init(grads), grads)
    return new, optax_clip.metrics(state)

  expected = jax.jit(functools.partial(step, plain))(grads)
  for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
    mesh = jax.make_mesh(
      (2, 3), ("layers", "experts"), (kind, kind), devices=jax.devices()[:6]
    )
    shardings = {key: jax.NamedSharding(mesh, spec) for key, spec in specs.items()}
    placed = jax.device_put(grads, shardings)
    local = jax.shard_map(
      functools.partial(step, sharded),
      mesh=mesh,
      in_specs=(specs,),
      out_specs=(specs, jax.P()),
    )
    for run in (local, functools.partial(step, plain)):
      found = jax.jit(run)(placed)
      for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6)
