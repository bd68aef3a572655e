"""A threshold that changes in training: by a schedule, or by hand from the loop.

A small network learns scikit-learn's handwritten digits three times, on the same
batches::

    python examples/threshold_schedule.py

* ``fixed``: one `max_norm` for the whole run.
* ``schedule``: `max_norm` is a schedule of optax, a function of the step, which the
  clip counts itself. It is for what is known in advance.
* ``by hand``: `optax.inject_hyperparams` keeps `max_norm` in the optimizer's state,
  where the loop changes it. It is for what only the run tells: here, every so many
  steps, the median of the norms since the last change.

In all three the step is compiled once: what changes is a value that it reads, not a
constant in the program. The last column of the table counts how often JAX traced it.
(A clip made anew for each `max_norm`, with a step around it, would be compiled anew.)
"""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import statistics
from typing import Any
from typing import NamedTuple

import _digits
import _flags
import jax
import jax.numpy as jnp
import optax
from rich import box
from rich.console import Console
from rich.table import Table

import optax_clip

BATCH = 64
WIDTH = 64


class Run(NamedTuple):
  """What one run did, step by step.

  Attributes:
    norms: of the gradients, before clipping.
    limits: the threshold at each step.
    traces: how often the step was traced, and so compiled.
    accuracy: on the images that were held out, at the end.
  """

  norms: list[float]
  limits: list[float]
  traces: int
  accuracy: float


def init(seed: int) -> dict[str, jax.Array]:
  """Two layers, from pixels to a score for each digit."""
  up, down = jax.random.split(jax.random.key(seed))
  return {
    "up": jax.random.normal(up, (64, WIDTH)) * (2 / 64) ** 0.5,
    "down": jax.random.normal(down, (WIDTH, 10)) * (1 / WIDTH) ** 0.5,
  }


def scores(params: dict[str, jax.Array], images: jax.Array) -> jax.Array:
  """f32[batch, 10]."""
  return jax.nn.relu(images @ params["up"]) @ params["down"]


def train(
  clip: optax.GradientTransformation,
  flags: argparse.Namespace,
  change: Callable[[list[float]], float] | None = None,
) -> Run:
  """Trains once.

  Args:
    clip: stands first in the chain.
    flags: of the command line.
    change: what sets `max_norm` from the norms since it last did, or `None`. `clip` is
      then wrapped in `optax.inject_hyperparams`.
  """
  digits = _digits.load()
  params = init(flags.seed)
  tx = optax.chain(clip, optax.sgd(flags.lr, momentum=0.9))
  state = tx.init(params)
  traces = 0

  @jax.jit
  def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
    # Python runs this only while JAX traces, before it compiles.
    nonlocal traces
    traces += 1

    def loss_fn(params: Any) -> jax.Array:
      losses = optax.softmax_cross_entropy_with_integer_labels(
        scores(params, images), labels
      )
      return jnp.mean(losses)

    updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
    return optax.apply_updates(params, updates), state, optax_clip.metrics(state)

  logs: list[dict[str, jax.Array]] = []
  batches = _digits.batches(digits, flags.steps, BATCH, flags.seed)
  for number, batch in enumerate(batches):
    if change and number and number % flags.every == 0:
      set_max_norm(state, change(read(logs[-flags.every :], "norm")))
    params, state, seen = step(params, state, *batch)
    logs.append(seen)
  right = jnp.argmax(scores(params, digits.test_images), axis=-1) == digits.test_labels
  return Run(read(logs, "norm"), read(logs, "limit"), traces, right.mean().item())


def set_max_norm(state: Any, value: float) -> None:
  """Changes the threshold of the injected clip, the first of the chain.

  An array of the old one's dtype takes its place: a Python number is another type to
  `jax.jit`, and would compile the step once more.
  """
  hyperparams = state[0].hyperparams
  hyperparams["max_norm"] = jnp.asarray(value, hyperparams["max_norm"].dtype)


def read(logs: Sequence[dict[str, jax.Array]], field: str) -> list[float]:
  """One of the clip's metrics at each step; waits for the device, once."""
  found = [seen[f"clip_by_global_norm/{field}"] for seen in logs]
  return [value.item() for value in jax.device_get(found)]


def runs(flags: argparse.Namespace) -> dict[str, Callable[[], Run]]:
  """The three ways, by their names in the table."""
  clip = optax_clip.clip_by_global_norm
  decay = optax.linear_schedule(flags.max_norm, flags.end, flags.steps)
  injected = optax.inject_hyperparams(clip)(max_norm=flags.max_norm)
  return {
    "fixed": lambda: train(clip(flags.max_norm), flags),
    "schedule": lambda: train(clip(decay), flags),
    "by hand": lambda: train(injected, flags, statistics.median),
  }


def table(done: dict[str, Run], every: int) -> Table:
  """The threshold over the run, and what came of it."""
  result = Table(
    caption="clipped: of all steps. compiled: how many times.", box=box.SIMPLE_HEAD
  )
  result.add_column("max_norm at step", no_wrap=True)
  steps = range(0, len(next(iter(done.values())).norms), every)
  # As many of them as fit 80 columns, evenly spread.
  shown = steps[:: -(-len(steps) // 4)]
  for number in shown:
    result.add_column(str(number + 1), justify="right", no_wrap=True)
  for name in ("clipped", "accuracy", "compiled"):
    result.add_column(name, justify="right", no_wrap=True)
  for name, run in done.items():
    clipped = [norm > limit for norm, limit in zip(run.norms, run.limits, strict=True)]
    result.add_row(
      name,
      *(f"{run.limits[number]:.3g}" for number in shown),
      f"{statistics.mean(clipped):.0%}",
      f"{run.accuracy:.1%}",
      str(run.traces),
    )
  return result


def main(argv: Sequence[str] | None = None) -> dict[str, Run]:
  """Trains three times and prints the table; returns the runs."""
  flags = parse(argv)
  console = Console(highlight=False)
  done = {}
  for name, run in runs(flags).items():
    with console.status(f"training, {name}"):
      done[name] = run()
  console.print(table(done, flags.every))
  return done


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Reads and checks the flags."""
  parser = _flags.Parser(
    description=__doc__.partition("\n")[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add("--max-norm", type=_flags.threshold, default=1.0, help="at the start")
  add("--end", type=_flags.threshold, default=0.2, help="max_norm the schedule ends at")
  add(
    "--every", type=_flags.positive, default=100, help="steps between changes by hand"
  )
  add("--lr", type=_flags.rate, default=0.1, help="learning rate of SGD with momentum")
  add("--steps", type=_flags.positive, default=500, help="of each run")
  add("--seed", type=_flags.natural, default=0, help="of the weights and the batches")
  return parser.parse_args(argv)


if __name__ == "__main__":
  try:
    main()
  except KeyboardInterrupt:
    raise SystemExit(130) from None
