"""Matrices of twelve kinds, and what float64 SVDs make of them."""

import numpy as np


def orthogonal(rng, rows, columns):
  """Returns a matrix with orthonormal columns."""
  return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def with_values(rng, rows, columns, values):
  """Returns a random matrix with these singular values."""
  k = min(rows, columns)
  return (orthogonal(rng, rows, k) * values) @ orthogonal(rng, columns, k).T


def _spectra(rng, k):
  """Singular values in units of the limit, by kind."""
  low = rng.uniform(0.01, 0.9, k)

  def spikes(count, most):
    values = low.copy()
    values[:count] = np.exp(rng.uniform(0.1, np.log(most), count))
    return values

  return {
    "inside": rng.uniform(0.01, 0.99, k) * rng.uniform(0.3, 1),
    "gauss": None,
    "one spike": spikes(1, 1e4),
    "few spikes": spikes(int(rng.integers(2, 7)), 1e3),
    "ill-conditioned": np.logspace(-6, rng.uniform(-0.5, 1.5), k),
    "all above": rng.uniform(1.2, 40, k),
    "all equal": np.ones(k),
    "near": 1 + rng.uniform(-0.02, 0.02, k),
    "low rank": np.r_[np.exp(rng.uniform(-1, 5, 2)), np.zeros(k - 2)],
    "power law": rng.uniform(0.5, 30) * np.arange(1, k + 1) ** -1.0,
    "half above": rng.uniform(0.01, 2, k),
    "structured": None,
  }


KINDS = tuple(_spectra(np.random.default_rng(0), 4))


def make(kind, rng, rows, columns):
  """Returns a matrix of a kind, for a limit of 1."""
  if kind == "gauss":
    x = rng.standard_normal((rows, columns)) / (rows**0.5 + columns**0.5)
    return x * rng.uniform(0.5, 5)
  if kind == "structured":
    one = np.ones((rows, columns)) / (rows * columns) ** 0.5
    row = np.zeros_like(one)
    row[0] = columns**-0.5
    sign = np.where((np.arange(rows)[:, None] + np.arange(columns)) % 3 > 0, 1, -1)
    found = (one, row, sign / np.linalg.norm(sign, 2))[int(rng.integers(3))]
    return found * np.exp(rng.uniform(-0.5, 1))
  return with_values(rng, rows, columns, _spectra(rng, min(rows, columns))[kind])


def many(count, rows, columns, seed=0):
  """Returns a stack of `count` matrices of all kinds in turn, and their kinds."""
  rng = np.random.default_rng(seed)
  kinds = [KINDS[i % len(KINDS)] for i in range(count)]
  return np.stack([make(kind, rng, rows, columns) for kind in kinds]), kinds


def values(x):
  """The singular values of matrices, whatever their dtype, in float64."""
  return np.linalg.svd(np.asarray(x).astype(np.float64), compute_uv=False)


def hard(x, limit):
  """U min(S, c) V^T."""
  left, s, right = np.linalg.svd(np.asarray(x).astype(np.float64), full_matrices=False)
  return (left * np.minimum(s, limit)[..., None, :]) @ right


def soft(x, limit):
  """U (S / sqrt(1 + S^2 / c^2)) V^T."""
  left, s, right = np.linalg.svd(np.asarray(x).astype(np.float64), full_matrices=False)
  return (left * (s / np.sqrt(1 + (s / limit) ** 2))[..., None, :]) @ right
