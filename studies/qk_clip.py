"""QK-Clip on a small language model whose attention logits explode.

Written down before the first run.

Task: next bytes of the source of Python's standard library, by a transformer of two
layers, width 32 and two heads of 16, without a norm of queries and keys and without
weight decay; 300 steps on batches of 8 times 32 bytes, at a constant learning rate.
After each step `qk_clip` gets the largest logits of that step's forward pass.

Cells: Muon on the matrices of the layers (Adam at 0.003 on all else) at rates of 0.01,
0.03, 0.1 and 0.3, and Adam on everything at 0.003, 0.01, 0.03 and 0.1; each without a
bound, with tau = 100, the paper's, and with tau = 30; seeds 0, 1 and 2, which have the
same weights and batches in all cells. Measured are the largest logit of each step over
all layers, heads, examples and positions, and the held-out loss at the end.

What would count as a failure:

1. of the task: without a bound and at its highest rate, an optimizer's logits exceed
   100 in fewer than two of three seeds. Then nothing was there to be clipped.
2. of the bound: with tau, a logit exceeds 2 tau in any step of any seed after the
   first that was scaled. (Above tau itself they may be: a step lies between the
   measurement and the next.)
3. harm: at the rate that is best without a bound, the held-out loss with tau is worse
   by more than two standard errors of the differences, seed by seed.
4. no help: at no rate is it better by more than that.
"""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_clip
from studies import _sweep
from studies import language

Array = jax.Array

WIDTH, HEADS, LAYERS, BATCH = 32, 2, 2, 8
LENGTH = language.LENGTH
REST = 0.003  # The rate of Adam for what Muon is not for.
EVERY = 10  # Steps for which one largest logit is kept.
TAUS = (float("inf"), 100.0, 30.0)
NORMED = ("query", "key", "value", "merge", "up", "down")


def _muon(rate: Array) -> optax.GradientTransformation:
  matrices = optax_clip.labels_by_path({"^blocks/": True, "": False})
  each = optax.contrib.MuonDimensionNumbers()
  return optax.contrib.muon(
    rate,
    adam_learning_rate=REST,
    muon_weight_dimension_numbers=lambda params: jax.tree.map(
      lambda matrix: each if matrix else None, matrices(params)
    ),
  )


OPTIMIZERS: dict[str, tuple[Callable[[Array], Any], tuple[float, ...]]] = {
  "muon": (_muon, (0.01, 0.03, 0.1, 0.3)),
  "adam": (optax.adam, (0.003, 0.01, 0.03, 0.1)),
}


def init(seed: int) -> dict[str, Any]:
  """Matrices of Gaussians of variance 1 / inputs, small embeddings and no biases."""
  random = np.random.default_rng(seed)

  def matrix(rows: int, columns: int, scale: float) -> Array:
    return jnp.float32(random.normal(size=(rows, columns)) * scale)

  shapes = {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
  return {
    "bytes": matrix(256, WIDTH, 0.1),
    "places": matrix(LENGTH, WIDTH, 0.1),
    "blocks": [
      {
        name: matrix(rows, columns, rows**-0.5)
        for name in NORMED
        for rows, columns in [shapes.get(name, (WIDTH, WIDTH))]
      }
      for _ in range(LAYERS)
    ],
    "logits": matrix(WIDTH, 256, WIDTH**-0.5),
  }


def loss(params: dict[str, Any], windows: Array) -> tuple[Array, list[Array]]:
  """The mean loss in nats a byte, and each layer's largest logits, f32[heads]."""
  text, truth = windows[:, :-1], windows[:, 1:].astype(jnp.int32)
  x = params["bytes"][text] + params["places"]
  largest = []
  for block in params["blocks"]:
    y = jax.nn.standardize(x)
    query, key, value = (
      (y @ block[name]).reshape(*y.shape[:2], HEADS, -1)
      for name in ("query", "key", "value")
    )
    largest.append(
      jax.lax.stop_gradient(optax_clip.max_attention_logits(query, key, is_causal=True))
    )
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x = x + mixed.reshape(x.shape) @ block["merge"]
    x = x + jax.nn.gelu(jax.nn.standardize(x) @ block["up"]) @ block["down"]
  scores = jax.nn.standardize(x) @ params["logits"]
  losses = optax.softmax_cross_entropy_with_integer_labels(scores, truth)
  return jnp.mean(losses), largest


def clipped(params: dict[str, Any], largest: list[Array], tau: Array) -> dict[str, Any]:
  """The parameters with the queries and keys of all layers as tau asks for."""
  blocks = []
  for block, most in zip(params["blocks"], largest, strict=True):
    query, key = optax_clip.qk_clip(
      block["query"], block["key"], most, tau, head_axis=-1, fused=True
    )
    blocks.append({**block, "query": query, "key": key})
  return {**params, "blocks": blocks}


def train(
  make: Callable[[Array], Any], who: _sweep.Members, steps: int
) -> dict[str, np.ndarray]:
  """Trains all members at once: each has a seed, a rate and a tau.

  Returns:
    The held-out ``loss`` of each, and for each step the ``largest`` logit, and
    whether a head was ``scaled``.
  """
  train_text, held_out = (jnp.asarray(x) for x in language.texts())

  def one(member: dict[str, Array], params: Any) -> dict[str, Array]:
    tx = make(member["rate"])
    seed = jax.random.key(member["seed"])

    def step(carry: Any, number: Array) -> Any:
      params, state = carry
      starts = jax.random.randint(
        jax.random.fold_in(seed, number), (BATCH, 1), 0, len(train_text) - LENGTH - 1
      )
      windows = train_text[starts + jnp.arange(LENGTH + 1)]
      grads, most = jax.grad(loss, has_aux=True)(params, windows)
      updates, state = tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
      params = clipped(params, most, member["tau"])
      largest = jnp.max(jnp.stack(most))
      scaled = jnp.any(jnp.stack([_exceed(x, member["tau"]) for x in most]))
      return (params, state), (largest, scaled)

    (params, _), (largest, scaled) = jax.lax.scan(
      step, (params, tx.init(params)), jnp.arange(steps)
    )
    return {"loss": loss(params, held_out)[0], "largest": largest, "scaled": scaled}

  starts = [init(seed) for seed in who["seed"].tolist()]
  params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
  here = jax.tree.map(jnp.asarray, who)
  return jax.device_get(jax.jit(jax.vmap(one))(here, params))


def run(
  quick: bool = False,
  note: Callable[[str], None] = lambda text: None,
  *,
  optimizers: tuple[str, ...] = tuple(OPTIMIZERS),
  taus: tuple[float, ...] = TAUS,
  seeds: int = 3,
  steps: int = 300,
) -> Iterator[dict[str, Any]]:
  """One row for each optimizer, learning rate and tau, with a list over seeds.

  ``loss`` is held out, in nats a byte, at the end; null where it is not finite.
  ``largest`` has the largest logit of every `EVERY` steps, null where one is not
  finite; ``after`` the largest after the first step that was scaled.
  """
  if quick:
    optimizers, seeds, steps = ("adam",), 2, 20
  for optimizer in optimizers:
    make, rates = OPTIMIZERS[optimizer]
    note(f"qk_clip: {optimizer}")
    who = _sweep.members(
      rate=np.float32(rates), tau=np.float32(taus), seed=np.arange(seeds)
    )
    seen = train(make, who, steps)
    for i, rate in enumerate(rates):
      for j, tau in enumerate(taus):
        first = (i * len(taus) + j) * seeds
        mine = {k: v[first : first + seeds] for k, v in seen.items()}
        later = np.cumsum(mine["scaled"], axis=1) - mine["scaled"] > 0
        after = np.where(later, mine["largest"], -np.inf).max(axis=1)
        every = min(EVERY, steps)
        blocks = mine["largest"][:, : steps // every * every]
        blocks = blocks.reshape(seeds, -1, every).max(axis=2)
        yield {
          "study": "qk_clip",
          "optimizer": optimizer,
          "rate": rate,
          "tau": tau if np.isfinite(tau) else None,
          "steps": steps,
          "loss": [_number(x, 5) for x in mine["loss"]],
          "largest": [[_number(x, 4) for x in row] for row in blocks],
          "after": [_number(x, 4) for x in after],
          "scaled": mine["scaled"].sum(axis=1).tolist(),
        }


def _exceed(largest: Array, tau: Array) -> Array:
  return jnp.any((largest > tau) & (largest < jnp.inf))


def _number(x: Any, digits: int) -> float | None:
  return float(f"{x:.{digits}g}") if np.isfinite(x) else None
