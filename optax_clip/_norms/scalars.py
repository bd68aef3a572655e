"""How arithmetic on the few numbers of each leaf compiles to few kernels.

Nothing here changes a number. It changes the kernels that XLA makes of four things,
in a program; outside of one, each operation has a kernel of its own anyway:

* *Coefficients of whole leaves*, `columns`. XLA compiles one kernel for all leaves of
  a shape if a *scalar* scales them, but one for each leaf if *an element of a vector*
  does: it fuses the slice, whose constant index makes the kernel unlike all others.
  With 300 leaves that is the difference of 0.1 to 3 seconds.
* *Arithmetic on the norms of units*, `each`. Leaf by leaf it is most of what a step
  takes to compile, on every backend. Side by side in one vector it is that of one leaf.
* *Arithmetic on single numbers*, `paired` and `each`: on a TPU every operation on one
  number is a kernel. What learns a limit from one norm has a hundred.
* *Coefficients of units, and of all leaves together*, `each` again. XLA:CPU repeats all
  that they are made of in the kernel of each leaf.

With JAX 0.10.2 `lax.optimization_barrier` prevents none of it: it is gone before XLA
fuses. A reduction does, as XLA materialises its results. One reduction into rows and
one from rows into elements make two kernels, as all rows share theirs.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import itertools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from optax_clip import _backend
from optax_clip._norms import mesh as _mesh
from optax_clip._norms.joint import Joint

Array = jax.Array
# Results of one reduction. With more, kernels compile slowly, and 60 do not fit a GPU's
# shared memory; with fewer, the program is long.
_WIDTH = 16
# And if they are arrays: of twelve, XLA:GPU writes the whole table for each to memory.
_NARROW = 8


def columns(vectors: Sequence[Array]) -> list[list[Array]]:
  """Returns for each i the entries ``vector[i]`` of all vectors, bit for bit.

  Args:
    vectors: arrays of one shape; with more than one axis, an entry is an array.
  """
  count = vectors[0].shape[0]
  # The operands of one reduction have to agree in dtype and in varying mesh axes.
  alike = len({v.dtype for v in vectors}) == 1
  plain = count <= 1 or not alike or not _backend.is_traced(vectors)
  if plain or any(map(_mesh.varying_axes, vectors)):
    return [list(row) for row in zip(*map(_entries, vectors), strict=True)]
  table = jnp.stack(vectors, axis=1)
  # If entries are arrays, leaves share no kernels on a CPU, and a reduction is slow.
  cpu = _by_rows if table.ndim == 2 else _by_entries
  return _backend.by_backend(table, cpu=cpu, gpu=_by_rows, tpu=_by_entries)


def _by_rows(table: Array) -> list[list[Array]]:
  return [_entries(row) for row in _rows(table)]


def _by_entries(table: Array) -> list[list[Array]]:
  # On a TPU each leaf's kernel reads its own scalars, at the cost of no other kernel.
  return [_entries(row) for row in _entries(table)]


def each(
  f: Callable[..., Any],
  arguments: Sequence[tuple[Any, ...]],
  *,
  then: Callable[..., Any] | None = None,
  last: int = 0,
  write: bool = False,
) -> list[Any]:
  """Returns ``[f(*x) for x in arguments]``; one device computes all side by side.

  Args:
    f: an elementwise function from trees of arrays to such a tree.
    arguments: the arguments of each call.
    then: takes the arguments and the result of a call; each then gives a pair.
    last: how many arrays a result of `f` has, if they multiply leaves.
    write: whether the results of `f` go into many kernels.
  """
  arrays = jax.tree.leaves(arguments)
  first = _backend.traced_once(f)
  second = None if then is None else _backend.traced_once(then)

  def of_one(*x: Any, kept: Callable[[Any], Any] = lambda result: result) -> Any:
    result = kept(first(*x))
    return result if second is None else (result, second(*x, result))

  def one_by_one(arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [of_one(*x) for x in arguments]

  def of_leaf(result: Any) -> Any:
    # Vectors are taken apart, by a reduction, before leaves get their entries.
    is_vector = any(x.ndim == 1 for x in jax.tree.leaves(result))
    return result if is_vector else written(result)

  def leaf_by_leaf(arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [of_one(*x, kept=of_leaf) for x in arguments]

  def together(apart: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    return _side_by_side(of_one, arguments, last, apart)

  if not _backend.is_traced(arrays):
    return one_by_one(arguments)
  several = len(arguments) > 1 and _mesh.on_one_device(arrays)
  cpu = leaf_by_leaf if last or write else one_by_one
  if several and _backend.keeps_functions():
    cpu = functools.partial(together, _copied)
  gpu = functools.partial(together, _reduced) if several else one_by_one
  tpu = in_pairs(one_by_one) if all(x.size == 1 for x in arrays) else gpu
  return _backend.by_backend(arguments, cpu=cpu, gpu=gpu, tpu=tpu)


def paired(f: Callable[..., Any]) -> Callable[..., Any]:
  """Makes a function of single numbers one of few kernels on a TPU.

  Args:
    f: a function from trees of arrays to such a tree, which `jax.vmap` accepts.

  Returns:
    A function with the results of `f`, on every backend.
  """

  def found(*trees: Any) -> Any:
    if not _backend.is_traced(trees):
      return f(*trees)
    return _backend.by_backend(*trees, cpu=f, gpu=f, tpu=in_pairs(f))

  return found


def in_pairs(f: Callable[..., Any]) -> Callable[..., Any]:
  """Computes a function with an idle entry beside each number, as a TPU needs it.

  A TPU has a kernel for each operation on an array of one element, and one for a whole
  chain of operations on an array of two.
  """

  def beside(x: Any) -> Array:
    x = jnp.asarray(x)
    # Of ones no arithmetic here makes NaN. Of the number itself, twice, XLA would make
    # one number again. A weak type stays one: integers of Python are not int64.
    idle = jnp.ones_like(x, shape=())
    return lax.pad(x[None], idle, [(0, 1, 0), *[(0, 0, 0)] * x.ndim])

  def found(*trees: Any) -> Any:
    if any(map(_mesh.varying_axes, jax.tree.leaves(trees))):
      # The idle entry would not vary.
      return f(*trees)
    results = jax.vmap(f)(*jax.tree.map(beside, trees))
    return jax.tree.map(lambda x: lax.index_in_dim(x, 0, keepdims=False), results)

  return found


def _copied(joint: Joint, vectors: Sequence[Array]) -> list[list[Array]]:
  """Returns for each i the arrays ``joint.split(vector)[i]`` of all vectors, as copies.

  Else XLA:CPU would repeat what the vectors are made of in each kernel that takes a
  part of them, and compile it anew, as no two of these kernels are alike.
  """
  table, starts = jnp.stack(vectors), joint.starts()
  copy = functools.cache(
    lambda size: _backend.compiled_once(
      lambda table, start: lax.dynamic_slice_in_dim(table, start, size, 1)
    )
  )

  def own(i: int, shape: tuple[int, ...]) -> list[Array]:
    part = copy(math.prod(shape))(table, jnp.int32(starts[i]))
    return [lax.reshape(row, shape) for row in _entries(part)]

  return [own(i, shape) for i, shape in enumerate(joint.shapes)]


def _reduced(joint: Joint, vectors: Sequence[Array]) -> list[list[Array]]:
  """Returns what `_copied` does, by a few reductions for each shape."""
  found: list[list[Array]] = [[] for _ in joint.shapes]
  starts = joint.starts()
  for shape, like in itertools.groupby(joint.order, key=lambda i: joint.shapes[i]):
    members = list(like)
    begin = starts[members[0]]
    end = begin + len(members) * math.prod(shape)
    stacks = [
      lax.reshape(lax.slice(x, (begin,), (end,)), (len(members), *shape))
      for x in vectors
    ]
    for i, row in zip(members, columns(stacks), strict=True):
      found[i] = row
  return found


def _side_by_side(
  of_one: Callable[..., Any],
  arguments: Sequence[tuple[Any, ...]],
  last: int,
  apart: Callable[[Joint, Sequence[Array]], list[list[Array]]],
) -> list[Any]:
  """Calls an elementwise function on vectors of all arguments.

  Args:
    of_one, arguments, last: as in `each`.
    apart: takes the vectors apart whose parts multiply leaves.
  """
  results: list[Any] = [None] * len(arguments)
  kinds: dict[Any, list[int]] = {}
  for i, x in enumerate(arguments):
    leaves, treedef = jax.tree.flatten(x)
    key = treedef, tuple(y.dtype for y in leaves)
    kinds.setdefault(key, []).append(i)
  # One vector for each dtype.
  for (treedef, _), members in kinds.items():
    rows = [jax.tree.leaves(arguments[i]) for i in members]
    joint = Joint.of([jnp.broadcast_shapes(*(y.shape for y in row)) for row in rows])
    vectors = [joint.joined(column) for column in zip(*rows, strict=True)]
    arrays, kind = jax.tree.flatten(of_one(*jax.tree.unflatten(treedef, vectors)))
    own = apart(joint, arrays[:last]) if last else [[] for _ in members]
    for vector in arrays[last:]:
      own = [[*row, x] for row, x in zip(own, joint.split(vector), strict=True)]
    for i, row in zip(members, own, strict=True):
      results[i] = jax.tree.unflatten(kind, row)
  return results


@jax.custom_jvp
def written(tree: Any) -> Any:
  """Returns the arrays, which XLA materialises, as it does results of a reduction.

  Else XLA:CPU would repeat all that follows the last division for each element of the
  leaf that an array multiplies, and compile it anew into every kernel that takes one.

  Args:
    tree: arrays of one shape; two at least, as XLA:GPU fuses a reduction to one.
  """
  arrays, treedef = jax.tree.flatten(tree)
  # As bits: XLA:CPU would turn a sum into a kernel that multiplies the leaf, too.
  bits = list(map(_bits, arrays))
  first = lax.broadcasted_iota(jnp.int32, (2, *bits[0].shape), 0) == 0
  both = [jnp.where(first, x[None], jnp.zeros_like(x)[None]) for x in bits]
  kept = lax.reduce(both, [jnp.zeros((), x.dtype) for x in bits], _either, (0,))
  found = [
    lax.bitcast_convert_type(x, y.dtype) for x, y in zip(kept, arrays, strict=True)
  ]
  return jax.tree.unflatten(treedef, found)


@written.defjvp
def _written_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
  return written(primals[0]), tangents[0]


def _either(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
  return [x | y for x, y in zip(a, b, strict=True)]


def _bits(x: Array) -> Array:
  carrier = jnp.dtype(f"uint{jnp.finfo(x.dtype).bits}")
  return lax.bitcast_convert_type(x, carrier)


@jax.custom_jvp
def _rows(table: Array) -> list[Array]:
  """Returns ``list(table)``."""
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
  """Slices out the entries along axis 0: cheaper to trace than `table[i]`."""
  return [lax.index_in_dim(table, i, keepdims=False) for i in range(table.shape[0])]


def _taken_apart(bits: Array) -> list[Array]:
  """Returns an integer array's entries along axis 0, followed by padding."""
  count, *rest = bits.shape
  width = _WIDTH if len(rest) < 2 else _NARROW
  if count <= width:
    return _along_first(bits)
  size = width
  while size * width < count:
    size *= width
  groups = -(-count // size)
  bits = jnp.pad(bits, [(0, groups * size - count), *[(0, 0) for _ in rest]])
  bits = bits.reshape(groups, size, *rest)
  apart = _backend.traced_once(_taken_apart)
  return [row for group in _along_first(bits) for row in apart(group)]


def _along_first(bits: Array) -> list[Array]:
  """Returns an integer array's few entries along axis 0, by one reduction."""
  count = bits.shape[0]
  place = lax.broadcasted_iota(jnp.int32, bits.shape, 0)
  none = jnp.zeros_like(bits)
  return list(
    lax.reduce(
      [lax.select(place == i, bits, none) for i in range(count)],
      [jnp.zeros((), bits.dtype)] * count,
      _either,
      (0,),
    )
  )
