"""Fine-tuning: frozen layers, and a threshold for each group of layers.

A network of three layers learns the digits 0 to 4. Then its first layer is frozen, its
last one begins anew, and it learns the digits 5 to 9, once for each way to clip::

    python examples/fine_tuning.py

Whether frozen layers count is a matter of where the clip stands. A gradient is computed
for them too, and a clip that sees it takes it into the norm: the others are then
clipped for a layer that does not move.

* ``all``: `clip_by_global_norm` before anything else. Frozen layers count.
* ``counted``: the norm of the layers that are trained, by ``counted``. What does not
  count is scaled like the rest, which no longer matters.
* ``groups``: a norm and a `max_norm` for each group, of regular expressions of the
  layers' names. Frozen layers are a group of their own, which takes nothing from the
  others; with ``inf`` they are measured and never clipped.
* ``inside``: the same by a clip inside `optax.multi_transform`, one for each group.
  What is frozen is not measured, and as each clip has a name, `optax_clip.metrics`
  says what was done to each group; of ``groups`` it says the largest norm, be it of
  the frozen, and the least that was kept. The updates are the same.

What freezes is `optax.set_to_zero` in `optax.multi_transform`. Zero gradients would not
be enough: AdamW's weight decay moves weights without any. Where memory counts, do not
differentiate frozen layers at all; then no clip can see them.
"""

import argparse
from collections.abc import Sequence
import math
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
WAYS = ("all", "counted", "groups", "inside")

# The first expression found in a path such as "head/kernel" says the group of a leaf.
GROUPS = optax_clip.labels_by_path({"^stem/": "frozen", "^head/": "head", "": "body"})

Params = dict[str, dict[str, jax.Array]]


class Run(NamedTuple):
  """One way to fine-tune.

  Attributes:
    params: the weights at the end.
    logs: `optax_clip.metrics` at each step.
    accuracy: on new digits that were held out.
  """

  params: Params
  logs: list[dict[str, float]]
  accuracy: float


def layer(key: jax.Array, rows: int, columns: int) -> dict[str, jax.Array]:
  """Weights before training."""
  kernel = jax.random.normal(key, (rows, columns)) * (2 / rows) ** 0.5
  return {"kernel": kernel, "bias": jnp.zeros(columns)}


def init(key: jax.Array) -> Params:
  """The stem that will be frozen, the body, and the head: a score for each digit."""
  stem, body, head = jax.random.split(key, 3)
  return {
    "stem": layer(stem, 64, WIDTH),
    "body": layer(body, WIDTH, WIDTH),
    "head": layer(head, WIDTH, 5),
  }


def scores(params: Params, images: jax.Array) -> jax.Array:
  """f32[batch, 5]."""
  hidden = images
  for name in ("stem", "body"):
    hidden = jax.nn.relu(hidden @ params[name]["kernel"] + params[name]["bias"])
  return hidden @ params["head"]["kernel"] + params["head"]["bias"]


def loss_fn(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
  """The mean cross-entropy of a batch."""
  return optax.softmax_cross_entropy_with_integer_labels(
    scores(params, images), labels
  ).mean()


def accuracy(params: Params, digits: _digits.Digits) -> float:
  """The share of images that were held out and are recognised."""
  found = jnp.argmax(scores(params, digits.test_images), axis=-1)
  return jnp.mean(found == digits.test_labels).item()


def optimizer(way: str, flags: argparse.Namespace) -> optax.GradientTransformation:
  """The clip and the optimizer of one of `WAYS`; the metrics have its name."""
  max_norms = {"body": flags.body_norm, "head": flags.head_norm}
  # The weights of the body are trained already, and move a tenth as fast.
  groups = {
    "frozen": optax.set_to_zero(),
    "body": optax.adamw(flags.lr / 10),
    "head": optax.adamw(flags.lr),
  }
  if way == "inside":
    for group, max_norm in max_norms.items():
      clip = optax_clip.clip_by_global_norm(max_norm, name=f"inside, {group}")
      groups[group] = optax.chain(clip, groups[group])
    return optax.multi_transform(groups, GROUPS)
  clips = {
    "all": optax_clip.clip_by_global_norm(flags.max_norm, name="all"),
    "counted": optax_clip.clip_by_group_norm(
      "one", {"one": flags.max_norm}, counted=trained, name="counted"
    ),
    "groups": optax_clip.clip_by_group_norm(
      GROUPS, max_norms | {"frozen": math.inf}, name="groups"
    ),
  }
  return optax.chain(clips[way], optax.multi_transform(groups, GROUPS))


def trained(tree: Any) -> Any:
  """For each leaf whether it is trained."""
  return jax.tree.map(lambda group: group != "frozen", GROUPS(tree))


def train(
  params: Params,
  tx: optax.GradientTransformation,
  digits: _digits.Digits,
  flags: argparse.Namespace,
) -> Run:
  """Trains from given weights."""
  # Labels count from 0, whichever digits they are.
  first = digits.train_labels.min()
  digits = digits._replace(
    train_labels=digits.train_labels - first, test_labels=digits.test_labels - first
  )
  state = tx.init(params)

  @jax.jit
  def step(params: Params, state: Any, images: jax.Array, labels: jax.Array) -> Any:
    grads = jax.grad(loss_fn)(params, images, labels)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, optax_clip.metrics(state)

  logs = []
  for batch in _digits.batches(digits, flags.steps, BATCH, flags.seed):
    params, state, seen = step(params, state, *batch)
    logs.append(seen)
  return Run(params, jax.device_get(logs), accuracy(params, digits))


def table(done: dict[str, Run], before: Params) -> Table:
  """What each clip saw and did, and what came of it: means over all steps."""
  result = Table(
    caption="norm: before the clip. kept: what the clip multiplied with. clipped: of"
    " all steps. new digits: recognised, of those held out. stem: its weights.",
    box=box.SIMPLE_HEAD,
  )
  result.add_column("clip", no_wrap=True)
  for name in ("norm", "kept", "clipped", "new digits", "stem"):
    result.add_column(name, justify="right", no_wrap=True)
  for run in done.values():
    end = [f"{run.accuracy:.1%}", "moved" if moved(run, before) else "unchanged"]
    for name in dict.fromkeys(key.partition("/")[0] for key in run.logs[0]):

      def mean(field: str, name: str = name, run: Run = run) -> float:
        return float(np.mean([seen[f"{name}/{field}"] for seen in run.logs]))

      clipped = run.logs[-1][f"{name}/steps_clipped"] / len(run.logs)
      result.add_row(
        name,
        f"{mean('norm'):.2f}",
        f"{mean('coefficient'):.0%}",
        f"{clipped:.0%}",
        *end,
      )
      end = []
  return result


def moved(run: Run, before: Params) -> bool:
  """Whether a bit of a frozen weight has changed."""
  return any(
    np.asarray(x).tobytes() != np.asarray(y).tobytes()
    for x, y in zip(
      jax.tree.leaves(run.params["stem"]), jax.tree.leaves(before["stem"]), strict=True
    )
  )


def main(argv: Sequence[str] | None = None) -> tuple[Params, dict[str, Run]]:
  """Pre-trains, fine-tunes in each way, prints; returns where it began, and runs."""
  flags = parse(argv)
  console = Console(highlight=False)
  digits = _digits.load()
  keys = jax.random.split(jax.random.key(flags.seed))
  with console.status("learning 0 to 4"):
    tx = optax.chain(
      optax_clip.clip_by_global_norm(flags.max_norm), optax.adamw(flags.lr)
    )
    first = train(init(keys[0]), tx, _digits.only(digits, 0, 4), flags)
  console.print(f"Digits 0 to 4 are learnt: {first.accuracy:.1%} of those held out.")
  start = first.params | {"head": init(keys[1])["head"]}
  done = {}
  for way in WAYS:
    with console.status(f"learning 5 to 9, clipped: {way}"):
      tx = optimizer(way, flags)
      done[way] = train(start, tx, _digits.only(digits, 5, 9), flags)
  console.print(table(done, start))
  return start, done


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Reads and checks the flags."""
  parser = _flags.Parser(
    description=__doc__.partition("\n")[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add, norm = parser.add_argument, _flags.threshold
  add("--max-norm", type=norm, default=1.0, help="of all layers, or of those trained")
  add(
    "--body-norm", type=norm, default=0.6, help="of the body, with a group of its own"
  )
  add(
    "--head-norm", type=norm, default=0.8, help="of the head, with a group of its own"
  )
  add("--lr", type=_flags.rate, default=3e-3, help="of AdamW; of the body a tenth")
  add("--steps", type=_flags.positive, default=300, help="of each run")
  add("--seed", type=_flags.natural, default=0, help="of the weights and the batches")
  return parser.parse_args(argv)


if __name__ == "__main__":
  try:
    main()
  except KeyboardInterrupt:
    raise SystemExit(130) from None
