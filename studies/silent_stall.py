r"""A training run that stands still without a NaN, a warning or an error.

Gradients in float16 have a largest value of 65504. `optax.clip_by_global_norm`
squares and sums them in float16 too, so that its norm is inf as soon as the
true norm passes sqrt(65504) = 256; every update is then divided by inf. Nothing
is NaN, the loss is simply flat.

A small residual MLP learns scikit-learn's handwritten digits: parameters and
momentum in float32, loss and gradients in float16, batches of 512, SGD with
momentum 0.9 at a learning rate of 0.1, 150 steps, max_norm 1, 5 seeds. Twice:

* *summed*: the loss is the sum over the batch. The norm is in the hundreds and
  should be clipped to 1.
* *scaled*: the loss is the mean, times a loss scale of 1024. The gradients are
  clipped where they are, in float16 and still scaled, to max_norm * 1024, and
  divided by 1024 in float32 afterwards. A correct norm clips nothing at all.

Run ``python -m studies.silent_stall``; it takes about 20 seconds on two
cores, prints a table and writes a figure into the folder ``out``. Those of the guide,
for light and for dark pages, are made with ``--out docs/figures/silent_stall.svg``.
"""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table

import optax_clip
from studies import _digits

SEEDS = 5
STEPS = 150
BATCH = 512
LEARNING_RATE = 0.1
MOMENTUM = 0.9
MAX_NORM = 1.0
WIDTH = 128
BLOCKS = 1

LIBRARIES = {
  "optax": optax.clip_by_global_norm,
  "optax_clip": optax_clip.clip_by_global_norm,
}


class Colors(NamedTuple):
  """Of a figure; each is readable on the background."""

  optax: str
  optax_clip: str
  text: str
  muted: str
  grid: str
  background: str


LIGHT = Colors("#c0392b", "#1f6fb4", "#000000", "#444444", "#e6e6e6", "#ffffff")
DARK = Colors("#ff8a80", "#7ab8ff", "#e6e6e6", "#c0c0c0", "#3a3d42", "#131416")


class Variant(NamedTuple):
  """How the loss of a batch is made from the losses of its examples.

  Attributes:
    title: for the figure and the table.
    reduce: from losses, f32[batch], to the loss that is differentiated.
    scale: what the updates are divided by, in float32, after clipping.
  """

  title: str
  reduce: Callable[[jax.Array], jax.Array]
  scale: float


VARIANTS = {
  "summed": Variant("loss summed over the batch", jnp.sum, 1.0),
  "scaled": Variant("mean loss, loss scale 1024", lambda x: jnp.mean(x) * 1024, 1024.0),
}


class Run(NamedTuple):
  """What happened, for each seed and step.

  Attributes:
    loss: f32[seeds, steps], the mean loss of the batch before the step.
    norm: f32[seeds, steps], the gradients' norm, summed in float32 and divided
      by the loss scale.
    zero: bool[seeds, steps], whether every element of the update was zero.
    accuracy: f32[seeds, steps + 1], on the test set, before and after steps.
  """

  loss: np.ndarray
  norm: np.ndarray
  zero: np.ndarray
  accuracy: np.ndarray


def init(key: jax.Array) -> dict[str, Any]:
  """Parameters in float32; residual branches and the output start small."""
  keys = iter(jax.random.split(key, 2 + 2 * BLOCKS))

  def dense(rows: int, columns: int, gain: float) -> jax.Array:
    values = jax.random.normal(next(keys), (rows, columns))
    return values * gain / jnp.sqrt(rows)

  return {
    "input": dense(64, WIDTH, 1.0),
    "blocks": [
      (dense(WIDTH, WIDTH, 1.0), dense(WIDTH, WIDTH, 0.1)) for _ in range(BLOCKS)
    ],
    "output": dense(WIDTH, 10, 0.1),
  }


def logits(params: dict[str, Any], images: jax.Array) -> jax.Array:
  """A residual MLP, in the dtype of its parameters."""
  hidden = images.astype(params["input"].dtype) @ params["input"]
  for up, down in params["blocks"]:
    hidden = hidden + jax.nn.relu(hidden @ up) @ down
  return hidden @ params["output"]


def losses(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
  """The cross-entropy of each example, in float32."""
  scores = logits(params, images).astype(jnp.float32)
  return optax.softmax_cross_entropy_with_integer_labels(scores, labels)


def optimizer(library: str, scale: float) -> optax.GradientTransformation:
  """Clip in float16, unscale in float32, then SGD with momentum."""
  unscale = optax.stateless(
    lambda updates, _: jax.tree.map(lambda u: u.astype(jnp.float32) / scale, updates)
  )
  return optax.chain(
    LIBRARIES[library](MAX_NORM * scale),
    unscale,
    optax.sgd(LEARNING_RATE, momentum=MOMENTUM),
  )


def train(library: str, variant: str, seeds: int = SEEDS) -> Run:
  """Trains all seeds at once with the clipping of one library.

  Args:
    library: a key of `LIBRARIES`.
    variant: a key of `VARIANTS`.
    seeds: how many, from 0.
  """
  train_x, train_y, test_x, test_y = map(jnp.asarray, _digits.data())
  reduce, scale = VARIANTS[variant].reduce, VARIANTS[variant].scale
  tx = optimizer(library, scale)

  def objective(half: Any, images: jax.Array, labels: jax.Array) -> Any:
    each = losses(half, images, labels)
    return reduce(each), jnp.mean(each)

  def accuracy(params: Any) -> jax.Array:
    return jnp.mean(jnp.argmax(logits(params, test_x), -1) == test_y)

  def step(carry: tuple[Any, Any], key: jax.Array) -> Any:
    params, state = carry
    picked = jax.random.choice(key, len(train_x), (BATCH,), replace=False)
    half = jax.tree.map(lambda p: p.astype(jnp.float16), params)
    grads, loss = jax.grad(objective, has_aux=True)(
      half, train_x[picked], train_y[picked]
    )
    norm = exact_norm(grads) / scale
    updates, state = tx.update(grads, state, params)
    zero = jnp.all(jnp.stack([jnp.all(u == 0) for u in jax.tree.leaves(updates)]))
    params = optax.apply_updates(params, updates)
    return (params, state), (loss, norm, zero, accuracy(params))

  def one_seed(seed: jax.Array) -> Any:
    init_key, data_key = jax.random.split(jax.random.key(seed))
    params = init(init_key)
    keys = jax.random.split(data_key, STEPS)
    _, (loss, norm, zero, after) = jax.lax.scan(step, (params, tx.init(params)), keys)
    return loss, norm, zero, jnp.concatenate([accuracy(params)[None], after])

  return Run(*map(np.asarray, jax.jit(jax.vmap(one_seed))(jnp.arange(seeds))))


def exact_norm(tree: Any) -> jax.Array:
  """A norm that owes nothing to either library: everything in float32."""
  squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
  return jnp.sqrt(sum(squares))


def table(runs: dict[tuple[str, str], Run]) -> Table:
  """Test accuracy of each seed, and how many updates were zero."""
  seeds, steps = next(iter(runs.values())).zero.shape
  result = Table(
    title=f"Test accuracy in % after {STEPS} steps, float16 gradients",
    caption=f"Of {seeds * steps} updates in all, zero: every element is 0."
    f"\nclip: the true norm is above max_norm = {MAX_NORM:g}.",
    box=box.SIMPLE_HEAD,
  )
  for name in ("loss", "clipped by"):
    result.add_column(name, no_wrap=True)
  for name in (*(f"#{seed}" for seed in range(seeds)), "mean", "zero", "clip"):
    result.add_column(name, justify="right")
  for (variant, library), run in runs.items():
    final = 100 * run.accuracy[:, -1]
    result.add_row(
      variant,
      library,
      *(f"{value:.1f}" for value in final),
      f"{final.mean():.1f}",
      f"{run.zero.sum()}",
      f"{(run.norm > MAX_NORM).sum()}",
      end_section=library == list(LIBRARIES)[-1],
    )
  return result


def draw(runs: dict[tuple[str, str], Run], path: Path) -> None:
  """Accuracy over steps: a panel for each loss, a thin line for each seed.

  An SVG has a twin for dark pages, whose name ends with ``_dark``.
  """
  _draw(runs, path, LIGHT)
  if path.suffix == ".svg":
    _draw(runs, path.with_stem(f"{path.stem}_dark"), DARK)


def _draw(runs: dict[tuple[str, str], Run], path: Path, colors: Colors) -> None:
  matplotlib.use("Agg")
  style = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": colors.background,
    # A viewer may lack the font: letters are curves. And the file does not change.
    "svg.fonttype": "path",
    "svg.hashsalt": "silent_stall",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), colors.text),
    **dict.fromkeys(("xtick.color", "ytick.color"), colors.text),
  }
  with plt.rc_context(style):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.9), sharey=True)
    for axis, (key, variant) in zip(axes, VARIANTS.items(), strict=True):
      axis.set_title(variant.title, fontsize=11, color=colors.muted)
      axis.set(xlabel="training step", xlim=(0, STEPS), ylim=(0, 102))
      axis.grid(axis="y", color=colors.grid, linewidth=0.8)
      axis.set_axisbelow(True)
      for library in LIBRARIES:
        _draw_run(axis, library, runs[key, library], colors)
    axes[0].set_ylabel("test accuracy (%)")
    figure.suptitle(
      "The silent stall: float16 gradients, the same clip, two libraries",
      x=0.01,
      ha="left",
      fontsize=13,
      fontweight="bold",
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    dated = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=160, facecolor=colors.background, metadata=dated)
    plt.close(figure)


def _draw_run(axis: Any, library: str, run: Run, colors: Colors) -> None:
  color, final = getattr(colors, library), 100 * run.accuracy[:, -1]
  axis.plot(100 * run.accuracy.T, color=color, linewidth=0.9, alpha=0.8)
  learned = final.mean() > 50
  note = f"{library}.clip_by_global_norm\n"
  if run.zero.all():
    note += f"all {run.zero.size} updates are zero: {final.mean():.0f}%"
  else:
    note += f"{final.mean():.1f}% on average"
  height = final.min() - 5 if learned else final.max() + 3
  axis.text(
    STEPS - 2,
    height,
    note,
    color=color,
    ha="right",
    va="top" if learned else "bottom",
    fontweight="bold",
    fontsize=10,
    bbox={"facecolor": colors.background, "edgecolor": "none", "pad": 1.5},
  )


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the study, prints the table, writes the figure."""
  default = Path("out") / "silent_stall.png"
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument(
    "--out", type=Path, default=default, help="the figure (default: %(default)s)"
  )
  out = parser.parse_args(argv).out
  console = Console()
  runs = {}
  for variant in VARIANTS:
    for library in LIBRARIES:
      with console.status(f"{variant} loss, clipped by {library}"):
        runs[variant, library] = train(library, variant)
  console.print(table(runs))
  draw(runs, out)
  console.print(f"Wrote {out}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
  main()
