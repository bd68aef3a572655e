"""What an inexact norm does to a run: float16 in few leaves, bfloat16 in many.

*float16*: the loss is summed over the batch, or averaged and scaled, as in mixed
precision; gradients are clipped while they are float16 and scaled, and unscaled in
float32. *bfloat16*: the parameters are in 2,000 leaves, as that dtype loses most in
sums of many squares. Scikit-learn's digits, SGD with momentum.
"""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

import optax_clip
from studies import _digits
from studies import _sweep

Array = jax.Array

LEAVES = 2000
LIMIT = 0.1  # In bfloat16; the first gradients are all above it.
MANY_BATCH = 128
CLIPS = {
  "none": lambda limit: optax.identity(),
  "optax": optax.clip_by_global_norm,
  "optax_clip": optax_clip.clip_by_global_norm,
}


def run(
  quick: bool = False,
  note: Callable[[str], None] = lambda text: None,
  *,
  names: tuple[str, ...] = tuple(CLIPS),
  batches: tuple[int, ...] = (32, 128, 512),
  loss_scales: tuple[float, ...] = (0.0, 1.0, 128.0, 1024.0, 8192.0),
  rates: tuple[float, ...] = (0.03, 0.1, 0.3),
  leaves: int = LEAVES,
  seeds: int = 8,
  steps: int = 150,
) -> Iterator[dict[str, Any]]:
  """Yields one row for each clip and setting, with lists over seeds.

  Accuracies are final ones, in percent; ``idle`` counts steps that changed nothing.
  A loss scale of 0 stands for a summed loss without a scale.
  """
  if quick:
    batches, loss_scales, rates = (128,), (0.0, 1024.0), (0.1,)
    leaves, seeds, steps = 50, 2, 20
  for batch in batches:
    for loss_scale in loss_scales:
      for clip in names:
        note(f"low_precision: float16, batch {batch}, scale {loss_scale:g}, {clip}")
        yield from _half(clip, batch, loss_scale, seeds, steps)
  for clip in names:
    note(f"low_precision: bfloat16, {leaves} leaves, {clip}")
    yield from _many(clip, rates, leaves, min(seeds, 5), min(steps, 80))


def _half(
  clip: str, batch: int, loss_scale: float, seeds: int, steps: int
) -> Iterator[dict[str, Any]]:
  """Clips float16 gradients to a norm of 1, unscaled; the learning rate is 0.1."""
  unscaled = loss_scale or 1.0

  def gradient(params: Any, member: Any, key: Array, step: Array) -> Any:
    del member, step
    images, labels = _digits.batch(key, batch)

    def loss(half: Any) -> Array:
      each = _digits.losses(half, images, labels)
      return jnp.mean(each) * loss_scale if loss_scale else jnp.sum(each)

    return jax.grad(loss)(_cast(params, jnp.float16))

  unscale = optax.stateless(
    lambda updates, _: jax.tree.map(lambda u: u / unscaled, _cast(updates, jnp.float32))
  )
  scores = _sweep.train(
    _sweep.Task(_digits.plain, gradient, _digits.accuracy),
    lambda member: optax.chain(
      CLIPS[clip](unscaled), unscale, optax.sgd(member["rate"], momentum=0.9)
    ),
    _sweep.members(rate=np.float32([0.1]), seed=np.arange(seeds)),
    steps,
    steps,
  )
  about = {"part": "float16", "batch": batch, "loss_scale": loss_scale, "rate": 0.1}
  yield _row(about, clip, scores, steps)


def _many(
  clip: str, rates: tuple[float, ...], leaves: int, seeds: int, steps: int
) -> Iterator[dict[str, Any]]:
  """Clips bfloat16 gradients in many leaves to a norm of `LIMIT`.

  ``norms`` has each member's largest norm after the clip over all steps, in units of
  the limit. NumPy cuts the leaves and JAX clips them op by op: with 2,000 bfloat16
  leaves XLA takes minutes to compile optax's clip.
  """
  who = _sweep.members(rate=np.float32(rates), seed=np.arange(seeds))
  _, unflatten = jax.flatten_util.ravel_pytree(_digits.plain(0))
  params = np.stack(
    [jax.flatten_util.ravel_pytree(_digits.plain(s))[0] for s in who["seed"].tolist()]
  )
  cuts = np.linspace(0, params.shape[1], leaves + 1).astype(int)[1:-1]
  tx = CLIPS[clip](LIMIT)

  def gradient(flat: Array, seed: Array, step: Array) -> Array:
    key = jax.random.fold_in(jax.random.key(seed), step)
    images, labels = _digits.batch(key, MANY_BATCH)
    half = flat.astype(jnp.bfloat16)
    return jax.grad(lambda p: jnp.mean(_digits.losses(unflatten(p), images, labels)))(
      half
    )

  gradients = jax.jit(jax.vmap(gradient, in_axes=(0, 0, None)))
  clip_all = jax.vmap(lambda pieces: tx.update(pieces, tx.init(pieces))[0])
  trace, norms = np.zeros_like(params), np.zeros(len(params))
  for step in range(steps):
    grads = np.asarray(gradients(params, who["seed"], step))
    pieces = [jnp.asarray(piece) for piece in np.split(grads, cuts, axis=1)]
    clipped = jax.device_get(clip_all(pieces))
    updates = np.concatenate(clipped, 1).astype(np.float32)
    norms = np.maximum(norms, np.linalg.norm(np.float64(updates), axis=1) / LIMIT)
    trace = 0.9 * trace + updates
    params = params - who["rate"][:, None] * trace
  accuracy = jax.jit(jax.vmap(lambda flat: _digits.accuracy(unflatten(flat))))
  right = accuracy(params)["accuracy"]
  for i, rate in enumerate(rates):
    which = slice(i * seeds, (i + 1) * seeds)
    yield {
      "study": "low_precision",
      "part": "bfloat16",
      "leaves": leaves,
      "rate": rate,
      "method": clip,
      "steps": steps,
      "accuracy": [round(100 * float(x), 2) for x in right[which]],
      "norms": [round(float(x), 3) for x in norms[which]],
    }


def _row(
  about: dict[str, Any], clip: str, scores: dict[str, np.ndarray], steps: int
) -> dict[str, Any]:
  return {
    "study": "low_precision",
    **about,
    "method": clip,
    "steps": steps,
    "accuracy": _digits.percent(scores["accuracy"]),
    "finite": scores["finite"][:, -1].tolist(),
    "idle": scores["idle"][:, -1].tolist(),
  }


def _cast(tree: Any, dtype: Any) -> Any:
  return jax.tree.map(lambda x: x.astype(dtype), tree)
