"""Clips the gradient of each example before it sums them."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from optax_clip import _validate
from optax_clip import actions
from optax_clip._norms import extended as _extended
from optax_clip._norms import norm as _norm
from optax_clip._norms import power_sums as _power_sums
from optax_clip._norms.extended import Extended
from optax_clip._trees import leaf as _leaf
from optax_clip._trees import leaves as _leaves
from optax_clip._types import Nonfinite
from optax_clip._types import Scalar
from optax_clip._types import Updates

Array = jax.Array


def per_example_global_norm_clip(
  grads: Updates, l2_norm_clip: Scalar, *, nonfinite: Nonfinite = "propagate"
) -> tuple[Any, Array]:
  r"""Clips each example's gradient by its norm over all leaves, and sums.

  .. math::
      \bar g = \sum_b g_b \min\left(1, \frac{C}{\|g_b\|_2}\right)

  Args:
    grads: a tree of arrays whose axis 0 is the batch.
    l2_norm_clip: C, non-negative.
    nonfinite: ``"zero"`` leaves out an example whose norm is NaN or inf: the sum and
      the count are those of the others. With ``"propagate"`` one NaN makes the whole
      sum NaN.

  Returns:
    The sum over the batch, in the dtypes of `grads` (accumulated in float32), and
    i32[], how many examples were clipped; one that was left out does
    not count.

  Raises:
    ValueError: if the leaves do not share a leading batch axis, or `l2_norm_clip` is
      negative or NaN, or `nonfinite` is unknown.
    TypeError: if a leaf is an integer or a boolean; names its path.

  ==========================  =================================================
  input                       result
  ==========================  =================================================
  an example of zeros         adds zero, is not clipped
  ``l2_norm_clip=0``          zeros
  ``l2_norm_clip=inf``        the plain sum
  an example with a NaN       the sum is NaN; with ``"zero"`` that of the others
  only such examples          NaN; with ``"zero"`` zeros
  ==========================  =================================================

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> grads = [jnp.array([[0.0, 0, 0], [0, 3, 4], [4, 0, 3], [3, 4, 0]])]
    >>> (total,), clipped = optax_clip.per_example_global_norm_clip(grads, 1.25)
    >>> print(total, clipped)
    [1.75 1.75 1.75] 3

  References:
    Abadi et al., Deep Learning with Differential Privacy, 2016, arXiv:1607.00133.
  """
  _validate.nonnegative(l2_norm_clip=l2_norm_clip)
  _validate.choice(("propagate", "zero"), nonfinite=nonfinite)
  leaves = _batched_leaves(grads)
  treedef = jax.tree.structure(grads)
  norm = _example_norms(leaves)
  take = _all_finite([norm]) if nonfinite == "zero" else None
  sums, count = _clipped_sum(leaves, norm, l2_norm_clip, take)
  return jax.tree.unflatten(treedef, sums), count


def per_example_layer_norm_clip(
  grads: Updates,
  global_l2_norm_clip: Scalar,
  uniform: bool = True,
  *,
  nonfinite: Nonfinite = "propagate",
) -> tuple[Any, Any]:
  r"""Clips each example's gradient by its norm in each leaf, and sums.

  .. math::
      \bar g_k = \sum_b g_{b,k} \min\left(1, \frac{C_k}{\|g_{b,k}\|_2}\right),
      \quad C_k = C \sqrt{1 / K} \text{ or } C \sqrt{D_k / D}

  Args:
    grads: a tree of K arrays whose axis 0 is the batch.
    global_l2_norm_clip: C, non-negative: an example's clipped gradient has a norm of
      at most C over all leaves.
    uniform: whether all leaves get the same bound, or each by its share D_k / D of
      the parameters.
    nonfinite: ``"zero"`` leaves out an example with a norm, in any leaf, that is NaN
      or inf. With ``"propagate"`` one NaN makes the sum of its leaf NaN.

  Returns:
    The sum over the batch, and a tree of i32[]: how many examples were clipped in
    each leaf; one that was left out does not count.

  Errors are those of `per_example_global_norm_clip`.

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> grads = [jnp.array([[3.0, 4.0]]), jnp.array([[0.1, 0.0]])]
    >>> total, counts = optax_clip.per_example_layer_norm_clip(grads, 2**0.5)
    >>> print(total[0], total[1], counts[0], counts[1])
    [0.6 0.8] [0.1 0. ] 1 0

  The edge cases are those of `per_example_global_norm_clip`.

  References:
    McMahan et al., Learning Differentially Private Recurrent Language Models,
    2017, arXiv:1710.06963.
  """
  _validate.nonnegative(global_l2_norm_clip=global_l2_norm_clip)
  _validate.choice(("propagate", "zero"), nonfinite=nonfinite)
  leaves = _batched_leaves(grads)
  treedef = jax.tree.structure(grads)
  norms = [_example_norms([x]) for x in leaves]
  take = _all_finite(norms) if nonfinite == "zero" else None
  sizes = [math.prod(x.shape[1:]) for x in leaves]
  total = sum(sizes)
  shares = [1 / len(leaves) if uniform else size / total for size in sizes]
  clipped = [
    _clipped_sum([x], norm, global_l2_norm_clip * share**0.5, take)
    for x, norm, share in zip(leaves, norms, shares, strict=True)
  ]
  sums = [leaf for (leaf,), _ in clipped]
  counts = [count for _, count in clipped]
  return jax.tree.unflatten(treedef, sums), jax.tree.unflatten(treedef, counts)


def _batched_leaves(grads: Updates) -> list[Array]:
  leaves = _leaves.floating_leaves(grads)
  batches = {x.shape[0] if x.ndim else None for x in leaves}
  if len(batches) != 1 or None in batches:
    raise ValueError(
      "Every leaf of grads must have the batch as its axis 0, got the shapes"
      f" {[x.shape for x in leaves]}. Take the gradients with"
      " jax.vmap(jax.grad(loss), in_axes=(None, 0))."
    )
  return leaves


def _clipped_sum(
  leaves: list[Array], norm: Extended, limit: Scalar, take: Array | None
) -> tuple[list[Array], Array]:
  """Sums the leaves over examples; counts the examples that were clipped.

  Args:
    leaves: with the batch as axis 0.
    norm: the norm of each example over these leaves.
    limit: C.
    take: bool[batch], which examples to sum; `None`: all.
  """
  if take is not None:
    # What is left out depends on nothing.
    norm = _leaf.gate(norm, take)
  action = actions.rescale()
  bound = jnp.asarray(limit, norm.value.dtype)
  coefficient = action.weigh(norm, jnp.broadcast_to(bound, norm.value.shape))

  def total(x: Array) -> Array:
    def like_x(c: Array) -> Array:
      return c.reshape(c.shape + (1,) * (x.ndim - 1))

    per_example = jax.tree.map(like_x, coefficient)
    if take is not None:
      x = _leaf.gate(x, like_x(take))
    # The parts of complex64 are float32 already.
    wide = x.dtype if jnp.iscomplexobj(x) else _power_sums.accumulator(x.dtype)
    clipped = action.apply(x.astype(wide), per_example, bound)
    if take is not None:
      # Selected: a product of 0 and NaN is NaN.
      clipped = jnp.where(like_x(take), clipped, jnp.zeros_like(clipped))
    return jnp.sum(clipped, axis=0).astype(x.dtype)

  exceeds = _extended.as_float(norm) > bound
  count = jnp.sum(exceeds if take is None else exceeds & take, dtype=jnp.int32)
  return [total(x) for x in leaves], count


def _all_finite(norms: list[Extended]) -> Array:
  """Returns for each example whether all its norms are finite."""
  return jnp.all(jnp.stack([jnp.isfinite(norm.value) for norm in norms]), axis=0)


def _example_norms(leaves: list[Array]) -> Extended:
  """Measures each example over all leaves: f32[batch]."""
  per_leaf = _norm.over_dims(leaves, [tuple(range(1, x.ndim)) for x in leaves])
  dtype = _power_sums.accumulator(*(norm.value.dtype for norm in per_leaf))
  columns = [
    jnp.stack([x.ravel().astype(dtype) for x in column])
    for column in zip(*per_leaf, strict=True)
  ]
  return _norm.merged(Extended(*columns), 2.0)
