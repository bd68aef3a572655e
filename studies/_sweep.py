"""Trains many members (seeds, learning rates) of one method in one program."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_clip

Array = jax.Array
Members = dict[str, np.ndarray]


class Task(NamedTuple):
  """Describes what is trained.

  Attributes:
    init: maps a seed, a Python integer, to parameters.
    gradient: ``gradient(params, member, key, step)``: returns what clipping gets. The
      key depends on seed and step alone, so that all methods see equal batches.
    score: ``score(params)``: returns scalars that say how good the parameters are.
    weight: ``weight(member, step)``: returns the last factor for updates.
  """

  init: Callable[[int], Any]
  gradient: Callable[[Any, dict[str, Array], Array, Array], Any]
  score: Callable[[Any], dict[str, Array]]
  weight: Callable[[dict[str, Array], Array], Array] = lambda member, step: jnp.ones(())


def members(**values: Any) -> Members:
  """Makes all combinations of the values; the last varies fastest.

  `seed` and `rate`, the learning rate, must be among them.
  """
  grids = np.meshgrid(*values.values(), indexing="ij")
  return {name: grid.ravel() for name, grid in zip(values, grids, strict=True)}


def train(
  task: Task,
  make: Callable[[dict[str, Array]], optax.GradientTransformation],
  who: Members,
  steps: int,
  every: int,
  settled: Callable[[dict[str, np.ndarray]], np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
  """Trains all members at once, and leaves out those that are settled.

  Args:
    task: what to train.
    make: maps a member to its clip and optimizer; the member's values are traced.
    who: the members.
    steps: how many each takes.
    every: after so many steps takes scores, and leaves members out.
    settled: maps scores to the members that need no more training. Members whose
      parameters are no longer finite are left out in any case.

  Returns:
    Scores ``[members, checks]``; members that were left out repeat theirs. Beside the
    task's own: ``finite``, whether all parameters are; ``clipped`` and ``idle``, the
    steps so far that were clipped, and that changed nothing.
  """
  run = jax.jit(_portion(task, make, every))
  starts = {seed: task.init(seed) for seed in sorted(set(who["seed"].tolist()))}
  params = _stack([starts[seed] for seed in who["seed"].tolist()])
  state = jax.jit(jax.vmap(lambda member, p: make(member).init(p)))(
    jax.tree.map(jnp.asarray, who), params
  )
  count = len(who["seed"])
  carry = (params, state, jnp.zeros(count, jnp.int32))
  places = np.arange(count)  # Which member each row of the carry is.
  alive = np.ones(count, bool)
  checks: list[dict[str, np.ndarray]] = []
  for first in range(0, steps, every):
    if alive.any():
      places, carry = _fewer(places, carry, alive)
      here = {name: jnp.asarray(values[places]) for name, values in who.items()}
      carry, scores = run(here, carry, jnp.int32(first))
      now = {
        name: np.array(checks[-1][name]) if checks else np.zeros(count, x.dtype)
        for name, x in scores.items()
      }
      fresh = alive[places]
      for name, x in jax.device_get(scores).items():
        now[name][places[fresh]] = x[fresh]
      alive &= now["finite"]
      if settled is not None:
        alive &= ~settled(now)
    checks.append(now)
  return {name: np.stack([c[name] for c in checks], 1) for name in checks[0]}


def _portion(task: Task, make: Any, every: int) -> Any:
  def one(member: dict[str, Array], carry: Any, first: Array) -> Any:
    tx = make(member)
    seed = jax.random.key(member["seed"])

    def step(carry: Any, number: Array) -> Any:
      params, state, idle = carry
      key = jax.random.fold_in(seed, number)
      grads = task.gradient(params, member, key, number)
      updates, state = tx.update(grads, state, params)
      still = jnp.stack([jnp.all(u == 0) for u in jax.tree.leaves(updates)])
      weight = task.weight(member, number)
      updates = jax.tree.map(lambda u: u * weight.astype(u.dtype), updates)
      params = optax.apply_updates(params, updates)
      return (params, state, idle + jnp.all(still)), None

    (params, state, idle), _ = jax.lax.scan(step, carry, first + jnp.arange(every))
    finite = jnp.stack([jnp.all(jnp.isfinite(p)) for p in jax.tree.leaves(params)])
    clipped = [
      value
      for key, value in optax_clip.metrics(state, allow_empty=True).items()
      if key.endswith("/steps_clipped")
    ]
    return (params, state, idle), {
      **task.score(params),
      "finite": jnp.all(finite),
      "clipped": jnp.asarray(sum(clipped, jnp.int32(0))),
      "idle": idle,
    }

  return jax.vmap(one, in_axes=(0, 0, None))


def _fewer(places: np.ndarray, carry: Any, alive: np.ndarray) -> Any:
  """Drops members that need no training, as soon as they are half the rows.

  Halves the number of rows instead of fitting it: every new number compiles.
  """
  keep = np.flatnonzero(alive[places])
  rows = len(places)
  while rows % 2 == 0 and rows // 2 >= len(keep):
    rows //= 2
  if rows == len(places):
    return places, carry
  # Dropped members fill the rest; nobody reads their scores.
  others = np.setdiff1d(np.arange(len(places)), keep)
  rows_kept = np.concatenate([keep, others])[:rows]
  return places[rows_kept], jax.tree.map(lambda x: x[rows_kept], carry)


def _stack(trees: list[Any]) -> Any:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
