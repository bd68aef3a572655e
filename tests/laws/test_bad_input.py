"""Bad input: the error's type, and that it names argument, value and fix."""

from helpers.registry import FIXED
from helpers.registry import ROWS
from helpers.registry import ZERO_IS_MEANT
from helpers.registry import names
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import actions
from optax_clip import measures
from optax_clip import thresholds

G = {"a": jnp.array([3.0, 4.0])}
THREE = np.ones(3)
BATCH = [jnp.ones((2, 3))]

# For each function with a limit: the name of the argument, and a call with it.
LIMITS = {
  **{row.name: (*row.arguments(1.0), row.factory) for row in FIXED},
  "clip_by_group_norm": (
    r"max_norms\['x'\]",
    lambda limit: optax_clip.clip_by_group_norm({"a": "x"}, {"x": limit}),
  ),
  "clip_tree": ("max_norm", lambda limit: optax_clip.clip_tree(G, limit)),
  "per_example_global_norm_clip": (
    "l2_norm_clip",
    lambda limit: optax_clip.per_example_global_norm_clip(BATCH, limit),
  ),
  "per_example_layer_norm_clip": (
    "global_l2_norm_clip",
    lambda limit: optax_clip.per_example_layer_norm_clip(BATCH, limit),
  ),
  "thresholds.constant": ("limit", thresholds.constant),
}

NEGATIVE = {
  "float": -1.5,
  "int": -1,
  "minus inf": float("-inf"),
  "numpy scalar": np.float32(-1.5),
  "numpy float16": np.float16(-1.5),
  "numpy array": np.array(-1.5),
  "jax array": jnp.array(-1.5),
  "jax bfloat16": jnp.array(-1.5, jnp.bfloat16),
}
NANS = {
  "float": float("nan"),
  "numpy scalar": np.float32("nan"),
  "jax array": jnp.array(jnp.nan),
  "jax bfloat16": jnp.array(jnp.nan, jnp.bfloat16),
}


@pytest.mark.parametrize("kind", NEGATIVE)
@pytest.mark.parametrize("name", LIMITS)
def test_negative_limit(name, kind):
  argument, call = LIMITS[name]
  with pytest.raises(ValueError, match=rf"{argument} must be non-negative, got .*-"):
    call(NEGATIVE[kind])


@pytest.mark.parametrize("kind", NANS)
@pytest.mark.parametrize("name", LIMITS)
def test_nan_limit(name, kind):
  argument, call = LIMITS[name]
  with pytest.raises(ValueError, match=rf"{argument} must be non-negative, got .*nan"):
    call(NANS[kind])


@pytest.mark.parametrize("name", LIMITS)
def test_limit_error_says_what_to_do_instead(name):
  _, call = LIMITS[name]
  with pytest.raises(ValueError, match=r"Use 0 .* float\('inf'\) to never clip"):
    call(-1.0)


@pytest.mark.parametrize(
  "limit",
  [True, False, np.bool_(True), jnp.array(True), "1.0", 1j, [1.0, "a"], {}],
  ids=repr,
)
@pytest.mark.parametrize("name", LIMITS)
def test_limit_that_is_no_number(name, limit):
  argument, call = LIMITS[name]
  if name == "clip_tree" and isinstance(limit, (list, dict)):
    pytest.skip("takes a tree of limits")
  with pytest.raises(TypeError, match=rf"{argument} must be a number.*got"):
    call(limit)


@pytest.mark.parametrize(
  ("limits", "error", "words"),
  [
    ({"a": "1"}, TypeError, r"max_norm\['a'\] must be a number.*got '1'"),
    ({"a": -1.0}, ValueError, r"max_norm\['a'\] must be non-negative, got -1"),
    ({"a": THREE}, ValueError, r"max_norm\['a'\] must be a scalar"),
    ({"a": optax.constant_schedule(1)}, TypeError, r"max_norm\['a'\].*no schedule"),
    ({"b": 1.0}, ValueError, "max_norm must be a tree prefix of the updates"),
    ({}, ValueError, "max_norm must be a tree prefix of the updates"),
    ([1.0], ValueError, "max_norm must be a tree prefix of the updates"),
  ],
)
def test_limits_of_subtrees(limits, error, words):
  with pytest.raises(error, match=words):
    optax_clip.clip_tree(G, limits)


def test_known_norms_of_subtrees():
  words = "norm must be a tree like max_norm"
  with pytest.raises(ValueError, match=words):
    optax_clip.clip_tree(G, {"a": 1.0}, norm=1.0)
  with pytest.raises(ValueError, match=words):
    optax_clip.clip_tree(G, 1.0, norm={"a": 1.0})


def test_a_unit_of_no_limit():
  for limit in (None, {"a": None}):
    with pytest.raises(ValueError, match="rescale_to_unit_norm divides by the limit"):
      optax_clip.clip_tree(G, limit, rescale_to_unit_norm=True)


@pytest.mark.parametrize(
  "name",
  [
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
    "thresholds.constant",
  ],
)
def test_none_where_a_limit_must_be(name):
  argument, call = LIMITS[name]
  with pytest.raises(TypeError, match=rf"{argument} must be a number, got None"):
    call(None)


GOOD = [0, 0.0, 1, float("inf"), np.float16(2), jnp.array(1)]


@ZERO_IS_MEANT
@pytest.mark.parametrize("limit", GOOD, ids=repr)
@pytest.mark.parametrize("name", LIMITS)
def test_good_limits_pass(name, limit):
  LIMITS[name][1](limit)


def test_traced_negative_limit_counts_as_zero():
  def clipped(limit):
    return optax_clip.clip_tree(G, limit)[0]

  np.testing.assert_array_equal(jax.jit(clipped)(-1.0)["a"], [0, 0])


# --- Other numbers ------------------------------------------------------------

WITH_EPS = {
  "clip_by_global_norm": optax_clip.clip_by_global_norm,
  "clip_by_layer_norm": optax_clip.clip_by_layer_norm,
  "clip_by_block_rms": optax_clip.clip_by_block_rms,
  "clip_by_group_norm": lambda limit, eps: optax_clip.clip_by_group_norm(
    {"a": "x"}, {"x": limit}, eps=eps
  ),
  "clip_tree": lambda limit, eps: optax_clip.clip_tree(G, limit, eps=eps),
  "actions.rescale": lambda limit, eps: actions.rescale(eps=eps),
}


@pytest.mark.parametrize("eps", [-1e-6, float("nan"), jnp.array(-1.0)])
@pytest.mark.parametrize("name", WITH_EPS)
def test_bad_eps(name, eps):
  with pytest.raises(ValueError, match="eps must be non-negative, got"):
    WITH_EPS[name](1.0, eps=eps)


WITH_ORD = {
  "clip_by_global_norm": lambda ord: optax_clip.clip_by_global_norm(1.0, ord=ord),
  "clip_by_layer_norm": lambda ord: optax_clip.clip_by_layer_norm(1.0, ord=ord),
  "clip_by_group_norm": lambda ord: optax_clip.clip_by_group_norm(
    {"a": "x"}, {"x": 1.0}, ord=ord
  ),
  "adaptive_grad_clip": lambda ord: optax_clip.adaptive_grad_clip(1.0, ord=ord),
  "global_norm": lambda ord: optax_clip.global_norm(G, ord=ord),
  "clip_tree": lambda ord: optax_clip.clip_tree(G, 1.0, ord=ord),
  "measures.global_norm": lambda ord: measures.global_norm(ord=ord),
}


@pytest.mark.parametrize("ord", [0, -1, -2.0, float("nan"), float("-inf"), 100])
@pytest.mark.parametrize("name", WITH_ORD)
def test_unknown_ord(name, ord):
  with pytest.raises(ValueError, match=rf"ord must be .*got {ord}.*usual"):
    WITH_ORD[name](ord)


@pytest.mark.parametrize("ord", ["fro", "2", jnp.array(2.0), np.array([2])], ids=repr)
@pytest.mark.parametrize("name", WITH_ORD)
def test_ord_that_is_no_number(name, ord):
  with pytest.raises(TypeError, match="ord must be a Python number"):
    WITH_ORD[name](ord)


@pytest.mark.parametrize("ord", [1, 2.0])
def test_injected_ord(ord):
  tx = optax.inject_hyperparams(optax_clip.clip_by_global_norm)(1.0, ord=ord)
  with pytest.raises(TypeError, match=r"static_args=\('ord',\)"):
    tx.init(G)
  # The fix that the message names.
  tx = optax.inject_hyperparams(optax_clip.clip_by_global_norm, static_args=("ord",))(
    1.0, ord=ord
  )
  updates, _ = jax.jit(tx.update)(G, tx.init(G))
  norm = np.linalg.norm(np.asarray(updates["a"], np.float64), ord)
  assert norm == pytest.approx(1.0, rel=2e-7)


NONFINITE = {
  "clip": optax_clip.clip,
  "clip_by_global_norm": optax_clip.clip_by_global_norm,
  "clip_by_layer_norm": optax_clip.clip_by_layer_norm,
  "clip_by_block_rms": optax_clip.clip_by_block_rms,
  "adaptive_grad_clip": optax_clip.adaptive_grad_clip,
  "clip_by_group_norm": lambda limit, nonfinite: optax_clip.clip_by_group_norm(
    {"a": "x"}, {"x": limit}, nonfinite=nonfinite
  ),
  "clip_tree": lambda limit, nonfinite: optax_clip.clip_tree(
    G, limit, nonfinite=nonfinite
  ),
  "clip_with": lambda limit, nonfinite: optax_clip.clip_with(
    measures.global_norm(),
    thresholds.constant(limit),
    actions.rescale(),
    nonfinite=nonfinite,
  ),
}


@pytest.mark.parametrize("value", ["skip", "Zero", "", None, True, 0], ids=repr)
@pytest.mark.parametrize("name", NONFINITE)
def test_unknown_nonfinite(name, value):
  message = rf"nonfinite must be one of 'propagate', 'zero', got {value!r}"
  with pytest.raises(ValueError, match=message):
    NONFINITE[name](1.0, nonfinite=value)


# --- Leaves -------------------------------------------------------------------

INTEGERS = {
  "int32": jnp.arange(3),
  "uint8": jnp.arange(3, dtype=jnp.uint8),
  "bool": jnp.array([True, False]),
  "numpy": np.arange(3),
  "python int": 3,
  "python bool": True,
}


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("row", ROWS, ids=names(ROWS))
def test_integer_leaf_in_a_transformation(row, kind):
  tx = row.make()
  good = {"layer": {"w": [jnp.ones(2), jnp.ones(3)]}}
  bad = {"layer": {"w": [jnp.ones(2), INTEGERS[kind]]}}
  params = jax.tree.map(lambda x: jnp.ones(jnp.shape(x)), bad)
  state = tx.init(good)
  with pytest.raises(TypeError, match=r"\['layer'\]\['w'\]\[1\] .*optax\.masked") as e:
    tx.update(bad, state, params)
  assert str(jnp.asarray(INTEGERS[kind]).dtype) in str(e.value)


FUNCTIONS = {
  "global_norm": optax_clip.global_norm,
  "clip_tree": lambda tree: optax_clip.clip_tree(tree, 1.0),
  "clip_tree with a known norm": lambda tree: optax_clip.clip_tree(tree, 1.0, norm=2.0),
  "per_example_global_norm_clip": lambda tree: optax_clip.per_example_global_norm_clip(
    tree, 1.0
  ),
  "per_example_layer_norm_clip": lambda tree: optax_clip.per_example_layer_norm_clip(
    tree, 1.0
  ),
}


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_integer_leaf_in_a_function(name, dtype):
  tree = {"w": jnp.ones((2, 2)), "count": jnp.ones((2, 2), dtype)}
  with pytest.raises(TypeError, match=rf"\['count'\] has dtype {dtype}"):
    FUNCTIONS[name](tree)


@pytest.mark.parametrize(
  "call",
  [
    optax_clip.unitwise_norm,
    lambda x: optax_clip.unitwise_clip(jnp.ones(3), jnp.ones(3), x),
  ],
)
def test_integer_array(call):
  with pytest.raises(TypeError, match="int32"):
    call(jnp.arange(3))


def test_masked_integers_pass():
  """The fix that the message names."""
  tree = {"w": jnp.array([3.0, 4.0]), "count": jnp.arange(3)}
  tx = optax.masked(optax_clip.clip_by_global_norm(1.0), {"w": True, "count": False})
  updates, _ = tx.update(tree, tx.init(tree))
  np.testing.assert_array_max_ulp(np.asarray(updates["w"]), np.float32([0.6, 0.8]), 1)
  np.testing.assert_array_equal(updates["count"], tree["count"])


def test_complex_leaf_in_an_elementwise_clip():
  g = {"w": jnp.ones(2, jnp.complex64)}
  tx = optax_clip.clip(1.0)
  with pytest.raises(TypeError, match=r"[Cc]omplex.*clip_by_global_norm"):
    tx.update(g, tx.init(g))


# --- Parameters ---------------------------------------------------------------


def test_missing_params():
  tx = optax_clip.adaptive_grad_clip(0.1)
  with pytest.raises(ValueError, match=r"tx\.update\(updates, state, params\)"):
    tx.update(G, tx.init(G))


@pytest.mark.parametrize("params", [{"b": jnp.ones(2)}, [jnp.ones(2)], {**G, "b": 1.0}])
def test_params_of_another_structure(params):
  tx = optax_clip.adaptive_grad_clip(0.1)
  with pytest.raises(ValueError, match=r"updates and params .*structure.*'a'"):
    tx.update(G, tx.init(G), params)


def test_params_of_another_shape():
  tx = optax_clip.adaptive_grad_clip(0.1)
  with pytest.raises(ValueError, match=r"same shapes.*\(2,\) and \(3,\) at .*\['a'\]"):
    tx.update(G, tx.init(G), {"a": jnp.ones(3)})


def test_rank_beyond_five():
  g = {"deep": jnp.ones((2,) * 6)}
  tx = optax_clip.adaptive_grad_clip(0.1)
  for call in (
    lambda: tx.update(g, tx.init(g), g),
    lambda: optax_clip.unitwise_norm(g["deep"]),
  ):
    with pytest.raises(ValueError, match=r"rank 6.*axis="):
      call()
  # The fix that the message names.
  tx = optax_clip.adaptive_grad_clip(0.1, axis=(0, 1))
  tx.update(g, tx.init(g), g)


@pytest.mark.parametrize("axis", [2, -3, (0, 2), (-3,)])
def test_axis_out_of_range(axis):
  with pytest.raises(ValueError, match=r"axis=.* out of range .*\(3, 4\)"):
    optax_clip.unitwise_norm(jnp.ones((3, 4)), axis)
  g = jnp.ones((3, 4))
  tx = optax_clip.adaptive_grad_clip(0.1, axis=axis)
  with pytest.raises(ValueError, match=r"axis=.* out of range .*\(3, 4\)"):
    tx.update(g, tx.init(g), g)


@pytest.mark.parametrize("axis", [(0, 0), (0, -2)])
def test_axis_named_twice(axis):
  with pytest.raises(ValueError, match=r"axis=.* twice"):
    optax_clip.unitwise_norm(jnp.ones((3, 4)), axis)


def test_unitwise_clip_of_different_shapes():
  with pytest.raises(ValueError, match=r"one shape.*\(2,\).*\(3,\)"):
    optax_clip.unitwise_clip(jnp.ones(2), jnp.ones(3), jnp.ones(3))


# --- Labels -------------------------------------------------------------------


def test_label_without_a_limit():
  with pytest.raises(ValueError, match=r"no limit for .*'y'.*it has 'x'.*inf"):
    optax_clip.clip_by_group_norm({"a": "x", "b": "y"}, {"x": 1.0})


def test_label_without_a_limit_from_a_function():
  tx = optax_clip.clip_by_group_norm(lambda tree: {"a": "y"}, {"x": 1.0})
  with pytest.raises(ValueError, match=r"no limit for .*'y'.*it has 'x'"):
    tx.init(G)


@pytest.mark.parametrize("labels", [{}, [], (), None, {"a": None}], ids=repr)
def test_empty_labels(labels):
  with pytest.raises(ValueError, match=r"labels=.* holds no label"):
    optax_clip.clip_by_group_norm(labels, {"x": 1.0})


def test_empty_limits():
  with pytest.raises(ValueError, match="max_norms is empty"):
    optax_clip.clip_by_group_norm({"a": "x"}, {})


@pytest.mark.parametrize(
  "labels", [{"b": "x"}, {"a": "x", "b": "x"}, ["x"], {"a": {"deep": "x"}}], ids=repr
)
def test_labels_that_do_not_fit(labels):
  tx = optax_clip.clip_by_group_norm(labels, {"x": 1.0})
  with pytest.raises(ValueError, match="labels must be a tree prefix"):
    tx.init(G)


# --- Examples -----------------------------------------------------------------


@pytest.mark.parametrize(
  "function",
  [optax_clip.per_example_global_norm_clip, optax_clip.per_example_layer_norm_clip],
)
@pytest.mark.parametrize(
  "grads",
  [
    [jnp.ones((2, 3)), jnp.ones((3, 3))],
    [jnp.ones((2, 3)), jnp.ones(())],
    [jnp.ones(())],
  ],
  ids=["two batches", "a scalar among others", "a scalar"],
)
def test_leaves_without_a_common_batch(function, grads):
  with pytest.raises(ValueError, match=r"axis 0.*jax\.vmap"):
    function(grads, 1.0)
