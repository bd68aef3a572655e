"""Norms that change for good, and norms that never change."""

import functools

from helpers import learned
from helpers import shifts
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_clip
from optax_clip import thresholds

pytestmark = pytest.mark.programs

methods = pytest.mark.parametrize("name", shifts.METHODS)


@functools.cache
def figures():
  return shifts.measured()


# Measured, rounded up; `None`: locked for all of the 8,000 steps.
BOUNDS = {
  "autoclip": (1000, 1000, 1000),
  "clip_by_layer_percentile": (100, 100, 100),
  "clip_by_history": (128, 128, 128),
  "clip_by_history, surprise=None": (10, 128, 128),
  "zclip": (None, 400, 100),
  'zclip, mode="mean"': (None, 400, None),
  'zclip, mode="percentile"': (60, 400, 100),
  "adagc": (3500, 300, 3000),
  "adaclip": (2500, 6000, 2500),
  "thresholds.geometric": (230, 200, 100),
}


@methods
def test_steps_to_follow(name):
  for found, bound in zip(figures()[name], BOUNDS[name], strict=False):
    assert (found is None) == (bound is None)
    assert bound is None or found <= bound


def test_what_locks_says_so_first():
  """The first paragraph of a docstring names what its defaults can do."""
  locked = [name for name, (up, *_) in figures().items() if up is None]
  assert {name.split(",")[0] for name in locked} == {"zclip"}
  assert "lock" in optax_clip.zclip.__doc__.split("\n\n")[0]
  assert "lock" in thresholds.zscore.__doc__.split("\n\n")[0]


@methods
def test_the_tables_of_the_docs_are_those_measured(name):
  path = learned.DOCS / "learned.md"
  (row,) = [
    line
    for line in path.read_text().splitlines()
    if line.startswith(f"| `{name}` |") and line.count("|") == 6
  ]
  up, down, after, kept = figures()[name]
  cells = [c.strip().replace(",", "") for c in row.split("|")[-5:-1]]
  for cell, value in zip(cells[:3], (up, down, after), strict=True):
    if value is None:
      assert cell.startswith(">")
    else:
      assert int(cell) == pytest.approx(value, rel=0.05, abs=10)
  assert float(cells[3]) == pytest.approx(kept, abs=0.03)


CONSTANT = {
  **shifts.METHODS,
  "mean_over_rms": thresholds.mean_over_rms(eps=0.0),
  "adagc": thresholds.clipped_mean(warmup_norm=3e38),
}


@pytest.mark.parametrize("name", CONSTANT)
@pytest.mark.parametrize("level", [1e-30, 1e-3, 0.1, 3.0, 1e6, 1e30])
def test_equal_norms_are_not_clipped(name, level):
  norms = np.full(400, level, np.float32)
  found, state = learned.limits(CONSTANT[name], norms)
  assert not np.any(np.isnan(found))
  assert all(np.all(np.isfinite(x)) for x in learned.memory(state))
  if name == "mean_over_rms":
    np.testing.assert_allclose(found, 1, rtol=1e-6)
  else:
    assert np.all(norms <= found)


@methods
@pytest.mark.parametrize("level", [0.1, 1e6])
def test_rounding_errors_of_equal_norms_are_not_clipped(name, level):
  rng = np.random.default_rng(0)
  norms = np.float32(level * (1 + 1e-7 * rng.integers(-4, 5, 400)))
  found, _ = learned.limits(shifts.METHODS[name], norms)
  assert np.all(norms <= found)


def test_float64_norms_are_judged_in_float64():
  with jax.enable_x64(True):
    norms = np.full(100, 1 / 3)
    for threshold in shifts.METHODS.values():
      found, state = learned.limits(threshold, norms)
      assert np.all(norms <= found)
      floats = [x for x in learned.memory(state) if x.dtype.kind == "f"]
      assert all(x.dtype == np.float32 for x in floats)
    limit, _ = thresholds.percentile().update(
      jnp.asarray(1e300), thresholds.percentile().init(jnp.zeros(()))
    )
    assert limit.dtype == jnp.float64
    assert np.isfinite(limit)
