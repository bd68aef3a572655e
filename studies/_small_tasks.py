"""Six small tasks of different kinds for `untuned` and `horizon`.

Each can be harmed in the same four ways, and its score is a loss: lower is better.
"""

from collections.abc import Callable
import functools
import itertools
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.language_model import _text as language_model_text
from studies import _digits
from studies import _sweep

Array = jax.Array

# What happens to batches. A share is of all batches; "early" is one batch.
FAULTS = ("clean", "heavy", "early", "corrupted")
SHARE = 0.01
WEIGHT = 100.0
EARLY = 3

Loss = Callable[[Any, Array, Array], Array]


class SmallTask(NamedTuple):
  """Describes a task.

  Attributes:
    init: maps a seed to parameters.
    loss: ``loss(params, key, corrupted)``: the loss of the batch that the key draws;
      if `corrupted` is 1, of a batch whose truth is random.
    score: maps parameters to the loss on what no run has seen.
    nothing: the score of whoever knows nothing.
    optimizer: maps a learning rate to the optimizer.
    rates: four learning rates over a factor of 100.
  """

  init: Callable[[int], Any]
  loss: Loss
  score: Callable[[Any], Array]
  nothing: float
  optimizer: Callable[[Any], optax.GradientTransformation]
  rates: tuple[float, ...]


def swept(task: SmallTask) -> _sweep.Task:
  """Makes a task of the sweep: a member's `fault` is its place in `FAULTS`."""

  def gradient(params: Any, member: dict[str, Array], key: Array, step: Array) -> Any:
    draws, chance = jax.random.split(key)
    hit = jax.random.uniform(chance) < SHARE
    fault = member["fault"]
    heavy = (fault == FAULTS.index("heavy")) & hit
    heavy |= (fault == FAULTS.index("early")) & (step == EARLY)
    corrupted = (fault == FAULTS.index("corrupted")) & hit
    weight = jnp.where(heavy, WEIGHT, 1.0)
    return jax.grad(lambda p: weight * task.loss(p, draws, corrupted))(params)

  def score(params: Any) -> dict[str, Array]:
    return {"score": task.score(params)}

  return _sweep.Task(task.init, gradient, score)


def _dense(random: np.random.Generator, *sizes: int) -> list[tuple[Array, Array]]:
  """Draws He weights and zero biases."""
  return [
    (
      jnp.float32(random.normal(size=(rows, columns)) * np.sqrt(2 / rows)),
      jnp.zeros(columns),
    )
    for rows, columns in itertools.pairwise(sizes)
  ]


def _through(layers: Any, x: Array, activation: Any = jax.nn.relu) -> Array:
  for weights, bias in layers[:-1]:
    x = activation(x @ weights + bias)
  weights, bias = layers[-1]
  return x @ weights + bias


def _cross_entropy(logits: Array, labels: Array) -> Array:
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


# --- A small convolutional network on digits ------------------------------------------


def _patches(x: Array) -> Array:
  """Cuts [n, h, w, c] into windows of 3 by 3, every second: [n, h/2, w/2, 9c]."""
  x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
  size = x.shape[1] - 1
  cut = [
    x[:, i : i + size - 1 + (i < 2) : 2, j : j + size - 1 + (j < 2) : 2][
      :, : size // 2, : size // 2
    ]
    for i in range(3)
    for j in range(3)
  ]
  return jnp.concatenate(cut, -1)


def _conv_logits(params: Any, images: Array) -> Array:
  x = images.reshape(-1, 8, 8, 1)
  for weights, bias in params[:2]:
    x = jax.nn.relu(_patches(x) @ weights + bias)
  weights, bias = params[2]
  return x.reshape(len(x), -1) @ weights + bias


def _conv() -> SmallTask:
  _, _, test_x, test_y = _digits.data()

  def init(seed: int) -> Any:
    random = np.random.default_rng(seed)
    shapes = ((9, 8), (72, 16), (64, 10))
    return [_dense(random, *shape)[0] for shape in shapes]

  def loss(params: Any, key: Array, corrupted: Array) -> Array:
    picks, wrong = jax.random.split(key)
    images, labels = _digits.batch(picks, 16)
    labels = jnp.where(
      corrupted, jax.random.randint(wrong, labels.shape, 0, 10), labels
    )
    return _cross_entropy(_conv_logits(params, images), labels)

  def score(params: Any) -> Array:
    return _cross_entropy(
      _conv_logits(params, jnp.asarray(test_x)), jnp.asarray(test_y)
    )

  return SmallTask(
    init,
    loss,
    score,
    math.log(10),
    lambda rate: optax.sgd(rate, momentum=0.9),
    (0.01, 0.046, 0.22, 1.0),
  )


# --- Language: a recurrent network, and a transformer with Muon -----------------------

LETTERS, LENGTH = 64, 16


@functools.cache
def _text() -> tuple[np.ndarray, np.ndarray]:
  """Loads the source of Python's standard library, in `LETTERS` symbols."""
  text = language_model_text.load()
  train, held_out = (
    np.minimum(np.maximum(np.int32(x) - 32, 0) * (LETTERS - 1) // 94, LETTERS - 1)
    for x in (text.train[: 1 << 20], text.held_out[: 1 << 16])
  )
  return np.uint8(train), np.int32(held_out[: 256 * (LENGTH + 1)].reshape(256, -1))


def _windows(key: Array, count: int, corrupted: Array) -> Array:
  train = jnp.asarray(_text()[0])
  where, noise = jax.random.split(key)
  starts = jax.random.randint(where, (count, 1), 0, len(train) - LENGTH - 1)
  windows = train[starts + jnp.arange(LENGTH + 1)].astype(jnp.int32)
  junk = jax.random.randint(noise, windows.shape, 0, LETTERS)
  return jnp.where(corrupted, junk, windows)


def _unigram() -> float:
  """Returns the entropy of single symbols: whoever knows nothing of the context."""
  counts = np.bincount(_text()[0], minlength=LETTERS)
  share = counts[counts > 0] / counts.sum()
  return float(-np.sum(share * np.log(share)))


def _language(
  init: Callable[[int], Any],
  logits: Callable[[Any, Array], Array],
  optimizer: Callable[[Any], optax.GradientTransformation],
  rates: tuple[float, ...],
) -> SmallTask:
  """Makes the task of a language model, from its logits for symbols."""

  def of(params: Any, windows: Array) -> Array:
    return _cross_entropy(logits(params, windows[:, :-1]), windows[:, 1:])

  return SmallTask(
    init,
    lambda params, key, corrupted: of(params, _windows(key, 8, corrupted)),
    lambda params: of(params, jnp.asarray(_text()[1])),
    _unigram(),
    optimizer,
    rates,
  )


def _recurrent_logits(params: Any, symbols: Array) -> Array:
  def step(hidden: Array, symbol: Array) -> Any:
    inward = params["in"][symbol] + hidden @ params["inside"] + params["bias"]
    hidden = jnp.tanh(inward)
    return hidden, hidden

  start = jnp.zeros((len(symbols), params["bias"].size))
  _, hidden = jax.lax.scan(step, start, symbols.T, unroll=4)
  return hidden.swapaxes(0, 1) @ params["out"] + params["out_bias"]


def _recurrent() -> SmallTask:
  units = 32

  def init(seed: int) -> Any:
    random = np.random.default_rng(seed)
    inside = random.normal(size=(units, units)) / np.sqrt(units)
    return {
      "in": jnp.float32(random.normal(size=(LETTERS, units)) * 0.3),
      "inside": jnp.float32(inside),
      "bias": jnp.zeros(units),
      "out": jnp.float32(random.normal(size=(units, LETTERS)) * 0.1),
      "out_bias": jnp.zeros(LETTERS),
    }

  return _language(init, _recurrent_logits, optax.sgd, (0.1, 0.46, 2.2, 10.0))


def _normal(x: Array) -> Array:
  return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def _attention_logits(params: Any, symbols: Array) -> Array:
  x = params["embed"][symbols] + params["place"]
  y = _normal(x)
  q, k, v = (y @ params[name] for name in ("q", "k", "v"))
  scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
  mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
  x = x + jax.nn.softmax(jnp.where(mask, scores, -1e9)) @ v @ params["o"]
  x = x + jax.nn.relu(_normal(x) @ params["up"]) @ params["down"]
  return _normal(x) @ params["head"]


def _attention() -> SmallTask:
  width = 16

  def init(seed: int) -> Any:
    random = np.random.default_rng(seed)

    def draw(rows: int, columns: int, scale: float = 1.0) -> Array:
      return jnp.float32(random.normal(size=(rows, columns)) * scale / np.sqrt(rows))

    square = {name: draw(width, width) for name in ("q", "k", "v", "o")}
    return {
      "embed": draw(LETTERS, width, 2.0),
      "place": draw(LENGTH, width),
      **square,
      "up": draw(width, 2 * width),
      "down": draw(2 * width, width),
      "head": draw(width, LETTERS, 0.3),
    }

  return _language(
    init, _attention_logits, optax.contrib.muon, (0.002, 0.0093, 0.043, 0.2)
  )


# --- Regression with heavy tails ------------------------------------------------------


def _student(key: Array, freedom: float, shape: tuple[int, ...]) -> Array:
  return jax.random.t(key, freedom, shape)


def _regression() -> SmallTask:
  """Learns a network's values from inputs and noise with heavy tails."""
  random = np.random.default_rng(12345)
  teacher = _dense(random, 16, 8, 1)

  def truth(x: Array) -> Array:
    return _through(teacher, x, jnp.tanh)[:, 0]

  test = jax.random.normal(jax.random.key(2**31 - 1), (512, 16))
  spread = jnp.mean((truth(test) - jnp.mean(truth(test))) ** 2)

  def init(seed: int) -> Any:
    return _dense(np.random.default_rng(seed), 16, 32, 1)

  def loss(params: Any, key: Array, corrupted: Array) -> Array:
    inputs, noise, wrong = jax.random.split(key, 3)
    x = _student(inputs, 3.0, (16, 16)) / math.sqrt(3)
    y = truth(x) + 0.3 * _student(noise, 1.5, (16,))
    y = jnp.where(corrupted, 10 * jax.random.normal(wrong, y.shape), y)
    return 0.5 * jnp.mean((_through(params, x, jnp.tanh)[:, 0] - y) ** 2)

  def score(params: Any) -> Array:
    error = _through(params, test, jnp.tanh)[:, 0] - truth(test)
    return jnp.mean(error**2) / spread

  return SmallTask(init, loss, score, 1.0, optax.sgd, (0.003, 0.014, 0.065, 0.3))


# --- A variational autoencoder of digits ----------------------------------------------

CODES = 6


def _autoencoder() -> SmallTask:
  train_x, _, test_x, _ = _digits.data()
  mean = jnp.asarray(train_x.mean(0))
  # Whoever knows nothing but the mean image has an error of 1.
  spread = float(np.mean((test_x - train_x.mean(0)) ** 2))

  def init(seed: int) -> Any:
    random = np.random.default_rng(seed)
    return {
      "in": _dense(random, 64, 32, 2 * CODES),
      "out": _dense(random, CODES, 32, 64),
    }

  def decoded(params: Any, code: Array) -> Array:
    return mean + _through(params["out"], code)

  def encoded(params: Any, images: Array) -> tuple[Array, Array]:
    return tuple(jnp.split(_through(params["in"], images - mean), 2, -1))

  def error(guess: Array, images: Array) -> Array:
    return jnp.mean((guess - images) ** 2) / spread

  def loss(params: Any, key: Array, corrupted: Array) -> Array:
    picks, noise, wrong = jax.random.split(key, 3)
    images, _ = _digits.batch(picks, 16)
    junk = 10 * jax.random.uniform(wrong, images.shape)
    images = jnp.where(corrupted, junk, images)
    center, log_width = encoded(params, images)
    draw = jax.random.normal(noise, center.shape)
    guess = decoded(params, center + jnp.exp(log_width) * draw)
    divergence = jnp.exp(2 * log_width) + center**2 - 1 - 2 * log_width
    return error(guess, images) + 0.01 * jnp.mean(jnp.sum(divergence, -1))

  def score(params: Any) -> Array:
    images = jnp.asarray(test_x)
    return error(decoded(params, encoded(params, images)[0]), images)

  return SmallTask(init, loss, score, 1.0, optax.adamw, (0.002, 0.0093, 0.043, 0.2))


# --- An actor and a critic on a pole --------------------------------------------------

POLES, HORIZON, DISCOUNT = 8, 16, 0.97


def _pole(state: Array, force: Array) -> Array:
  """Moves carts with poles by 0.04 s (Barto, Sutton & Anderson 1983)."""
  _, speed, angle, turn = jnp.moveaxis(state, -1, 0)
  sine, cosine = jnp.sin(angle), jnp.cos(angle)
  push = (10 * force + 0.05 * turn**2 * sine) / 1.1
  twist = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
  pull = push - 0.05 * twist * cosine / 1.1
  rates = jnp.stack([speed, pull, turn, twist], -1)
  return state + 0.04 * rates


def _fell(state: Array) -> Array:
  return (jnp.abs(state[..., 0]) > 2.4) | (jnp.abs(state[..., 2]) > 0.21)


def _starts(key: Array, count: int) -> Array:
  return jax.random.uniform(key, (count, 4), minval=-0.05, maxval=0.05)


def _actor_critic() -> SmallTask:
  def init(seed: int) -> Any:
    random = np.random.default_rng(seed)
    return {"actor": _dense(random, 4, 32, 2), "critic": _dense(random, 4, 32, 1)}

  def loss(params: Any, key: Array, corrupted: Array) -> Array:
    begin, play, wrong = jax.random.split(key, 3)
    # Anywhere on the way to a fall, as if runs went on from batch to batch.
    spread = jnp.array([10.0, 10.0, 3.0, 10.0])
    state = _starts(begin, POLES) * spread

    def step(state: Array, key: Array) -> Any:
      logits = _through(params["actor"], state, jnp.tanh)
      act = jax.random.categorical(key, logits)
      later = _pole(state, 2.0 * act - 1)
      fell = _fell(later)
      later = jnp.where(fell[:, None], _starts(key, POLES), later)
      return later, (state, act, 1.0 - fell)

    last, (states, acts, alive) = jax.lax.scan(
      step, state, jax.random.split(play, HORIZON)
    )

    def value(state: Array) -> Array:
      return _through(params["critic"], state, jnp.tanh)[..., 0]

    rewards = jnp.where(corrupted, 10 * jax.random.normal(wrong, alive.shape), alive)

    def back(after: Array, row: Any) -> Any:
      reward, lives = row
      total = reward + DISCOUNT * lives * after
      return total, total

    _, returns = jax.lax.scan(back, value(last), (rewards, alive), reverse=True)
    returns = jax.lax.stop_gradient(returns)
    gain = returns - value(states)
    logits = _through(params["actor"], states, jnp.tanh)
    log_p = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_p, acts[..., None], -1)[..., 0]
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
    policy = -jnp.mean(jax.lax.stop_gradient(gain) * chosen)
    return policy + 0.5 * jnp.mean(gain**2) - 0.01 * jnp.mean(entropy)

  def score(params: Any) -> Array:
    """Returns the share of 200 steps for which 64 poles did not stand."""

    def step(carry: Any, key: Array) -> Any:
      state, stands = carry
      logits = _through(params["actor"], state, jnp.tanh)
      state = _pole(state, 2.0 * jax.random.categorical(key, logits) - 1)
      stands &= ~_fell(state)
      state = jnp.where(stands[:, None], state, 0)
      return (state, stands), jnp.mean(stands)

    begin, play = jax.random.split(jax.random.key(2**31 - 1))
    start = (_starts(begin, 64), jnp.ones(64, bool))
    _, stood = jax.lax.scan(step, start, jax.random.split(play, 200))
    return 1 - jnp.mean(stood)

  # A policy that pushes at random stands for about 11 of the 200 steps.
  return SmallTask(init, loss, score, 0.945, optax.adam, (0.003, 0.014, 0.065, 0.3))


TASKS: dict[str, Callable[[], SmallTask]] = {
  "convolution": _conv,
  "recurrent": _recurrent,
  "regression": _regression,
  "autoencoder": _autoencoder,
  "actor_critic": _actor_critic,
  "muon": _attention,
}
