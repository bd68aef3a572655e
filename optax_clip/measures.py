"""How large updates are: one norm of all leaves, or of each layer, group or unit.

Each function returns a `Measure` for `optax_clip.clip_with`. All of them take
``axis_name``, the mesh axes over which a norm is collected:

* ``"auto"``: inside `jax.shard_map`, each leaf's own varying axes, so that
  sharded leaves are summed and replicated ones counted once. Under `jax.jit`
  norms are global anyway.
* a name or a tuple of names: these, for every leaf. Needed inside `jax.pmap`
  and ``shard_map(..., check_vma=False)``, where types say nothing.
* ``()``: none, to clip each device's part by its own norm.

Instead, ``specs`` gives each leaf its own axes, and the dimensions that they cut: a
tree of `PartitionSpec` or a prefix of one, as ``in_specs`` of ``shard_map``. Pass it
where types cannot tell: for trees that mix sharded and replicated leaves inside
`jax.pmap` and ``check_vma=False``, and for norms of units and of stacked layers inside
``shard_map``. Do not pass it under plain `jax.jit`.

Measures of layers and units take ``stacked``: `jax.lax.scan` over layers, as in Flax's
``nnx.scan``, ``nnx.vmap`` and Linen's ``nn.scan``, keeps one parameter of all layers
in one leaf. Without ``stacked`` this leaf is one layer, and a layer that explodes
shrinks the updates of all. ``stacked={"blocks/": 0}`` says that every leaf in whose
path ``blocks/`` is found has its layers along axis 0; ``{"moe": (0, 1)}``, that each
expert of each layer is a layer of its own. The first regular expression that is found
counts, and one that is found nowhere is an error. A function from path and leaf to axes
or `None` may take the mapping's place, or a tree of these like the updates, of a class
of your own, as a module of Equinox.
"""

from collections.abc import Hashable
from collections.abc import Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_clip import _validate
from optax_clip._algebra import by_layout as _by_layout
from optax_clip._algebra.types import Measure
from optax_clip._algebra.types import Parts
from optax_clip._matrices.measure import spectral_norm
from optax_clip._norms import blocks as _blocks
from optax_clip._norms import extended as _extended
from optax_clip._norms import layout as _layout
from optax_clip._norms import mesh as _mesh
from optax_clip._norms import norm as _norm
from optax_clip._norms import power_sums as _power_sums
from optax_clip._norms.blocks import Norms
from optax_clip._norms.extended import Extended
from optax_clip._norms.layout import Layout
from optax_clip._trees import axes as _axes
from optax_clip._trees import labels as _labels
from optax_clip._trees import leaves as _leaves
from optax_clip._trees import paths as _paths
from optax_clip._types import AxisName
from optax_clip._types import DType
from optax_clip._types import Scalar
from optax_clip._types import Specs
from optax_clip._types import Updates

Array = jax.Array

__all__ = [
  "Layout",
  "global_norm",
  "group_norm",
  "layer_norm",
  "layer_rms",
  "relative",
  "spectral_norm",
  "unit_norm",
]


def global_norm(
  *, ord: float | None = None, axis_name: AxisName = "auto", specs: Specs = None
) -> Measure:
  """Measures all leaves together: one norm, of shape ``[]``.

  Args:
    ord: p, the order of the norm: 2 by default; 1, `float('inf')` (the largest
      modulus) or any p in (0, 64].
    axis_name, specs: as in the module's docstring.
  """
  p = _validate.order(ord)

  def layout(updates: Updates) -> Layout:
    dtypes = [x.dtype for x in _leaves.floating_leaves(updates)]
    cuts = _whole_cuts(updates, axis_name, specs)
    return laid(_power_sums.accumulator(*dtypes), cuts)

  def laid(dtype: DType, cuts: Sequence[_mesh.Cut]) -> Layout:
    return _layout.whole(0, dtype, [None] * len(cuts), cuts)

  def combine(layers: Norms, updates: Updates) -> Norms:
    del updates
    table = _table(layers)
    layout = laid(table.value.dtype, [q.cut for q in layers.layout.places])
    return Norms([_norm.merged(table, p)], layout)

  finer = layer_norm(ord=ord, axis_name=axis_name, specs=specs)
  parts = Parts(finer, combine if p >= 1 else None)
  return Measure(
    layout, _by_layout.Norm("global", p, (axis_name, specs), layout), parts
  )


def layer_norm(
  *,
  ord: float | None = None,
  axis_name: AxisName = "auto",
  specs: Specs = None,
  stacked: _axes.Stacked = None,
) -> Measure:
  """Measures each layer: each leaf, or each layer of a stacked leaf.

  Args:
    ord: the order of the norm, 2 by default.
    axis_name, specs: as in the module's docstring.
    stacked: which leaves hold many layers, and along which axis; as there.

  The norms have the shape ``[layers]``.
  """
  p = _validate.order(ord)
  _axes.checked_stacked(stacked)

  def layout(updates: Updates) -> Layout:
    shapes = [x.shape for x in _leaves.floating_leaves(updates)]
    layers = _axes.layer_axes(updates, stacked)
    dims = [
      None if layer is None else _axes.stacked_axes(shape, layer)
      for shape, layer in zip(shapes, layers, strict=True)
    ]
    return _layout.of_leaves(updates, dims, layers, axis_name, specs)

  key = ("layer", axis_name, specs, stacked)
  return Measure(layout, _by_layout.Norm("layer", p, key, layout), ord=_growing(p))


def layer_rms(
  *, axis_name: AxisName = "auto", specs: Specs = None, stacked: _axes.Stacked = None
) -> Measure:
  """Measures the root mean square of each layer, in the shape of `layer_norm`."""
  norm = layer_norm(axis_name=axis_name, specs=specs, stacked=stacked)
  return norm._replace(measure=_by_layout.Rms(norm), ord=None)


def group_norm(
  labels: _labels.Labels,
  names: Sequence[Hashable],
  *,
  ord: float | None = None,
  counted: Any = None,
  scaled: Any = None,
  axis_name: AxisName = "auto",
  specs: Specs = None,
) -> Measure:
  """Measures each group of leaves: norms of shape ``[len(names)]``.

  Args:
    labels: a tree of labels, one for each leaf, a prefix of such a tree, or a
      function from the updates to either, as in `optax.multi_transform`.
    names: the labels, in the order of the norms.
    ord: the order of the norm, 2 by default.
    counted: for each leaf whether it counts in its group's norm, given like `labels`;
      all do if `None`.
    scaled: for each leaf whether the action applies to it, given like `labels`; to all
      if `None`. A leaf that is not scaled passes bit for bit.
    axis_name, specs: as in the module's docstring.
  """
  p = _validate.order(ord)
  _labels.checked_labels(labels, names)

  def layout(updates: Updates) -> Layout:
    return laid(updates, _whole_cuts(updates, axis_name, specs))

  def laid(updates: Updates, cuts: Sequence[_mesh.Cut]) -> Layout:
    leaves = _leaves.floating_leaves(updates)
    dtype = _power_sums.accumulator(*(x.dtype for x in leaves))
    ids = _labels.label_ids(labels, names, updates)
    counts(updates)  # So that `init` raises.
    clipped = _labels.flags(updates, scaled=scaled)
    return _layout.whole(len(names), dtype, ids, cuts, clipped)

  def counts(updates: Updates) -> list[bool]:
    return _labels.flags(updates, counted=counted)

  def combine(layers: Norms, updates: Updates) -> Norms:
    table = _table(layers)
    layout = laid(updates, [q.cut for q in layers.layout.places])
    pairs = list(zip(layout.places, counts(updates), strict=True))
    groups = []
    for group in range(len(names)):
      own = [i for i, (q, count) in enumerate(pairs) if q.entry == group and count]
      if not own:
        groups.append(_extended.of(jnp.zeros((), table.value.dtype)))
        continue
      members = np.asarray(own, np.int32)
      groups.append(_norm.merged(jax.tree.map(lambda x, m=members: x[m], table), p))
    return Norms([Extended(*map(jnp.stack, zip(*groups, strict=True)))], layout)

  # Not `scaled`: the norms are the same.
  key = (labels, tuple(names), counted, axis_name, specs)
  finer = layer_norm(ord=ord, axis_name=axis_name, specs=specs)
  parts = Parts(finer, combine if p >= 1 else None)
  return Measure(layout, _by_layout.Norm("group", p, key, layout, counts), parts)


def unit_norm(
  *,
  axis: Any = None,
  ord: float | None = None,
  axis_name: AxisName = "auto",
  specs: Specs = None,
  stacked: _axes.Stacked = None,
) -> Measure:
  """Measures each unit: norms of shape ``[units]``, leaf by leaf.

  A unit is what feeds one output: by default the whole leaf for biases and
  gains, axis 0 of matrices and rank 3, all but the last axis of convolution
  kernels (HWIO and DHWIO).

  Args:
    axis: the axes that belong to one unit, for every leaf; by rank if `None`. In a
      stacked leaf, axes and rank are those of one layer. Where a model's names say
      more than ranks do, a mapping from regular expressions of paths, or a function
      from path and leaf, to axes or `None`, as for ``stacked``.
    ord: the order of the norm, 2 by default.
    axis_name, specs: as in the module's docstring.
    stacked: which leaves hold many layers; as there.
  """
  p = _validate.order(ord)
  _axes.checked_stacked(stacked)

  def layout(updates: Updates) -> Layout:
    # The shapes of whole leaves: a device may hold one row of a matrix, like a vector.
    shapes = _mesh.whole_shapes(updates, specs)
    layers = _axes.layer_axes(updates, stacked)
    given = [axis] * len(shapes)
    if _paths.is_by_path(axis):
      given = _paths.by_path(updates, axis, "axis")
    dims = [
      _axes.stacked_unit_axes(shape, own, layer)
      for shape, own, layer in zip(shapes, given, layers, strict=True)
    ]
    return _layout.of_leaves(updates, dims, layers, axis_name, specs)

  key = (axis, axis_name, specs, stacked)
  return Measure(layout, _by_layout.Norm("unit", p, key, layout))


def relative(measure: Measure, *, floor: Scalar = 1e-3) -> Measure:
  """Divides a measure of updates by the same measure of the parameters.

  Args:
    measure: what measures both.
    floor: the least norm that a parameter counts with, so that parameters that start
      at zero can move; an absolute constant, in the units of the parameters' norm.
      With 0 they stay at zero.
  """
  _validate.nonnegative(floor=floor)
  parts = measure.parts
  if parts is not None:
    # No ratio of two norms follows from the ratios of their parts.
    parts = Parts(relative(parts.measure, floor=floor), None)
  return measure._replace(
    measure=_by_layout.Ratio(measure, floor), parts=parts, ord=None
  )


def _table(layers: Norms) -> Extended:
  """Joins all norms to one array; a norm of 0, if there are none."""
  if not layers.layout.places:
    return _extended.of(_blocks.blank(layers.layout))
  return Extended(*(layers.table(x) for x in zip(*layers.blocks, strict=True)))


def _growing(ord: float) -> float | None:
  """Returns the order by which a norm grows with its size; `None` if it does not."""
  return None if ord == math.inf else ord


def _whole_cuts(updates: Updates, axis_name: AxisName, specs: Specs) -> list[_mesh.Cut]:
  """Finds how a mesh divides leaves whose norms cover all of each leaf."""
  return _mesh.cuts(updates, [None] * len(jax.tree.leaves(updates)), axis_name, specs)
