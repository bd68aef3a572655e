"""Measures: how large updates are.

Each function returns a `Measure` for `optax_clip.clip_with`. All of them take
``axis_name``, which says over which mesh axes a norm is collected:

* ``"auto"``: inside `jax.shard_map`, each leaf's own varying axes, so that
  sharded leaves are summed and replicated ones counted once. Under `jax.jit`
  norms are global anyway.
* a name or a tuple of names: these, for every leaf. Needed inside `jax.pmap`
  and ``shard_map(..., check_vma=False)``, where types say nothing.
* ``()``: none, to clip each device's part by its own norm.

``specs``, a tree of `PartitionSpec` or a prefix of one, as ``in_specs`` of
``shard_map``, says it for each leaf instead, and along which dimension a leaf is cut.
It is needed where types cannot tell: for trees that mix sharded and replicated leaves
inside `jax.pmap` and ``check_vma=False``, and for norms of units and of stacked layers
inside ``shard_map``. Elsewhere, under plain `jax.jit`, do not pass it.

Those of layers and units take ``stacked``: `jax.lax.scan` over layers, as in Flax's
``nnx.scan``, ``nnx.vmap`` and Linen's ``nn.scan``, keeps one parameter of all layers
in one leaf. Without it they would be one layer, and one that explodes would shrink
the updates of all. ``stacked={"blocks/": 0}`` says that every leaf in whose path
``blocks/`` is found has its layers along axis 0; the first regular expression that is
found counts, and one that is found nowhere is an error. Instead of a mapping, a
function from path and leaf to an axis or `None`.
"""

from collections.abc import Hashable
from collections.abc import Mapping
from collections.abc import Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp

from optax_clip import _groups
from optax_clip import _layers
from optax_clip import _mesh
from optax_clip import _moments
from optax_clip import _norms
from optax_clip import _paths
from optax_clip import _scalars
from optax_clip import _validate
from optax_clip._core import Measure

Array = jax.Array


def global_norm(
  *, ord: float | None = None, axis_name: Any = "auto", specs: Any = None
) -> Measure:
  """The norm of all leaves together: one number, of shape ``[]``."""
  p = _validate.order(ord)

  def like(params: Any) -> Array:
    leaves = _groups.floating_leaves(params)
    return jnp.zeros((), _moments.accumulator(*(x.dtype for x in leaves)))

  def measure(updates: Any, params: Any = None, **extra_args: Any) -> Any:
    del params, extra_args
    leaves = _groups.floating_leaves(updates)
    axes = _whole_axes(updates, axis_name, specs)
    norms = _norms.group_norms(leaves, [0] * len(leaves), 1, p, axes)
    return jax.tree.map(lambda x: x[0], norms)

  def spread(tree: Any, updates: Any) -> list[Any]:
    return [tree] * len(jax.tree.leaves(updates))

  def rows(reduce: _layers.Reduce, tree: Any, updates: Any) -> Array:
    del reduce
    return jnp.broadcast_to(tree, len(jax.tree.leaves(updates)))

  finer = layer_norm(ord=ord, axis_name=axis_name, specs=specs)
  return Measure(like, measure, spread, _layers.of_many(finer, rows))


def layer_norm(
  *,
  ord: float | None = None,
  axis_name: Any = "auto",
  specs: Any = None,
  stacked: _groups.Stacked = None,
) -> Measure:
  """The norm of each layer: of each leaf, or of each layer of a stacked leaf.

  Args:
    ord: the order of the norm, 2 by default.
    axis_name: see the module's docstring.
    specs: see there.
    stacked: which leaves hold many layers, and along which axis; see there.

  The shape is ``[leaves]``. With `stacked`, a list: for each leaf ``[]``, or its own
  shape with all axes but that of the layers of size 1.
  """
  p = _validate.order(ord)
  _groups.checked_stacked(stacked)

  def like(params: Any) -> Any:
    leaves = _groups.floating_leaves(params)
    over = _dims(params, leaves, stacked)
    if any(a is not None for a in over):
      return _blanks(leaves, over, _mesh.cuts(params, over, (), specs))
    dtype = _moments.accumulator(*(x.dtype for x in leaves))
    return jnp.zeros(len(leaves), dtype) if leaves else []

  def measure(updates: Any, params: Any = None, **extra_args: Any) -> Any:
    del params, extra_args
    leaves = _groups.floating_leaves(updates)
    over = _dims(updates, leaves, stacked)
    cuts = _mesh.cuts(updates, over, axis_name, specs)
    return _norms.leaf_norms(leaves, over, p, cuts)

  def spread(tree: list[Any], updates: Any) -> list[Any]:
    over = _dims(updates, jax.tree.leaves(updates), stacked)
    return _leaf_by_leaf(tree, _mesh.cuts(updates, over, axis_name, specs))

  def elements(updates: Any) -> list[float]:
    if p == math.inf:
      return [1.0] * sum(max(n, 1) for n in _layers.stacks(updates, stacked, specs))
    leaves = jax.tree.leaves(updates)
    over = _dims(updates, leaves, stacked)
    sizes = _sizes(leaves, over, _mesh.cuts(updates, over, axis_name, specs))
    stacks = _layers.stacks(updates, stacked, specs)
    return [
      size ** (1 / p)
      for size, stack in zip(sizes, stacks, strict=True)
      for _ in range(max(stack, 1))
    ]

  return Measure(like, measure, spread, _layers.own(stacked, specs, elements))


def layer_rms(
  *, axis_name: Any = "auto", specs: Any = None, stacked: _groups.Stacked = None
) -> Measure:
  """The root mean square of each layer, of the shape that `layer_norm` has."""
  norm = layer_norm(axis_name=axis_name, specs=specs, stacked=stacked)

  def measure(updates: Any, params: Any = None, **extra_args: Any) -> Any:
    norms = norm.measure(updates, params, **extra_args)
    leaves = _groups.floating_leaves(updates)
    over = _dims(updates, leaves, stacked)
    cuts = _mesh.cuts(updates, over, axis_name, specs)
    sizes = _sizes(leaves, over, cuts)
    if _norms.is_norm(norms):
      roots = jnp.sqrt(jnp.asarray(sizes, norms.value.dtype))
      return norms._replace(value=norms.value / roots)
    return [
      n._replace(value=n.value / math.sqrt(size))
      for n, size in zip(norms, sizes, strict=True)
    ]

  return norm._replace(measure=measure, layers=_layers.own(stacked, specs))


def group_norm(
  labels: _groups.Labels,
  names: Sequence[Hashable],
  *,
  ord: float | None = None,
  counted: Any = None,
  axis_name: Any = "auto",
  specs: Any = None,
) -> Measure:
  """The norm of each group of leaves: shape ``[len(names)]``.

  Args:
    labels: a tree of labels, one for each leaf, a prefix of such a tree, or a
      function from the updates to either, as in `optax.multi_transform`.
    names: the labels, in the order of the norms.
    ord: the order of the norm, 2 by default.
    counted: for each leaf whether it counts in the norm of its group, given like
      `labels`; all do if `None`.
    axis_name: see the module's docstring.
    specs: see there.
  """
  p = _validate.order(ord)
  _groups.checked_labels(labels, names)

  def like(params: Any) -> Array:
    leaves = _groups.floating_leaves(params)
    # Errors belong to `init`.
    _groups.label_ids(labels, names, params)
    _groups.counted_leaves(counted, params)
    dtype = _moments.accumulator(*(x.dtype for x in leaves))
    return jnp.zeros(len(names), dtype)

  def measure(updates: Any, params: Any = None, **extra_args: Any) -> Any:
    del params, extra_args
    leaves = _groups.floating_leaves(updates)
    ids = _groups.label_ids(labels, names, updates)
    axes = _whole_axes(updates, axis_name, specs)
    counts = _groups.counted_leaves(counted, updates)
    if not all(counts):
      rows = zip(leaves, ids, axes, counts, strict=True)
      kept = [row[:3] for row in rows if row[3]]
      leaves, ids, axes = map(list, zip(*kept, strict=True)) if kept else ([], [], [])
    return _norms.group_norms(leaves, ids, len(names), p, axes)

  def spread(tree: Any, updates: Any) -> list[Any]:
    rows = [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(len(names))]
    return [rows[i] for i in _groups.label_ids(labels, names, updates)]

  def by_layer(reduce: _layers.Reduce, tree: Any, updates: Any) -> Array:
    del reduce
    return tree[jnp.asarray(_groups.label_ids(labels, names, updates), jnp.int32)]

  finer = layer_norm(ord=ord, axis_name=axis_name, specs=specs)
  return Measure(like, measure, spread, _layers.of_many(finer, by_layer))


def unit_norm(
  *,
  axis: Any = None,
  ord: float | None = None,
  axis_name: Any = "auto",
  specs: Any = None,
  stacked: _groups.Stacked = None,
) -> Measure:
  """The norm of each unit: a list, for each leaf its shape with axes of size 1.

  A unit is what feeds one output: by default the whole leaf for biases and
  gains, axis 0 of matrices and rank 3, all but the last axis of convolution
  kernels (HWIO and DHWIO).

  Args:
    axis: the axes that belong to one unit, for every leaf; by rank if `None`. Of a
      stacked leaf, the axes and the rank of one layer. Or a mapping from regular
      expressions of paths, or a function from path and leaf, to axes or `None`, as
      for ``stacked``: where the names of a model say more than ranks do.
    ord: the order of the norm, 2 by default.
    axis_name: see the module's docstring.
    specs: see there.
    stacked: which leaves hold many layers, see there.
  """
  p = _validate.order(ord)
  _groups.checked_stacked(stacked)

  def axes(tree: Any) -> list[tuple[int, ...]]:
    # Of whole leaves: of one row of a matrix nobody could say that it is one.
    shapes = _mesh.whole_shapes(tree, specs)
    layers = _groups.layer_axes(tree, stacked)
    given = [axis] * len(shapes)
    if callable(axis) or isinstance(axis, Mapping):
      given = _paths.by_path(tree, axis, "axis")
    return [
      _groups.stacked_unit_axes(shape, own, layer)
      for shape, own, layer in zip(shapes, given, layers, strict=True)
    ]

  def like(params: Any) -> list[Array]:
    leaves = _groups.floating_leaves(params)
    over = axes(params)
    return _blanks(leaves, over, _mesh.cuts(params, over, (), specs))

  def measure(updates: Any, params: Any = None, **extra_args: Any) -> Any:
    del params, extra_args
    leaves = _groups.floating_leaves(updates)
    over = axes(updates)
    cuts = _mesh.cuts(updates, over, axis_name, specs)
    return _norms.leaf_norms(leaves, over, p, cuts)

  def spread(tree: list[Any], updates: Any) -> list[Any]:
    over = axes(updates)
    return _leaf_by_leaf(tree, _mesh.cuts(updates, over, axis_name, specs))

  return Measure(like, measure, spread, _layers.own(stacked, specs))


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

  layers = measure.layers
  if layers is not None:
    finer = None if layers.finer is None else relative(layers.finer, eps=eps)
    layers = layers._replace(elements=None, finer=finer)
  return measure._replace(measure=relative_measure, layers=layers)


def _dims(
  tree: Any, leaves: Sequence[Array], stacked: _groups.Stacked
) -> list[tuple[int, ...] | None]:
  """For each leaf the dimensions of one layer; `None` if it is one layer."""
  return [
    None if layer is None else _groups.stacked_axes(x.shape, layer)
    for x, layer in zip(leaves, _groups.layer_axes(tree, stacked), strict=True)
  ]


def _sizes(
  leaves: Sequence[Array],
  over: Sequence[tuple[int, ...] | None],
  cuts: Sequence[_mesh.Cut],
) -> list[int]:
  """For each leaf the number of elements that one norm is of."""
  # Under `shard_map` a leaf is one device's share of the elements.
  return [
    _size_of_one(x, dims) * _mesh.devices(cut.within)
    for x, dims, cut in zip(leaves, over, cuts, strict=True)
  ]


def _size_of_one(x: Array, dims: tuple[int, ...] | None) -> int:
  """The number of elements that one norm is of; 1 if there is none."""
  return max(math.prod(x.shape if dims is None else [x.shape[i] for i in dims]), 1)


def _blanks(
  leaves: Sequence[Array],
  over: Sequence[tuple[int, ...] | None],
  cuts: Sequence[_mesh.Cut],
) -> list[Array]:
  """Zeros as the norms of leaves over some axes, or over all of them."""
  result = []
  for x, dims, cut in zip(leaves, over, cuts, strict=True):
    shape = (
      () if dims is None else [1 if i in dims else n for i, n in enumerate(x.shape)]
    )
    dtype = _moments.accumulator(x.dtype)
    result.append(jnp.zeros(_mesh.whole_shape(shape, cut), dtype))
  return result


def _whole_axes(updates: Any, axis_name: Any, specs: Any) -> list[tuple[str, ...]]:
  """For each leaf the mesh axes that a norm of all of it is collected over."""
  whole = [None] * len(jax.tree.leaves(updates))
  return [cut.within for cut in _mesh.cuts(updates, whole, axis_name, specs)]


def _leaf_by_leaf(tree: Any, cuts: Sequence[_mesh.Cut]) -> list[Any]:
  """For each leaf, what of its entry in a norm-shaped tree concerns this device."""
  if not isinstance(tree, list):
    vectors, treedef = jax.tree.flatten(tree)
    return [jax.tree.unflatten(treedef, x) for x in _scalars.columns(vectors)]
  return [
    jax.tree.map(lambda x, cut=cut: _mesh.local(x, cut), entry)
    if cut.between
    else entry
    for entry, cut in zip(tree, cuts, strict=True)
  ]
