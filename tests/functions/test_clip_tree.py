"""`clip_tree` of subtrees, and to unit norm: against float64 NumPy and fractions."""

from fractions import Fraction
import math

from helpers import oracles
from helpers.registry import ZERO_IS_MEANT
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_clip
from optax_clip import actions
from optax_clip import clip_tree
from optax_clip import measures
from optax_clip import thresholds

SHAPES = {"body": {"w": (6, 5), "b": (5,)}, "head": [(3,), ()]}
LIMITS = {"body": 2.0, "head": [0.5, None]}


def tree(seed=0, dtype="float32", scale=1.0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: jnp.asarray(scale * rng.normal(size=shape), dtype),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def expected(part, limit, unit=False):
  """A subtree in float64, clipped by its own norm; and that norm."""
  leaves, treedef = jax.tree.flatten(part)
  wide = [oracles.wide(x) for x in leaves]
  norm = oracles.tree_norm(wide)
  limit = math.inf if limit is None else limit
  factor = limit / norm if norm > limit else 1.0
  if unit:
    factor = 1 / max(norm, limit) if max(norm, limit) > 0 else 0.0
  return treedef.unflatten([x * factor for x in wide]), norm


def assert_near(found, wanted, dtype):
  for new, exact in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert new.dtype == jnp.dtype(dtype)
    error = np.abs(oracles.wide(new) - exact)
    assert np.all(error <= 1e-6 * np.abs(exact) + 0.51 * oracles.ulps(np.asarray(new)))


class TestSubtrees:
  @pytest.mark.parametrize("dtype", oracles.LOW)
  def test_each_is_clipped_by_its_own_norm(self, dtype):
    grads = tree(dtype=dtype)
    found, norms = jax.jit(lambda x: clip_tree(x, LIMITS))(grads)
    pairs = [
      (found["body"], norms["body"], grads["body"], 2.0),
      (found["head"][0], norms["head"][0], grads["head"][0], 0.5),
      (found["head"][1], norms["head"][1], grads["head"][1], None),
    ]
    for part, norm, given, limit in pairs:
      wanted, exact = expected(given, limit)
      assert_near(part, wanted, dtype)
      assert norm.dtype == jnp.float32
      assert norm.shape == ()
      np.testing.assert_allclose(norm, exact, rtol=1e-6)
    np.testing.assert_array_equal(found["head"][1], grads["head"][1])

  def test_norms_are_a_tree_like_the_limits(self):
    _, norms = clip_tree(tree(), LIMITS)
    is_leaf = {"is_leaf": lambda x: x is None}
    assert jax.tree.structure(norms) == jax.tree.structure(LIMITS, **is_leaf)

  def test_one_limit_for_each_leaf(self):
    grads = tree()
    limits = jax.tree.map(lambda x: 0.25, grads)
    found, _ = clip_tree(grads, limits)
    tx = optax_clip.clip_by_layer_norm(0.25)
    wanted, _ = tx.update(grads, tx.init(grads))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)

  def test_limits_may_be_traced(self):
    clip = jax.jit(lambda x, c: clip_tree(x, {"body": c, "head": 2 * c})[0])
    grads = tree()
    for c in (1e-3, 1.0, 1e3):
      found = clip(grads, np.float32(c))
      assert_near(found["body"], expected(grads["body"], np.float32(c))[0], "float32")
      assert_near(
        found["head"], expected(grads["head"], 2 * np.float32(c))[0], "float32"
      )

  def test_known_norms(self):
    grads = tree()
    known = {"body": 8.0, "head": [0.1, 5.0]}
    found, norms = clip_tree(grads, {"body": 2.0, "head": [0.5, 1.0]}, norm=known)
    assert jax.tree.map(float, norms) == jax.tree.map(np.float32, known)
    np.testing.assert_array_equal(found["body"]["w"], grads["body"]["w"] / 4)
    np.testing.assert_array_equal(found["head"][0], grads["head"][0])
    np.testing.assert_allclose(found["head"][1], grads["head"][1] / 5, rtol=1e-6)

  def test_one_norm_that_is_not_finite(self):
    """It is seen where it is; with "zero", all is zero."""
    grads = tree() | {"head": [jnp.array([jnp.nan, 1, 1]), jnp.ones(())]}
    found, norms = clip_tree(grads, LIMITS)
    assert np.all(np.isnan(found["head"][0]))
    assert np.all(np.isfinite(found["body"]["w"]))
    assert np.isnan(norms["head"][0])
    found, _ = clip_tree(grads, LIMITS, nonfinite="zero")
    assert not any(np.any(x) for x in jax.tree.leaves(found))

  def test_norms_beyond_float32_and_other_keywords(self):
    grads = {"a": jnp.full(4, 3e38), "b": jnp.array([3.0, -4.0])}
    found, norms = clip_tree(grads, {"a": 1.0, "b": 1.0}, ord=math.inf, strict=True)
    assert norms["b"] == 4
    for x in jax.tree.leaves(found):
      assert 0.999 < np.max(np.abs(x)) <= 1

  @pytest.mark.parametrize(
    ("empty", "limits"), [({}, {}), ({"a": None}, {"a": 1.0}), ([{}, ()], [1.0, 2.0])]
  )
  def test_trees_without_leaves(self, empty, limits):
    found, norms = clip_tree(empty, limits)
    assert found == empty
    assert jax.tree.map(float, norms) == jax.tree.map(lambda c: 0.0, limits)

  def test_a_subtree_without_leaves(self):
    found, norms = clip_tree({"a": jnp.array([3.0, 4.0]), "b": {}}, {"a": 1, "b": 1})
    np.testing.assert_allclose(found["a"], [0.6, 0.8], rtol=1e-6)
    assert found["b"] == {}
    assert norms == {"a": 5, "b": 0}

  @ZERO_IS_MEANT
  def test_a_limit_of_zero(self):
    found, _ = clip_tree(tree(), {"body": 0.0, "head": None})
    assert not np.any(found["body"]["w"])
    assert np.all(found["head"][0])

  def test_integers_are_refused(self):
    for norm in (None, {"a": 1.0}):
      with pytest.raises(TypeError, match=r"updates\['a'\] has dtype int32"):
        clip_tree({"a": jnp.ones(2, jnp.int32)}, {"a": 1.0}, norm=norm)


class TestUnit:
  @pytest.mark.parametrize("dtype", oracles.LOW)
  @pytest.mark.parametrize("limit", [1e-3, 0.7, 1.0, 50.0, 1e3])
  def test_it_divides_by_the_limit(self, limit, dtype):
    grads = tree(dtype=dtype)
    found, norm = jax.jit(lambda x: clip_tree(x, limit, rescale_to_unit_norm=True))(
      grads
    )
    wanted, exact = expected(grads, limit, unit=True)
    assert_near(found, wanted, dtype)
    np.testing.assert_allclose(norm, exact, rtol=1e-6)

  def test_of_subtrees(self):
    grads = tree()
    limits = {"body": 2.0, "head": 100.0}
    found, _ = clip_tree(grads, limits, rescale_to_unit_norm=True)
    for name, limit in limits.items():
      assert_near(found[name], expected(grads[name], limit, unit=True)[0], "float32")

  @pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e19, 3e38])
  @pytest.mark.parametrize("limit", [1e-34, 1e-6, 1.0, 1e30, 3e38])
  def test_norms_and_limits_of_any_size(self, magnitude, limit):
    rng = np.random.default_rng(0)
    x = jnp.asarray(magnitude * rng.uniform(0.3, 1, 5), jnp.float32)
    found, _ = clip_tree(x, limit, rescale_to_unit_norm=True)
    wanted, _ = expected(x, float(np.float32(limit)), unit=True)
    error = np.abs(oracles.wide(found) - wanted)
    tiny = float(np.finfo(np.float32).tiny)
    assert np.all((error <= 2e-6 * np.abs(wanted)) | (np.abs(wanted) < tiny))

  def test_a_limit_of_zero_is_what_small_limits_tend_to(self):
    """Without a warning: nothing becomes zero but zeros."""
    found, _ = clip_tree(jnp.array([3.0, -4.0]), 0.0, rescale_to_unit_norm=True)
    np.testing.assert_allclose(found, [0.6, -0.8], rtol=1e-6)
    clip = jax.jit(lambda x, c: clip_tree(x, c, rescale_to_unit_norm=True)[0])
    np.testing.assert_allclose(
      clip(jnp.array([3.0, -4.0]), -1.0), [0.6, -0.8], rtol=1e-6
    )

  @pytest.mark.parametrize("limit", [0.0, 1.0, math.inf])
  def test_zeros_stay_zeros(self, limit):
    zeros = jnp.array([0.0, -0.0])
    oracles.assert_identical(
      clip_tree(zeros, limit, rescale_to_unit_norm=True)[0], zeros
    )

  def test_a_limit_of_inf(self):
    found, _ = clip_tree(jnp.array([3e38, 3e38]), math.inf, rescale_to_unit_norm=True)
    np.testing.assert_array_equal(found, [0, 0])

  def test_within_a_limit_of_1_nothing_changes(self):
    x = jnp.asarray(np.array([0.6, -0.0, 1e-40, -1e-45], np.float32))
    oracles.assert_identical(clip_tree(x, 1.0, rescale_to_unit_norm=True)[0], x)

  def test_nan(self):
    bad = jnp.array([jnp.nan, 1.0])
    assert np.all(np.isnan(clip_tree(bad, 1.0, rescale_to_unit_norm=True)[0]))
    found, _ = clip_tree(bad, 1.0, rescale_to_unit_norm=True, nonfinite="zero")
    np.testing.assert_array_equal(found, [0, 0])

  @pytest.mark.parametrize("dtype", oracles.LOW)
  def test_strict_never_exceeds_1(self, dtype):
    rng = np.random.default_rng(0)
    clip = jax.jit(
      lambda x, c: clip_tree(x, c, rescale_to_unit_norm=True, strict=True)[0]
    )
    for _ in range(200):
      x = jnp.asarray(rng.normal(size=7) * 10 ** rng.uniform(-2, 2), dtype)
      ratio = rng.choice([1.0, 1 + 1e-7, 1 - 1e-7, 10 ** rng.uniform(-1, 1)])
      norm = oracles.tree_norm([x])
      new = clip(x, np.float64(norm * ratio))
      assert oracles.exact_square([new]) <= Fraction(1)
      if ratio < 1:
        assert oracles.tree_norm([new]) > 1 - 4 * oracles.epsilon(x.dtype) - 3e-6

  def test_eps_is_added_to_the_norm(self):
    found, _ = clip_tree(jnp.array([3.0, 4.0]), 1.0, eps=5.0, rescale_to_unit_norm=True)
    np.testing.assert_allclose(found, [0.3, 0.4], rtol=1e-6)

  def test_derivatives(self):
    x = jnp.array([3.0, 4.0])

    def total(x, c):
      return jnp.sum(clip_tree(x, c, rescale_to_unit_norm=True)[0])

    # Above the limit x / n; below x / c.
    np.testing.assert_allclose(
      jax.grad(total)(x, 1.0), [1 / 5 - 21 / 125, 1 / 5 - 28 / 125], rtol=1e-5
    )
    np.testing.assert_allclose(jax.grad(total)(x, 10.0), [0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(total, 1)(x, 10.0), -0.07, rtol=1e-6)
    for limit in (0.0, 1.0, math.inf):
      for point in (jnp.zeros(2), x):
        for found in jax.grad(total, (0, 1))(point, jnp.asarray(limit)):
          assert np.all(np.isfinite(found)), (limit, point)

  def test_as_an_action_of_groups(self):
    tx = optax_clip.clip_with(
      measures.layer_norm(), thresholds.constant(2.0), actions.rescale_to_unit()
    )
    g = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
    updates, _ = jax.jit(tx.update)(g, tx.init(g))
    np.testing.assert_allclose(updates["a"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [0.5], rtol=1e-6)


# --- Cotangents -------------------------------------------------------------------


def bounded(max_norm):
  """As in docs/faq.md: passes a state on, and clips what comes back."""

  @jax.custom_vjp
  def same(state):
    return state

  def backward(_, cotangents):
    return optax_clip.clip_tree(cotangents, max_norm)[:1]

  same.defvjp(lambda state: (state, None), backward)
  return same


def simulated(start, bound, steps=200):
  """A state of two leaves, and of an integer, that grows tenfold in each step."""

  def step(state, _):
    state = {"x": 10 * state["x"], "y": 10 * state["y"], "n": state["n"] + 1}
    return bound(state), None

  state = {**start, "n": jnp.int32(0)}
  state = jax.lax.scan(step, state, None, length=steps)[0]
  return jnp.sum(3 * state["x"]) + jnp.sum(4 * state["y"])


def test_cotangents_are_bounded_at_every_step_of_a_simulation():
  start = {"x": jnp.float32([1e-30]), "y": jnp.float32([1e-30])}
  grads = jax.jit(jax.grad(simulated), static_argnums=1)
  assert np.isinf(grads(start, lambda state: state)["x"]).all()
  # The last step multiplies what was clipped to 1 by 10; the direction is kept.
  found = grads(start, bounded(1.0))
  np.testing.assert_allclose(found["x"], [6.0], rtol=1e-6)
  np.testing.assert_allclose(found["y"], [8.0], rtol=1e-6)


def test_cotangents_of_examples_are_bounded_one_by_one():
  starts = {"x": jnp.zeros((3, 1)), "y": jnp.zeros((3, 1))}
  grad = jax.grad(lambda start: simulated(start, bounded(1.0), 5))
  found = jax.jit(jax.vmap(grad))(starts)
  np.testing.assert_allclose(found["y"], np.full((3, 1), 8.0), rtol=1e-6)


def test_cotangents_within_the_bound_are_those_of_the_loss():
  start = {"x": jnp.float32([0.5]), "y": jnp.float32([0.5])}
  for bound in (lambda state: state, bounded(1e9)):
    found = jax.grad(simulated)(start, bound, 3)
    assert jax.tree.map(lambda x: x.tolist(), found) == {"x": [3000.0], "y": [4000.0]}
