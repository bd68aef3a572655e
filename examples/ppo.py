"""PPO all on the device: limits of actor and critic, and metrics out of a scan.

A small network learns to balance a pole on a cart that it pushes to the left or to the
right. The cart, the pole, the sampling and the training are one `jax.lax.scan`::

    python ppo.py --actor-norm 0.1 --critic-norm 10

The gradient of the critic is in the units of returns, and here some hundred times as
large as that of the actor. Under one norm for both, the actor would be scaled by what
the critic does. `clip_by_group_norm` has a norm and a limit for each. A label may stand
for a whole part of the parameters.

The metrics are scalars on the device: the scan returns those of every update at once.
"""

import argparse
from collections.abc import Sequence
import importlib.util
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_clip

CARTS, HORIZON, LONGEST = 32, 64, 500
EPOCHS, PARTS = 4, 4
DISCOUNT, LAMBDA, RATIO = 0.99, 0.95, 0.2


def init(key: jax.Array) -> dict[str, dict[str, jax.Array]]:
  """Makes an actor, with a score for each action, and a critic."""
  up, down = jax.random.normal(key, (2, 64, 64))
  actor = {"up": up[:4] / 2, "down": down[:, :2] / 80}
  return {"actor": actor, "critic": {"up": up[4:8] / 2, "down": down[:, 2:3] / 8}}


def network(params: dict[str, jax.Array], carts: jax.Array) -> jax.Array:
  """Maps f32[..., 4] to f32[..., 2] scores of actions or f32[..., 1] values."""
  return jnp.tanh(carts @ params["up"]) @ params["down"]


def push(carts: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Moves carts, f32[n, 4], for 0.02 s; returns them and which of them failed."""
  speed, angle, spin = carts.T[1:]
  force = jnp.where(action == 1, 10.0, -10.0)
  pull = (force + 0.05 * spin**2 * jnp.sin(angle)) / 1.1
  turn = 9.8 * jnp.sin(angle) - jnp.cos(angle) * pull
  turn = turn / (2 / 3 - 0.05 * jnp.cos(angle) ** 2 / 1.1)
  change = jnp.stack([speed, pull - 0.05 * turn * jnp.cos(angle) / 1.1, spin, turn])
  carts = carts + 0.02 * change.T
  return carts, (jnp.abs(carts[:, 0]) > 2.4) | (jnp.abs(carts[:, 2]) > 0.209)


def play(params: Any, world: Any, key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
  """Acts once in every cart; one that failed, or is done, begins anew."""
  carts, age = world
  scores, value = network(params["actor"], carts), network(params["critic"], carts)
  act_key, new_key = jax.random.split(key)
  action = jax.random.categorical(act_key, scores)
  moved, failed = push(carts, action)
  ended = failed | (age + 1 >= LONGEST)
  new = jax.random.uniform(new_key, carts.shape, minval=-0.05, maxval=0.05)
  world = jnp.where(ended[:, None], new, moved), jnp.where(ended, 0, age + 1)
  seen = {"carts": carts, "action": action, "value": value[:, 0], "ended": ended}
  seen["age"] = age + 1
  return world, seen | {"chance": chance(scores, action)}


def chance(scores: jax.Array, action: jax.Array) -> jax.Array:
  """Takes the logarithm of the probability of what was done."""
  each = jax.nn.log_softmax(scores)
  return jnp.take_along_axis(each, action[..., None], axis=-1)[..., 0]


def advantages(seen: dict[str, jax.Array], last: jax.Array) -> jax.Array:
  """Takes the generalized advantages, f32[time, carts]; each step is worth 1."""

  def back(carry: Any, now: dict[str, jax.Array]) -> Any:
    advantage, following = carry
    goes_on = DISCOUNT * (1.0 - now["ended"])
    advantage = 1 + goes_on * (following + LAMBDA * advantage) - now["value"]
    return (advantage, now["value"]), advantage

  return jax.lax.scan(back, (jnp.zeros_like(last), last), seen, reverse=True)[1]


def loss_fn(params: Any, part: dict[str, jax.Array]) -> jax.Array:
  """Takes the sum of the losses of PPO for the actor and for the critic."""
  now = chance(network(params["actor"], part["carts"]), part["action"])
  ratio, gain = jnp.exp(now - part["chance"]), jax.nn.standardize(part["gain"])
  bounded = jnp.clip(ratio, 1 - RATIO, 1 + RATIO)
  actor = -jnp.minimum(ratio * gain, bounded * gain).mean()
  values = network(params["critic"], part["carts"])[:, 0]
  return actor + jnp.square(values - part["value"] - part["gain"]).mean()


def make_update(tx: optax.GradientTransformation) -> Any:
  """Makes what plays and trains once, for `jax.lax.scan`."""

  def train(carry: Any, part: dict[str, jax.Array]) -> Any:
    params, state = carry
    grads = jax.grad(loss_fn)(params, part)
    norms = {name: optax_clip.global_norm(grads[name]) for name in grads}
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), norms

  def update(carry: Any, key: jax.Array) -> Any:
    params, state, world = carry
    play_key, *keys = jax.random.split(key, 1 + EPOCHS)
    keys_of_play = jax.random.split(play_key, HORIZON)
    world, seen = jax.lax.scan(
      lambda world, key: play(params, world, key), world, keys_of_play
    )
    seen["gain"] = advantages(seen, network(params["critic"], world[0])[:, 0])
    ended = {"ended": seen["ended"].sum(), "moves": (seen["age"] * seen["ended"]).sum()}
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), seen)
    order = [jax.random.permutation(key, CARTS * HORIZON) for key in keys]
    order = jnp.concatenate(order).reshape(EPOCHS * PARTS, -1)
    parts = jax.tree.map(lambda x: x[order], flat)
    (params, state), norms = jax.lax.scan(train, (params, state), parts)
    seen = optax_clip.metrics(state) | jax.tree.map(jnp.mean, norms)
    return (params, state, world), seen | ended

  return update


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Trains and prints; returns the metrics of every update."""
  flags = parse(argv)
  limits = {"actor": flags.actor_norm, "critic": flags.critic_norm}
  labels = {"actor": "actor", "critic": "critic"}
  clip = optax_clip.clip_by_group_norm(labels, limits, record="layers", name="clip")
  tx = optax.chain(clip, optax.adam(flags.lr))
  keys = jax.random.split(jax.random.key(flags.seed), 1 + flags.steps)
  params = init(keys[0])
  world = jnp.zeros((CARTS, 4)), jnp.zeros(CARTS, int)
  carry, logs = (params, tx.init(params), world), []
  update = make_update(tx)
  scan = jax.jit(lambda carry, keys: jax.lax.scan(update, carry, keys))
  size = -(-flags.steps // 10)
  for at in progress(range(1, 1 + flags.steps, size), "playing and training"):
    carry, seen = scan(carry, keys[at : at + size])
    logs.append(seen)
  logs = jax.tree.map(lambda *values: np.concatenate(values), *jax.device_get(logs))
  print(optax_clip.layer_metrics(carry[1], params))
  first, last = (
    logs["moves"][at].sum() / max(1, logs["ended"][at].sum())
    for at in (slice(0, 1), slice(-10, None))
  )
  print(
    f"The pole stood for {first:.0f} moves at first and for {last:.0f} of at most"
    f" {LONGEST} in the end, and the gradient of the critic was"
    f" {np.median(logs['critic'] / logs['actor']):.0f} times as large as the actor's."
  )
  return logs


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
  add("--actor-norm", type=float, default=0.1, help="limit of the actor")
  add("--critic-norm", type=float, default=10.0, help="limit of the critic")
  add("--lr", type=float, default=3e-3, help="learning rate of Adam")
  add("--steps", type=int, default=60, help=f"updates, each of {CARTS * HORIZON} moves")
  add("--seed", type=int, default=0, help="of all that is random")
  flags = parser.parse_args(argv)
  for name, value in vars(flags).items():
    least = 1 if name == "steps" else 0
    if not value >= least:
      parser.error(f"--{name.replace('_', '-')}: {value} is not at least {least}")
  return flags


if __name__ == "__main__":
  main()
