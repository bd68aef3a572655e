"""What the tests of learned thresholds share: drivers, traces, and the methods."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from helpers import registry
import optax_clip
from optax_clip import thresholds

DOCS = pathlib.Path(__file__).parents[2] / "docs"

# Every transformation with a memory of norms: name, factory, keyword arguments
# that make its warm-up short, and the steps after which it limits.
METHODS = {
  row.name: (row.factory, row.short, row.waits) for row in registry.LEARNED
} | {
  f"zclip_{mode}": (
    optax_clip.zclip,
    {"warmup": 10, "max_norm": None, "mode": mode},
    1,
  )
  for mode in ("mean", "percentile")
}

# Every threshold that learns or is made of others, by its name, with a short memory.
THRESHOLDS = {
  "percentile": thresholds.percentile(50.0, 20),
  "history": thresholds.history(window=10, surprise=2.0),
  "zscore": thresholds.zscore(warmup=5),
  "clipped_mean": thresholds.clipped_mean(warmup=5),
  "average": thresholds.average(),
  "geometric": thresholds.geometric(),
  "mean_over_rms": thresholds.mean_over_rms(),
  "at_most": thresholds.at_most(thresholds.zscore(warmup=5), 1.5),
  "until_learned": thresholds.until_learned(
    thresholds.history(window=10), thresholds.geometric()
  ),
  "warmup": thresholds.warmup(thresholds.percentile(50.0, 20), 3, 0.7),
}


def make(name, **keywords):
  """The transformation of a row."""
  factory, defaults, _ = METHODS[name]
  return factory(**{**defaults, **keywords})


def trace(seed, steps, shape=(), spikes=0.02):
  """Norms around 1 that wander, with spikes of 3 to 1000 times; float32 values."""
  rng = np.random.default_rng(seed)
  level = np.exp(0.3 * np.sin(np.arange(steps) / 150.0))
  norms = np.exp(0.2 * rng.standard_normal((steps, *shape)))
  norms *= level.reshape(steps, *(1,) * len(shape))
  spike = rng.random(norms.shape) < spikes
  norms = np.where(spike, norms * 10 ** rng.uniform(0.5, 3, norms.shape), norms)
  return np.asarray(norms, np.float32)


def scanned(threshold, norms):
  """`limits`, to be compiled as a part of something."""
  state = threshold.init(jnp.zeros_like(norms[0]))

  def body(state, n):
    new, state = threshold.update(n, state)
    return state, new

  state, found = jax.lax.scan(body, state, norms)
  return found, state


def _run(tx, updates, params, state):
  def body(state, u):
    new, state = tx.update(u, state, params)
    return state, new

  state, found = jax.lax.scan(body, state, updates)
  return found, state


def limits(threshold, norms):
  """The limits of a threshold over a trace of norms, and its last state."""
  found, state = jax.jit(functools.partial(scanned, threshold))(jnp.asarray(norms))
  return np.asarray(found, np.float64), state


def run(tx, updates, params=None, state=None):
  """All updates of a transformation over a stacked sequence, and the last state."""
  first = jax.tree.map(lambda x: x[0], updates)
  params = jax.tree.map(jnp.zeros_like, first) if params is None else params
  state = tx.init(params) if state is None else state
  return jax.jit(functools.partial(_run, tx))(updates, params, state)


@functools.cache
def _runner(name):
  tx = make(name)
  return tx, jax.jit(functools.partial(_run, tx))


def run_method(name, updates, state=None):
  """`run` of a row of `METHODS`, compiled once for all sequences of one shape."""
  tx, compiled = _runner(name)
  params = jax.tree.map(lambda x: jnp.zeros_like(x[0]), updates)
  return compiled(updates, params, tx.init(params) if state is None else state)


def each(function, *cases):
  """A function of each case, one after the other, compiled once for all.

  A case is one entry of the first axis of all arrays. Each runs the program that it
  would run alone: under `jax.vmap`, both branches of a conditional would run.
  """
  cases = jax.tree.map(jnp.asarray, cases)
  found = jax.jit(lambda cases: jax.lax.map(lambda case: function(*case), cases))(cases)
  return jax.tree.map(np.asarray, found)


def limits_of_each(threshold, norms):
  """`limits` of several traces."""
  found, state = each(functools.partial(scanned, threshold), norms)
  return found.astype(np.float64), state


def run_each(tx, updates):
  """`run` of several sequences of updates, with parameters of zeros."""

  def run(updates):
    params = jax.tree.map(lambda x: jnp.zeros_like(x[0]), updates)
    return _run(tx, updates, params, tx.init(params))

  return each(run, updates)


LONGEST = 160


@functools.cache
def _player(name, nonfinite):
  tx = make(name, nonfinite=nonfinite)

  def play(updates, taken):
    def body(state, step):
      u, take = step
      new, later = tx.update(u, state)
      return jax.tree.map(lambda a, b: jnp.where(take, a, b), later, state), new

    params = jax.tree.map(lambda x: x[0], updates)
    return jax.lax.scan(body, tx.init(params), (updates, taken))

  return jax.jit(play)


def play(name, *parts, nonfinite="propagate"):
  """Runs a method over parts of a sequence: (updates, whether they are taken).

  A part that is not taken leaves the state alone. All sequences have one length,
  so that each method is compiled once for all tests.

  Returns:
    The updates of all parts, and the last state.
  """
  updates = jax.tree.map(lambda *x: np.concatenate(x), *(p for p, _ in parts))
  taken = np.concatenate(
    [np.full(len(jax.tree.leaves(p)[0]), take) for p, take in parts]
  )
  steps = len(taken)
  assert steps <= LONGEST

  def padded(x):
    return np.concatenate([x, np.zeros((LONGEST - steps, *x.shape[1:]), x.dtype)])

  state, found = _player(name, nonfinite)(jax.tree.map(padded, updates), padded(taken))
  return jax.tree.map(lambda x: np.asarray(x)[:steps], found), state


def memory(state):
  """All a state remembers, without the record: for comparisons bit for bit."""

  def records(node):
    return isinstance(node, optax_clip.states.Record)

  kept = [x for x in jax.tree.leaves(state, is_leaf=records) if not records(x)]
  return [np.asarray(x) for x in kept]


def assert_same_memory(a, b):
  """Equal bits."""
  a, b = memory(a), memory(b)
  assert a
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    assert x.dtype == y.dtype
    assert x.shape == y.shape
    assert x.tobytes() == y.tobytes()
