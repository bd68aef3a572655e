"""Trains a small language model side by side with and without clipping.

A byte-level transformer in Flax NNX learns the source of Python's standard library,
once for each method named by ``--clip``, from the same weights and on the same
batches. One batch in 100 is broken on purpose, and a guard skips its step::

    python -m examples.language_model
    python -m examples.language_model --clip none,global,layer,rms,agc,value
    python -m examples.language_model --lr 0.5 --fp16
    python -m examples.language_model --steps 5000 --checkpoint out/long --resume
    python -m examples.language_model --fsdp

It needs no network and, by default, half a minute on two cores. It shows each run live,
writes every step to ``steps.csv`` and a figure to ``steps.png`` in the folder of
``--out``, and closes with a table, what was seen, and the call to copy. With
``--checkpoint`` it may be killed at any moment: the same command with
``--resume`` goes on, and ends with the same bits. ``--fsdp`` trains on all devices,
of one process or several, with a part of all weights on each.

All runs use one learning rate, and the best one depends on the clip:
``docs/evidence.md`` has a study of this model at several, with five seeds.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import itertools
import math
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn
from rich.progress import Progress
from rich.progress import TextColumn

from examples.language_model import _devices
from examples.language_model import _flags
from examples.language_model import _model
from examples.language_model import _outcome
from examples.language_model import _text
from examples.language_model._clips import METHODS
from examples.language_model._clips import Method
from examples.language_model._clips import code
from examples.language_model._clips import recorded
from examples.language_model._clips import transformation
from examples.language_model.checkpoints import Checkpoints

HELD_OUT_BATCHES = 32
HELD_OUT_BATCH = 64

# Results are fetched from the device this many steps at a time, and one such
# portion late: fetching at every step would make the device wait for Python.
PORTION = 10


def main(argv: Sequence[str] | None = None) -> None:
  """Trains one model for each method and reports on all of them."""
  flags = _flags.parse(argv)
  console = Console(quiet=not flags.devices.first)
  if flags.resume:
    for name, found in flags.checkpoints.items():
      how = f"goes on from step {found.latest}"
      if found.latest is None:
        how = "no checkpoint yet, starts from the beginning"
      console.print(f"{name}: {how} ({found.folder})", soft_wrap=True, highlight=False)
  with progress(console) as bars:
    runs = [train(name, flags, bars) for name in flags.clip]
  if not flags.devices.first:
    return
  _outcome.write_csv(runs, flags.out / "steps.csv")
  _outcome.draw(runs, flags.out / "steps.png", describe(flags))
  console.print()
  console.print(_outcome.table(runs))
  console.print()
  console.print(_outcome.notes(runs, flags.lr), style="dim", highlight=False)
  best = _outcome.best(runs)
  console.print()
  console.print(_outcome.seen(runs, len(flags.broken)), markup=False, highlight=False)
  if best:
    console.print(f"\nTo train as '{best.name}' did, copy:\n", highlight=False)
    console.print(code(best.name, flags), markup=False, soft_wrap=True)
    console.print()
  for name in ("steps.csv", "steps.png"):
    console.print(f"Wrote {flags.out / name}", soft_wrap=True, highlight=False)


def train(name: str, flags: argparse.Namespace, bars: Progress) -> _outcome.Run:
  """Trains one model from the start and tests it on held-out text."""
  method = METHODS[name]
  length = _flags.LENGTH + 1  # Inputs and targets overlap.

  def make() -> tuple[_model.Transformer, nnx.Optimizer]:
    rngs = nnx.Rngs(flags.seed)
    model = _model.Transformer(flags.width, flags.layers, _flags.LENGTH, rngs)
    return model, nnx.Optimizer(model, transformation(method, flags), wrt=nnx.Param)

  model, optimizer = flags.devices.build(make)
  step = make_step(method, flags.dtype, flags.devices)
  bar = bars.add_task(name, total=flags.steps, status="compiling")
  with flags.checkpoints.get(name, contextlib.nullcontext()) as checkpoints:
    steps = start(checkpoints, model, optimizer) if checkpoints else []
    bars.update(bar, completed=len(steps))
    before = len(steps)
    windows = _text.windows(
      flags.text.train, flags.steps, _flags.BATCH, length, flags.seed, before
    )
    batches = zip(windows, weights(flags, before), strict=True)
    started = speed = math.nan
    while len(steps) < flags.steps:
      # A checkpoint needs the model of its step, and not of a later one.
      every = flags.checkpoint_every
      stop = min(len(steps) // every * every + every, flags.steps)
      segment = itertools.islice(batches, stop - len(steps))
      for portion in portions(step, model, optimizer, segment):
        steps += portion
        if checkpoints:
          checkpoints.record(portion)
        if len(steps) == before + 1:
          started = time.perf_counter()  # The first step compiles.
        else:
          speed = (len(steps) - before - 1) / (time.perf_counter() - started)
          show(bars, bar, steps, speed)
      if checkpoints:
        checkpoints.save(len(steps), nnx.state((model, optimizer)))
  return _outcome.Run(
    name,
    method.measured,
    steps,
    held_out(model, flags.text.held_out, flags.seed, flags.devices),
  )


def weights(flags: argparse.Namespace, first: int) -> Iterator[np.float32]:
  """Yields what each step's loss counts: 1, and NaN where a batch is broken."""
  for step in range(first, flags.steps):
    yield np.float32(np.nan if step in flags.broken else 1)


def start(
  checkpoints: Checkpoints, model: Any, optimizer: Any
) -> list[dict[str, float]]:
  """Begins a run or goes on with it; returns what its steps measured so far."""
  if checkpoints.latest is None:
    checkpoints.begin()
    return []
  _, state, rows = checkpoints.restore(nnx.state((model, optimizer)))
  nnx.update((model, optimizer), state)
  return rows


def make_step(
  method: Method, dtype: Any, devices: _devices.One
) -> Callable[..., dict[str, jax.Array]]:
  """A training step: float32 weights, loss and gradients in `dtype`."""

  @nnx.jit
  def step(
    model: Any, optimizer: Any, batch: jax.Array, weight: jax.Array
  ) -> dict[str, jax.Array]:
    graph, params = nnx.split(model)

    def loss_of(params: Any) -> jax.Array:
      return weight * _model.loss(nnx.merge(graph, params), batch)

    loss, grads = jax.value_and_grad(loss_of)(optax.tree.cast(params, dtype))
    optimizer.update(model, grads)
    devices.keep((model, optimizer))
    # What clipping did is a part of the optimizer's state, free to read.
    return {"loss": loss} | recorded(method, optimizer)

  return lambda model, optimizer, batch, weight: devices.wait(
    step(model, optimizer, devices.batch(batch), weight), (model, optimizer)
  )


def portions(
  step: Callable[..., dict[str, jax.Array]],
  model: Any,
  optimizer: Any,
  batches: Iterator[tuple[np.ndarray, np.float32]],
) -> Iterator[list[dict[str, float]]]:
  """Runs all steps; yields their results on the host, the first one at once."""
  yield fetch([step(model, optimizer, *next(batches))])
  pending = []
  for batch in batches:
    pending.append(step(model, optimizer, *batch))
    if len(pending) == 2 * PORTION:
      yield fetch(pending[:PORTION])
      del pending[:PORTION]
  if pending:
    yield fetch(pending)


def fetch(results: list[dict[str, jax.Array]]) -> list[dict[str, float]]:
  """Results as numbers; waits for the device."""
  return [
    {key: value.item() for key, value in result.items()}
    for result in jax.device_get(results)
  ]


# Here, and not in the function, so that it is compiled once for all runs.
test_loss = nnx.jit(_model.loss)


def held_out(
  model: Any, text: Any, seed: int, devices: _devices.One = _devices.ONE
) -> float:
  """Nats per byte on text that was not trained on, with float32 weights."""
  length = _flags.LENGTH + 1
  batches = _text.windows(text, HELD_OUT_BATCHES, HELD_OUT_BATCH, length, seed)
  losses = [devices.wait(test_loss(model, devices.batch(x))) for x in batches]
  return float(sum(losses)) / HELD_OUT_BATCHES


def progress(console: Console) -> Progress:
  """A bar for each run; none, but a few plain lines, outside a terminal."""
  return Progress(
    TextColumn("{task.description:6}"),
    BarColumn(bar_width=None),
    TextColumn("{task.completed}/{task.total} {task.fields[status]}"),
    console=console,
    disable=not console.is_terminal,
    expand=True,
  )


def show(bars: Progress, bar: Any, steps: list[Any], speed: float) -> None:
  """Brings the bar of a run up to date."""
  taken = (step for step in reversed(steps) if math.isfinite(step["loss"]))
  last, done = next(taken, steps[-1]), len(steps)
  clipped = 100 * last["steps_clipped"] / done
  tokens = speed * _flags.BATCH * _flags.LENGTH
  status = (
    f"loss {last['loss']:.3f} {tokens / 1000:.0f}k tok/s"
    f" norm {_outcome.number(last['norm'])} clipped {clipped:.0f}%"
    f" skipped {steps[-1]['steps_skipped']}"
  )
  before = bars.tasks[bar].completed
  bars.update(bar, completed=done, status=status)
  total = bars.tasks[bar].total
  if bars.disable and done * 5 // total > before * 5 // total:
    name = bars.tasks[bar].description
    bars.console.print(f"{name:6} {done}/{total} {status}", highlight=False)


def describe(flags: argparse.Namespace) -> str:
  """The title of the figure."""
  return (
    f"{flags.optimizer}, lr {flags.lr:g}, width {flags.width},"
    f" {flags.layers} layers, {jnp.dtype(flags.dtype).name} gradients,"
    f" seed {flags.seed}"
  )
