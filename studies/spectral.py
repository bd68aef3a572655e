"""Whether clipping singular values helps, and whether it is spikes that it stops.

`spectral_clip` limits each singular value of a matrix, where other clips scale a whole
tensor. It is compared with them on ordinary batches, with noise of heavy tails, and
where a batch in 50 has a spike of rank one, which is what it is made for.

Tasks: ``language``, the byte-level transformer of `examples/language_model` with one
block of width 32 (batches of 8 times 16 bytes, 100 steps); ``recurrent``, the network
of `_small_tasks` with 32 units (150 steps); ``digits``, scikit-learn's, two hidden
layers of 64 (batches of 32, 150 steps). The score is the cross-entropy on what no run
has seen, at the end.

Batches: ``clean``; ``heavy``: each element of the gradient gets noise with a tail of
exponent 1.5, whose variance is infinite, a tenth of the tensor's RMS in scale;
``spikes``: in 2% of the steps each matrix of the gradient gets a random matrix of rank
one, 30 times as large as itself by 2-norm. Optimizers: SGD with momentum 0.9, and
AdamW. Cells: `CELLS`. A clip of ``updates`` stands behind the momentum or Adam, before
weight decay and learning rate.

Tuning, for each task, optimizer, kind of batches and cell on its own: every pair of 3
learning rates and 4 constants (both 4 times apart), or every rate without a clip, on
seeds 100 and 101; the pair of the least mean score is run again on seeds 0 to 4, and
only those are reported. The constants' ranges follow from what is limited: a singular
value is smaller than the layer's norm, and momentum sums up to ten gradients.

What counts, decided before the first run. A seed fails if its score is not finite or
not below that of knowing nothing (ln 256, ln 64, ln 10), and then it is worth that.
Differences are taken seed by seed; one counts if it is larger than two standard errors.
In each of the 6 pairs of task and optimizer, "the others" are the best of global norm,
layer norm, AGC, and layer norm of updates, *by the tuning seeds*; likewise the best of
the four spectral cells.

1. "Spectral clipping trains better" on a kind of batches if the best spectral cell is
   better than the others in at least 4 pairs and worse in none. Otherwise it gains
   nothing there.
2. "It stops spikes better" if 1 holds with spikes, and if in at least 4 pairs its
   advantage is larger with spikes than on clean batches, by two standard errors. If
   only the first half holds, what it gains has another cause than spikes.
3. "Any clip is needed against spikes" if without a clip the score is worse than that of
   the others in at least 4 pairs.
4. Hard or soft, on gradients or on updates: one is better than the other on a kind of
   batches if it is so in at least 4 pairs and worse in none.

A best rate or constant at the end of its list is counted, and the page says how often:
there the grid, and not the method, may have decided. Beside the scores stand the times
of a step, each cell alone and unbatched, the least of several rounds; the score at the
end is in it.

These lines, the tasks and the constants were not changed after a look at results.
"""

from collections.abc import Callable
from collections.abc import Iterator
import math
import time
from typing import Any
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.language_model import _model
import optax_clip
from studies import _digits
from studies import _small_tasks
from studies import _sweep
from studies import language

Array = jax.Array
Transformation = optax.GradientTransformation

KINDS = ("clean", "heavy", "spikes")
TAIL, NOISE = 1.5, 0.1
SHARE, SPIKE = 0.02, 30.0
WIDTH, LENGTH, BATCH, HELD_OUT = 32, 16, 8, 256
STEPS = {"language": 100, "recurrent": 150, "digits": 150}
NOTHING = {"language": math.log(256), "recurrent": math.log(64), "digits": math.log(10)}
RATES = {"sgd": (0.1, 0.4, 1.6), "adamw": (0.002, 0.008, 0.032)}
TUNED_ON, SEEDS = (100, 101), (0, 1, 2, 3, 4)
# How many members one call of a program trains at most, one after the other.
GROUP = 72

Clip = Callable[[Any], Transformation]


class Cell(NamedTuple):
  """A way to limit, or not to.

  Attributes:
    clip: from a constant to the clip.
    limits: the constants to try, for each optimizer.
    where: whether it stands before the optimizer or behind it.
    color: in the figure.
    fill: whether its mark is full.
  """

  clip: Clip
  limits: dict[str, tuple[float, ...]]
  where: str = "gradients"
  color: str = "#444444"
  fill: bool = True


def _soft(limit: Any) -> Transformation:
  return optax_clip.spectral_clip(limit, soft=True)


def _from(first: float, other: float | None = None) -> dict[str, tuple[float, ...]]:
  """Four constants for SGD, and for AdamW, each four times the one before."""
  firsts = {"sgd": first, "adamw": first if other is None else other}
  return {name: tuple(x * 4.0**i for i in range(4)) for name, x in firsts.items()}


UPDATES = "updates"
CELLS = {
  "none": Cell(
    optax_clip.clip_by_global_norm, {"sgd": (math.inf,), "adamw": (math.inf,)}
  ),
  "global": Cell(optax_clip.clip_by_global_norm, _from(0.025), color="#1f6fb4"),
  "layer": Cell(optax_clip.clip_by_layer_norm, _from(0.025), color="#17a2b8"),
  "agc": Cell(optax_clip.adaptive_grad_clip, _from(0.004), color="#2e8b57"),
  "layer, updates": Cell(
    optax_clip.clip_by_layer_norm, _from(0.25, 1.0), UPDATES, "#17a2b8", False
  ),
  "spectral": Cell(optax_clip.spectral_clip, _from(0.00625), color="#c0392b"),
  "spectral soft": Cell(_soft, _from(0.00625), color="#e67e22"),
  "spectral, updates": Cell(
    optax_clip.spectral_clip, _from(0.0625, 0.25), UPDATES, "#c0392b", False
  ),
  "spectral soft, updates": Cell(_soft, _from(0.0625, 0.25), UPDATES, "#e67e22", False),
}
OTHERS = ("global", "layer", "agc", "layer, updates")
SPECTRAL = tuple(name for name in CELLS if name.startswith("spectral"))


def optimizer(name: str, cell: Cell, limit: Any, rate: Any) -> Transformation:
  """Makes SGD or AdamW with a clip in its place."""
  clip, none = cell.clip(limit), optax.identity()
  before, after = (none, clip) if cell.where == UPDATES else (clip, none)
  inner = optax.trace(0.9) if name == "sgd" else optax.scale_by_adam()
  decay = none if name == "sgd" else optax.add_decayed_weights(1e-4)
  return optax.chain(before, inner, after, decay, optax.scale_by_learning_rate(rate))


def harmed(grads: Any, kind: Array, key: Array) -> Any:
  """Adds to a gradient what the kind of batches says: a place in `KINDS`."""
  chance, draws = jax.random.split(key)
  is_heavy = kind == KINDS.index("heavy")
  is_hit = kind == KINDS.index("spikes")
  is_hit &= jax.random.uniform(chance) < SHARE

  def heavy(grads: list[Array]) -> list[Array]:
    return [_with_tails(g, k) for g, k in zip(grads, keys, strict=True)]

  def spiked(grads: list[Array]) -> list[Array]:
    return [_with_spike(g, k) for g, k in zip(grads, keys, strict=True)]

  leaves, structure = jax.tree.flatten(grads)
  keys = jax.random.split(draws, len(leaves))
  leaves = jax.lax.cond(is_heavy, heavy, lambda grads: grads, leaves)
  leaves = jax.lax.cond(is_hit, spiked, lambda grads: grads, leaves)
  return jax.tree.unflatten(structure, leaves)


def _with_tails(g: Array, key: Array) -> Array:
  """Adds noise whose absolute value is Pareto's (Lomax's), with a random sign."""
  signed = jax.random.uniform(key, g.shape, minval=-1.0, maxval=1.0)
  size = jnp.maximum(jnp.abs(signed), 1e-6) ** (-1 / TAIL) - 1
  return g + NOISE * jnp.sqrt(jnp.mean(g * g)) * jnp.sign(signed) * size


def _with_spike(g: Array, key: Array) -> Array:
  if g.ndim != 2:
    return g
  ways = [
    jax.random.normal(k, (n,))
    for k, n in zip(jax.random.split(key), g.shape, strict=True)
  ]
  rows, columns = (way / jnp.linalg.norm(way) for way in ways)
  return g + SPIKE * jnp.linalg.norm(g) * jnp.outer(rows, columns)


def task(name: str) -> _sweep.Task:
  """Makes a task; a member's `kind` is a place in `KINDS`."""
  init, loss, score = {
    "language": _language,
    "recurrent": _recurrent,
    "digits": _of_digits,
  }[name]()

  def gradient(params: Any, member: Any, key: Array, step: Array) -> Any:
    del step
    draws, harm = jax.random.split(key)
    return harmed(jax.grad(loss)(params, draws), member["kind"], harm)

  return _sweep.Task(init, gradient, lambda params: {"score": score(params)})


def _language() -> Any:
  def build(seed: int) -> _model.Transformer:
    return _model.Transformer(WIDTH, 1, LENGTH, nnx.Rngs(seed))

  graph, _ = nnx.split(nnx.eval_shape(lambda: build(0)))
  train, held_out = (jnp.asarray(x) for x in language.texts())

  def of(params: Any, windows: Array) -> Array:
    return _model.loss(nnx.merge(graph, nnx.State(params)), windows)

  def loss(params: Any, key: Array) -> Array:
    starts = jax.random.randint(key, (BATCH, 1), 0, len(train) - LENGTH - 1)
    return of(params, train[starts + jnp.arange(LENGTH + 1)])

  return (
    lambda seed: nnx.to_pure_dict(nnx.state(build(seed))),
    loss,
    lambda params: of(params, held_out[:HELD_OUT, : LENGTH + 1]),
  )


def _recurrent() -> Any:
  found = _small_tasks.TASKS["recurrent"]()
  no = jnp.zeros((), bool)
  return found.init, lambda params, key: found.loss(params, key, no), found.score


def _of_digits() -> Any:
  _, _, images, labels = (jnp.asarray(x) for x in _digits.data())
  return (
    lambda seed: _digits.plain(seed, 2),
    lambda params, key: jnp.mean(_digits.losses(params, *_digits.batch(key, 32))),
    lambda params: jnp.mean(_digits.losses(params, images, labels)),
  )


def run(
  quick: bool = False,
  note: Callable[[str], None] = lambda text: None,
  *,
  tasks: tuple[str, ...] = tuple(STEPS),
  optimizers: tuple[str, ...] = tuple(RATES),
  names: tuple[str, ...] = tuple(CELLS),
  steps: int | None = None,
  tries: int = 4,
  seeds: tuple[int, ...] = SEEDS,
  rounds: int = 7,
) -> Iterator[dict[str, Any]]:
  """One row for each task, optimizer, cell and kind of batches; and one for its cost.

  ``score`` is that of each seed at the tuned `rate` and `limit`, null where it is not
  finite; ``tuning`` the mean of the tuning seeds there; ``clipped`` counts steps.
  Rows with ``ms`` hold the time of one step, alone.
  """
  if quick:
    tasks, names, steps, tries, rounds = ("digits",), ("none", "spectral"), 20, 1, 1
    optimizers, seeds = ("sgd",), (0, 1)
  for name in tasks:
    of = task(name)
    for which in optimizers:
      programs = {}
      for cell in names:
        note(f"spectral: {name}, {which}, {cell}")
        program = _sweep.Program(
          of,
          lambda member, which=which, cell=cell: optimizer(
            which, CELLS[cell], member["limit"], member["rate"]
          ),
          STEPS[name] if steps is None else steps,
          GROUP,
        )
        about = {"study": "spectral", "task": name, "optimizer": which, "method": cell}
        for row in _tuned(program, which, cell, NOTHING[name], tries, seeds):
          yield about | row
        programs[cell] = program
      yield from _costs(programs, name, which, rounds)


def _tuned(
  program: _sweep.Program,
  which: str,
  cell: str,
  nothing: float,
  tries: int,
  seeds: tuple[int, ...],
) -> Iterator[dict[str, Any]]:
  rates, limits = RATES[which][:tries], CELLS[cell].limits[which][:tries]
  kinds = np.arange(len(KINDS))
  grid = _sweep.members(
    kind=kinds,
    rate=np.float32(rates),
    limit=np.float32(limits),
    seed=np.asarray(TUNED_ON),
  )
  scores = worth(program.train(grid)["score"], nothing)
  means = scores.reshape(len(kinds), -1, len(TUNED_ON)).mean(-1)
  best = means.argmin(-1)
  chosen = [divmod(int(i), len(limits)) for i in best]
  parts = [
    _sweep.members(
      kind=kinds[k : k + 1],
      rate=np.float32(rates[i : i + 1]),
      limit=np.float32(limits[j : j + 1]),
      seed=np.asarray(seeds),
    )
    for k, (i, j) in enumerate(chosen)
  ]
  found = program.train({x: np.concatenate([p[x] for p in parts]) for x in parts[0]})
  for k, (i, j) in enumerate(chosen):
    mine = {x: v[k * len(seeds) : (k + 1) * len(seeds)] for x, v in found.items()}
    yield {
      "batches": KINDS[k],
      "rate": rates[i],
      "limit": None if math.isinf(limits[j]) else limits[j],
      "at_the_end": [
        i in (0, len(rates) - 1),
        len(limits) > 1 and j in (0, len(limits) - 1),
      ],
      "tuning": round(float(means[k].min()), 5),
      "score": [round(float(x), 5) if np.isfinite(x) else None for x in mine["score"]],
      "clipped": mine["clipped"].tolist(),
    }


def worth(scores: np.ndarray, nothing: float) -> np.ndarray:
  """What scores count: at most that of knowing nothing, which failures get."""
  return np.minimum(np.where(np.isfinite(scores), scores, nothing), nothing)


def _costs(
  programs: dict[str, _sweep.Program], name: str, which: str, rounds: int
) -> Iterator[dict[str, Any]]:
  """Times a step of each cell in turn, on clean batches with its middle constant."""
  least = dict.fromkeys(programs, math.inf)
  for _ in range(rounds):
    for cell, program in programs.items():
      limits = CELLS[cell].limits[which]
      one = _sweep.members(
        kind=np.zeros(1, int),
        rate=np.float32(RATES[which][1:2]),
        limit=np.float32(limits[len(limits) // 2 :][:1]),
        seed=np.zeros(1, int),
      )
      started = time.perf_counter()
      program.train(one)
      least[cell] = min(least[cell], time.perf_counter() - started)
  for cell, seconds in least.items():
    yield {
      "study": "spectral",
      "task": name,
      "optimizer": which,
      "method": cell,
      "ms": round(1e3 * seconds / programs[cell].steps, 4),
    }
