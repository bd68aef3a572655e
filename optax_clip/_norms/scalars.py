"""Lays arithmetic on the few numbers of each leaf out, so that XLA compiles it well.

Nothing here changes a number. It changes which kernels XLA makes, of three things:

* *Coefficients of whole leaves*, `columns`. XLA compiles one kernel for all leaves of
  a shape that are scaled by a *scalar*, but one for each leaf that is scaled by *an
  element of a vector*: it moves the slice into the kernel, where its constant index
  makes the kernel unlike all others. With 300 leaves that is the difference of 0.1 to
  3 seconds.
* *Arithmetic on the norms of units*, `each`. Leaf by leaf it takes XLA:GPU most of the
  time to compile a step.
* *Coefficients of units*, `each` again. XLA:CPU does all that follows their last
  division once for each element of the leaf.

`lax.optimization_barrier` prevents none of it, as it is gone before XLA fuses. A
reduction does: XLA writes its results down. One into rows and one into the elements of
each row are two kernels, as all rows share theirs.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from optax_clip import _backend
from optax_clip._norms import mesh as _mesh

Array = jax.Array
# Results of a reduction. Kernels are slow to compile with more, and with 60 do not fit
# the shared memory of a GPU; the program is long with fewer.
_WIDTH = 16


def columns(vectors: Sequence[Array]) -> list[list[Array]]:
  """For each i the entries ``vector[i]`` of all vectors, bit for bit.

  Args:
    vectors: of one shape. Where they have more than one axis, an entry is an array.
  """
  count = vectors[0].shape[0]
  # Within a reduction dtypes have to agree, and what varies over which mesh axes.
  alike = len({v.dtype for v in vectors}) == 1
  if count <= 1 or not alike or any(map(_mesh.varying_axes, vectors)):
    return [list(row) for row in zip(*map(_entries, vectors), strict=True)]
  table = jnp.stack(vectors, axis=1)
  # Kernels of a CPU are not shared by leaves, and there a reduction is slow.
  cpu = _by_rows if table.ndim == 2 else _by_entries
  return _backend.by_backend(table, cpu=cpu, gpu=_by_rows, tpu=_by_entries)


def _by_rows(table: Array) -> list[list[Array]]:
  return [_entries(row) for row in _rows(table)]


def _by_entries(table: Array) -> list[list[Array]]:
  # Each leaf's kernel on a TPU reads its own scalars: no kernel of theirs.
  return [_entries(row) for row in _entries(table)]


def each(
  f: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], *, is_last: bool = False
) -> list[Any]:
  """``[f(*x) for x in arguments]``; on one GPU, of all of one shape at once.

  XLA's time to compile for a GPU grows with the number of operations, and that of AGC
  with the arithmetic on the norms of the units of each leaf: four times as long as with
  optax's. A TPU would move the norms to lay them side by side.

  Args:
    f: of trees of arrays to such a tree, of the same shapes for the same shapes.
    arguments: for each call its arguments.
    is_last: whether leaves are multiplied with the results.
  """
  arrays = jax.tree.leaves(arguments)

  def one_by_one(arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [f(*x) for x in arguments]

  def written(arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    return jax.tree.map(_written, one_by_one(arguments))

  def together(arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    return in_stacks(jax.vmap(f), f, arguments, is_last)

  alike = len(by_shape(arguments)) < len(arguments) and _mesh.on_one_device(arrays)
  cpu = written if is_last and any(x.ndim > 1 for x in arrays) else one_by_one
  gpu = together if alike else one_by_one
  return _backend.by_backend(arguments, cpu=cpu, gpu=gpu, tpu=one_by_one)


def by_shape(arguments: Sequence[Any]) -> list[list[int]]:
  """The numbers of the arguments that are alike in structure, shapes and dtypes."""
  found: dict[Any, list[int]] = {}
  for i, x in enumerate(arguments):
    leaves, treedef = jax.tree.flatten(x)
    key = treedef, tuple((jnp.shape(y), jnp.result_type(y)) for y in leaves)
    found.setdefault(key, []).append(i)
  return list(found.values())


def in_stacks(
  of_stack: Callable[..., Any],
  of_one: Callable[..., Any],
  arguments: Sequence[tuple[Any, ...]],
  is_last: bool = False,
) -> list[Any]:
  """What a function makes of stacks of the arguments that are alike, taken apart.

  Args:
    of_stack: the function, of arguments with one more axis in front.
    of_one: the function for what nothing else is like.
    arguments: for each call its arguments.
    is_last: whether leaves are multiplied with the results.
  """
  results: list[Any] = [None] * len(arguments)
  for members in by_shape(arguments):
    if len(members) == 1:
      results[members[0]] = of_one(*arguments[members[0]])
      continue
    stacks = jax.tree.map(lambda *x: jnp.stack(x), *(arguments[i] for i in members))
    arrays, treedef = jax.tree.flatten(of_stack(*stacks))
    parts = columns(arrays) if is_last else zip(*map(_entries, arrays), strict=True)
    for i, own in zip(members, parts, strict=True):
      results[i] = jax.tree.unflatten(treedef, own)
  return results


@jax.custom_jvp
def _written(x: Array) -> Array:
  """The same array, which XLA:CPU writes down if it has an entry for each unit.

  It would compute it anew for each element of the leaf that is multiplied with it:
  all that follows the last division.
  """
  if x.ndim < 2:
    return x
  # As bits: of a sum XLA:CPU would make a kernel that multiplies the leaf, too.
  bits = _bits(x)
  first = lax.broadcasted_iota(jnp.int32, (2, *x.shape), 0) == 0
  both = jnp.where(first, bits[None], jnp.zeros_like(bits)[None])
  kept = lax.reduce(both, jnp.zeros((), bits.dtype), lax.bitwise_or, (0,))
  return lax.bitcast_convert_type(kept, x.dtype)


@_written.defjvp
def _written_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
  return _written(primals[0]), tangents[0]


def _bits(x: Array) -> Array:
  carrier = jnp.dtype(f"uint{jnp.finfo(x.dtype).bits}")
  return lax.bitcast_convert_type(x, carrier)


@jax.custom_jvp
def _rows(table: Array) -> list[Array]:
  """``list(table)``."""
  # As bits: a sum with zeros would flush subnormals.
  found = _taken_apart(_bits(table))[: table.shape[0]]
  return [lax.bitcast_convert_type(x, table.dtype) for x in found]


@_rows.defjvp
def _rows_jvp(
  primals: tuple[Array], tangents: tuple[Array]
) -> tuple[list[Array], list[Array]]:
  (table,), (tangent,) = primals, tangents
  return _rows(table), _entries(tangent)


def _entries(table: Array) -> list[Array]:
  """The entries along the first axis, as slices: cheaper to trace than `table[i]`."""
  return [lax.index_in_dim(table, i, keepdims=False) for i in range(table.shape[0])]


def _taken_apart(bits: Array) -> list[Array]:
  """The entries of an array of integers along its first axis, and some more."""
  count, *rest = bits.shape
  if count <= _WIDTH:
    return _along_first(bits)
  size = _WIDTH
  while size * _WIDTH < count:
    size *= _WIDTH
  groups = -(-count // size)
  bits = jnp.pad(bits, [(0, groups * size - count), *[(0, 0) for _ in rest]])
  bits = bits.reshape(groups, size, *rest)
  return [row for group in _along_first(bits) for row in _taken_apart(group)]


def _along_first(bits: Array) -> list[Array]:
  """The entries of an array of integers along its first axis, of a few."""
  count = bits.shape[0]
  place = lax.broadcasted_iota(jnp.int32, bits.shape, 0)
  none = jnp.zeros_like(bits)
  return list(
    lax.reduce(
      [lax.select(place == i, bits, none) for i in range(count)],
      [jnp.zeros((), bits.dtype)] * count,
      lambda a, b: [x | y for x, y in zip(a, b, strict=True)],
      (0,),
    )
  )
