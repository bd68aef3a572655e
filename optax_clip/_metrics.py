"""Reading what clipping did out of any optimizer state."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_clip._core import Record

Array = jax.Array


def metrics(opt_state: Any) -> dict[str, Array]:
  """What the clipping transformations of an optimizer did at the last step.

  Args:
    opt_state: any optimizer state that holds states of this package, however
      deep: in `optax.chain`, `masked`, `multi_transform`, `inject_hyperparams`,
      `MultiSteps`, `apply_if_finite`; or a Flax NNX `Optimizer` or Linen
      `TrainState`, whose ``opt_state`` is taken.

  Returns:
    A flat dictionary of scalars. For each transformation, under its name
    (``clip_by_global_norm``, or what was passed as ``name=``):

    * ``<name>/norm``: f32, before clipping. Of several norms, the largest.
    * ``<name>/limit``: f32. Of several limits, the smallest.
    * ``<name>/coefficient``: f32, what the updates were multiplied with. Of
      several, the smallest.
    * ``<name>/clipped_fraction``: f32, the share of norms above their limit.
    * ``<name>/steps``, ``<name>/steps_clipped``, ``<name>/steps_nonfinite``:
      i32, counted since `init`.

    A second transformation of the same name is ``<name>_1``, and so on, in the
    order in which they stand in the state. Empty if nothing was recorded.

    It is a pure function of the state: call it inside `jit` and return its
    result, or outside.

  Example:
    >>> import jax.numpy as jnp, optax, optax_clip
    >>> tx = optax.chain(optax_clip.clip_by_global_norm(1.0), optax.sgd(0.1))
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> _, state = tx.update({"w": jnp.array([3.0, 4.0])}, state)
    >>> print(optax_clip.metrics(state)["clip_by_global_norm/norm"])
    5.0
  """
  state = getattr(opt_state, "opt_state", opt_state)
  leaves = jax.tree_util.tree_leaves_with_path(
    state, is_leaf=lambda node: isinstance(node, Record)
  )
  records = [(path[-1].key, node) for path, node in leaves if isinstance(node, Record)]
  # A name that a user chose may look like a numbered one.
  chosen = {name for name, _ in records}
  used: set[str] = set()
  result: dict[str, Array] = {}
  for name, record in records:
    prefix, number = name, 0
    while prefix in used or (number and prefix in chosen):
      number += 1
      prefix = f"{name}_{number}"
    used.add(prefix)
    for field, value in record._asdict().items():
      result[f"{prefix}/{field}"] = _array(value)
  return result


def _array(leaf: Any) -> Array:
  # Flax NNX wraps each leaf of the state in a variable.
  return jnp.asarray(leaf.get_value() if hasattr(leaf, "get_value") else leaf)
