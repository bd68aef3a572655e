"""Which matrices a leaf holds: its rows, its columns, and how often; on any mesh."""

from collections.abc import Callable
import math
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from optax_clip._norms import mesh as _mesh
from optax_clip._norms.layout import Place
from optax_clip._trees import axes as _axes

Array = jax.Array


class View(NamedTuple):
  """Says how a leaf is a stack of matrices; hashable.

  Attributes:
    batch: the dimensions that count matrices.
    rows: those that count rows.
    columns: those that count columns.
    shape: of one matrix, on all devices together.
    cut: how a mesh divides one matrix, in dimensions ``[*rows, *columns]``.
  """

  batch: tuple[int, ...]
  rows: tuple[int, ...]
  columns: tuple[int, ...]
  shape: tuple[int, int]
  cut: _mesh.Cut

  def is_vector(self) -> bool:
    """Returns whether the one singular value of a matrix is its 2-norm."""
    return min(self.shape) <= 1


def of(leaf: Any, place: Place) -> View:
  """Finds the matrices of a leaf, which a norm measures each.

  Raises:
    ValueError: if a norm is that of a unit, or if a mesh divides a matrix and nothing
      says along which dimension.
  """
  rank = jnp.ndim(leaf)
  dims = tuple(range(rank)) if place.dims is None else tuple(sorted(place.dims))
  whole = tuple(jnp.shape(leaf)) if place.shape is None else place.shape
  rows = place.rows
  if rows is None:
    rows = tuple(dims[i] for i in default_rows([whole[d] for d in dims]))
  columns = tuple(d for d in dims if d not in rows)
  if not place.layers and place.rows is None and len(dims) < rank:
    raise ValueError(
      "Singular values are of a matrix, and these norms are of its units. Measure with"
      " measures.layer_norm() or measures.spectral_norm()."
    )
  order = (*rows, *columns)
  pieces = dict(place.pieces.between)
  if place.cut.within and not any(d in pieces for d in order):
    raise ValueError(
      "A matrix may be cut along any dimension over the mesh axes"
      f" {place.cut.within}: pass specs=, as in_specs of shard_map."
    )
  between = tuple((i, pieces[d]) for i, d in enumerate(order) if d in pieces)
  shape = math.prod(whole[d] for d in rows), math.prod(whole[d] for d in columns)
  batch = tuple(d for d in range(rank) if d not in dims)
  return View(batch, rows, columns, shape, _mesh.Cut((), between))


def default_rows(shape: Any) -> tuple[int, ...]:
  """Returns the axes of a leaf's rows by rank: what feeds one output, as in AGC."""
  return (
    tuple(range(len(shape) - 1)) if len(shape) > 5 else _axes.unit_axes(shape, None)
  )


def over_matrices(
  f: Callable[..., tuple[Array, ...]], view: View, leaf: Array, *scalars: Array
) -> tuple[Array, ...]:
  """Maps ``f(matrix, *scalars) -> matrix, *scalars`` over the matrices of a leaf.

  One after the other: each takes the shortest way that is enough for it, and one needs
  the memory.

  Args:
    f: of one matrix as this device holds it, in dimensions ``[*rows, *columns]``.
    view: which matrices these are.
    leaf: all of them.
    *scalars: for each, an array that has size 1 in the dimensions of the matrices, or
      a scalar.
  """
  order = (*view.batch, *view.rows, *view.columns)
  inverse = tuple(order.index(d) for d in range(leaf.ndim))
  moved = _mesh.replicated(leaf).transpose(order)
  counted = moved.shape[: len(view.batch)]
  count = math.prod(counted)
  like = [jnp.shape(x) for x in scalars]
  if not view.batch:
    new, *found = f(moved, *(jnp.reshape(x, ()) for x in scalars))
  else:
    each = [
      jnp.broadcast_to(jnp.reshape(x, -1), (count,))
      if jnp.size(x) == 1
      else jnp.reshape(_mesh.replicated(x), (count,))
      for x in scalars
    ]
    stack = moved.reshape(count, *moved.shape[len(view.batch) :])
    new, *found = lax.map(lambda x: f(*x), (stack, *each))
  full = next((shape for shape in like if shape), ())
  new = _mesh.sharded_like(new.reshape(moved.shape).transpose(inverse), leaf)
  return new, *(jnp.reshape(x, full) for x in found)


def gathered(matrix: Array, view: View) -> Array:
  """Returns the whole of a matrix ``[*rows, *columns]`` as one ``[m, n]``.

  Summed over devices that hold zeros elsewhere: its type then says that all hold the
  same.
  """
  return _mesh.whole(matrix, view.cut).reshape(view.shape)


def scattered(whole: Array, like: Array, view: View) -> Array:
  """Inverts `gathered`: returns this device's part of a matrix ``[m, n]``."""
  devices = {dim: _mesh.devices(names) for dim, names in view.cut.between}
  shape = [n * devices.get(i, 1) for i, n in enumerate(like.shape)]
  return _mesh.local(whole.reshape(shape), view.cut)
