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
    ({"block[": 0}, ValueError, "is no regular expression"),
    ({"blocks": "0"}, TypeError, r"stacked\['blocks'\] must be an integer, got '0'"),
    (["blocks"], TypeError, "stacked must map path regexes to axes"),
    (
      {"layers/": 0},
      ValueError,
      "'layers/' is found in no path. The paths are blocks/",
    ),
    ({"blocks/": 2}, ValueError, "axis 2 is out of range for blocks/b"),
  ],
)
def test_bad_input(stacked, error, words):
  with pytest.raises(error, match=words):
    optax_clip.clip_by_layer_norm(1.0, stacked=stacked).init(stack(separate(0)))
