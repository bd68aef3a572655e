"""QK-Clip: query and key weights, scaled where attention logits were too large."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_clip import _validate
from optax_clip import actions
from optax_clip._functions import attention_logits as _logits
from optax_clip._norms import extended as _extended
from optax_clip._norms import mesh as _mesh
from optax_clip._norms import power_sums as _power_sums
from optax_clip._norms.extended import Extended
from optax_clip._trees import axes as _axes
from optax_clip._trees import leaf as _leaf
from optax_clip._trees import paths as _paths
from optax_clip._types import Params
from optax_clip._types import PyTree
from optax_clip._types import Scalar

Array = jax.Array
Axes: TypeAlias = int | Sequence[int]
# Tau is undershot by this many epsilons: the errors of both factors and products.
_EPSILONS = 16
HeadAxis: TypeAlias = Axes | Mapping[str, Axes] | Callable[[str, Any], Axes]


def qk_clip(
  query: Params,
  key: Params,
  max_logits: jax.typing.ArrayLike,
  tau: Scalar = 100.0,
  *,
  alpha: Scalar = 0.5,
  head_axis: HeadAxis = -2,
  fused: bool = False,
) -> tuple[Any, Any]:
  r"""Scales query and key weights of heads whose attention logits exceed tau.

  To be applied to the new weights, after each optimizer step, with the largest logits
  that the forward pass of this step had: the QK-Clip of MuonClip.

  .. math::
      \gamma_h = \min\left(1, \frac{\tau}{S_h}\right), \quad
      W^k_g \leftarrow W^k_g \cdot \kappa_g, \quad
      W^q_h \leftarrow W^q_h \cdot \min\left(1, \frac{\gamma_h}{\kappa_g}\right),
      \quad \kappa_g = \left(\min_{h \in g} \gamma_h\right)^{1 - \alpha}

  With a key head for each query head this is the paper's
  :math:`W^q \gamma^{\alpha}`, :math:`W^k \gamma^{1 - \alpha}`. With a key head g for a
  group of query heads, that key head is scaled as its worst query head needs, and each
  query head by what is then left to do for it: its logits end at most at tau, and no
  weight ever grows. The other query heads of the group keep their weights, and their
  logits shrink with the key head; ``alpha=1`` scales queries only, and leaves these
  logits alone.

  Args:
    query: the weights that make queries: an array, or a tree of all that is scaled
      together, as a kernel and its bias.
    key: the weights that make keys; `None` where keys are shared by heads and must
      stay, as the rotary part of multi-head latent attention: queries are then scaled
      by gamma in full, whatever `alpha` is.
    max_logits: S, the largest logit of each query head before the softmax, scale
      included, of all examples and pairs of positions; ``[heads]``, or
      ``[layers, heads]`` for layers that are stacked.
    tau: the largest logit that may be, above 0; a float or a traced scalar; 100 in the
      paper. `float('inf')` never scales.
    alpha: the share of the query in the scaling, from 0 to 1.
    head_axis: the axis along which heads lie in each leaf, of query and key alike. For
      stacked layers all axes of `max_logits` in its order, as ``(0, -2)``. Where
      leaves differ, by regular expressions of their paths, as
      ``{"^query": 1, "^key": 0}``, or by a function from path and leaf; paths begin
      with ``query`` or ``key``.
    fused: whether heads and their dimensions share that axis, heads outermost, as in
      ``[embed, heads * dim]``, of which it is then -1.

  Returns:
    The new query and key, of equal structure, shapes and dtypes. With the inputs that
    were measured no head has a logit above tau any more; factors aim at 2e-6 below it,
    products are taken in float32 (float64 for float64) and rounded toward zero. Where
    the terms of a logit have both signs, that rounding may leave it above tau by 2
    machine epsilons of the weights' dtype times the sum of its negative terms.

  Raises:
    ValueError: if `tau` is not positive, `alpha` is not in [0, 1], or an axis is out of
      range or has not the size that `max_logits` asks for.
    TypeError: if a leaf is an integer or a boolean; names its path.

  ===========================  =====================================================
  S of a head                  result
  ===========================  =====================================================
  at most tau                  unchanged, bit for bit, if no head of its group is more
  zero or negative             the same: tau is a bound from above
  NaN                          never scales: nobody knows by how much
  inf                          never scales: by tau over inf, weights would be 0
  3e38                         scaled by tau / 3e38, without under- or overflow before
                               the rounding to the leaf's dtype
  ===========================  =====================================================

  An inf is mostly of a bad batch, whose step a guard skips. Who knows that it is the
  overflow of a float16 logit says so: ``jnp.minimum(max_logits, 65504)``.

  Example:
    Head 0 had a logit of 400, head 1 one of 30:

    >>> import jax.numpy as jnp, optax_clip
    >>> query = key = jnp.ones((2, 3))  # [heads, dim], for one input.
    >>> query, key = optax_clip.qk_clip(query, key, jnp.array([400.0, 30.0]))
    >>> print(query[:, 0].round(3), key[:, 0].round(3))
    [0.5 1. ] [0.5 1. ]

  References:
    Kimi Team, Kimi K2: Open Agentic Intelligence, 2025, arXiv:2507.20534.
  """
  _validate.positive(tau=tau)
  _validate.scalar(tau=tau, alpha=alpha)
  _validate.within(0, 1, alpha=alpha)
  most = jnp.asarray(max_logits)
  if not most.ndim or not most.size or not jnp.issubdtype(most.dtype, jnp.floating):
    raise ValueError(
      "max_logits must hold one float for each query head, got"
      f" {most.dtype}{list(most.shape)}. See optax_clip.max_attention_logits."
    )
  # They are few, and heads of a group may lie on several devices.
  most = _mesh.replicated(most.astype(_power_sums.accumulator(most.dtype)))
  tree = {"query": query, "key": key}
  places = _places(tree, most.ndim, head_axis)
  widths, key_heads = _widths(places, most.shape, fused)
  share = alpha if key_heads else 1.0
  own, shared = _factors(most, tau, share, key_heads or most.shape[-1])
  leaves, treedef = jax.tree.flatten(tree)
  new = [
    _scaled(jnp.asarray(leaf), shared if place.is_key else own, place.axes, width)
    for leaf, place, width in zip(leaves, places, widths, strict=True)
  ]
  scaled = jax.tree.unflatten(treedef, new)
  return scaled["query"], scaled["key"]


def _factors(
  most: Array, tau: Scalar, alpha: Scalar, key_heads: int
) -> tuple[Extended, Extended]:
  """Returns the factor of each query head, and of each key head.

  Args:
    most: the largest logits, ``[..., heads]``.
    tau: the limit.
    alpha: the share of the query.
    key_heads: the number of key heads.
  """
  limit = jnp.asarray(tau, most.dtype)
  limit = jnp.broadcast_to(limit, most.shape)
  exceeds = (most > limit) & (most < jnp.inf) & (limit > 0)  # False for NaN.
  limit = jnp.where(exceeds, limit, 1) * (1 - _EPSILONS * jnp.finfo(limit.dtype).eps)
  gamma = actions.rescale().weigh(_extended.of(jnp.where(exceeds, most, 0)), limit)

  stack = most.shape[:-1]
  grouped = jnp.where(exceeds, most, 0).reshape(*stack, key_heads, -1)
  worst = jnp.max(grouped, axis=-1)
  touched = worst > 0
  # The powers of both stay in the range of floats, their quotient may not. However
  # inexact they are: queries get the rest of gamma.
  share = 1 - jnp.asarray(alpha, most.dtype)
  allowed = jnp.max(jnp.where(exceeds, limit, 0).reshape(grouped.shape), axis=-1)
  above = jnp.where(touched, allowed, 1) ** share
  shared = _extended.quotient(above, jnp.where(touched, worst, 1) ** share)
  shared = _extended.where(touched, _at_most_one(shared), 1)
  each = Extended(*(_repeated(x, most.shape[-1] // key_heads) for x in shared))
  left = _extended.quotient(gamma, each)
  return _at_most_one(left), shared


def _repeated(x: Array, count: int) -> Array:
  """Repeats each entry of the last axis, with any sharding."""
  repeated = jnp.broadcast_to(x[..., None], (*x.shape, count))
  return repeated.reshape(*x.shape[:-1], x.shape[-1] * count)


def _at_most_one(x: Extended) -> Extended:
  return _extended.where(~_extended.exceeds(x, jnp.ones_like(x.value)), x, 1)


def _scaled(leaf: Array, factor: Extended, axes: tuple[int, ...], width: int) -> Array:
  """Scales each head of a leaf by its factor; those of factor 1 stay, bit for bit."""
  along = Extended(*(_along(x, axes, width, leaf.ndim) for x in factor))
  new = actions.rescale(strict=True).apply(leaf, along, along.value)
  # Strictness drops subnormals and the sign of zero.
  return _leaf.keep_weak_type(leaf, jnp.where(along.value == 1, leaf, new))


def _along(x: Array, axes: tuple[int, ...], width: int, rank: int) -> Array:
  """Numbers of heads as a broadcastable of a leaf in which they have these axes."""
  x = _repeated(x, width)
  x = jnp.transpose(x, sorted(range(x.ndim), key=axes.__getitem__))
  return jnp.expand_dims(x, [i for i in range(rank) if i not in axes])


class _Place(NamedTuple):
  """Says where heads lie in a leaf.

  Attributes:
    path: of the leaf.
    is_key: whether it is of the key.
    axes: the axes of `max_logits` in the leaf, none negative.
    sizes: of these axes.
  """

  path: str
  is_key: bool
  axes: tuple[int, ...]
  sizes: tuple[int, ...]


def _places(tree: PyTree, count: int, head_axis: HeadAxis) -> list[_Place]:
  """Finds where heads lie in each leaf; `count` is the rank of `max_logits`."""
  paths = _paths.every_name(tree)
  leaves = jax.tree.leaves(tree)
  if _paths.is_by_path(head_axis):
    found = _paths.by_path(tree, head_axis, "head_axis")
  else:
    found = [head_axis] * len(leaves)
  places = []
  for path, leaf, axis in zip(paths, leaves, found, strict=True):
    axes = _head_axes(path, leaf, axis, count)
    sizes = tuple(jnp.shape(leaf)[i] for i in axes)
    places.append(_Place(path, path.split("/")[0] == "key", axes, sizes))
  return places


def _head_axes(path: str, leaf: ArrayLike, axis: Any, count: int) -> tuple[int, ...]:
  """Checks and returns the axes of one leaf."""
  if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
    raise TypeError(
      f"{path} has dtype {jnp.result_type(leaf)}, which cannot be scaled. Pass the"
      " floating weights of queries and keys only."
    )
  shape = jnp.shape(leaf)
  axes = (axis,) if isinstance(axis, int) else tuple(axis or ())
  if len(axes) != count:
    raise ValueError(
      f"head_axis must have one axis of {path} for each of the {count} of max_logits,"
      f" got {axis!r}. Layers that are stacked have one more, as in (0, -2)."
    )
  return _axes.distinct(axis if count else (), shape, "head_axis", path)


def _widths(
  places: list[_Place], shape: tuple[int, ...], fused: bool
) -> tuple[list[int], int]:
  """Returns each leaf's length of a head, and the number of key heads."""
  heads = shape[-1]
  ours = {p.sizes[-1] // heads for p in places if not p.is_key} if fused else {1}
  width = max(ours, default=1)
  keys = [p for p in places if p.is_key]
  if keys and len(ours) > 1:
    raise ValueError(
      f"fused: heads have the dimensions {sorted(ours)} in the leaves of query, and it"
      " is unknown which of them key has. Scale what has no key of its own in another"
      " call, with key=None."
    )
  for place in places:
    *stack, size = place.sizes
    unit = 1 if not fused else width if place.is_key else heads
    if place.is_key:
      right = unit > 0 and size % unit == 0
    else:
      right = size > 0 and (size % heads == 0 if fused else size == heads)
    if tuple(stack) != shape[:-1] or not right:
      raise ValueError(
        f"head_axis: {place.path} has the size {list(place.sizes)} along"
        f" {place.axes}, which does not fit max_logits of shape {list(shape)}. These"
        " must be its axes of heads and of stacked layers; with fused=True that of"
        " heads * dim, of equal dim in query and key."
      )
  counts = {p.sizes[-1] // width for p in keys}
  for count in counts:
    _logits.check_groups(heads, count)
  if len(counts) > 1:
    raise ValueError(
      f"head_axis: the leaves of key have different numbers of heads, {sorted(counts)}."
      " Set it to their axes of heads."
    )
  widths = [
    1 if not fused else width if p.is_key else p.sizes[-1] // heads for p in places
  ]
  return widths, max(counts, default=0)
