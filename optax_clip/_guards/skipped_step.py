"""What happens on a skipped step: one form for each kind of backend.

* CPU: `lax.cond`. The step runs in one branch, and in the other nothing changes.
  XLA writes parameters and state in place of the old ones; a selection instead
  takes 3.6 times as long there, and 1.9 copies.
* GPU and TPU: every step is computed, and XLA fuses a selection between old and new
  values into the kernels that read and write them anyway. A `cond` copies parameters
  and both moments in every step on a GPU, and stops the host.
* Outside `jit`: Python decides, and what stands inside runs as it would without a
  guard. JAX would compile a `cond` anew in each step, since its branches are new
  functions, and keep the program.

Values are the same in both: neither multiplies by zero to forget a value, which would
keep NaN. So are derivatives: by all that a skipped step was made from they are 0.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from optax_clip import _backend
from optax_clip import _jaxprs
from optax_clip._guards import record as _record
from optax_clip._trees import leaf as _leaf
from optax_clip._types import OptState
from optax_clip._types import PyTree
from optax_clip._types import Updates

Array = jax.Array


def taken_or_kept(
  take: Array,
  step: Callable[[Any], tuple[Any, Any]],
  updates: Updates,
  kept: PyTree,
  state: OptState,
) -> tuple[Any, Any]:
  """Returns ``step(updates)`` if the step is taken, else what there was before.

  Args:
    take: bool[], whether to take the step.
    step: maps updates to the result and the new state; traced once.
    updates: what `step` gets.
    kept: the result of a skipped step; `None`: zeros.
    state: the state before the step. On a skipped step its records show what was
      measured; everything else in it stays.

  Raises:
    TypeError: if the step changes the structure, a shape or a dtype of the state.
  """
  if not _backend.is_traced(take):
    return _decided(bool(take), step, updates, kept, state)
  closed, shapes = jax.make_jaxpr(step, return_shape=True)(updates)
  _same_types(state, shapes[1])
  treedef = jax.tree.structure(shapes)
  leaves = jax.tree.leaves(updates)
  shown = [False] * len(jax.tree.leaves(shapes[0])) + _record.of_last_step(state)
  run = _backend.traced_once(functools.partial(_jaxprs.run, closed))

  def new() -> list[Any]:
    # Gated in a branch, too: `vmap` turns the branch into a selection.
    return run(*_leaf.gate((closed.consts, leaves), take))

  def old(measured: list[Any]) -> list[Any]:
    result = _zeros(shapes[0], leaves, take) if kept is None else jax.tree.leaves(kept)
    later = iter(measured)
    return [
      next(later) if show else x
      for show, x in zip(shown, [*result, *jax.tree.leaves(state)], strict=True)
    ]

  def branch() -> list[Any]:
    return lax.cond(take, new, lambda: old(_jaxprs.run_only(closed, shown, leaves)))

  def selection() -> list[Any]:
    values = new()
    measured = [x for show, x in zip(shown, values, strict=True) if show]
    return [
      x if show else jnp.where(take, x, y)
      for show, x, y in zip(shown, values, old(measured), strict=True)
    ]

  found = _backend.by_backend(cpu=branch, gpu=selection, tpu=selection)
  like = updates if kept is None else kept
  return _as_weak((like, state), jax.tree.unflatten(treedef, found))


def _decided(
  take: bool,
  step: Callable[[Any], tuple[Any, Any]],
  updates: Updates,
  kept: PyTree,
  state: OptState,
) -> tuple[Any, Any]:
  """Takes or skips a step of which it is known now whether to take it."""
  shown = _record.of_last_step(state)
  # What a skipped step shows is computed with all else: no program drops the rest.
  runs = take or any(shown)
  result, later = step(updates) if runs else jax.eval_shape(step, updates)
  _same_types(state, later)
  like = (updates if kept is None else kept, state)
  if take:
    return _as_weak(like, (result, later))
  if kept is None:
    zeros = _zeros(result, jax.tree.leaves(updates), jnp.asarray(take))
    kept = jax.tree.unflatten(jax.tree.structure(result), zeros)
  leaves, treedef = jax.tree.flatten(state)
  rows = zip(shown, jax.tree.leaves(later), leaves, strict=True)
  later = jax.tree.unflatten(treedef, [x if show else y for show, x, y in rows])
  return _as_weak(like, (kept, later))


def _as_weak(like: PyTree, new: PyTree) -> Any:
  """Makes results weakly typed where what came in is."""
  old, (found, treedef) = jax.tree.leaves(like), jax.tree.flatten(new)
  if len(old) != len(found):
    return new
  return jax.tree.unflatten(treedef, map(_weakly_typed, old, found))


def _weakly_typed(like: PyTree, new: Array) -> Array:
  """Makes a result weakly typed if what came in is."""
  old = jnp.asarray(like)
  return _leaf.keep_weak_type(old, new) if old.shape == new.shape else new


def _zeros(shapes: PyTree, leaves: list[Any], take: Array) -> list[Array]:
  """Makes the updates of a skipped step."""
  found = jax.tree.leaves(shapes)
  if len(found) != len(leaves):
    return [jnp.zeros(x.shape, x.dtype) for x in found]
  # Made from the updates, which are sharded, and vary over a mesh, as the result is.
  return [
    jnp.where(take, y.astype(x.dtype), jnp.zeros((), x.dtype))
    if x.shape == jnp.shape(y)
    else jnp.zeros(x.shape, x.dtype)
    for x, y in zip(found, map(jnp.asarray, leaves), strict=True)
  ]


def _same_types(state: OptState, later: OptState) -> None:
  """Raises an error if a step changes a type in the state."""
  fix = (
    "A guard has to choose between the two, and so has jax.lax.scan. Make its init"
    " return what its update returns: cast there, as jnp.zeros(..., dtype)."
  )
  ours: Any = jax.tree.structure(state)
  theirs: Any = jax.tree.structure(later)
  if ours != theirs:
    raise TypeError(
      "The transformation inside a guard changes the structure of its state, from"
      f" {ours} to {theirs}. {fix}"
    )
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(later), strict=True
  )
  for (path, old), new in pairs:
    before, after = (f"{jnp.result_type(x)}{list(jnp.shape(x))}" for x in (old, new))
    if before != after:
      raise TypeError(
        "The transformation inside a guard changes the type of a leaf of its state:"
        f" state{jax.tree_util.keystr(path)} is {before} before the step and {after}"
        f" after it. {fix}"
      )
