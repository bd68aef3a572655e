"""A candidate that is no part of the library: a limit that listens to directions.

The limit is a part h of the typical norm m. h grows while new gradients agree with the
last clipped ones, and falls where they point back::

    c     = <g, d> / (|g| |d|)                  agreement; 0 at first
    eta   = max(rate, a min(1, 10 / (t + 1)))   a: 1, times 0.7 after a step with c < 0
    log h = clip(log h + eta c, log least, log most)
    L     = h m,   u = g min(1, L / |g|)
    log m = log m + w (min(log |g|, log m + log surprise) - log m)
    d     = memory d + u                        w = max(1 - decay, 1 / (t + 1))

Once every step is clipped, this is normalized hypergradient descent on the limit
(Baydin et al., Online Learning Rate Adaptation with Hypergradient Descent,
arXiv:1703.04782). Gradients that are 0 or not finite change nothing.
"""

from typing import Any
from typing import Literal
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array

_TINY = 1e-30


class AgreementState(NamedTuple):
  """Holds what `clip_by_agreement` remembers.

  Attributes:
    seen: f32[norms], norms learned from.
    log_mean: f32[norms], log m.
    log_part: f32[norms], log h.
    pace: f32[norms], a.
    direction: d, like the gradients.
  """

  seen: Array
  log_mean: Array
  log_part: Array
  pace: Array
  direction: Any


def clip_by_agreement(
  by: Literal["leaf", "all"] = "leaf",
  rate: float = 0.3,
  most: float = 2.0,
  start: float = 1e-3,
  least: float = 1e-5,
  decay: float = 0.95,
  surprise: float = 3.0,
  memory: float = 0.9,
) -> optax.GradientTransformation:
  """Clips each leaf, or all together, by how well gradients agree: see the module."""
  log = jnp.log
  lowest, highest, first_part = (log(jnp.float32(x)) for x in (least, most, start))

  def init(params: Any) -> AgreementState:
    count = len(jax.tree.leaves(params)) if by == "leaf" else 1
    zeros = jnp.zeros(count)
    return AgreementState(
      zeros, zeros, zeros + first_part, zeros + 1, jax.tree.map(jnp.zeros_like, params)
    )

  def dot(a: Any, b: Any) -> Array:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    products = jnp.stack([jnp.vdot(x, y) for x, y in pairs])
    return products if by == "leaf" else jnp.sum(products, keepdims=True)

  def each(function: Any, factors: Array, *trees: Any) -> Any:
    leaves, treedef = jax.tree.flatten(trees[0])
    others = [jax.tree.leaves(tree) for tree in trees[1:]]
    own = jnp.broadcast_to(factors, (len(leaves),))
    rows = zip(own, leaves, *others, strict=True)
    return jax.tree.unflatten(treedef, [function(*row) for row in rows])

  def update(grads: Any, state: AgreementState, params: Any = None) -> Any:
    del params
    norm = jnp.sqrt(dot(grads, grads))
    usable = jnp.isfinite(norm) & (norm > 0)
    log_norm = log(jnp.where(usable, norm, 1))
    first = state.seen == 0
    length = jnp.sqrt(dot(state.direction, state.direction))
    cosine = dot(grads, state.direction) / jnp.maximum(norm * length, _TINY)
    cosine = jnp.where(usable & (length > 0), cosine, 0)
    speed = jnp.maximum(rate, state.pace * jnp.minimum(1, 10 / (state.seen + 1)))
    log_part = jnp.clip(state.log_part + speed * cosine, lowest, highest)
    log_part = jnp.where(first, first_part, log_part)
    log_mean = jnp.where(first, log_norm, state.log_mean)
    factor = jnp.exp(jnp.minimum(0, log_part + log_mean - log_norm))
    factor = jnp.where(usable, factor, 0)
    # Not a product: 0 times an inf is NaN.
    clipped = each(lambda f, g: jnp.where(f > 0, f * g, 0), factor, grads)
    weight = jnp.maximum(1 - decay, 1 / (state.seen + 1))
    learned = jnp.minimum(log_norm, log_mean + log(jnp.float32(surprise)))

    def kept(new: Array, old: Array) -> Array:
      return jnp.where(usable, new, old)

    return clipped, AgreementState(
      kept(state.seen + 1, state.seen),
      kept(log_mean + weight * (learned - log_mean), state.log_mean),
      kept(log_part, state.log_part),
      kept(state.pace * jnp.where(cosine < 0, 0.7, 1), state.pace),
      each(
        lambda ok, d, u: jnp.where(ok, memory * d + u, d),
        usable,
        state.direction,
        clipped,
      ),
    )

  return optax.GradientTransformation(init, update)
