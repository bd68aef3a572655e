"""Bfloat16 gradients, accumulated and guarded; a checkpoint that continues bit by bit.

A small network learns scikit-learn's handwritten digits in bfloat16, with weights in
float32. It trains once without a break, and once with a checkpoint in the middle of an
accumulation, from which a new state goes on to the same bits::

    python bfloat16_resume.py --accumulate 4

* `optax.MultiSteps` adds microbatches up in float32, and takes a step for so many.
* `skip_nonfinite` stands around it: it leaves a microbatch with a NaN out, and the next
  one takes its place. Inside it would come too late, when the sum is NaN already.
* `autoclip` learns its limit from the norms of the means. What it learned is a part of
  the optimizer's state, as are the sum so far and the counts: save all of the state.
* The batch is a function of the seed and of the number of the step alone.
"""

import argparse
from collections.abc import Sequence
import importlib.util
from pathlib import Path
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from sklearn.datasets import load_digits

import optax_clip


def init(tx: Any, flags: argparse.Namespace) -> dict[str, Any]:
  """Makes all that a step depends on."""
  up, down = jax.random.normal(jax.random.key(flags.seed), (2, 64, 64)) / 8
  params = {"up": up, "down": down[:, :10]}
  return {"params": params, "optimizer": tx.init(params)}


def main(argv: Sequence[str] | None = None) -> tuple[Any, Any, dict[str, Any]]:
  """Trains twice and compares; returns both states, and the last metrics."""
  flags = parse(argv)
  images, labels = load_digits(return_X_y=True)
  images = np.float32(images / 16)
  chain = optax.chain(optax_clip.autoclip(window=32), optax.adamw(flags.lr))
  tx = optax_clip.skip_nonfinite(
    optax.MultiSteps(chain, flags.accumulate).gradient_transformation()
  )

  @jax.jit
  def train_step(state: Any, images: jax.Array, labels: jax.Array) -> Any:
    def loss_fn(params: Any) -> jax.Array:
      scores = jax.nn.relu(images.astype(jnp.bfloat16) @ params["up"]) @ params["down"]
      each = optax.softmax_cross_entropy_with_integer_labels
      return each(scores.astype(jnp.float32), labels).mean()

    # Of weights in bfloat16 the gradients are bfloat16; the weights stay float32.
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), state["params"])
    loss, grads = jax.value_and_grad(loss_fn)(low)
    updates, optimizer = tx.update(grads, state["optimizer"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    seen = {"loss": loss, **optax_clip.metrics(optimizer)}
    return {"params": params, "optimizer": optimizer}, seen

  def train(state: Any, steps: range, title: str) -> Any:
    for step in progress(steps, title):
      at = np.random.default_rng((flags.seed, step)).integers(len(labels), size=32)
      batch = images[at]
      if step % 50 == 10:
        batch[0, 0] = np.nan  # As from a broken file.
      state, seen = train_step(state, batch, labels[at])
    return state, jax.device_get(seen)

  middle = flags.steps // 2
  whole, seen = train(init(tx, flags), range(flags.steps), "without a break")
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "checkpoint"
    half, _ = train(init(tx, flags), range(middle), "up to the checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, half)
    del half  # As if the process had ended here.
    like = jax.eval_shape(lambda: init(tx, flags))
    with ocp.StandardCheckpointer() as checkpointer:
      state = checkpointer.restore(path, like)
  resumed, _ = train(state, range(middle, flags.steps), "from the checkpoint")
  same = [
    np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True)
  ]
  print(
    f"After {flags.steps} microbatches of bfloat16 gradients, of which"
    f" {seen['skip_nonfinite/steps_skipped']} were skipped, {sum(same)} of {len(same)}"
    f" arrays of the resumed run have the bits of the run without a break."
  )
  return whole, resumed, seen


def progress(items: Sequence[Any], title: str) -> Any:
  """Shows a bar on a terminal, if rich is installed; elsewhere prints one line."""
  if sys.stdout.isatty() and importlib.util.find_spec("rich"):
    return importlib.import_module("rich.progress").track(items, title)
  print(f"{title}: {len(items)} steps", flush=True)
  return items


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Reads and checks the flags."""
  parser = argparse.ArgumentParser(
    description=__doc__.partition("\n")[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add("--accumulate", type=int, default=4, help="microbatches to a step")
  add("--lr", type=float, default=1e-2, help="learning rate of AdamW")
  add("--steps", type=int, default=402, help="microbatches, at least 2")
  add("--seed", type=int, default=0, help="of the weights and the batches")
  flags = parser.parse_args(argv)
  for name, value in vars(flags).items():
    least = {"steps": 2, "accumulate": 1}.get(name, 0)
    if not value >= least:
      parser.error(f"--{name.replace('_', '-')}: {value} is not at least {least}")
  return flags


if __name__ == "__main__":
  main()
