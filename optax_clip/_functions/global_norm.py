"""Measures the norm of a tree, for code without an optax chain."""

import jax

from optax_clip import measures
from optax_clip._norms import extended as _extended
from optax_clip._trees import leaves as _leaves
from optax_clip._types import AxisName
from optax_clip._types import PyTree
from optax_clip._types import Specs

Array = jax.Array


def global_norm(
  tree: PyTree,
  *,
  ord: float | None = None,
  axis_name: AxisName = "auto",
  specs: Specs = None,
) -> Array:
  r"""Measures the norm of all elements in a tree.

  .. math::
      n = \left(\sum_i |x_i|^p\right)^{1/p}

  It sums in float32, or float64 if a leaf is, and is right over the whole range of
  floats: it loses neither the squares of 3e38 nor those of 1e-37. It reads the leaves
  once, and again only if the plain sum left the safe range.

  Args:
    tree: any tree of floating or complex arrays.
    ord: as in `measures.global_norm`.
    axis_name, specs: as in `optax_clip.measures`.

  Returns:
    f32[], or f64[] if a leaf is float64. 0 for an empty tree, NaN if an element is
    NaN, inf if one is inf; otherwise finite: at most the largest float, even where
    the norm is beyond it.

  Raises:
    TypeError: if a leaf is an integer or a boolean; names its path.

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> print(optax_clip.global_norm({"w": jnp.full(4, 300.0, jnp.float16)}))
    600.0
  """
  measure = measures.global_norm(ord=ord, axis_name=axis_name, specs=specs)
  (norm,) = measure.measure(_leaves.with_values(tree))
  return _extended.as_float(norm)
