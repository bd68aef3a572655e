"""From vectors to what each leaf needs of them, such that XLA compiles few kernels.

XLA compiles one kernel for all leaves of a shape that are scaled by a *scalar*,
but one for each leaf that is scaled by *an element of a vector*: it moves the
slice into the kernel, where its constant index makes the kernel unlike all
others. With 300 leaves that is the difference of 0.1 to 3 seconds.
`lax.optimization_barrier` does not prevent it, as it is gone before XLA fuses.

A reduction with many results does: XLA has to write its results down, and each
leaf sees one of its own. One into rows and one into the elements of each row are
two kernels, as all rows share theirs.
"""

from collections.abc import Sequence

import jax
from jax import lax
import jax.numpy as jnp

from optax_clip import _backend
from optax_clip import _mesh

Array = jax.Array

# Elements of a row. Kernels are slow to compile with more results, and the
# program is long with more rows.
_WIDTH = 16


def columns(vectors: Sequence[Array]) -> list[list[Array]]:
  """For each i the scalars ``vector[i]`` of all vectors, bit for bit."""
  count = vectors[0].size
  # Within a reduction dtypes have to agree, and what varies over which mesh axes.
  alike = len({v.dtype for v in vectors}) == 1
  if count <= 1 or not alike or any(map(_mesh.varying_axes, vectors)):
    return [list(row) for row in zip(*map(_entries, vectors), strict=True)]
  table = jnp.stack(vectors, axis=1)
  return _backend.by_backend(table, cpu=_by_rows, gpu=_by_rows, tpu=_by_entries)


def _by_rows(table: Array) -> list[list[Array]]:
  return [_entries(row) for row in _rows(table)]


def _by_entries(table: Array) -> list[list[Array]]:
  # Each leaf's kernel on a TPU reads its own scalars: no kernel of theirs.
  return [_entries(row) for row in _entries(table)]


@jax.custom_jvp
def _rows(table: Array) -> list[Array]:
  """``list(table)``."""
  # As bits: a sum with zeros would flush subnormals.
  carrier = jnp.dtype(f"uint{jnp.finfo(table.dtype).bits}")
  bits = lax.bitcast_convert_type(table, carrier)
  count, width = table.shape
  groups = -(-count // _WIDTH)
  bits = jnp.pad(bits, ((0, groups * _WIDTH - count), (0, 0)))
  bits = bits.reshape(groups, _WIDTH, width)
  found = [row for group in _along_first(bits) for row in _along_first(group)]
  return [lax.bitcast_convert_type(x, table.dtype) for x in found[:count]]


@_rows.defjvp
def _rows_jvp(
  primals: tuple[Array], tangents: tuple[Array]
) -> tuple[list[Array], list[Array]]:
  (table,), (tangent,) = primals, tangents
  return _rows(table), _entries(tangent)


def _entries(table: Array) -> list[Array]:
  """The entries along the first axis, as slices: cheaper to trace than `table[i]`."""
  return [lax.index_in_dim(table, i, keepdims=False) for i in range(table.shape[0])]


def _along_first(bits: Array) -> list[Array]:
  """The entries of an array of integers along its first axis."""
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
