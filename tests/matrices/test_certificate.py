"""The proof of the bound: exact, adversarial, in float32, and with less precision."""

from fractions import Fraction
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _matrices as matrices
import optax_clip
from optax_clip import measures
from optax_clip._matrices import certificate

ROWS, COLUMNS = 24, 32


@functools.cache
def looking():
  """The compiled bound of one matrix over a limit, and how far it may be off."""
  return jax.jit(lambda x, c: certificate.look(x, c, 1e-3).bound)


def bound_of_size(size, order):
  """The bound that a 2-norm of T proves, in float64."""
  return math.sqrt((1 + math.cosh(math.acosh(max(size, 1)) / order)) / 2)


def chebyshev(x, order):
  """T_order(x) of numbers, in float64."""
  x = np.asarray(x)
  inside = np.cos(order * np.arccos(np.clip(x, -1, 1)))
  return np.where(x > 1, np.cosh(order * np.arccosh(np.maximum(x, 1))), inside)


class TestProof:
  def test_gaps_are_those_of_the_page(self):
    found = [certificate.gap(1024, k) for k in range(3, 9)]
    np.testing.assert_allclose(
      found, [3.4e-2, 8.5e-3, 2.1e-3, 5.3e-4, 1.3e-4, 3.3e-5], rtol=0.03
    )
    assert [certificate.doublings(m, 1e-3) for m in (16, 32, 1024, 4096)] == [
      5,
      6,
      6,
      7,
    ]

  @pytest.mark.parametrize("seed", range(4))
  def test_no_spectrum_found_by_optimisation_breaks_it(self, seed):
    """Spectra that pass, climbed to the largest value: below the bound, and near it."""
    rng = np.random.default_rng(seed)
    rows, order = ROWS, 2 ** certificate.doublings(ROWS, 1e-3)
    limit = 1 + certificate.gap(rows, int(math.log2(order)))

    def passes(s):
      return np.sum(chebyshev(2 * s * s - 1, order) ** 2) <= rows

    best = rng.uniform(0, 1, rows)
    for _ in range(4000):
      trial = best.copy()
      i = rng.integers(rows)
      # The largest goes up; others move to where their polynomial is small.
      trial[i] += rng.normal() * 10 ** rng.uniform(-6, -1)
      trial[0] = max(trial) * (1 + abs(rng.normal()) * 10 ** rng.uniform(-8, -3))
      trial = np.abs(trial)
      if passes(trial) and max(trial) >= max(best):
        best = trial
    assert max(best) <= limit
    # It is no loose bound: four fifths of the gap are reached.
    assert max(best) >= 1 + 0.8 * (limit - 1)
    # And the program sees what the proof does.
    x = matrices.with_values(rng, rows, COLUMNS, best)
    x = np.asarray(x, np.float32)
    found = float(looking()(x, np.float32(1)))
    assert matrices.values(x)[0] <= found <= 1 + 1e-3

  @pytest.mark.parametrize("kind", matrices.KINDS)
  def test_a_bound_is_never_below_the_truth(self, kind):
    rng = np.random.default_rng(1)
    for _ in range(8):
      x = np.asarray(matrices.make(kind, rng, ROWS, COLUMNS), np.float32)
      size, top = np.float32(np.linalg.norm(x)), matrices.values(x)[0]
      for share in (0.3, 0.99, 1.0, 1.001, 3.0):
        limit = np.float32(share * top) / size
        found = float(looking()(x / size, limit))
        assert matrices.values(x / size)[0] <= found * float(limit) * (1 + 1e-7)
        if matrices.values(x / size)[0] <= limit:
          assert found <= 1 + 1e-3


def exact_bound(x, doublings):
  """The bound of a float32 matrix for a limit of 1, by integer arithmetic."""
  scale = 2**30
  whole = [[int(Fraction(float(v)) * scale) for v in row] for row in x]
  assert all(
    Fraction(w, scale) == Fraction(float(v))
    for row, old in zip(whole, x, strict=True)
    for w, v in zip(row, old, strict=True)
  )
  m = len(whole)
  shift = 60
  t = np.array(
    [[2 * sum(a * b for a, b in zip(r, s, strict=True)) for s in whole] for r in whole],
    object,
  ) - (np.eye(m, dtype=int).astype(object) << shift)
  for _ in range(doublings):
    t = 2 * t.dot(t) - (np.eye(m, dtype=int).astype(object) << (2 * shift))
    shift *= 2
  square = Fraction(int((t * t).sum()), 1 << (2 * shift))
  # A fraction of thousands of digits; its root is a float.
  size = math.sqrt(square) if square < 10**300 else math.inf
  return bound_of_size(size, 2**doublings)


def worst_rounding(count, seed):
  """How far float32 bounds are from exact ones, relative, of matrices near a limit."""
  rng = np.random.default_rng(seed)
  rows, columns = 8, 12
  errors = []
  doublings = certificate.doublings(rows, 1e-3)
  for i in range(count):
    kind = matrices.KINDS[i % len(matrices.KINDS)]
    x = matrices.make(kind, rng, rows, columns)
    x = x / np.linalg.norm(x, 2) * (1 + rng.uniform(-1e-2, 1e-3))
    # Multiples of 2^-30 from -1 to 1: exact as floats, and as integers.
    x = np.asarray(np.round(x * 2**22) / 2**22, np.float32)
    found = looking()(x, np.float32(1))
    plain = float(found) / (1 + certificate.rounding(jnp.float32))
    exact = min(exact_bound(x, doublings), float(np.sum((x @ x.T) ** 2)) ** 0.25)
    errors.append(abs(plain / exact - 1))
  return max(errors)


class TestRounding:
  def test_float32_is_near_exact_arithmetic(self):
    assert worst_rounding(36, 0) <= certificate.rounding(jnp.float32) / 10

  @pytest.mark.slow
  def test_float32_is_near_exact_arithmetic_in_a_thousand_matrices(self):
    assert worst_rounding(1000, 1) <= certificate.rounding(jnp.float32) / 10

  @pytest.mark.parametrize(("bits", "lost"), [(7, 1e-3), (10, 1e-4)])
  def test_less_precision_breaks_the_proof(self, monkeypatch, bits, lost):
    """As TPUs, and GPUs with TF32, multiply by default: a bound below the truth."""
    x = np.full((ROWS, COLUMNS), np.float32(1.0039), np.float32)
    x = x / np.float32(np.linalg.norm(x))
    true = matrices.values(x)[0]

    def by_default(a, b):
      a, b = (jax.lax.reduce_precision(v, 8, bits) for v in (a, b))
      return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

    limit = np.float32(true)
    assert float(certificate.look(x, limit, 1e-3).bound) * limit >= true
    found = []
    for scale in np.linspace(1, 2, 16).astype(np.float32):
      with monkeypatch.context() as patch:
        patch.setattr(certificate, "dot", by_default)
        bound = certificate.look(x * scale, limit * scale, 1e-3).bound
      found.append(float(bound) / (true / float(limit)) - 1)
    # In bfloat16 by more than the promise, in TF32 by more than is left for rounding.
    assert min(found) < -lost

  @pytest.mark.parametrize("soft", [False, True])
  def test_every_matmul_states_its_precision(self, soft):
    tx = optax_clip.spectral_clip(1.0, soft=soft)
    g = {"w": jnp.ones((40, 48))}
    text = str(jax.make_jaxpr(lambda g: tx.update(g, tx.init(g)))(g))
    measured = str(jax.make_jaxpr(measures.spectral_norm().measure)(g))
    for program in (text, measured):
      dots = program.split("dot_general[")[1:]
      assert dots
      assert all("HIGHEST" in x.partition("]\n")[0][:400] for x in dots)


class TestMeasure:
  @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
  def test_it_is_an_upper_bound_and_near(self, dtype):
    x, _ = matrices.many(36, ROWS, COLUMNS, 3)
    stack = jnp.asarray(x * 2.0**40, dtype)
    measure = measures.spectral_norm(stacked={"": 0})
    (found,) = jax.jit(lambda g: measure.measure(g))({"w": stack})
    ratio = np.asarray(found.value * found.unit).ravel() / matrices.values(stack)[:, 0]
    assert np.all(ratio >= 1)
    assert np.all(ratio <= 1 + 1e-3)

  def test_vectors_zeros_and_what_is_not_finite(self):
    tree = {
      "vector": jnp.asarray([3.0, 4.0]),
      "zeros": jnp.zeros((4, 5)),
      "nan": jnp.full((4, 5), jnp.nan),
    }
    measure = measures.spectral_norm()
    (found,) = measure.measure(tree)
    norms = (found.value * found.unit).tolist()
    by_name = dict(zip(sorted(tree), norms, strict=True))
    assert by_name["vector"] == 5
    assert by_name["zeros"] == 0
    assert math.isnan(by_name["nan"])

  def test_it_is_differentiable(self):
    x = jnp.asarray(matrices.with_values(np.random.default_rng(0), 6, 9, range(1, 7)))
    tx = optax_clip.clip_by_spectral_norm(1.0)

    def size(x):
      return measures.spectral_norm().measure({"w": x})[0].value[0]

    left, _, right = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    np.testing.assert_allclose(
      jax.grad(size)(x.astype(jnp.float32)), np.outer(left[:, 0], right[0]), atol=1e-4
    )
    zero = {"w": jnp.zeros((6, 9))}
    grad = jax.grad(lambda g: jnp.sum(tx.update(g, tx.init(g))[0]["w"]))(zero)
    np.testing.assert_array_equal(grad["w"], 1)
