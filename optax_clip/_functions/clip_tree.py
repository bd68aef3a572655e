"""Clips a tree by a limit or by a tree of limits, for code without an optax chain."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_clip import _validate
from optax_clip import actions
from optax_clip import measures
from optax_clip._algebra import handed as _handed
from optax_clip._algebra import measured as _measured
from optax_clip._algebra.clip_with import clip_with
from optax_clip._norms import extended as _extended
from optax_clip._thresholds import limits as _limits
from optax_clip._trees import labels as _labels
from optax_clip._trees import leaves as _leaves
from optax_clip._types import AxisName
from optax_clip._types import Nonfinite
from optax_clip._types import PyTree
from optax_clip._types import Scalar
from optax_clip._types import Specs

Array = jax.Array


def clip_tree(
  tree: PyTree,
  max_norm: PyTree,
  *,
  norm: PyTree = None,
  ord: float | None = None,
  eps: Scalar = 0.0,
  nonfinite: Nonfinite = "propagate",
  strict: bool = False,
  rescale_to_unit_norm: bool = False,
  axis_name: AxisName = "auto",
  specs: Specs = None,
) -> tuple[Any, Any]:
  r"""Clips a tree by its global norm, or its subtrees by theirs, and returns both.

  .. math::
      x \leftarrow x \cdot \min\left(1, \frac{c}{n + \epsilon}\right)

  This is `optax_clip.clip_by_global_norm` as a function.

  Args:
    tree: any tree of floating or complex arrays.
    max_norm: c, a non-negative float or a traced scalar; `None` is off. Or a tree
      prefix of these: each subtree is then clipped by its own norm.
    norm: the norm, if it is known: of a whole model, for example, where this tree is
      one pipeline stage. With several limits, a tree like theirs. `None` measures it.
    ord, eps, strict: as in `measures.global_norm` and `actions.rescale`.
    nonfinite: as in `clip_with`, if the norm, or one of several, is not finite.
    rescale_to_unit_norm: whether to divide the clipped tree by c, so that its norm is
      at most 1.
    axis_name, specs: as in `optax_clip.measures`.

  Returns:
    The clipped tree and its norm before clipping, f32[] (or f64[]); with several
    limits, a tree like theirs.

  Raises:
    ValueError: if `max_norm` or `eps` is negative or NaN; if `max_norm` is not a tree
      prefix of the tree, or `norm` not a tree like it; if `rescale_to_unit_norm`
      has no limit to divide by.
    TypeError: if a leaf is an integer or a boolean; names its path.

  ==================  ===================  ============================
  input               result               with `rescale_to_unit_norm`
  ==================  ===================  ============================
  ``max_norm=0``      zeros, a warning     norm 1, direction kept
  ``max_norm=inf``    unchanged            zeros
  ``max_norm=None``   unchanged            `ValueError`
  all zero            unchanged            unchanged
  a NaN element       all NaN              all NaN
  ==================  ===================  ============================

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> grads, norm = optax_clip.clip_tree({"w": jnp.array([3.0, 4.0])}, 1.0)
    >>> print(grads["w"], norm)
    [0.6 0.8] 5.0

    Each part by its own norm:

    >>> grads = {"body": {"w": jnp.array([3.0, 4.0])}, "head": jnp.array([8.0])}
    >>> grads, norms = optax_clip.clip_tree(grads, {"body": 1.0, "head": 2.0})
    >>> print(grads["body"]["w"], grads["head"], norms["body"], norms["head"])
    [0.6 0.8] [2.] 5.0 8.0
  """
  given_tree, tree = tree, _leaves.with_values(tree)
  limits, prefix = _checked_limits(max_norm, rescale_to_unit_norm)
  is_one = prefix == jax.tree.structure(0)
  if is_one:
    measure = measures.global_norm(ord=ord, axis_name=axis_name, specs=specs)
    threshold = _limits.of(limits[0])
  else:
    if not jax.tree.leaves(tree):
      # Nothing to measure.
      return given_tree, prefix.unflatten([jnp.zeros(())] * len(limits))
    ids = _labels.broadcast(prefix.unflatten(range(len(limits))), tree, "max_norm")
    labels = jax.tree.unflatten(jax.tree.structure(tree), ids)
    measure = measures.group_norm(
      labels, range(len(limits)), ord=ord, axis_name=axis_name, specs=specs
    )
    threshold = _limits.per_group(limits)
  if norm is None:
    (known,) = measure.measure(tree)
  else:
    _leaves.floating_leaves(tree)
    dtype = measure.layout(tree).blocks[0].dtype
    norms = [jnp.asarray(n, dtype) for n in _checked_norms(norm, prefix)]
    known = _extended.of(norms[0] if is_one else jnp.stack(norms))
  action = actions.rescale_to_unit if rescale_to_unit_norm else actions.rescale
  tx = clip_with(
    measure,
    threshold,
    action(eps=eps, strict=strict),
    nonfinite=nonfinite,
    record=False,
  )
  with _handed.scope(_measured.known(measure, tree, known)):
    clipped, _ = tx.update(tree, optax.EmptyState())
  sizes = _extended.as_float(known)
  found = sizes if is_one else prefix.unflatten([sizes[i] for i in range(len(limits))])
  return _leaves.restored(clipped, given_tree), found


def _checked_limits(max_norm: PyTree, divides: bool) -> tuple[list[Any], Any]:
  """Checks a tree of limits, numbers or `None`; returns them and its structure."""
  rows, prefix = jax.tree_util.tree_flatten_with_path(max_norm, is_leaf=_is_none)
  for path, limit in rows:
    name = f"max_norm{jax.tree_util.keystr(path)}"
    _validate.bound(**{name: limit})
    if not divides:
      _validate.limit(**{name: limit})
    elif limit is None:
      raise ValueError(
        f"rescale_to_unit_norm divides by the limit, and {name} is None: pass a number."
      )
  return [limit for _, limit in rows], prefix


def _checked_norms(norm: PyTree, prefix: PyTree) -> list[Any]:
  """Checks a tree of norms against the structure of the limits; returns them."""
  norms, structure = jax.tree.flatten(norm, is_leaf=_is_none)
  if structure != prefix:
    raise ValueError(
      f"norm must be a tree like max_norm, {prefix}, got one of structure {structure}."
    )
  for known in norms:
    _validate.known_norm(known)
  return norms


def _is_none(node: object) -> bool:
  return node is None
