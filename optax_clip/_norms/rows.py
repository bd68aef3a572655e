"""How a GPU sums along an axis and reads each element once.

For few columns XLA:GPU has more threads to square elements than to add them up. It
then writes all squares to memory, in a kernel of its own, and reads them back: for AGC
that is twice the bytes of the gradients and of the parameters. On which GPUs, and for
which dtypes and widths, hangs on the price that its model of the device has for the
arithmetic.

Sums of a few rows each then come first, as many as keep all threads busy. A barrier
keeps XLA from making one sum of both.
"""

import math

import jax
from jax import lax
import jax.numpy as jnp

from optax_clip._norms import mesh as _mesh

Array = jax.Array
# How many sums at once keep all threads busy on each vendor's GPUs (NOTES.md).
SUMS = {"gpu": 12 << 10, "rocm": 24 << 10, "oneapi": 24 << 10}
# Of fewer rows than this a first sum does not pay.
_ROWS = 16
# Arrays of at most this many elements are summed at once.
_SMALL = 1 << 16


def total(x: Array, dims: tuple[int, ...], sums: int) -> Array:
  """Sums over some axes, which stay with size 1, `sums` or more at first."""
  first, last = (dims[0], dims[-1] + 1) if dims else (0, 0)
  lead, rows, columns = (
    math.prod(shape) for shape in (x.shape[:first], x.shape[first:last], x.shape[last:])
  )
  parts = min(-(-sums // max(lead * columns, 1)), rows // _ROWS)
  along_rows = last - first == len(dims) and last < x.ndim
  if not along_rows or parts < 2 or x.size <= _SMALL or not _mesh.on_one_device([x]):
    return jnp.sum(x, axis=dims, keepdims=True)
  # As many as divide the rows, if there is such a number near; else zeros fill them up.
  parts = next((n for n in range(parts, 2 * parts) if rows % n == 0), parts)
  each = -(-rows // parts)
  kept = [1 if d in dims else n for d, n in enumerate(x.shape)]
  whole = jnp.pad(
    x.reshape(lead, rows, columns), ((0, 0), (0, parts * each - rows), (0, 0))
  )
  first_sums = jnp.sum(whole.reshape(lead, parts, each, columns), axis=2)
  return jnp.sum(lax.optimization_barrier(first_sums), axis=1).reshape(kept)
