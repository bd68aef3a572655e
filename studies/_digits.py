"""What most studies train: scikit-learn's digits and a small network.

The network has no normalisation layers.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Array = jax.Array

WIDTH = 64


@functools.cache
def data() -> tuple[np.ndarray, ...]:
  """Loads images in [0, 1] and labels: 1437 to train on, 360 to test on."""
  from sklearn.datasets import load_digits
  from sklearn.model_selection import train_test_split

  images, labels = load_digits(return_X_y=True)
  train_x, test_x, train_y, test_y = train_test_split(
    np.float32(images / 16), labels, test_size=0.2, random_state=0, stratify=labels
  )
  return train_x, np.int32(train_y), test_x, np.int32(test_y)


def batch(key: Array, size: int) -> tuple[Array, Array]:
  """Draws images and labels, with replacement."""
  train_x, train_y, _, _ = data()
  picked = jax.random.randint(key, (size,), 0, len(train_x))
  return jnp.asarray(train_x)[picked], jnp.asarray(train_y)[picked]


def plain(seed: int, hidden: int = 4) -> list[tuple[Array, Array]]:
  """Draws weights (He) and biases for a network with `hidden` layers and ReLUs."""
  random = np.random.default_rng(seed)
  sizes = (64, *[WIDTH] * hidden, 10)
  return [
    (
      jnp.float32(random.normal(size=(rows, columns)) * np.sqrt(2 / rows)),
      jnp.zeros(columns),
    )
    for rows, columns in itertools.pairwise(sizes)
  ]


def logits(params: Any, images: Array) -> Array:
  """Computes the network's logits, in the dtype of its parameters."""
  x = images.astype(params[0][0].dtype)
  for weights, bias in params[:-1]:
    x = jax.nn.relu(x @ weights + bias)
  weights, bias = params[-1]
  return x @ weights + bias


def losses(params: Any, images: Array, labels: Array) -> Array:
  """Computes each example's cross-entropy, in float32."""
  return optax.softmax_cross_entropy_with_integer_labels(
    logits(params, images).astype(jnp.float32), labels
  )


def accuracy(params: Any) -> dict[str, Array]:
  """Computes the share of test images that the network names correctly."""
  _, _, test_x, test_y = data()
  right = jnp.argmax(logits(params, jnp.asarray(test_x)), -1) == jnp.asarray(test_y)
  return {"accuracy": jnp.mean(right)}


def percent(accuracies: np.ndarray) -> list[float]:
  """Returns some members' final accuracies, in percent."""
  return [round(100 * float(x), 2) for x in accuracies[:, -1]]
