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
  run = jax.jit(jax.vmap(_portion(task, make, every), in_axes=(0, 0, None)))
  params = _starts(task, who)
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


class Program:
  """Trains members one after the other, any number of them in one compiled program.

  As `train`, whose members run side by side: there a condition becomes a selection,
  and each member pays for what another one needs.
  """

  def __init__(
    self,
    task: Task,
    make: Callable[[dict[str, Array]], optax.GradientTransformation],
    steps: int,
    most: int,
  ):
    """Prepares it for up to `most` members at once; `steps` as in `train`."""
    self.task, self.steps, self.most = task, steps, most
    one = _portion(task, make, steps)

    def alone(member: dict[str, Array], params: Any) -> dict[str, Array]:
      start = params, make(member).init(params), jnp.int32(0)
      return one(member, start, jnp.int32(0))[1]

    def run(count: Array, who: dict[str, Array], params: Any) -> dict[str, Array]:
      shapes = jax.eval_shape(
        lambda x: alone(*jax.tree.map(lambda y: y[0], x)), (who, params)
      )
      empty = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), shapes)

      def member(i: Array, found: dict[str, Array]) -> dict[str, Array]:
        scores = alone(*jax.tree.map(lambda x: x[i], (who, params)))
        return jax.tree.map(lambda x, y: x.at[i].set(y), found, scores)

      return jax.lax.fori_loop(0, count, member, empty)

    self._run = jax.jit(run)

  def train(self, who: Members) -> dict[str, np.ndarray]:
    """Trains the members; returns their scores ``[members]`` at the end."""
    count = len(who["seed"])
    parts = []
    for first in range(0, count, self.most):
      part = {k: v[first : first + self.most] for k, v in who.items()}
      here = len(part["seed"])
      filled = {k: np.resize(v, self.most) for k, v in part.items()}
      found = self._run(
        here, jax.tree.map(jnp.asarray, filled), _starts(self.task, filled)
      )
      parts.append({k: np.asarray(v)[:here] for k, v in found.items()})
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


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

  return one


def _starts(task: Task, who: Members) -> Any:
  seeds = who["seed"].tolist()
  starts = {seed: task.init(seed) for seed in sorted(set(seeds))}
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[starts[s] for s in seeds])


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
