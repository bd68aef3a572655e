"""Brings one matrix of a leaf to units in which its 2-norm is near 1, and back."""

from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from optax_clip._matrices import hard as _hard
from optax_clip._matrices import view as _view
from optax_clip._norms import extended as _extended
from optax_clip._norms import power_sums as _power_sums
from optax_clip._norms.extended import Extended

Array = jax.Array
# The largest ratio of norm and limit that float32 resolves: below, limits are raised
# and the result is lowered.
_DEPTH = 22
# What `strict` allows for the errors of a norm and of a limit, in epsilons.
NORM_EPSILONS = 16


class Units(NamedTuple):
  """Holds powers of two between a leaf and what is computed with, and its limit there.

  Attributes:
    view: which matrix this is of a leaf.
    dtype: of the leaf.
    exponent: i32[], of the unit: the matrix is divided by 2 to it.
    raised: i32[], by how many powers of two the limit is raised.
    goal: f[], the limit, in these units and raised.
    size: f[], the measured norm in these units, in [1/2, 1).
  """

  view: _view.View
  dtype: Any
  exponent: Array
  raised: Array
  goal: Array
  size: Array

  @property
  def aim(self) -> _hard.Aim:
    """The precision that is promised for the leaf's dtype."""
    return _hard.aim_for(self.dtype)

  @property
  def least(self) -> Array:
    """The largest error of one element by underflow, here."""
    aim = jnp.asarray(self.aim.least, self.goal.dtype)
    return _scaled(aim, self.raised - self.exponent)

  def inside(self, matrix: Array) -> Array:
    """Brings a device's part of a matrix here: ``[m, n]`` with m <= n, all of it."""
    whole = real(_view.gathered(matrix, self.view)).astype(self.goal.dtype)
    whole = _scaled(whole, -self.exponent)
    return whole.T if self._is_turned() else whole

  def outside(self, new: Array, like: Array) -> Array:
    """Inverts `inside`, and lowers what was raised."""
    new = _scaled(new, self.exponent - self.raised)
    new = new.T if self._is_turned() else new
    new = complex_like(new, self.view.shape, self.dtype)
    return _view.scattered(new, like, self.view)

  def rounded(self, x: Array) -> Array:
    """Rounds a matrix to the leaf's dtype, here."""
    # As the leaf will hold it; but in the leaf's own dtype there is nothing to round.
    there = _scaled(x, self.exponent - self.raised)
    there = there.astype(jnp.finfo(self.dtype).dtype)
    return _scaled(there.astype(x.dtype), self.raised - self.exponent)

  def _is_turned(self) -> bool:
    rows, columns = self.view.shape
    return rows > columns


def of(
  view: _view.View, dtype: Any, norm: Extended, limit: Array, *, strict: bool
) -> Units:
  """Finds the units of a matrix whose 2-norm, or a bound of it, is finite."""
  wide = _power_sums.accumulator(dtype)
  value, unit, limit = (x.astype(wide) for x in (*norm, limit))
  # In units of powers of two: the matrix near 1, and limits from 2^-22 up.
  size, exponent = jnp.frexp(value)
  exponent = exponent + _exponent(unit)
  ratio = _extended.quotient(jnp.where(limit > 0, limit, 1), Extended(value, unit))
  share, depth = jnp.frexp(ratio.value)
  depth = depth + _exponent(ratio.unit)
  raised = jnp.maximum(-_DEPTH - depth, 0)
  goal = size * share * _power(jnp.minimum(depth + raised, 60), wide)
  if strict:
    tolerance = _hard.aim_for(dtype).tolerance
    goal = goal / (1 + tolerance) * (1 - NORM_EPSILONS * float(jnp.finfo(wide).eps))
  return Units(view, dtype, exponent, raised, goal, size)


def real(x: Array) -> Array:
  """Writes a complex matrix as a real one of twice the rows and columns.

  Its singular values are the same, each twice.
  """
  if not jnp.iscomplexobj(x):
    return x
  re, im = x.real, x.imag
  return jnp.block([[re, -im], [im, re]])


def complex_like(x: Array, shape: tuple[int, int], dtype: Any) -> Array:
  """Inverts `real`, and casts to the leaf's dtype."""
  if not jnp.issubdtype(dtype, jnp.complexfloating):
    return x.astype(dtype)
  rows, columns = shape
  part = jnp.finfo(dtype).dtype
  return lax.complex(x[:rows, :columns].astype(part), x[rows:, :columns].astype(part))


def _exponent(power: Array) -> Array:
  """Returns n of ``2 ** n``."""
  return jnp.frexp(power)[1] - 1


def _power(exponent: Array, dtype: Any) -> Array:
  """Returns ``2 ** exponent``, within the normal floats."""
  info = jnp.finfo(dtype)
  bounded = jnp.clip(exponent, int(info.minexp), int(info.maxexp) - 1)
  return jnp.ldexp(jnp.ones((), dtype), bounded)


def _scaled(x: Array, exponent: Array) -> Array:
  """Multiplies by ``2 ** exponent``, in two steps, as one may leave the range."""
  half = exponent // 2
  return x * _power(half, x.dtype) * _power(exponent - half, x.dtype)
