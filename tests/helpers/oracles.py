"""Float64 NumPy (and exact) transcriptions that the tests compare with."""

from fractions import Fraction
import math

import jax
import ml_dtypes
import numpy as np

LOW = ("float16", "bfloat16", "float32")


def wide(x):
  """An array in float64 or complex128, whatever its dtype: exact."""
  x = np.asarray(x)
  return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def wide_leaves(tree):
  """The leaves of a tree in float64."""
  return [wide(x) for x in jax.tree.leaves(tree)]


def norm(x, ord=2.0, axis=None):
  """The norm of one array over `axis` (kept with size 1) or over everything.

  In units of a power of two near the largest element, in extended precision
  where the machine has it: right for every finite float64.
  """
  size = np.abs(wide(x)).astype(np.longdouble)
  axis = tuple(range(size.ndim)) if axis is None else axis
  peak = size.max(axis=axis, keepdims=True, initial=0)
  if ord == math.inf:
    return peak.astype(np.float64)
  # NaN and inf must reach the sum.
  ok = np.isfinite(peak) & (peak > 0)
  unit = np.ldexp(np.longdouble(1), np.frexp(np.where(ok, peak, 1))[1])
  scaled = size / unit
  total = (scaled**ord).sum(axis=axis, keepdims=True)
  return (total ** (np.longdouble(1) / ord) * unit).astype(np.float64)


def tree_norm(leaves, ord=2.0):
  """The norm over all elements of a list of arrays, a float."""
  if not leaves:
    return 0.0
  return norm(np.concatenate([wide(x).ravel() for x in leaves]), ord).item()


def exact_square(leaves):
  """The sum of squares of all elements as a fraction: no rounding at all."""
  total = Fraction(0)
  for leaf in leaves:
    x = wide(leaf).ravel()
    for part in (x.real, x.imag) if x.dtype.kind == "c" else (x,):
      total += _exact_square(part)
  return total


def _exact_square(x):
  # Mantissas are integers below 2^53: sum their squares by exponent.
  x = x[x != 0]
  if not x.size:
    return Fraction(0)
  mantissa, exponent = np.frexp(x)
  integers = np.ldexp(mantissa, 53).astype(np.int64).tolist()
  least = int(exponent.min())
  total = sum(
    (m << (e - least)) ** 2 for m, e in zip(integers, exponent.tolist(), strict=True)
  )
  return Fraction(total) * Fraction(2) ** (2 * (least - 53))


def epsilon(dtype):
  """One unit in the last place of 1, of the real dtype behind a dtype."""
  return float(finfo(dtype).eps)


def finfo(dtype):
  """`numpy.finfo`, also of bfloat16."""
  return ml_dtypes.finfo(np.dtype(dtype))


def ulps(x):
  """The spacing of the dtype of `x` at each of its elements, in float64."""
  info = finfo(x.dtype)
  size = np.maximum(np.abs(wide(x)), float(info.tiny))
  return np.ldexp(1.0, np.frexp(size)[1] - 1 - info.nmant)


def bits(x):
  """An array as integers, so that -0.0, subnormals and NaNs are told apart."""
  x = np.ascontiguousarray(np.asarray(x))
  return x.reshape(-1).view(np.uint8)


def assert_identical(old, new):
  """Equal trees, bit for bit, with equal structure, shapes and dtypes."""
  assert jax.tree.structure(old) == jax.tree.structure(new)
  for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
    assert np.shape(a) == np.shape(b)
    assert np.asarray(a).dtype == np.asarray(b).dtype
    np.testing.assert_array_equal(bits(a), bits(b))
