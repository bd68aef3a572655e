"""Tells that a run has stopped where a guard cannot: inside an accumulator.

`optax.MultiSteps` resets its accumulator by a product with 0, which keeps a NaN. A
guard inside then skips every later step, and sees nothing but NaNs.
"""

from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_clip._guards.record import SkipRecord
from optax_clip._guards.verdict import SkipReason
from optax_clip._types import OptState
from optax_clip._types import PyTree


def warn(opt_state: OptState) -> None:
  """Warns if a guard inside `optax.MultiSteps` skipped its last two steps for NaNs."""
  for state in _nodes(opt_state, optax.MultiStepsState):
    nodes = jax.tree_util.tree_leaves_with_path(
      state.inner_opt_state, is_leaf=lambda node: isinstance(node, SkipRecord)
    )
    for path, record in nodes:
      if isinstance(record, SkipRecord) and (steps := _stuck(record)):
        warnings.warn(
          f"{path[-1].key!r} stands inside optax.MultiSteps, whose accumulator keeps a"
          f" NaN for good: it has skipped the last {steps} steps, and will skip all"
          " others. Go back to a checkpoint from before, and put the guard around, as"
          " skip_nonfinite(optax.MultiSteps(optimizer, k).gradient_transformation()),"
          " with the trainer's own accumulation off.",
          stacklevel=3,
        )


def _stuck(record: SkipRecord) -> int:
  """Returns how many steps were skipped; 0 if that may end, or nobody knows yet."""
  counts = record.counts
  counts = counts.get_value() if hasattr(counts, "get_value") else counts
  if isinstance(counts, jax.core.Tracer):
    return 0
  entries = record._replace(counts=jnp.asarray(counts)).entries()
  steps = int(np.max(entries["consecutive"]))
  is_norm = np.any(np.asarray(entries["reason"]) == SkipReason.NONFINITE_NORM)
  return steps if steps > 1 and is_norm else 0


def _nodes(tree: PyTree, kind: type) -> list[Any]:
  found = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
  return [node for node in found if isinstance(node, kind)]
