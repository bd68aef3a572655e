"""Defines a small decoder-only transformer over bytes, in Flax NNX."""

from flax import nnx
import jax
import jax.numpy as jnp
import optax

VOCABULARY = 256
HEAD = 16


class Block(nnx.Module):
  """Applies attention, then an MLP, each to a normalized residual stream."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
    self.heads = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
    self.merge = nnx.Linear(width, width, use_bias=False, rngs=rngs)
    self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
    self.up = nnx.Linear(width, 4 * width, rngs=rngs)
    self.down = nnx.Linear(4 * width, width, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [batch, time, width] to the same shape."""
    heads = self.heads(self.attention_norm(x))
    heads = heads.reshape(*x.shape[:2], 3, -1, HEAD)
    query, key, value = (heads[:, :, i] for i in range(3))
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x = x + self.merge(mixed.reshape(x.shape))
    return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x))))


class Transformer(nnx.Module):
  """Predicts the next byte.

  Args:
    width: the width of the residual stream, a multiple of `HEAD`.
    layers: the number of blocks.
    length: the longest sequence.
    rngs: the keys for the initial weights.
  """

  def __init__(self, width: int, layers: int, length: int, rngs: nnx.Rngs):
    self.bytes = nnx.Embed(VOCABULARY, width, rngs=rngs)
    self.places = nnx.Embed(length, width, rngs=rngs)
    self.blocks = nnx.List([Block(width, rngs) for _ in range(layers)])
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.logits = nnx.Linear(width, VOCABULARY, rngs=rngs)

  def __call__(self, text: jax.Array) -> jax.Array:
    """Maps u8[batch, time] to f[batch, time, 256], in the weights' dtype."""
    x = self.bytes(text) + self.places(jnp.arange(text.shape[1]))
    for block in self.blocks:
      x = block(x)
    return self.logits(self.norm(x))


def loss(model: Transformer, windows: jax.Array) -> jax.Array:
  """Computes the mean cross-entropy of each next byte, in nats; f32."""
  logits = model(windows[:, :-1]).astype(jnp.float32)
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(
      logits, windows[:, 1:].astype(jnp.int32)
    )
  )
