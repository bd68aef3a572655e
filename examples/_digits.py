"""Loads real images without a network: scikit-learn's digits, 8 x 8 pixels."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Digits(NamedTuple):
  """Holds images in [0, 1] and what they show, with a fifth held out.

  Attributes:
    train_images: f32[1437, 64].
    train_labels: i32[1437].
    test_images: f32[360, 64].
    test_labels: i32[360].
  """

  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray


def load() -> Digits:
  """Loads all 1797 images of ten digits, always split in the same way."""
  images, labels = load_digits(return_X_y=True)
  train_images, test_images, train_labels, test_labels = train_test_split(
    np.float32(images / 16),
    labels.astype(np.int32),
    test_size=0.2,
    random_state=0,
    stratify=labels,
  )
  return Digits(train_images, train_labels, test_images, test_labels)


def only(digits: Digits, first: int, last: int) -> Digits:
  """Selects the images that show a digit from `first` to `last`."""

  def chosen(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kept = (first <= labels) & (labels <= last)
    return images[kept], labels[kept]

  return Digits(
    *chosen(digits.train_images, digits.train_labels),
    *chosen(digits.test_images, digits.test_labels),
  )


def batches(
  digits: Digits, count: int, batch: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields `count` random training batches, with their labels."""
  generator = np.random.default_rng(seed)
  for _ in range(count):
    picked = generator.integers(len(digits.train_labels), size=batch)
    yield digits.train_images[picked], digits.train_labels[picked]
