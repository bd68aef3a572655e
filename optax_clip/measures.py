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

from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_clip import _validate
from optax_clip._algebra.types import Measure
from optax_clip._algebra.types import Parts
from optax_clip._matrices.measure import spectral_norm
from optax_clip._norms import extended as _extended
from optax_clip._norms import layout as _layout
from optax_clip._norms import mesh as _mesh
from optax_clip._norms import norm as _norm
from optax_clip._norms import power_sums as _power_sums
from optax_clip._norms import scalars as _scalars
from optax_clip._norms.extended import Extended
from optax_clip._norms.layout import Layout
from optax_clip._trees import axes as _axes
from optax_clip._trees import labels as _labels
from optax_clip._trees import leaves as _leaves
from optax_clip._trees import paths as _paths
from optax_clip._types import AxisName
from optax_clip._types import Params
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
    leaves = _leaves.floating_leaves(updates)
    dtype = _power_sums.accumulator(*(x.dtype for x in leaves))
    cuts = _whole_cuts(updates, axis_name, specs)
    return _layout.whole(0, dtype, [None] * len(leaves), cuts)

  finer = layer_norm(ord=ord, axis_name=axis_name, specs=specs)

  def combine(norms: Sequence[Extended], updates: Updates) -> list[Extended]:
    return [_norm.merged(_table(finer, norms, updates), p)]

  parts = Parts(finer, combine if p >= 1 else None)
  return Measure(layout, _Norm("global", p, (axis_name, specs), layout), parts)


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
    axis_name: see the module's docstring.
    specs: see there.
    stacked: which leaves hold many layers, and along which axis; see there.

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
  return Measure(layout, _Norm("layer", p, key, layout), ord=_growing(p))


def layer_rms(
  *, axis_name: AxisName = "auto", specs: Specs = None, stacked: _axes.Stacked = None
) -> Measure:
  """Measures the root mean square of each layer, in the shape of `layer_norm`."""
  norm = layer_norm(axis_name=axis_name, specs=specs, stacked=stacked)
  return norm._replace(measure=_Rms(norm), ord=None)


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
    axis_name: see the module's docstring.
    specs: see there.
  """
  p = _validate.order(ord)
  _labels.checked_labels(labels, names)

  def layout(updates: Updates) -> Layout:
    leaves = _leaves.floating_leaves(updates)
    dtype = _power_sums.accumulator(*(x.dtype for x in leaves))
    ids = _labels.label_ids(labels, names, updates)
    counts(updates)  # So that `init` raises.
    cuts = _whole_cuts(updates, axis_name, specs)
    clipped = _labels.flags(updates, scaled=scaled)
    return _layout.whole(len(names), dtype, ids, cuts, clipped)

  def counts(updates: Updates) -> list[bool]:
    return _labels.flags(updates, counted=counted)

  finer = layer_norm(ord=ord, axis_name=axis_name, specs=specs)

  def combine(norms: Sequence[Extended], updates: Updates) -> list[Extended]:
    table = _table(finer, norms, updates)
    pairs = list(zip(layout(updates).places, counts(updates), strict=True))
    groups = []
    for group in range(len(names)):
      own = [i for i, (q, count) in enumerate(pairs) if q.entry == group and count]
      if not own:
        groups.append(_extended.of(jnp.zeros((), table.value.dtype)))
        continue
      members = np.asarray(own, np.int32)
      groups.append(_norm.merged(jax.tree.map(lambda x, m=members: x[m], table), p))
    return [Extended(*map(jnp.stack, zip(*groups, strict=True)))]

  # Not `scaled`: the norms are the same.
  key = (labels, tuple(names), counted, axis_name, specs)
  parts = Parts(finer, combine if p >= 1 else None)
  return Measure(layout, _Norm("group", p, key, layout, counts), parts)


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
    axis_name: see the module's docstring.
    specs: see there.
    stacked: which leaves hold many layers, see there.
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
  return Measure(layout, _Norm("unit", p, key, layout))


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
  return measure._replace(measure=_Ratio(measure, floor), parts=parts, ord=None)


@dataclasses.dataclass(frozen=True)
class _Norm:
  """Measures norms of updates; two are equal if they measure the same.

  Attributes:
    kind: what one norm measures, by name.
    ord: the order of the norms.
    key: all that the layout depends on beside the updates.
    layout: from updates to the layout of their norms.
    counts: for each leaf whether it counts; all do if `None`.
  """

  kind: str
  ord: float
  key: Any
  layout: Callable[[Any], Layout] = dataclasses.field(compare=False)
  counts: Callable[[Any], list[bool]] | None = dataclasses.field(
    default=None, compare=False
  )

  uses_params = False

  def __call__(
    self, updates: Updates, params: Params = None, **extra_args: Any
  ) -> list[Extended]:
    del params, extra_args
    leaves, layout = _leaves.floating_leaves(updates), self.layout(updates)
    if self.counts is not None:
      rows = zip(leaves, layout.places, self.counts(updates), strict=True)
      kept = [(x, place) for x, place, counts in rows if counts]
      leaves = [x for x, _ in kept]
      layout = layout._replace(places=tuple(place for _, place in kept))
    return _norm.of_layout(leaves, layout, self.ord)


@dataclasses.dataclass(frozen=True)
class _Rms:
  """Measures the root mean squares of layers."""

  norm: Measure = dataclasses.field(compare=False)
  key: Any = None

  uses_params = False

  def __post_init__(self) -> None:
    object.__setattr__(self, "key", self.norm.measure)

  def __call__(
    self, updates: Updates, params: Params = None, **extra_args: Any
  ) -> list[Extended]:
    layout = self.norm.layout(updates)
    norms = self.norm.measure(updates, params, **extra_args)
    return [
      norm._replace(value=norm.value / jnp.sqrt(jnp.asarray(size, norm.value.dtype)))
      for norm, size in zip(norms, layout.sizes(), strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class _Ratio:
  """Measures updates in units of the same measure of the parameters."""

  of: Measure = dataclasses.field(compare=False)
  floor: Scalar
  key: Any = None

  def __post_init__(self) -> None:
    object.__setattr__(self, "key", self.of.measure)

  def __call__(
    self, updates: Updates, params: Params = None, **extra_args: Any
  ) -> list[Extended]:
    _leaves.same_structure(updates, params)
    above = self.of.measure(updates, None, **extra_args)
    below = self.of.measure(params, None, **extra_args)
    weights = _scalars.each(_extended.as_float, [(x,) for x in below])
    layout, own = self.of.layout(updates), self.of.layout(params)
    if (own.blocks, own.positions()) != (layout.blocks, layout.positions()):
      # Dtypes decide which block holds a norm, and parameters may have others.
      weights = layout.untabled(own.table(weights), [x.value for x in above])
    return _scalars.each(self._ratio, list(zip(above, weights, strict=True)))

  def _ratio(self, update: Extended, weight: Array) -> Extended:
    floor = jnp.maximum(weight, jnp.asarray(self.floor, weight.dtype))
    return _extended.divided(update, floor.astype(update.value.dtype))


def _table(measure: Measure, norms: Sequence[Extended], updates: Updates) -> Extended:
  """Joins all norms of a measure to one array; a norm of 0, if there are none."""
  layout = measure.layout(updates)
  if not layout.places:
    return _extended.of(layout.blank())
  return Extended(*(layout.table(column) for column in zip(*norms, strict=True)))


def _growing(ord: float) -> float | None:
  """Returns the order by which a norm grows with its size; `None` if it does not."""
  return None if ord == float("inf") else ord


def _whole_cuts(updates: Updates, axis_name: AxisName, specs: Specs) -> list[_mesh.Cut]:
  """Finds how a mesh divides leaves whose norms cover all of each leaf."""
  return _mesh.cuts(updates, [None] * len(jax.tree.leaves(updates)), axis_name, specs)
