"""From a first run to a threshold: observes, suggests, trains with it, compares.

A small language model learns the source of Python's standard library, at first
without clipping. The optimizer keeps the norms of its gradients meanwhile, and no
step waits for them. They suggest a `max_norm`, with which the same model is
trained once more, on the same batches::

    python demos/suggest.py
    python demos/suggest.py --lr 0.1 --clipped-share 0.01

It needs no network and, by default, less than a minute on two cores. It prints the
suggestion and the losses, and draws the norms with the threshold and with what
`autoclip` and `zclip` would have allowed.

Held-out losses in nats/byte, without clipping and with what was suggested, for seeds
0, 1 and 2: 2.460, 2.629, 2.453 and 2.315, 2.343, 2.323. At a learning rate of 0.1,
the best one without clipping, seed 0 reaches 2.428 and 2.384.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from typing import NamedTuple

import _flags
import _model
import _report
import _text
from flax import nnx
import jax
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax
from rich.console import Console
from train_lm import held_out

import optax_clip

LENGTH = 64
BATCH = 16
WIDTH = 64
LAYERS = 2
MOMENTUM = 0.9

# Losses are drawn as running means over about so many steps.
_SMOOTH = 20

_NORMS, _MAX_NORM, _AUTOCLIP, _ZCLIP = "#8c9aa8", "#c0392b", "#1f6fb4", "#2e8b57"


class Run(NamedTuple):
  """One finished run.

  Attributes:
    losses: f32[steps], of the training batches, in nats per byte.
    norms: f32[steps], of the gradients, before any clipping.
    held_out: nats per byte on text that was not trained on.
  """

  losses: np.ndarray
  norms: np.ndarray
  held_out: float


def train(tx: optax.GradientTransformation, flags: argparse.Namespace) -> Run:
  """Trains one model from the start with what `tx` makes of its gradients."""
  model = _model.Transformer(WIDTH, LAYERS, LENGTH, nnx.Rngs(flags.seed))
  observed = optax_clip.observe(
    optax.chain(tx, optax.sgd(flags.lr, momentum=MOMENTUM)), window=flags.steps
  )
  optimizer = nnx.Optimizer(model, observed, wrt=nnx.Param)

  @nnx.jit
  def step(model: Any, optimizer: Any, batch: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(_model.loss)(model, batch)
    optimizer.update(model, grads)
    return loss

  batches = _text.windows(flags.text.train, flags.steps, BATCH, LENGTH + 1, flags.seed)
  losses = [step(model, optimizer, batch) for batch in batches]
  return Run(
    np.asarray(jax.device_get(losses)),
    # The only time that the norms leave the device.
    optax_clip.norm_history(optimizer),
    held_out(model, flags.text.held_out, flags.seed),
  )


def draw(
  path: Path, first: Run, second: Run, found: optax_clip.states.Suggestion, title: str
) -> None:
  """Draws the norms of the first run with all limits, and the losses of both."""
  matplotlib.use("Agg")
  style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
  steps = np.arange(1, len(first.norms) + 1)
  with plt.rc_context(style):
    figure, (top, bottom) = plt.subplots(
      2, 1, figsize=(9, 6.4), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    _draw_norms(top, steps, first.norms, found)
    for run, color, name in (
      (first, _NORMS, "without clipping"),
      (second, _MAX_NORM, f"max_norm {found.max_norm:.3g}"),
    ):
      smooth = _report.smooth(run.losses, 1 - 1 / _SMOOTH)
      label = f"{name}\nheld out: {run.held_out:.3f}"
      bottom.plot(steps, smooth, color=color, linewidth=1.8, label=label)
    bottom.set(xlabel="training step", ylabel="train loss (nats/byte)")
    for axis in (top, bottom):
      axis.set_xlim(0, len(steps))
      axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
      axis.set_axisbelow(True)
      axis.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, labelspacing=1.0
      )
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


def _draw_norms(
  axis: Any, steps: np.ndarray, norms: np.ndarray, found: optax_clip.states.Suggestion
) -> None:
  axis.plot(steps, norms, color=_NORMS, linewidth=0.9, label="norm, not clipped")
  for tx, color, name in (
    (optax_clip.autoclip(), _AUTOCLIP, "autoclip"),
    (optax_clip.zclip(), _ZCLIP, "zclip"),
  ):
    limits = optax_clip.replay_limits(tx, norms)
    axis.plot(steps, limits, color=color, linewidth=1.2, label=f"{name} would allow")
  axis.axhline(
    found.max_norm,
    color=_MAX_NORM,
    linewidth=1.8,
    label=f"suggested max_norm {found.max_norm:.3g}\nabove it: "
    f"{100 * found.clipped_later:.1f}% after the start",
  )
  if found.start:
    axis.axvspan(0, found.start, color="#f3efe2", label="start, left out", zorder=0)
  axis.set_yscale("log")
  axis.set(ylabel="gradient norm (nats/byte per weight)")
  _report.label_decades(axis)


def main(argv: Sequence[str] | None = None) -> None:
  """Trains twice, prints the suggestion and the comparison, draws the figure."""
  flags = parse(argv)
  console = Console(highlight=False)
  with console.status("training without clipping"):
    first = train(optax.identity(), flags)
  try:
    found = optax_clip.suggest_max_norm(first.norms, flags.clipped_share)
  except ValueError as error:
    console.print(f"No suggestion: {error}")
    raise SystemExit(1) from None
  console.print(str(found))
  with console.status(f"training with max_norm {found.max_norm:.3g}"):
    second = train(optax_clip.clip_by_global_norm(found.max_norm), flags)
  console.print(
    f"\nheld-out loss: {first.held_out:.3f} nats/byte without clipping,"
    f" {second.held_out:.3f} with it"
  )
  title = f"Norms of a first run, sgd, lr {flags.lr:g}, seed {flags.seed}"
  path = flags.out / "suggest.png"
  draw(path, first, second, found, title)
  console.print(f"Wrote {path}", soft_wrap=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Reads and checks all flags, the text and the folder of `--out`."""
  parser = _flags.Parser(
    description=__doc__.partition("\n")[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add("--lr", type=_flags.rate, default=0.2, help="learning rate of SGD with momentum")
  add("--steps", type=_flags.positive, default=300, help="steps of each run")
  add(
    "--clipped-share",
    type=_flags.threshold,
    default=0.05,
    help="share of the steps to clip, besides spikes",
  )
  add("--seed", type=_flags.natural, default=0, help="of the weights and the batches")
  add("--out", type=Path, default="out", help="folder of the figure")
  flags = parser.parse_args(argv)
  if not flags.clipped_share < 1:
    parser.error(f"argument --clipped-share: {flags.clipped_share:g} is not below 1")
  try:
    flags.out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    parser.error(f"argument --out: {flags.out}: {error.strerror}")
  try:
    flags.text = _text.load()
  except OSError as error:
    parser.error(f"no text to train on: {error}")
  return flags


if __name__ == "__main__":
  try:
    main()
  except KeyboardInterrupt:
    raise SystemExit(130) from None
