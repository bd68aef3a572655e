"""What a clip of gradients cannot see: Adam's second moment after a quiet phase.

Adam divides by the root of a running mean of squares. While gradients are zero that
mean decays, and the first ordinary gradients are then divided by next to nothing: the
gradient is as large as ever, the update is not. Clips of the gradient are compared with
limits on the update, between Adam and its learning rate.

Tasks, with b1 = 0.9 and b2 = 0.999 (optax's defaults), 5 seeds:

* ``padded``: scikit-learn's digits, two hidden layers of 64 without normalisation,
  batches of 64. 400 steps; then 8,000 whose batches are padding, so that the gradient
  is zero; then 400 steps. Beside it the same without the padding. Measured: the test
  accuracy when the padding ends, the worst at a check (every 20 steps) of the 200 steps
  after it, and at the end. Rates 0.001, 0.003 and 0.01.
* ``sparse``: an embedding of 64 common and 448 rare tokens with 16 numbers each, and
  one vector that turns a row into the token's value. A batch is 32 times 4 tokens; the
  target is the sum of their values, plus noise. A rare token comes once in 1,000 steps
  on average, a common one twice a step. 6,000 steps. Measured: the mean squared error
  of the values of rare and of common tokens; knowing nothing costs 1. Rates 0.001,
  0.003, 0.01 and 0.03.

Cells: nothing; the global norm of the gradient, limited to 0.1 and to 1; after Adam,
the RMS of each tensor limited to 1 (`clip_by_block_rms`), StableAdamW's factor, and the
history of update norms (`clip_by_history`); and no clip with b2 = 0.95, the other cure.
In ``sparse`` also the RMS of each row, limited to 1.

What counts, decided before the first run. A seed of ``padded`` fails if its worst
accuracy is more than 5 points below that at the end of the padding.

1. The trouble is there if without a clip most seeds fail at some rate. If not, the
   study shows nothing of what it was made for.
2. "A clip of gradients cannot see it" is wrong if, at a rate where most seeds fail
   without a clip, at most half as many fail with one of these clips.
3. "A limit on updates helps" is wrong for a method with which, at that rate, more than
   half as many seeds fail as without; and it has a price if without padding the best
   accuracy at the end is lower by more than two standard errors.
4. In ``sparse`` a limit helps if at the best rate of each (by the error of rare tokens)
   that error is lower than without by more than two standard errors; the RMS of the
   table is expected not to, as one row in 512 hardly changes it.

These lines, the tasks and the constants were not changed after a look at results.
"""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_clip
from optax_clip import actions
from optax_clip import measures
from optax_clip import thresholds
from studies import _digits
from studies import _sweep

Array = jax.Array
Transformation = optax.GradientTransformation

# Of `padded`.
BATCH, HIDDEN = 64, 2
PHASE, QUIET, EVERY, AFTER = 400, 8000, 20, 200
# Of `sparse`.
COMMON, RARE, WIDTH, TOKENS = 64, 448, 16, (32, 4)
STEPS, GAP, NOISE = 6000, 1000, 0.5

RATES = {"padded": (0.001, 0.003, 0.01), "sparse": (0.001, 0.003, 0.01, 0.03)}
FAILED = 5.0  # Points of accuracy.


class Cell(NamedTuple):
  """A way to limit, or not to.

  Attributes:
    before: stands before Adam.
    after: stands after it, before the learning rate.
    adam: Adam, without its learning rate.
    color: in the figure.
    line: in the figure.
  """

  before: Transformation = optax.identity()
  after: Transformation = optax.identity()
  adam: Callable[[], Transformation] = optax.scale_by_adam
  color: str = "#444444"
  line: str = "-"

  def make(self, rate: Any) -> Transformation:
    """The whole optimizer."""
    return optax.chain(
      self.before, self.adam(), self.after, optax.scale_by_learning_rate(rate)
    )


def scale_by_stable_adam(
  b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> Transformation:
  """Adam's updates, divided by the RMS of g / sqrt(v) where that is above 1.

  As StableAdamW (Wortsman et al. 2023, arXiv:2304.13013) has it, for each tensor.
  """
  adam = optax.scale_by_adam(b1, b2, eps)

  def update(grads: Any, state: Any, params: Any = None) -> Any:
    updates, state = adam.update(grads, state, params)
    moments = optax.tree.bias_correction(state.nu, b2, state.count)

    def divided(u: Array, g: Array, v: Array) -> Array:
      rms = jnp.sqrt(jnp.mean(g**2 / jnp.maximum(v, eps**2)))
      return u / jnp.maximum(rms, 1.0)

    return jax.tree.map(divided, updates, grads, moments), state

  return optax.GradientTransformation(adam.init, update)


def _row_rms(limit: float) -> Transformation:
  """Limits the RMS of each row of a matrix, and of each vector of `WIDTH` numbers."""
  return optax_clip.clip_with(
    measures.unit_norm(axis=-1),
    thresholds.constant(limit * WIDTH**0.5),
    actions.rescale(),
  )


CELLS = {
  # Nothing is above an infinite limit: this only counts.
  "none": Cell(before=optax_clip.clip_by_global_norm(float("inf"))),
  "global 0.1": Cell(
    before=optax_clip.clip_by_global_norm(0.1), color="#1f6fb4", line=":"
  ),
  "global 1": Cell(before=optax_clip.clip_by_global_norm(1.0), color="#1f6fb4"),
  "update RMS 1": Cell(after=optax_clip.clip_by_block_rms(1.0), color="#2e8b57"),
  "StableAdamW": Cell(adam=scale_by_stable_adam, color="#c0392b"),
  # As Levanter has it.
  "update history": Cell(
    after=optax_clip.clip_by_history(surprise=None), color="#b8860b"
  ),
  "none, b2 0.95": Cell(adam=lambda: optax.scale_by_adam(b2=0.95), line="--"),
}
ROWS_TOO = {"update RMS 1 by row": Cell(after=_row_rms(1.0), color="#17a2b8")}


def padded(phase: int, quiet: int) -> _sweep.Task:
  """Digits, a number of steps without a gradient, and digits."""

  def gradient(params: Any, member: Any, key: Array, step: Array) -> Any:
    del member
    images, labels = _digits.batch(key, BATCH)

    def ordinary(params: Any) -> Any:
      return jax.grad(lambda p: jnp.mean(_digits.losses(p, images, labels)))(params)

    def zeros(params: Any) -> Any:
      return jax.tree.map(jnp.zeros_like, params)

    is_quiet = (step >= phase) & (step < phase + quiet)
    return jax.lax.cond(is_quiet, zeros, ordinary, params)

  return _sweep.Task(
    lambda seed: _digits.plain(seed, HIDDEN), gradient, _digits.accuracy
  )


def sparse() -> _sweep.Task:
  """Values of tokens, most of which hardly ever come."""
  values = jax.random.normal(jax.random.key(2**31 - 1), (COMMON + RARE,))
  share_of_rare = RARE / GAP / np.prod(TOKENS)

  def init(seed: int) -> Any:
    rows, out = jax.random.split(jax.random.key(seed))
    return {
      "table": 0.1 * jax.random.normal(rows, (COMMON + RARE, WIDTH)),
      "out": jax.random.normal(out, (WIDTH,)) / WIDTH**0.5,
    }

  def gradient(params: Any, member: Any, key: Array, step: Array) -> Any:
    del member, step
    kind, common, rare, noise = jax.random.split(key, 4)
    tokens = jnp.where(
      jax.random.uniform(kind, TOKENS) < share_of_rare,
      jax.random.randint(rare, TOKENS, COMMON, COMMON + RARE),
      jax.random.randint(common, TOKENS, 0, COMMON),
    )
    target = values[tokens].sum(1) + NOISE * jax.random.normal(noise, TOKENS[:1])

    def loss(params: Any) -> Array:
      found = params["table"][tokens].sum(1) @ params["out"]
      return jnp.mean((found - target) ** 2)

    return jax.grad(loss)(params)

  def score(params: Any) -> dict[str, Array]:
    errors = (params["table"] @ params["out"] - values) ** 2
    return {"common": jnp.mean(errors[:COMMON]), "rare": jnp.mean(errors[COMMON:])}

  return _sweep.Task(init, gradient, score)


def run(
  quick: bool = False,
  note: Callable[[str], None] = lambda text: None,
  *,
  names: tuple[str, ...] | None = None,
  rates: dict[str, tuple[float, ...]] = RATES,
  seeds: int = 5,
  phase: int = PHASE,
  quiet: int = QUIET,
  steps: int = STEPS,
) -> Iterator[dict[str, Any]]:
  """One row for each task, cell and learning rate, with a list over seeds.

  Of ``padded``: ``before``, ``worst`` and ``end``, in percent, and ``course``, the mean
  accuracy at ``before`` and at each check after it. Of ``sparse``: ``rare`` and
  ``common``; null where it is not finite.
  """
  if quick:
    names, seeds, phase, quiet, steps = ("none", "update RMS 1"), 2, 100, 100, 100
  for length in (quiet, 0):
    for name, cell in CELLS.items():
      if names is None or name in names:
        note(f"update_clipping: padded, {length}, {name}")
        yield from _padded(name, cell, rates["padded"], seeds, phase, length)
  for name, cell in (CELLS | ROWS_TOO).items():
    if names is None or name in names:
      note(f"update_clipping: sparse, {name}")
      yield from _sparse(name, cell, rates["sparse"], seeds, steps)


def _padded(
  name: str, cell: Cell, rates: tuple[float, ...], seeds: int, phase: int, quiet: int
) -> Iterator[dict[str, Any]]:
  scores = _sweep.train(
    padded(phase, quiet),
    lambda member: cell.make(member["rate"]),
    _sweep.members(rate=np.float32(rates), seed=np.arange(seeds)),
    2 * phase + quiet,
    EVERY,
  )
  resumed = (phase + quiet) // EVERY
  for i, rate in enumerate(rates):
    mine = {k: v[i * seeds : (i + 1) * seeds] for k, v in scores.items()}
    # What is not finite says nothing: chance is what it is worth.
    right = 100 * np.where(mine["finite"], mine["accuracy"], 0.1)
    after = right[:, resumed : resumed + AFTER // EVERY]
    yield {
      "study": "update_clipping",
      "task": "padded",
      "quiet": quiet,
      "method": name,
      "rate": rate,
      "before": _rounded(right[:, resumed - 1]),
      "worst": _rounded(after.min(1)),
      "end": _rounded(right[:, -1]),
      "course": _rounded(right[:, resumed - 1 :].mean(0)),
      "finite": mine["finite"][:, -1].tolist(),
      "clipped": mine["clipped"][:, -1].tolist(),
    }


def _sparse(
  name: str, cell: Cell, rates: tuple[float, ...], seeds: int, steps: int
) -> Iterator[dict[str, Any]]:
  scores = _sweep.train(
    sparse(),
    lambda member: cell.make(member["rate"]),
    _sweep.members(rate=np.float32(rates), seed=np.arange(seeds)),
    steps,
    steps,
  )
  for i, rate in enumerate(rates):
    mine = {k: v[i * seeds : (i + 1) * seeds, -1] for k, v in scores.items()}
    yield {
      "study": "update_clipping",
      "task": "sparse",
      "method": name,
      "rate": rate,
      "rare": [round(float(x), 5) if np.isfinite(x) else None for x in mine["rare"]],
      "common": [
        round(float(x), 5) if np.isfinite(x) else None for x in mine["common"]
      ],
      "clipped": mine["clipped"].tolist(),
    }


def _rounded(percents: np.ndarray) -> list[float]:
  return [round(float(x), 2) for x in percents]
