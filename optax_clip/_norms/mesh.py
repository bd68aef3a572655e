"""Which devices hold which parts of a norm: manual axes, specs and shardings.

Only this file depends on how a JAX version spells them.
"""

from collections.abc import Callable
from collections.abc import Sequence
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_clip import _backend
from optax_clip._trees import paths as _paths
from optax_clip._types import AxisName
from optax_clip._types import Specs

Array = jax.Array


def varying_axes(x: Any) -> tuple[str, ...]:
  """Returns the manual mesh axes over which `x` holds different values, sorted.

  Empty outside `shard_map`, and inside it with ``check_vma=False``.
  """
  # Optimizers may be initialised with a `ShapeDtypeStruct`, too.
  aval = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
  manual = getattr(aval, "mat", None)
  varying = manual.varying if manual is not None else getattr(aval, "vma", ())
  return tuple(sorted(varying))


def unchecked_axes() -> tuple[str, ...]:
  """Returns the manual mesh axes of which types do not tell what varies over them.

  They are those of `pmap` and of `shard_map` with ``check_vma=False``.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return ()
  manual = jax.sharding.AxisType.Manual
  names = [
    n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == manual
  ]
  return tuple(n for n in names if n not in varying_axes(jax.lax.axis_index(n)))


def _unreduced_axes(x: Any) -> tuple[str, ...]:
  """Returns the axes over which `x` is still to be summed, sorted."""
  aval = jax.typeof(x) if isinstance(x, jax.Array) else x
  spec = getattr(getattr(aval, "sharding", None), "spec", None)
  manual = getattr(aval, "mat", None)
  return tuple(
    sorted({*getattr(spec, "unreduced", ()), *getattr(manual, "unreduced", ())})
  )


def collected_axes(x: Any, axis_name: AxisName) -> tuple[str, ...]:
  """Returns the axes over which to collect the norm of the whole of `x`."""
  if axis_name == "auto":
    return varying_axes(x)
  return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


class Cut(NamedTuple):
  """Says how a mesh divides the norms of one leaf.

  Attributes:
    within: the axes over which each norm is collected.
    between: pairs of a dimension along which norms differ, and the axes that cut it:
      each device has some of the norms.
  """

  within: tuple[str, ...] = ()
  between: tuple[tuple[int, tuple[str, ...]], ...] = ()

  @property
  def axes(self) -> tuple[str, ...]:
    """Returns all the axes, sorted."""
    return tuple(
      sorted({*self.within, *(a for _, names in self.between for a in names)})
    )


def cuts(
  tree: Any, over: Sequence[tuple[int, ...] | None], axis_name: AxisName, specs: Specs
) -> list[Cut]:
  """Finds how a mesh divides the norms of each leaf.

  Args:
    tree: updates.
    over: for each leaf the dimensions that one norm reduces, or `None` for all.
    axis_name: as in `optax_clip.measures`.
    specs: as there; without effect outside `shard_map` and `pmap`, where arrays are
      whole.

  Raises:
    ValueError: if norms reduce some dimensions only and nothing says which dimension
      the mesh cuts; or if a leaf is unreduced.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  for path, x in leaves:
    if names := _unreduced_axes(x):
      raise ValueError(
        f"The leaf {jax.tree_util.keystr(path)} is unreduced over the mesh axes"
        f" {names}: each device holds a part of a sum, and the norm of a part is not"
        " that of the sum. Sum it first, with jax.reshard to a PartitionSpec without"
        " unreduced axes, or with lax.psum inside shard_map."
      )
  if specs is not None:
    pairs = zip(leaves, over, _leaf_specs(tree, specs), strict=True)
    return [_cut(x, dims, spec) for (_, x), dims, spec in pairs]
  for (path, x), dims in zip(leaves, over, strict=True):
    if dims is not None and (names := collected_axes(x, axis_name)):
      raise ValueError(
        f"The leaf {jax.tree_util.keystr(path)} may be cut along any dimension over the"
        f" mesh axes {names}, and norms of units or stacked layers reduce only some of"
        " them. Pass specs=, a tree of PartitionSpecs or a prefix of one, as in_specs"
        " of shard_map."
      )
  return [Cut(collected_axes(x, axis_name)) for _, x in leaves]


def whole_shapes(tree: Any, specs: Specs) -> list[tuple[int, ...]]:
  """Returns the shape that each leaf has on all devices together."""
  leaves = jax.tree.leaves(tree)
  if specs is None:
    return [tuple(jnp.shape(x)) for x in leaves]
  every = [
    _cut(x, (), spec) for x, spec in zip(leaves, _leaf_specs(tree, specs), strict=True)
  ]
  return [whole_shape(jnp.shape(x), cut) for x, cut in zip(leaves, every, strict=True)]


def _leaf_specs(tree: Any, specs: Specs) -> list[Any]:
  """Returns each leaf's `PartitionSpec`; `None` stands for an empty one."""

  def is_spec(node: object) -> bool:
    return node is None or _paths.is_spec(node)

  given, treedef = jax.tree.flatten(specs, is_leaf=is_spec)
  wrong = [spec for spec in given if not is_spec(spec)]
  if wrong:
    raise TypeError(
      f"specs must hold PartitionSpecs, got {wrong[0]!r} of type"
      f" {type(wrong[0]).__name__}."
    )
  if not jax.tree.leaves(tree):
    return []  # optax.tree_map_params initialises with a stand-in for all parameters.
  # Broadcasts indices, as `None` is not a leaf and a spec may be a tuple.
  numbers = jax.tree.unflatten(treedef, range(len(given)))
  try:
    found = jax.tree.leaves(jax.tree.broadcast(numbers, tree))
  except ValueError as error:
    raise ValueError(
      "specs must be a tree prefix of the updates, got one of structure"
      f" {treedef} for updates of structure {jax.tree.structure(tree)}."
    ) from error
  return [given[i] for i in found]


def _cut(x: Any, dims: tuple[int, ...] | None, spec: Any) -> Cut:
  entries = tuple(spec or ())
  if len(entries) > jnp.ndim(x):
    raise ValueError(f"specs: {spec} has more dimensions than {jnp.shape(x)}.")
  within: list[str] = []
  between = []
  for dim, entry in enumerate(entries):
    names = (entry,) if isinstance(entry, str) else tuple(entry or ())
    names = tuple(name for name in names if _is_bound(name))
    if dims is None or dim in dims:
      within += names
    elif names:
      between.append((dim, names))
  return Cut(tuple(sorted(within)), tuple(between))


def _is_bound(name: str) -> bool:
  """Returns whether arrays are local along a mesh axis here."""
  try:
    jax.lax.axis_index(name)
  except NameError:
    return False
  return True


def whole_shape(shape: Sequence[int], cut: Cut) -> tuple[int, ...]:
  """Returns the shape on all devices together of norms with this shape on each."""
  whole = list(shape)
  for dim, names in cut.between:
    whole[dim] *= devices(names)
  return tuple(whole)


def placed(x: Array, cut: Cut) -> Array:
  """Puts this device's norms in their place among all, with 0 for the others.

  One collective then both completes each norm and joins all of them. After it every
  device knows all norms, so that thresholds and records are those of one device.
  """
  for dim, names in cut.between:
    shape = list(x.shape)
    shape[dim] *= devices(names)
    start = _index(names) * x.shape[dim]
    empty = jnp.zeros(shape, x.dtype)
    x = jax.lax.dynamic_update_slice_in_dim(empty, x, start, dim)
  return x


def local(x: Array, cut: Cut) -> Array:
  """Inverts `placed`: takes this device's norms out of all."""
  for dim, names in cut.between:
    size = x.shape[dim] // devices(names)
    x = jax.lax.dynamic_slice_in_dim(x, _index(names) * size, size, dim)
  return x


def whole(x: Array, cut: Cut) -> Array:
  """Joins what each device has along the dimensions that a mesh cuts."""
  names = tuple(name for _, each in cut.between for name in each)
  return jax.lax.psum(placed(x, cut), names) if names else x


def _index(names: tuple[str, ...]) -> Array:
  """Returns this device's place along the product of some mesh axes."""
  index = jnp.zeros((), jnp.int32)
  for name in names:
    index = index * devices((name,)) + jax.lax.axis_index(name)
  return index


def collect_each(
  values: Sequence[Array],
  axes: Sequence[tuple[str, ...]],
  collective: Callable[..., Array],
) -> list[Array]:
  """Collects arrays over their axes, by one collective for each distinct set."""
  result = list(values)
  kinds = [
    (names, varying_axes(x), x.dtype) for x, names in zip(values, axes, strict=True)
  ]
  for kind in sorted(set(kinds), key=str):
    names = kind[0]
    if not names:
      continue
    members = [i for i, other in enumerate(kinds) if other == kind]
    joint = collective(jnp.concatenate([values[i].ravel() for i in members]), names)
    start = 0
    for i in members:
      stop = start + values[i].size
      result[i] = joint[start:stop].reshape(values[i].shape)
      start = stop
  return result


def is_explicitly_sharded(x: Any) -> bool:
  """Returns whether the type of `x` says that a dimension is sharded."""
  sharding = getattr(jax.typeof(x), "sharding", None)
  return any(axis is not None for axis in getattr(sharding, "spec", None) or ())


def replicated(x: Array) -> Array:
  """Replicates an array whose type says that it is sharded."""
  if not is_explicitly_sharded(x):
    return x
  return resharded(x, like=x, spec=jax.sharding.PartitionSpec())


def sharded_like(x: Array, like: Array) -> Array:
  """Reshards an array as the type of another in its shape says."""
  if not is_explicitly_sharded(like):
    return x
  return resharded(x, like, jax.typeof(like).sharding.spec)


def on_mesh_of(x: Array, like: Array) -> Array:
  """Moves an array to the mesh with explicit axes that the type of another names.

  A state that was made before there was a mesh has none, and some operations refuse
  it next to arrays that have one.
  """
  mesh = getattr(getattr(jax.typeof(like), "sharding", None), "mesh", None)
  explicit = jax.sharding.AxisType.Explicit
  if mesh is None or explicit not in mesh.axis_types:
    return x
  if not jax.typeof(x).sharding.mesh.empty:
    return x
  return resharded(x, like, jax.sharding.PartitionSpec())


def resharded(x: Array, like: Array, spec: jax.sharding.PartitionSpec) -> Array:
  """Reshards an array, as a spec says, over the mesh that another's type names."""
  # A spec alone would need `jax.set_mesh`, which frameworks do not all call.
  mesh = jax.typeof(like).sharding.mesh
  return _reshard(x, jax.sharding.NamedSharding(mesh, spec))


# `jax.reshard` since JAX 0.9.
_reshard = getattr(jax, "reshard", None) or jax.sharding.reshard


def on_one_device(arrays: Sequence[Any]) -> bool:
  """Returns whether concatenating the arrays is known to move no data.

  True when there is only one device, inside a fully manual `shard_map` or
  `pmap` (arrays are local there), and for concrete arrays on one device.
  """
  if jax.device_count() == 1:
    return True
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:
    manual = jax.sharding.AxisType.Manual
    return all(kind == manual for kind in mesh.axis_types)
  if _backend.is_traced(arrays):
    return False
  return len({d for x in arrays for d in x.devices()}) == 1


def devices(names: tuple[str, ...]) -> int:
  """Counts the devices that a collective over these axes covers.

  Unbound axes count as 1: states are made outside `shard_map` and `pmap`.
  """
  return math.prod(jax.lax.psum(1, name) for name in names if _is_bound(name))
