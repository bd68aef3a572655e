"""How min(s, c) acts on singular values: few directions are contracted, many at once.

All here is one matrix ``[m, n]`` with m <= n, in float32 or better. Three ways, and one
proof at the end:

* *Few above.* The T of the certificate is the filter for what is above. A thin block
  of columns finds these directions, and ``W - L diag(1 - c/s) Lᵀ W`` contracts them. A
  left factor: I - L diag(a) Lᵀ makes no singular value larger, however rough L is.
* *Many above, by a little, on a CPU.* The eigenvectors of ``W Wᵀ`` are all directions,
  each contracted by the length of what lies along it.
* *Many above.* With the polar factor Q and the projector P on what is above,
  ``W - P (W - c Q)``. Published forms take the polar factor of W everywhere, and move
  small singular values by up to an eighth of the limit, where it has not converged.
  Here it stands behind P: below the limit nothing is added, and no error made.
* *Whatever came of it* is looked at once more, as rounded to the leaf's dtype. What is
  still above is multiplied by what the proof leaves.
"""

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from optax_clip._matrices import certificate as _certificate
from optax_clip._matrices import quintics as _quintics
from optax_clip._matrices.certificate import dot
from optax_clip._matrices.certificate import frobenius

Array = jax.Array
# Columns of the block that finds directions above; with more of these, all at once.
_COLUMNS = 16
# How often a block is tried.
_PASSES = 4
# A direction is contracted if its roughness costs at most this share of the limit, or
# is the rounding of float32.
_ACCEPTED, _SMOOTH = 1e-4, 1e-5
# Power steps of the block.
_POWERS = 3
# Up to how many limits eigenvectors serve.
_NEAR = 4
# How near the limit the projector tells above from below, as a share of it.
_ZONE = 1e-2


class Aim(NamedTuple):
  """Holds the precision that is promised for a leaf's dtype; hashable.

  Attributes:
    tolerance: by how much, relative to the limit, the result may exceed it.
    below: how far below the limit is aimed, so that rounding stays below it.
    least: the largest error of one element by underflow.
  """

  tolerance: float
  below: float
  least: float


# From a matrix to its value in the leaf's dtype, as float32 or better.
Rounded = Callable[[Array], Array]


def aim_for(dtype: Any) -> Aim:
  """Returns the promise: 1e-3, and in bfloat16 and 8 bits half their epsilon."""
  info = jnp.finfo(dtype)
  eps = float(info.eps)
  wide = jnp.finfo(jnp.float64 if info.dtype == jnp.float64 else jnp.float32)
  # Arithmetic flushes its own subnormals; those of narrower dtypes are rounded.
  is_flushed = info.tiny <= wide.tiny
  least = info.tiny if is_flushed else info.smallest_subnormal
  return Aim(max(1e-3, eps / 2), max(eps / 2, 8 * float(wide.eps)), float(least))


class _State(NamedTuple):
  """Holds a matrix on its way.

  Attributes:
    matrix: as it is now.
    turn: i32[], how often it was acted on.
    first: the bound of the first look.
    done: whether the matrix is proven.
  """

  matrix: Array
  turn: Array
  first: Array
  done: Array


def clipped(
  matrix: Array, limit: Array, aim: Aim, rounded: Rounded, least: Array
) -> tuple[Array, Array]:
  """Clips the singular values of a matrix at a limit: looks, acts, and looks again.

  Args:
    matrix: f32 or f64 ``[m, n]``, m <= n, of a 2-norm near 1; finite.
    limit: f[], from 2^-22 up.
    aim: the promised precision.
    rounded: rounds a matrix to the leaf's dtype.
    least: `Aim.least`, in units of the matrix.

  Returns:
    The new matrix; and the proven bound of the old one's largest singular value over
    the limit. Where this bound is `within`, the old matrix is returned.
  """
  goal = limit * (1 - aim.below)

  def act(state: _State, look: _certificate.Look) -> _State:
    top = look.bound * limit
    operands = (state.matrix, look.filter, goal, top, state.turn)
    new, turn = _few(*operands)
    # Not even that was enough: less of it is.
    last = state.turn > _PASSES
    less = functools.partial(shortened, matrix, limit, aim, rounded, least)
    new = lax.cond(last, less, lambda x, _: x, new, top)
    return state._replace(matrix=new, turn=turn + 1, done=last)

  def step(state: _State) -> _State:
    look = _certificate.look(rounded(state.matrix), limit, aim.tolerance)
    first = jnp.where(state.turn == 0, look.bound, state.first)
    state = state._replace(first=first)
    done = within(look.bound, aim)
    return lax.cond(done, lambda x, _: x._replace(done=~x.done), act, state, look)

  # From the matrix, so that over a mesh its type varies as the matrix does.
  zero = jnp.sum(matrix) * 0
  start = _State(matrix, zero.astype(jnp.int32), zero, zero != 0)
  end = lax.while_loop(lambda state: ~state.done, step, start)
  return end.matrix, end.first


def first(matrix: Array, limit: Array, aim: Aim, rounded: Rounded) -> Array:
  """Returns the proven bound of the largest singular value over the limit."""
  return _certificate.look(rounded(matrix), limit, aim.tolerance, fixed=True).bound


def once(
  matrix: Array,
  bound: Array,
  limit: Array,
  aim: Aim,
  rounded: Rounded,
  least: Array,
) -> Array:
  """Clips the singular values of a matrix at a limit, without a branch.

  All at once, as small QRs are slow on GPUs and TPUs. One more look decides by how much
  the result is shortened, if at all.

  Args:
    matrix: as in `clipped`.
    bound: what `first` found.
    limit: as in `clipped`.
    aim: as there.
    rounded: as there.
    least: as there.
  """
  new = all_at_once(matrix, limit * (1 - aim.below), bound * limit)
  new = jnp.where(within(bound, aim), matrix, new)
  return proven(matrix, new, limit, aim, rounded, least, fixed=True)


def proven(
  old: Array,
  new: Array,
  limit: Array,
  aim: Aim,
  rounded: Rounded,
  least: Array,
  *,
  fixed: bool = False,
) -> Array:
  """Looks at a new matrix, and shortens it if it is not proven to be within."""
  look = _certificate.look(rounded(new), limit, aim.tolerance, fixed=fixed)
  less = shortened(old, limit, aim, rounded, least, new, look.bound * limit)
  return jnp.where(within(look.bound, aim), new, less)


def in_place(act: Callable[[Array], Array], x: Array, needed: Array) -> Array:
  """Acts on an array if that is needed, by a loop of at most one turn.

  A loop leaves its array in place, where a branch would write a copy of it.
  """

  def turn(state: tuple[Array, Array]) -> tuple[Array, Array]:
    x, goes_on = state
    return act(x), goes_on & ~goes_on

  return lax.while_loop(lambda state: state[1], turn, (x, needed))[0]


def within(bound: Array, aim: Aim) -> Array:
  """Returns whether a bound over the limit proves the promise; false for NaN."""
  return bound <= 1 + aim.tolerance


def _few(
  matrix: Array, filter: Array, goal: Array, top: Array, turn: Array
) -> tuple[Array, Array]:
  """Contracts few directions, some times; and clips all at once if there are more.

  Returns:
    The new matrix, and the turn that this was: the last but one after all at once.
  """
  new, is_full = lax.cond(
    turn < _PASSES,
    lambda x, y: contracted(x, y, goal, turn),
    lambda x, _: (x, turn <= _PASSES),
    *(matrix, filter),
  )
  # All at once begins with what was: what the block made of it is rougher.
  new = jnp.where(is_full, matrix, new)
  turn = jnp.where(is_full, _PASSES, turn)
  if matrix.shape[0] <= _COLUMNS:
    return new, turn  # The block has room for all directions.
  new = lax.cond(is_full, lambda x: _many(x, goal, top), lambda x: x, new)
  return new, turn


def _many(matrix: Array, goal: Array, top: Array) -> Array:
  """Clips all singular values at once, on a CPU.

  Eigenvectors of ``W Wᵀ`` cost a fourth of two sign functions there. Their errors grow
  with the square of the largest singular value: they serve up to some limits.
  """
  return lax.cond(
    top <= _NEAR * goal,
    lambda x: by_eigenvectors(x, goal),
    lambda x: all_at_once(x, goal, top),
    matrix,
  )


def by_eigenvectors(matrix: Array, goal: Array) -> Array:
  """Contracts all directions above a goal, by the eigenvectors of ``W Wᵀ``.

  Rough eigenvectors make rough directions, and no singular value larger: the length of
  what lies along each says how much of it is above, not its eigenvalue.
  """
  vectors = jnp.linalg.eigh(dot(matrix, matrix.T), symmetrize_input=False)[1]
  along = dot(vectors.T, matrix)
  sizes = jnp.sqrt(jnp.sum(jnp.square(along), axis=1))
  share = jnp.where(sizes > goal, 1 - goal / jnp.where(sizes > 0, sizes, 1), 0)
  return matrix - dot(vectors * share[None], along)


def contracted(
  matrix: Array, filter: Array, goal: Array, seed: Array
) -> tuple[Array, Array]:
  """Contracts the directions above a goal that a thin block of columns finds.

  Returns:
    The new matrix, and whether all columns found one, so that there may be more.
  """
  rows, dtype = matrix.shape[0], matrix.dtype
  width = min(_COLUMNS, rows)
  start = _certificate.columns(rows, width, seed, dtype)
  peak = jnp.maximum(jnp.max(jnp.abs(filter)), 1)
  basis = jnp.linalg.qr(dot(filter / peak, start))[0]
  # Power steps on the matrix itself, whose condition is the root of the filter's.
  for _ in range(_POWERS):
    basis = jnp.linalg.qr(dot(matrix, dot(matrix.T, basis)))[0]
  block = dot(basis.T, matrix)
  # By a QR of the block, not by its square: a spike of 1e4 would swallow the others.
  wide, small = jnp.linalg.qr(block.T)
  turn, sizes, back = jnp.linalg.svd(small.T)
  left, right = dot(basis, turn), dot(wide, back.T)
  safe = jnp.where(sizes > 0, sizes, 1)
  rest = dot(matrix, right) - left * sizes[None]
  roughness = jnp.sqrt(jnp.sum(jnp.square(rest), axis=0)) / safe
  above = jnp.maximum(sizes - goal, 0)
  good = (roughness * above <= _ACCEPTED * goal) | (roughness <= _SMOOTH)
  share = jnp.where(good & (sizes > 0), above / safe, 0)
  new = matrix - dot(left * share[None], dot(turn.T, block))
  return new, (sizes[-1] > goal) & (width < rows)


def all_at_once(matrix: Array, goal: Array, top: Array) -> Array:
  """Clips all singular values by two sign functions: ``W - P (W - c Q)``.

  Args:
    matrix: ``[m, n]``, m <= n.
    goal: the limit c.
    top: a bound of the largest singular value; the 2-norm counts where it is smaller.
  """
  identity = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
  largest = frobenius(matrix) * (1 + 1e-5)
  largest = jnp.where(top < largest, top, largest)
  ratio = jnp.maximum(largest / goal, 1)
  polar = _polar(matrix / (ratio * goal), 1 / ratio)
  # Eigenvalues s / c - 1, with errors of the size of s / c and not of its square.
  above = _symmetric(dot(polar, matrix.T) / goal) - identity
  most = jnp.maximum(ratio - 1, 1) * (1 + 1e-5)
  projector = (_sign(above / most, _ZONE / most) + identity) / 2
  return matrix - dot(projector, matrix - goal * polar)


def _polar(x: Array, low: Array) -> Array:
  """Returns the polar factor, for singular values from `low` to 1."""

  def step(x: Array, row: Array) -> Array:
    square = dot(x, x.T)
    return row[0] * x + dot(row[1] * square + row[2] * dot(square, square), x)

  return _quintics.composed(step, x, low)


def _sign(x: Array, low: Array) -> Array:
  """Returns the sign of a symmetric matrix, for eigenvalues from `low` to 1."""

  def step(x: Array, row: Array) -> Array:
    square = dot(x, x)
    odd = row[0] * x + dot(row[1] * square + row[2] * dot(square, square), x)
    return _symmetric(odd)

  return _quintics.composed(step, x, low)


def _symmetric(x: Array) -> Array:
  return (x + x.T) / 2


def shortened(
  old: Array,
  limit: Array,
  aim: Aim,
  rounded: Rounded,
  least: Array,
  new: Array,
  top: Array,
) -> Array:
  """Returns so much of a matrix that no rounding brings it above the limit.

  Rounding each element by a share u of it moves the largest singular value by u times
  the 2-norm at most, and underflow by `least` for each element.

  Args:
    old: the matrix as it was.
    limit: f[].
    aim: the promised precision.
    rounded: rounds a matrix to the leaf's dtype.
    least: `Aim.least`, in units of the matrix.
    new: the matrix as it is.
    top: a bound of its largest singular value, when rounded.
  """
  goal = limit * (1 - 2 * aim.below)
  lost = least * float(old.size) ** 0.5
  bound = top + 2 * aim.below * frobenius(new)
  # The 2-norm is a bound too. Near the dtype's subnormals, what would be rounded away
  # from zero becomes zero, so that no rounding adds to it.
  plain = old * (goal / jnp.maximum(frobenius(old), goal))
  plain = jnp.where(jnp.abs(rounded(plain)) > jnp.abs(plain), 0, plain)
  usable = (lost < goal / 4) & jnp.isfinite(bound)
  short = (goal - lost) / jnp.where(bound > 0, bound, 1)
  return jnp.where(usable, new * short, plain)
