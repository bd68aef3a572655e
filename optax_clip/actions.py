"""What happens to updates that exceed their limit: they are scaled or clamped.

Each function returns an `Action` for `optax_clip.clip_with`. No other code of the
package writes to updates. An action computes one coefficient from the few norms, in
float32; it then multiplies each leaf once, in float32, and casts it back. (A division
instead makes XLA materialise a second copy of all gradients: it does not repeat a
division in the several places where an optimizer uses its gradients.)
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from optax_clip import _validate
from optax_clip._algebra.types import Action
from optax_clip._matrices import clip as _matrices
from optax_clip._norms import extended as _extended
from optax_clip._norms import power_sums as _power_sums
from optax_clip._norms import rounding as _rounding
from optax_clip._norms.extended import Extended
from optax_clip._types import Scalar

Array = jax.Array

__all__ = [
  "clamp",
  "clip_singular_values",
  "floored",
  "normalize",
  "rational",
  "rescale",
  "rescale_elements",
  "rescale_to_unit",
  "soft_clip_singular_values",
  "square_root",
  "tanh",
]
# `strict` undershoots the limit by this many epsilons of the norms' dtype: the errors
# of norm (law: 1e-6 relative in float32), limit, coefficient and two products.
_STRICT_EPSILONS = 16


def rescale(*, eps: Scalar = 0.0, strict: bool = False) -> Action:
  r"""Scales updates down to the limit; those within it pass bit for bit.

  .. math::
      u \leftarrow u \cdot \min\left(1, \frac{L}{n + \epsilon}\right)

  Args:
    eps: added to the norm in the denominator, in the norm's units; PyTorch adds 1e-6.
    strict: whether no norm of the result may exceed its limit in exact arithmetic.
      It then lies below the limit: by 2e-6 of it in float32, and, as elements are
      rounded toward zero, typically by 5e-4 in float16 and 3e-3 in bfloat16, at worst
      twice that. Norms from 2e-6 below the limit on are scaled too, and subnormal
      elements become zero, except in float16.
  """
  _validate.nonnegative(eps=eps)

  def weigh(norm: Extended, limit: Array) -> Extended:
    if strict:
      limit = limit * _below_limit(limit.dtype)
    size = _extended.plus(norm, eps)
    exceeds = _extended.exceeds(size, limit)
    # Safe where they are not selected: 0 / 0 would poison the derivative.
    size = _extended.where(exceeds, size, 1)
    ratio = _extended.quotient(jnp.where(exceeds, limit, 1), size)
    return _extended.where(exceeds, ratio, 1)

  return Action(weigh, _multiply_toward_zero if strict else _multiply)


def rescale_to_unit(*, eps: Scalar = 0.0, strict: bool = False) -> Action:
  r"""Scales as `rescale` does, and divides by the limit: the norm is then at most 1.

  .. math::
      u \leftarrow u / \max(n + \epsilon, L)

  What is added next, as the noise of differential privacy, need not know the limit. A
  limit of inf makes all zero, one of 0 makes the norm 1; zeros stay zeros.

  Args:
    eps: added to the norm, in its units.
    strict: whether the norm of what is returned must not exceed 1 in exact
      arithmetic; as in `actions.rescale`.
  """
  _validate.nonnegative(eps=eps)

  def weigh(norm: Extended, limit: Array) -> Extended:
    share = _below_limit(limit.dtype) if strict else 1.0
    one = jnp.full_like(limit, share)
    limit = limit * one
    size = _extended.plus(norm, eps)
    size = _extended.where(_extended.exceeds(size, limit), size, limit)
    # Safe where both are 0: then so is the update.
    size = _extended.where(size.value != 0, size, 1)
    return _extended.quotient(jnp.broadcast_to(one, size.value.shape), size)

  return Action(weigh, _multiply_toward_zero if strict else _multiply)


def clamp(*, strict: bool = False) -> Action:
  r"""Moves each element into the interval from -L to L.

  .. math::
      u_i \leftarrow \min(\max(u_i, -L), L)

  NaN stays NaN; inf becomes L. The recorded coefficient is that of the largest
  element, if the measure is a norm of order inf.

  Args:
    strict: whether to round down a limit that the leaf's dtype cannot hold, instead
      of to the nearest value. It costs one unit in the last place.
  """

  def apply(leaf: Array, coefficient: Extended, limit: Array) -> Array:
    del coefficient
    if jnp.iscomplexobj(leaf):
      raise TypeError(
        "Complex leaves have no order to clip elements by: use"
        " clip_by_global_norm or clip_by_layer_norm for them."
      )
    # In a leaf of eight bits this could cost an eighth of the limit: there the limit is
    # what float32 holds of it.
    if strict and jnp.finfo(leaf.dtype).bits > 8:
      limit = _rounding.next_below(limit)
    bound = _rounding.cast(limit, leaf.dtype, toward_zero=strict)
    # Not two comparisons with -L and L: XLA turns them into a minimum and a maximum,
    # in which CPUs flush subnormals.
    signed = jnp.where(leaf < 0, -bound, bound)
    return jnp.where(jnp.abs(leaf) > bound, signed, leaf)

  return Action(rescale().weigh, apply)


def rational() -> Action:
  r"""Shrinks everything a little, and large updates to the limit.

  .. math::
      u \leftarrow u \cdot \frac{L}{L + n}

  An update of norm L keeps half of it. The edge cases of this and the other soft
  actions are those of `rescale`: a limit of inf or a norm of 0 leaves the update
  as it is, a limit of 0 makes it zero, NaN propagates.
  """
  return _soft(lambda r: 1 / (1 + r))


def square_root() -> Action:
  r"""Shrinks large updates to the limit, and hardly touches small ones.

  .. math::
      u \leftarrow u / \sqrt{1 + (n / L)^2}

  An update of norm L keeps 71% of it. Edge cases: see `rational`.
  """
  return _soft(lambda r: lax.rsqrt(1 + r * r))


def tanh() -> Action:
  r"""Shrinks large updates to the limit, and hardly touches small ones.

  .. math::
      u \leftarrow u \cdot \frac{L}{n} \tanh \frac{n}{L}

  An update of norm L keeps 76% of it. Edge cases: see `rational`.
  """

  def shape(r: Array) -> Array:
    positive = r > 0
    safe = jnp.where(positive, r, 1)
    return jnp.where(positive, jnp.tanh(safe) / safe, 1)

  return _soft(shape)


def floored(floor: Scalar) -> Action:
  r"""Scales to the limit, but never by less than a factor (delta-GClip).

  .. math::
      u \leftarrow u \cdot \max\left(\delta, \min(1, L / n)\right)

  The norm of the result may exceed the limit; a limit of 0 scales by delta. The
  floor is what makes convergence provable for deep networks.

  Args:
    floor: delta, from 0 to 1. A float or a traced scalar.

  References:
    Mukherjee & Tucat, Regularized Gradient Clipping Provably Trains Wide and
    Deep Neural Networks, 2024, arXiv:2404.08624.
  """
  _validate.within(0, 1, floor=floor)
  hard = rescale()

  def weigh(norm: Extended, limit: Array) -> Extended:
    coefficient = hard.weigh(norm, limit)
    least = jnp.asarray(floor, limit.dtype)
    # True for NaN, which must reach the updates.
    enough = ~(_extended.as_float(coefficient) < least)
    return _extended.where(enough, coefficient, least)

  return Action(weigh, _multiply)


def normalize() -> Action:
  r"""Scales every update that is not zero to the limit, up or down.

  .. math::
      u \leftarrow u \cdot L / n

  A norm of 0 and a limit of inf leave the update as it is.
  """

  def weigh(norm: Extended, limit: Array) -> Extended:
    stays = (norm.value == 0) | ((limit == jnp.inf) & ~jnp.isnan(norm.value))
    size = _extended.where(~stays, norm, 1)
    ratio = _extended.quotient(jnp.where(stays, 1, limit), size)
    return _extended.where(~stays, ratio, 1)

  return Action(weigh, _multiply)


def rescale_elements() -> Action:
  r"""Scales the elements beyond the limit by the factor that the largest needs.

  .. math::
      u_i \leftarrow u_i \cdot L / n \text{ where } |u_i| > L

  For a measure of order inf, whose norm n is the largest modulus. Unlike `clamp`
  it keeps the differences among the large elements. (AdaClip of Stable-SPAM.)
  """

  def apply(leaf: Array, coefficient: Extended, limit: Array) -> Array:
    wide = _power_sums.accumulator(leaf.dtype)
    bound = limit.astype(wide)
    if jnp.iscomplexobj(leaf):
      large = jnp.abs(leaf).astype(wide) > bound
    else:
      # Not by the modulus, which the measure takes as well: XLA would materialise the
      # moduli of all updates for both.
      x = leaf.astype(wide)
      large = (x > bound) | (x < -bound)
    return jnp.where(large, _multiply(leaf, coefficient, limit), leaf)

  return Action(rescale().weigh, apply)


def clip_singular_values(*, strict: bool = False) -> Action:
  r"""Clips each singular value of a matrix at the limit; what is within passes.

  .. math::
      U \, \text{diag}(s) \, V^T \leftarrow U \, \text{diag}(\min(s, L)) \, V^T

  By matmuls alone, with a proof: the largest singular value of the result, rounded to
  the leaf's dtype, is at most L (1 + 1e-3), in bfloat16 L (1 + 2^-8). A matrix within
  the limit passes bit for bit. Vectors and scalars are scaled, which is the same. The
  norm may be any upper bound, as the 2-norm (`measures.layer_norm`), which decides most
  matrices for nothing; it is recorded as the proven one where the matrix is looked at.

  Args:
    strict: whether L itself bounds the result: matrices less than the tolerance below
      it are clipped, too.
  """
  settle = functools.partial(_matrices.settled, soft=False, strict=strict)
  return rescale(strict=strict)._replace(settle=settle)


def soft_clip_singular_values(*, strict: bool = False) -> Action:
  r"""Shrinks each singular value of a matrix below the limit (SPECTRA).

  .. math::
      U \, \text{diag}(s) \, V^T \leftarrow
      U \, \text{diag}(s / \sqrt{1 + s^2 / L^2}) \, V^T

  The bound of the result is that of `actions.clip_singular_values`, and every matrix
  changes. Vectors and scalars are shrunk by their 2-norm, which is the same.

  Args:
    strict: as in `actions.clip_singular_values`.

  References:
    Jiang, Semenov & Stich, SPECTRA, 2026, arXiv:2603.14315.
  """
  settle = functools.partial(_matrices.settled, soft=True, strict=strict)
  return square_root()._replace(settle=settle)


def _below_limit(dtype: Any) -> float:
  """The share of a limit that `strict` allows."""
  return float(1 - _STRICT_EPSILONS * jnp.finfo(dtype).eps)


def _soft(shape: Callable[[Array], Array]) -> Action:
  """Makes an action whose coefficient is a function of r = n / L.

  Args:
    shape: the function: 1 at r = 0 and differentiable there, and 1 / r beyond the
      precision of floats, where `rescale` takes over.
  """
  hard = rescale()

  def weigh(norm: Extended, limit: Array) -> Extended:
    # `rescale` handles a limit of 0 or inf, and a norm of NaN or inf.
    usable = (limit > 0) & (limit < jnp.inf) & jnp.isfinite(norm.value)
    size = _extended.where(usable, norm, 1)
    ratio = _extended.as_float(_extended.quotient(size, jnp.where(usable, limit, 1)))
    near = usable & (ratio < 2 / jnp.finfo(ratio.dtype).eps)
    soft = _extended.of(shape(jnp.where(near, ratio, 1)))
    rest = hard.weigh(norm, limit)
    return jax.tree.map(lambda x, y: jnp.where(near, x, y), soft, rest)

  return Action(weigh, _multiply)


def _multiply(leaf: Array, coefficient: Extended, limit: Array) -> Array:
  del limit
  return _scaled(leaf, coefficient, toward_zero=False)


def _multiply_toward_zero(leaf: Array, coefficient: Extended, limit: Array) -> Array:
  del limit
  return _scaled(leaf, coefficient, toward_zero=True)


def _scaled(leaf: Array, coefficient: Extended, *, toward_zero: bool) -> Array:
  if jnp.iscomplexobj(leaf):
    parts = [
      _scaled(part, coefficient, toward_zero=toward_zero)
      for part in (leaf.real, leaf.imag)
    ]
    return lax.complex(*parts)
  wide = _power_sums.accumulator(leaf.dtype)
  value, unit = (x.astype(wide) for x in coefficient)
  if toward_zero and coefficient.value.dtype != wide:
    # The cast above rounded the coefficient of a float64 norm.
    value = value * (1 - 2 * jnp.finfo(wide).eps)
  product = leaf.astype(wide) * unit * value
  if toward_zero and _rounding.shares_range(leaf.dtype, wide):
    # No selection: subnormals become zero even within the limit.
    return _rounding.cast(product, leaf.dtype, toward_zero=True)
  # A selection, not a product with 1: CPUs flush subnormal products to zero. A value of
  # 1 has the unit 1; comparing that too would take a TPU a kernel for each leaf.
  new = _rounding.cast(product, leaf.dtype, toward_zero=toward_zero)
  return jnp.where(value == 1, leaf, new)
