"""Trains a small model; on one device, or on those of several processes.

`test_processes.py` imports it for the former, and starts it for the latter::

    python process_worker.py HOST:PORT PROCESSES INDEX FOLDER

With "forever" instead of a folder it goes on until something ends it, and says after
each step how many there were.
"""

from collections.abc import Callable
import functools
import itertools
from pathlib import Path
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_clip

STEPS = 50
BATCH, INPUTS, WIDTH, OUTPUTS = 32, 16, 24, 8
AXIS = "devices"

# Where it goes on for ever, a process that gave no sign of life for so many seconds
# counts as dead; a busy machine may be that slow, so elsewhere it is JAX's 100.
HEARTBEAT = 5

METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
  "global": lambda: optax_clip.clip_by_global_norm(1.0),
  "layer": lambda: optax_clip.clip_by_layer_norm(0.5),
  "zclip": lambda: optax_clip.zclip(0.5, warmup=5, max_norm=None),
  "adagc": lambda: optax_clip.adagc(1.0, warmup=5),
}
# Those that processes try under jit, where arrays are whole, and inside shard_map,
# where each device has a part and the clip finds out over which axes to sum.
WHOLE = ("global", "layer", "zclip")
PARTS = ("adagc",)


def init():
  """The same weights in every process."""
  rng = np.random.default_rng(0)
  shapes = {
    "up": (INPUTS, WIDTH),
    "bias": (WIDTH,),
    "down": (WIDTH, OUTPUTS),
    "scale": (),
  }
  params = {
    name: np.asarray(rng.normal(size=shape) / 4, np.float32)
    for name, shape in shapes.items()
  }
  return params | {"scale": np.float32(1)}


def batches():
  """Of all steps, f32[STEPS, BATCH, INPUTS + OUTPUTS]; one in ten is a spike."""
  rng = np.random.default_rng(1)
  x = rng.normal(size=(STEPS, BATCH, INPUTS))
  y = np.sin(x[..., :OUTPUTS])
  y[9::10] *= 10
  return np.concatenate([x, y], -1).astype(np.float32)


def loss_of(params, batch):
  x, y = batch[:, :INPUTS], batch[:, INPUTS:]
  hidden = jnp.tanh(jnp.dot(x, params["up"]) + params["bias"][None])
  return jnp.mean((params["scale"] * jnp.dot(hidden, params["down"]) - y) ** 2)


def step(tx, loss, params, state, batch):
  value, grads = jax.value_and_grad(loss)(params, batch)
  updates, state = tx.update(grads, state, params)
  logs = {"loss": value, **optax_clip.metrics(state)}
  return optax.apply_updates(params, updates), state, logs


def optimizer(method):
  return optax.chain(METHODS[method](), optax.adamw(1e-2))


def run(train, params, state, batches):
  """Weights after all steps, and what each of them measured, as flat NumPy arrays."""
  logs = []
  for batch in batches:
    # One step at a time: where cores are few, the devices of a CPU that are in
    # different steps can wait for each other for ever.
    params, state, log = jax.block_until_ready(train(params, state, batch))
    logs.append(log)
  return params, {key: np.array([log[key] for log in logs]) for key in logs[0]}


def on_one_device(method):
  tx, params = optimizer(method), init()
  train = jax.jit(functools.partial(step, tx, loss_of))
  return run(train, params, tx.init(params), batches())


def spec(x, count):
  """Cuts weights along their largest dimension that `count` divides."""
  sizes = [0 if size % count else size for size in jnp.shape(x)]
  if not any(sizes):
    return jax.P()
  return jax.P(*[None] * int(np.argmax(sizes)), AXIS)


def put(mesh, x, spec):
  """An array of which every process has the whole, on the devices of all."""
  x = np.asarray(x)
  return jax.make_array_from_callback(
    x.shape, jax.NamedSharding(mesh, spec), lambda part: x[part]
  )


class Sharded:
  """Weights, moments and batches in as many parts as there are devices."""

  def __init__(self, mesh: jax.sharding.Mesh):
    self.mesh = mesh
    self.specs = {name: spec(x, mesh.size) for name, x in init().items()}

  def like_weights(self, tree: Any) -> Any:
    """Specs of what has the shape of weights; the rest is whole everywhere."""
    shapes = {x.shape: self.specs[name] for name, x in init().items()}
    return jax.tree.map(lambda x: shapes.get(jnp.shape(x), jax.P()), tree)

  def gathered_loss(self, params, batch):
    """As FSDP does it by hand: weights are whole only while they are needed."""

    def whole(x, spec):
      if AXIS not in spec:
        return x
      return jax.lax.all_gather(x, AXIS, axis=spec.index(AXIS), tiled=True)

    params = jax.tree.map(whole, params, self.specs)
    return jax.lax.pmean(loss_of(params, batch), AXIS)

  def start(self, method, parts=False):
    """The step, and the first weights and state."""
    tx, params = optimizer(method), init()
    state = tx.init(params)
    specs = self.specs, self.like_weights(state)
    params, state = jax.tree.map(
      functools.partial(put, self.mesh), (params, state), specs
    )
    train = functools.partial(step, tx, self.gathered_loss if parts else loss_of)
    if parts:
      train = jax.shard_map(
        train,
        mesh=self.mesh,
        in_specs=(*specs, jax.P(AXIS)),
        out_specs=(*specs, jax.P()),
      )
    return jax.jit(train), params, state

  def batches(self):
    return (put(self.mesh, batch, jax.P(AXIS)) for batch in batches())

  def run(self, method, parts=False):
    params, logs = run(*self.start(method, parts), self.batches())
    for name, x in params.items():
      parts = self.mesh.size if AXIS in self.specs[name] else 1
      assert parts * x.addressable_shards[0].data.size == x.size, name
    gather = jax.jit(lambda x: x, out_shardings=jax.NamedSharding(self.mesh, jax.P()))
    return gather(params), logs


def main(address, processes, index, folder):
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  forever = folder == "forever"
  limits = {"heartbeat_timeout_seconds": HEARTBEAT} if forever else {}
  jax.distributed.initialize(address, int(processes), int(index), **limits)
  kind = jax.sharding.AxisType.Auto
  sharded = Sharded(jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(kind,)))
  if forever:
    train, params, state = sharded.start("global")
    for number, batch in enumerate(itertools.cycle(list(sharded.batches()))):
      params, state, _ = jax.block_until_ready(train(params, state, batch))
      print(number + 1, flush=True)
  for name, methods in {"whole": WHOLE, "parts": PARTS}.items():
    for method in methods:
      params, logs = sharded.run(method, parts=name == "parts")
      np.savez(Path(folder) / f"{name}-{method}-{index}.npz", **params, **logs)


if __name__ == "__main__":
  main(*sys.argv[1:])
