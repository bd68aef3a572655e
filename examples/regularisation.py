"""Clipping with weight decay, L1 and L2 penalties: what is clipped, and what is not.

A small network learns scikit-learn's handwritten digits by plain SGD, with a penalty in
each of the places where it may stand::

    python examples/regularisation.py
    python examples/regularisation.py --max-norm inf

A step has two parts: the gradient of the data's loss, and that of the penalty, which is
a strength times w for L2, and times sign(w) for L1. SGD without a clip does not care
where the second is added: with ``--max-norm inf`` all orders of L2 end at 95.9% of the
digits and a norm of the weights of 8.48. A clip does (defaults, means of 5 seeds):

* ``in loss``: the clip is given the sum and shrinks both parts alike. What is minimised
  stays as it was written, in smaller steps: 95.9%, and a norm of 8.60. But the penalty
  counts in the norm, and a step takes off less than its strength says: 0.0041 of the
  weights, times the learning rate, in place of 0.01.
* ``before``: `optax.add_decayed_weights` before the clip. It is the same sum, and the
  numbers are the same. What is kept out of the loss is not kept from the clip.
* ``after``: `optax.add_decayed_weights` after the clip, which is given the gradient of
  the data alone. A step takes off what the strength says, whatever the clip does. Only
  the other part shrinks, to 0.32 of itself, so that the penalty weighs more: 93.8%, and
  a norm of 6.70. The lower `max_norm`, the more so: strengths are to be found with it.

A clip in front of `optax.adamw` is ``after``. L1 is the clearest case: as long as no
weight is exactly 0, its gradient has the same norm at every step, the strength times
the root of the number of weights, here 0.21. In the loss, that alone is above
`max_norm`: every step would be clipped even if the data had nothing more to say.
"""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import _digits
import _flags
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table

import optax_clip

BATCH = 64
WIDTH = 64

Params = dict[str, jax.Array]


class Way(NamedTuple):
  """Where a penalty stands.

  Attributes:
    loss: what is added to the loss, a function of the weights.
    before: what is added to the gradient before the clip.
    after: what is added to it after the clip.
  """

  loss: Callable[[Params], Any] = lambda params: 0.0
  before: optax.GradientTransformation = optax.identity()
  after: optax.GradientTransformation = optax.identity()


class Run(NamedTuple):
  """What happened, for each seed and step.

  Attributes:
    data: f32[seeds, steps], the norm of the gradient of the cross-entropy alone.
    norm: f32[seeds, steps], of what the clip was given.
    kept: f32[seeds, steps], what the clip multiplied it with.
    weights: f32[seeds], the norm of all weights at the end.
    zeros: f32[seeds], the share of weights below 1e-3 at the end.
    accuracy: f32[seeds], on the images that were held out, at the end.
  """

  data: np.ndarray
  norm: np.ndarray
  kept: np.ndarray
  weights: np.ndarray
  zeros: np.ndarray
  accuracy: np.ndarray


def ways(l2: float, l1: float) -> dict[str, Way]:
  """Every order, by its name in the table."""

  def squares(params: Params) -> jax.Array:
    return l2 / 2 * sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params))

  def moduli(params: Params) -> jax.Array:
    return l1 * sum(jnp.sum(jnp.abs(p)) for p in jax.tree.leaves(params))

  decay, signs = optax.add_decayed_weights(l2), add_signs(l1)
  return {
    "none": Way(),
    "L2 in loss": Way(loss=squares),
    "decay before": Way(before=decay),
    "decay after": Way(after=decay),
    "L1 in loss": Way(loss=moduli),
    "L1 after": Way(after=signs),
  }


def add_signs(strength: float) -> optax.GradientTransformation:
  """The gradient of an L1 penalty, added to the updates."""

  def add(updates: Any, params: Any) -> Any:
    return jax.tree.map(lambda u, p: u + strength * jnp.sign(p), updates, params)

  return optax.stateless(add)


def init(key: jax.Array) -> Params:
  """Two layers, from pixels to a score for each digit."""
  up, down = jax.random.split(key)
  return {
    "up": jax.random.normal(up, (64, WIDTH)) * (2 / 64) ** 0.5,
    "down": jax.random.normal(down, (WIDTH, 10)) * (1 / WIDTH) ** 0.5,
  }


def scores(params: Params, images: jax.Array) -> jax.Array:
  """f32[batch, 10]."""
  return jax.nn.relu(images @ params["up"]) @ params["down"]


def cross_entropy(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
  """The mean over a batch."""
  return optax.softmax_cross_entropy_with_integer_labels(
    scores(params, images), labels
  ).mean()


def train(way: Way, flags: argparse.Namespace) -> Run:
  """Trains all seeds at once."""
  train_x, train_y, test_x, test_y = map(jnp.asarray, _digits.load())
  tx = optax.chain(
    way.before,
    optax_clip.clip_by_global_norm(flags.max_norm, name="clip"),
    way.after,
    optax.sgd(flags.lr),
  )

  def step(carry: tuple[Params, Any], key: jax.Array) -> Any:
    params, state = carry
    picked = jax.random.randint(key, (BATCH,), 0, len(train_x))
    data = jax.grad(cross_entropy)(params, train_x[picked], train_y[picked])
    # The gradient of one loss, in two parts so that they can be measured.
    penalty = jax.grad(lambda params: jnp.asarray(way.loss(params)))(params)
    grads = jax.tree.map(jnp.add, data, penalty)
    updates, state = tx.update(grads, state, params)
    seen = optax_clip.metrics(state)
    logs = optax_clip.global_norm(data), seen["clip/norm"], seen["clip/coefficient"]
    return (optax.apply_updates(params, updates), state), logs

  def one_seed(seed: jax.Array) -> Run:
    init_key, data_key = jax.random.split(jax.random.key(seed))
    params = init(init_key)
    keys = jax.random.split(data_key, flags.steps)
    (params, _), logs = jax.lax.scan(step, (params, tx.init(params)), keys)
    flat = jnp.concatenate([p.ravel() for p in jax.tree.leaves(params)])
    right = jnp.argmax(scores(params, test_x), axis=-1) == test_y
    return Run(
      *logs,
      optax_clip.global_norm(params),
      jnp.mean(jnp.abs(flat) < 1e-3),
      right.mean(),
    )

  return Run(*map(np.asarray, jax.jit(jax.vmap(one_seed))(jnp.arange(flags.seeds))))


def effective(name: str, run: Run, flags: argparse.Namespace) -> float:
  """What the weights lose in a step, over the learning rate: a mean over steps.

  Of L2 and weight decay it is a share of the weights, of L1 an amount.
  """
  strength = {"none": 0.0, "L1": flags.l1}.get(name.split()[0], flags.l2)
  return strength * (1.0 if name.endswith("after") else run.kept.mean().item())


def table(done: dict[str, Run], flags: argparse.Namespace) -> Table:
  """Means over seeds and steps, and at the end of them."""
  result = Table(
    title=f"max_norm {flags.max_norm:g}, L2 {flags.l2:g}, L1 {flags.l1:g},"
    f" {flags.seeds} seeds, {flags.steps} steps",
    caption="data: norm of the gradient without the penalty. norm: of what the clip"
    " is given. decay: what a step takes off the weights, over the learning rate."
    " weights: their norm at the end. zero: share of them below 1e-3.",
    box=box.SIMPLE_HEAD,
    pad_edge=False,
  )
  result.add_column("penalty", no_wrap=True)
  for name in ("data", "norm", "clipped", "decay", "weights", "zero", "accuracy"):
    result.add_column(name, justify="right", no_wrap=True)
  for name, run in done.items():
    result.add_row(
      name,
      f"{run.data.mean():.3f}",
      f"{run.norm.mean():.3f}",
      f"{(run.norm > flags.max_norm).mean():.0%}",
      f"{effective(name, run, flags):.2g}",
      f"{run.weights.mean():.2f}",
      f"{run.zeros.mean():.0%}",
      f"{run.accuracy.mean():.1%}",
      end_section=name in ("none", "decay after"),
    )
  return result


def main(argv: Sequence[str] | None = None) -> dict[str, Run]:
  """Trains in every order and prints the table; returns the runs."""
  flags = parse(argv)
  console = Console(highlight=False)
  done = {}
  for name, way in ways(flags.l2, flags.l1).items():
    with console.status(f"training, {name}"):
      done[name] = train(way, flags)
  console.print(table(done, flags))
  return done


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Reads and checks the flags."""
  parser = _flags.Parser(
    description=__doc__.partition("\n")[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add, number = parser.add_argument, _flags.threshold
  add("--max-norm", type=number, default=0.15, help="of what the clip is given")
  add("--l2", type=number, default=0.01, help="strength of weight decay and L2")
  add("--l1", type=number, default=0.003, help="strength of L1")
  add("--lr", type=_flags.rate, default=0.3, help="learning rate of SGD")
  add("--steps", type=_flags.positive, default=1500, help="of each run")
  add("--seeds", type=_flags.positive, default=5, help="how many, from 0")
  return parser.parse_args(argv)


if __name__ == "__main__":
  try:
    main()
  except KeyboardInterrupt:
    raise SystemExit(130) from None
