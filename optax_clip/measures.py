"""Measures: how large updates are.

Each function returns a `Measure` for `optax_clip.clip_with`. All of them take
``axis_name``, which says over which mesh axes a norm is collected:

* ``"auto"``: inside `jax.shard_map`, each leaf's own varying axes, so that
  sharded leaves are summed and replicated ones counted once. Under `jax.jit`
  norms are global anyway.
* a name or a tuple of names: these, for every leaf. Needed inside `jax.pmap`
  and ``shard_map(..., check_vma=False)``, where types say nothing.
* ``()``: none, to clip each device's part by its own norm.

Those of layers and units take ``stacked``: `jax.lax.scan` over layers, as in Flax's
``nnx.scan``, ``nnx.vmap`` and Linen's ``nn.scan``, keeps one parameter of all layers
in one leaf. Without it they would be one layer, and one that explodes would shrink
the updates of all. ``stacked={"blocks/": 0}`` says that every leaf in whose path
``blocks/`` is found has its layers along axis 0; the first regular expression that is
found counts, and one that is found nowhere is an error. Instead of a mapping, a
function from path and leaf to an axis or `None`.
"""

from collections.abc import Hashable
from collections.abc import Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp

from optax_clip import _groups
from optax_clip import _mesh
from optax_clip import _moments
from optax_clip import _norms
from optax_clip import _scalars
from optax_clip import _validate
from optax_clip._core import Measure

Array = jax.Array


def global_norm(*, ord: float | None = None, axis_name: Any = "auto") -> Measure:
  """The norm of all leaves together: one number, of shape ``[]``."""
  p = _validate.order(ord)

  def like(params: Any) -> Array:
    leaves = _groups.floating_leaves(params)
    return jnp.zeros((), _moments.accumulator(*(x.dtype for x in leaves)))

  def measure(updates: Any, params: Any = None, **extra_args: Any) -> Any:
    del params, extra_args
    leaves = _groups.floating_leaves(updates)
    norms = _norms.group_norms(leaves, [0] * len(leaves), 1, p, axis_name)
    return jax.tree.map(lambda x: x[0], norms)

  def spread(tree: Any, updates: Any) -> list[Any]:
    return [tree] * len(jax.tree.leaves(updates))

  return Measure(like, measure, spread)


def layer_norm(
  *,
  ord: float | None = None,
  axis_name: Any = "auto",
  stacked: _groups.Stacked = None,
) -> Measure:
  """The norm of each layer: of each leaf, or of each layer of a stacked leaf.

  Args:
    ord: the order of the norm, 2 by default.
    axis_name: see the module's docstring.
    stacked: which leaves hold many layers, and along which axis; see there.

  The shape is ``[leaves]``. With `stacked`, a list: for each leaf ``[]``, or its own
  shape with all axes but that of the layers of size 1.
  """
  p = _validate.order(ord)
  _groups.checked_stacked(stacked)

  def axes(tree: Any, leaves: list[Array]) -> list[tuple[int, ...] | None]:
    return [
      None if layer is None else _groups.stacked_axes(x.shape, layer)
      for x, layer in zip(leaves, _groups.layer_axes(tree, stacked), strict=True)
    ]

  def like(params: Any) -> Any:
    leaves = _groups.floating_leaves(params)
    over = axes(params, leaves)
    if any(a is not None for a in over):
      return [_blank(x, a) for x, a in zip(leaves, over, strict=True)]
    dtype = _moments.accumulator(*(x.dtype for x in leaves))
    return jnp.zeros(len(leaves), dtype) if leaves else []

  def measure(updates: Any, params: Any = None, **extra_args: Any) -> Any:
    del params, extra_args
    leaves = _groups.floating_leaves(updates)
    over = axes(updates, leaves)
    stacks = [x for x, a in zip(leaves, over, strict=True) if a is not None]
    _mesh.require_unsharded(stacks, "a norm of stacked layers")
    return _norms.leaf_norms(leaves, over, p, axis_name)

  return Measure(like, measure, _leaf_by_leaf)


def layer_rms(*, axis_name: Any = "auto", stacked: _groups.Stacked = None) -> Measure:
  """The root mean square of each layer, of the shape that `layer_norm` has."""
  norm = layer_norm(axis_name=axis_name, stacked=stacked)

  def measure(updates: Any, params: Any = None, **extra_args: Any) -> Any:
    norms = norm.measure(updates, params, **extra_args)
    leaves = _groups.floating_leaves(updates)
    # Under `shard_map` a leaf is one device's share of the elements.
    sizes = [
      max(x.size, 1) * _mesh.devices(_mesh.collected_axes(x, axis_name)) for x in leaves
    ]
    if _norms.is_norm(norms):
      roots = jnp.sqrt(jnp.asarray(sizes, norms.value.dtype))
      return norms._replace(value=norms.value / roots)
    return [
      n._replace(value=n.value / math.sqrt(size / max(n.value.size, 1)))
      for n, size in zip(norms, sizes, strict=True)
    ]

  return norm._replace(measure=measure)


def group_norm(
  labels: _groups.Labels,
  names: Sequence[Hashable],
  *,
  ord: float | None = None,
  axis_name: Any = "auto",
) -> Measure:
  """The norm of each group of leaves: shape ``[len(names)]``.

  Args:
    labels: a tree of labels, one for each leaf, a prefix of such a tree, or a
      function from the updates to either, as in `optax.multi_transform`.
    names: the labels, in the order of the norms.
    ord: the order of the norm, 2 by default.
    axis_name: see the module's docstring.
  """
  p = _validate.order(ord)
  _groups.checked_labels(labels, names)

  def like(params: Any) -> Array:
    leaves = _groups.floating_leaves(params)
    _groups.label_ids(labels, names, params)  # Errors belong to `init`.
    dtype = _moments.accumulator(*(x.dtype for x in leaves))
    return jnp.zeros(len(names), dtype)

  def measure(updates: Any, params: Any = None, **extra_args: Any) -> Any:
    del params, extra_args
    leaves = _groups.floating_leaves(updates)
    ids = _groups.label_ids(labels, names, updates)
    return _norms.group_norms(leaves, ids, len(names), p, axis_name)

  def spread(tree: Any, updates: Any) -> list[Any]:
    rows = [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(len(names))]
    return [rows[i] for i in _groups.label_ids(labels, names, updates)]

  return Measure(like, measure, spread)


def unit_norm(
  *,
  axis: Any = None,
  ord: float | None = None,
  stacked: _groups.Stacked = None,
) -> Measure:
  """The norm of each unit: a list, for each leaf its shape with axes of size 1.

  A unit is what feeds one output: by default the whole leaf for biases and
  gains, axis 0 of matrices and rank 3, all but the last axis of convolution
  kernels (HWIO and DHWIO).

  Args:
    axis: the axes that belong to one unit, for every leaf; by rank if `None`. Of a
      stacked leaf, the axes and the rank of one layer.
    ord: the order of the norm, 2 by default.
    stacked: which leaves hold many layers, see the module's docstring.
  """
  p = _validate.order(ord)
  _groups.checked_stacked(stacked)

  def axes(tree: Any, leaves: list[Array]) -> list[tuple[int, ...]]:
    return [
      _groups.stacked_unit_axes(x.shape, axis, layer)
      for x, layer in zip(leaves, _groups.layer_axes(tree, stacked), strict=True)
    ]

  def like(params: Any) -> list[Array]:
    leaves = _groups.floating_leaves(params)
    pairs = zip(leaves, axes(params, leaves), strict=True)
    return [_blank(x, over) for x, over in pairs]

  def measure(updates: Any, params: Any = None, **extra_args: Any) -> Any:
    del params, extra_args
    leaves = _groups.floating_leaves(updates)
    _mesh.require_unsharded(leaves, "a norm of units")
    return _norms.leaf_norms(leaves, axes(updates, leaves), p)

  return Measure(like, measure, _leaf_by_leaf)


def relative(measure: Measure, *, eps: float = 1e-3) -> Measure:
  """A measure of updates, divided by the same measure of the parameters.

  Args:
    measure: what to take of both.
    eps: the least norm a parameter counts with, so that parameters that start
      at zero can move. In the units of the parameters' norm.
  """
  _validate.positive(eps=eps)

  def ratio(updates: _norms.Norm, params: _norms.Norm) -> _norms.Norm:
    floor = jnp.maximum(_norms.magnitude(params), eps)
    # A large norm over a small one may not be a float: keep it in the unit.
    big = 2.0**64
    high = updates.value > big
    return _norms.Norm(
      value=jnp.where(high, updates.value / big, updates.value)
      / floor.astype(updates.value.dtype),
      unit=jnp.where(high, updates.unit * big, updates.unit),
    )

  def relative_measure(updates: Any, params: Any = None, **extra_args: Any) -> Any:
    _groups.same_structure(updates, params)
    return jax.tree.map(
      ratio,
      measure.measure(updates, None, **extra_args),
      measure.measure(params, None, **extra_args),
      is_leaf=_norms.is_norm,
    )

  return measure._replace(measure=relative_measure)


def _blank(x: Array, over: tuple[int, ...] | None) -> Array:
  """Zeros as the norms of a leaf over some axes, or over all of it."""
  shape = () if over is None else [1 if i in over else n for i, n in enumerate(x.shape)]
  return jnp.zeros(shape, _moments.accumulator(x.dtype))


def _leaf_by_leaf(tree: Any, updates: Any) -> list[Any]:
  del updates
  if isinstance(tree, list):
    return tree
  vectors, treedef = jax.tree.flatten(tree)
  return [jax.tree.unflatten(treedef, x) for x in _scalars.columns(vectors)]
