"""Norms and clipping as plain functions, for code without an optax chain."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_clip import _extended
from optax_clip import _groups
from optax_clip import _moments
from optax_clip import _norms
from optax_clip import _validate
from optax_clip import actions
from optax_clip import measures
from optax_clip import thresholds
from optax_clip._core import clip_with
from optax_clip._core import given

Array = jax.Array


def global_norm(
  tree: Any, *, ord: float | None = None, axis_name: Any = "auto", specs: Any = None
) -> Array:
  r"""The norm of all elements of a tree.

  .. math::
      n = \Big(\sum_i |x_i|^p\Big)^{1/p}

  Accumulated in float32 (float64 where a leaf is float64) whatever the dtypes,
  and right over the whole range of floats: neither the squares of 3e38 nor
  those of 1e-37 are lost. One read of the leaves; a second one only when the
  plain sum left the safe range.

  Args:
    tree: any tree of floating or complex arrays.
    ord: p: 2 by default, `float('inf')` for the largest modulus.
    axis_name: mesh axes to collect over, see `optax_clip.measures`.
    specs: which dimension of which leaf is sharded, see `optax_clip.measures`.

  Returns:
    f32[], or f64[] if a leaf is float64. 0 for an empty tree, NaN if an element
    is NaN, inf if one is inf; otherwise finite: a norm beyond the largest float
    is returned as the largest float.

  Raises:
    TypeError: if a leaf is an integer or a boolean; names its path.

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> print(optax_clip.global_norm({"w": jnp.full(4, 300.0, jnp.float16)}))
    600.0
  """
  measure = measures.global_norm(ord=ord, axis_name=axis_name, specs=specs)
  (norm,) = measure.measure(_groups.with_values(tree))
  return _extended.as_float(norm)


def clip_tree(
  tree: Any,
  max_norm: Any,
  *,
  norm: Any = None,
  ord: float | None = None,
  eps: Any = 0.0,
  nonfinite: str = "propagate",
  strict: bool = False,
  axis_name: Any = "auto",
  specs: Any = None,
) -> tuple[Any, Array]:
  r"""Clips a tree by its global norm, and returns both.

  .. math::
      x \leftarrow x \cdot \min\left(1, \frac{c}{n + \epsilon}\right)

  The functional form of `optax_clip.clip_by_global_norm`.

  Args:
    tree: any tree of floating or complex arrays.
    max_norm: c, a non-negative float or a traced scalar.
    norm: the norm, if it is already known: of more than this tree, say, where
      a model is split over pipelines. Measured if `None`.
    ord: the order of the norm, 2 by default.
    eps: added to the norm in the denominator.
    nonfinite: ``"zero"`` returns zeros if the norm is NaN or inf.
    strict: whether the result's norm must not exceed c in exact arithmetic.
    axis_name: mesh axes to collect over, see `optax_clip.measures`.
    specs: which dimension of which leaf is sharded, see `optax_clip.measures`.

  Returns:
    The clipped tree and its norm before clipping, f32[] (or f64[]).

  Raises:
    ValueError: if `max_norm` or `eps` is negative or NaN.
    TypeError: if a leaf is an integer or a boolean; names its path.

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> grads, norm = optax_clip.clip_tree({"w": jnp.array([3.0, 4.0])}, 1.0)
    >>> print(grads["w"], norm)
    [0.6 0.8] 5.0
  """
  given_tree, tree = tree, _groups.with_values(tree)
  _validate.nonnegative(max_norm=max_norm)
  _validate.scalar(max_norm=max_norm)
  measure = measures.global_norm(ord=ord, axis_name=axis_name, specs=specs)
  if norm is None:
    (known,) = measure.measure(tree)
  else:
    _groups.floating_leaves(tree)
    _validate.known_norm(norm)
    known = _extended.of(jnp.asarray(norm, measure.layout(tree).blocks[0].dtype))
  tx = clip_with(
    measure,
    thresholds.constant(max_norm),
    actions.rescale(eps=eps, strict=strict),
    nonfinite=nonfinite,
    record=False,
  )
  handed = given(tree, known, measure)
  clipped, _ = tx.update(tree, optax.EmptyState(), norms=handed)
  return _groups.restored(clipped, given_tree), _extended.as_float(known)


def unitwise_norm(x: Array, axis: Any = None) -> Array:
  """The 2-norm of each unit of an array, at each of the unit's elements.

  Args:
    x: a floating or complex array.
    axis: the axes that belong to one unit. `None` goes by rank: the whole
      array for scalars and vectors, axis 0 for rank 2 and 3, all but the last
      axis for rank 4 and 5.

  Returns:
    An array of the shape of `x`, f32 (f64 for float64): the norm of a float16
    unit need not be a float16.

  Raises:
    ValueError: if `axis` is out of range, or `None` with a rank above 5.

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> print(optax_clip.unitwise_norm(jnp.array([[3.0, 1.0], [4.0, 0.0]])))
    [[5. 1.]
     [5. 1.]]
  """
  (x,) = _groups.floating_leaves(x)
  (norm,) = _norms.over_dims([x], [_groups.unit_axes(x.shape, axis)])
  value = _extended.as_float(norm)
  # Not `broadcast_to`, which an explicitly sharded `x` does not allow.
  return value + jnp.zeros_like(x, value.dtype)


def unitwise_clip(
  g_norm: Array, max_norm: Array, grad: Array, div_eps: Any = 1e-6
) -> Array:
  r"""Clips each unit of an array, given norms and limits element by element.

  .. math::
      g \leftarrow g \cdot \frac{c}{\max(n, \epsilon)} \text{ where } n \ge c

  Args:
    g_norm: n, as from `unitwise_norm`; of the shape of `grad`.
    max_norm: c, of the shape of `grad`.
    grad: a floating or complex array.
    div_eps: the least value to divide by.

  Returns:
    The clipped array, of the dtype of `grad`.

  Raises:
    ValueError: if the three shapes differ.

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> g = jnp.array([[3.0, 0.1], [4.0, 0.0]])
    >>> norm = optax_clip.unitwise_norm(g)
    >>> print(optax_clip.unitwise_clip(norm, jnp.ones_like(g), g))
    [[0.6 0.1]
     [0.8 0. ]]
  """
  (grad,) = _groups.floating_leaves(grad)
  shapes = {jnp.shape(g_norm), jnp.shape(max_norm), grad.shape}
  if len(shapes) > 1:
    raise ValueError(
      "g_norm, max_norm and grad must have one shape, got"
      f" {jnp.shape(g_norm)}, {jnp.shape(max_norm)} and {grad.shape}."
    )
  wide = _moments.accumulator(grad.dtype)
  norm, limit = (jnp.asarray(x, wide) for x in (g_norm, max_norm))
  divisor = jnp.maximum(norm, jnp.asarray(div_eps, wide))
  action = actions.rescale()
  clipped = action.apply(grad, action.weigh(_extended.of(divisor), limit), limit)
  return jnp.where(norm < limit, grad, clipped)
