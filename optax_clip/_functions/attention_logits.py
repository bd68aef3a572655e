"""How large the logits of attention are, which QK-Clip bounds."""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from optax_clip._norms import mesh as _mesh
from optax_clip._norms import power_sums as _power_sums
from optax_clip._types import Scalar

Array = jax.Array


def max_attention_logits(
  query: Array,
  key: Array,
  mask: Array | None = None,
  *,
  scale: Scalar | None = None,
  is_causal: bool = False,
) -> Array:
  r"""Measures the largest attention logit of each query head, for `qk_clip`.

  .. math::
      S_h = \max_{b, i, j} \; s \, q_{b i h} \cdot k_{b j h}

  It makes all logits once more, in float32: for small models, or for a step of many.
  What an attention kernel returns as the logarithm of its sum of exponentials may
  stand for it: that is never below S, and above it at most by the logarithm of the
  number of keys.

  Args:
    query: ``[..., queries, heads, dim]``, as `jax.nn.dot_product_attention` takes it.
    key: ``[..., keys, key_heads, dim]``; `key_heads` divides `heads`, and each serves
      as many query heads that lie side by side.
    mask: booleans, True where a query sees a key; broadcast to
      ``[..., heads, queries, keys]``.
    scale: s, ``1 / sqrt(dim)`` by default.
    is_causal: whether no query sees a later key.

  Returns:
    f32[heads]. NaN if one of its logits is NaN; -inf if no query sees a key. Inside of
    `shard_map` it is that of the device: collect it by `jax.lax.pmax` over the axes of
    batch and sequence.

  Raises:
    ValueError: if the key heads do not divide the query heads.

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> query = jnp.array([[[3.0, 4.0], [1.0, 0.0]]])  # One position, two heads.
    >>> print(optax_clip.max_attention_logits(query, query, scale=1.0))
    [25.  1.]

  References:
    Kimi Team, Kimi K2: Open Agentic Intelligence, 2025, arXiv:2507.20534.
  """
  heads, key_heads = query.shape[-2], key.shape[-2]
  check_groups(heads, key_heads)
  dtype = _power_sums.accumulator(query.dtype, key.dtype)
  if _mesh.is_explicitly_sharded(query) or _mesh.is_explicitly_sharded(key):
    query, key = _laid_out(query, key)
    key_heads = key.shape[-2]
  grouped = query.reshape(*query.shape[:-2], key_heads, heads // key_heads, -1)
  logits = jnp.einsum(
    "...tkgd,...skd->...kgts",
    grouped.astype(dtype),
    key.astype(dtype),
    precision=lax.Precision.HIGHEST,
  )
  logits = logits.reshape(*logits.shape[:-4], heads, *logits.shape[-2:])
  factor = query.shape[-1] ** -0.5 if scale is None else scale
  logits = logits * jnp.asarray(factor, dtype)
  seen = jnp.ones(logits.shape[-2:], bool)
  if is_causal:
    seen = jnp.tril(seen)
  seen = jnp.broadcast_to(seen, logits.shape)
  if mask is not None:
    seen = seen & jnp.broadcast_to(mask, logits.shape)
  logits = jnp.where(seen, logits, -jnp.inf)
  others = tuple(i for i in range(logits.ndim) if i != logits.ndim - 3)
  return jnp.max(logits, axis=others, initial=-jnp.inf)


def check_groups(heads: int, key_heads: int) -> None:
  if key_heads < 1 or heads % key_heads:
    raise ValueError(
      f"key has {key_heads} heads, which do not divide the {heads} query heads: each"
      " key head must serve as many query heads. Check the axis of heads."
    )


def _laid_out(query: Array, key: Array) -> tuple[Array, Array]:
  """Lays explicitly sharded heads out so that JAX can multiply query and key.

  No dimension of a head is divided, batches of the key are as those of the query, and
  each query head has a key head of its own if heads are divided.
  """
  on_mesh = query if _mesh.is_explicitly_sharded(query) else key
  own, theirs = map(_entries, (query, key))
  batch = len(own) - 3
  own[-1] = theirs[-1] = None
  if query.shape[:batch] == key.shape[:-3]:
    theirs[:batch] = own[:batch]
  # A mesh axis divides one dimension of the product.
  taken = {name for entry in own for name in _names(entry)}
  theirs[-3] = None if taken & {*_names(theirs[-3])} else theirs[-3]
  theirs[-2] = None
  query = _mesh.resharded(query, on_mesh, jax.sharding.PartitionSpec(*own))
  key = _mesh.resharded(key, on_mesh, jax.sharding.PartitionSpec(*theirs))
  if own[-2] is None:
    return query, key
  count = query.shape[-2] // key.shape[-2]
  shape = (*key.shape[:-2], query.shape[-2], key.shape[-1])
  each = jnp.broadcast_to(
    key[..., None, :], (*key.shape[:-1], count, key.shape[-1])
  ).reshape(shape)
  theirs[-2] = own[-2]
  return query, _mesh.resharded(each, on_mesh, jax.sharding.PartitionSpec(*theirs))


def _entries(x: Array) -> list[Any]:
  """Returns how the type of an array says that each of its dimensions is divided."""
  spec = tuple(jax.typeof(x).sharding.spec)
  return [*spec, *[None] * (x.ndim - len(spec))]


def _names(entry: Any) -> tuple[str, ...]:
  """Returns the mesh axes in one entry of a `PartitionSpec`."""
  return (entry,) if isinstance(entry, str) else tuple(entry or ())
