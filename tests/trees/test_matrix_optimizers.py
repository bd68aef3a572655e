"""Groups of the leaves that optax's Muon takes, by the recipes of the guide."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip

# Muon of optax mixes dtypes and ranks.
pytestmark = pytest.mark.foreign

SHAPES = {
  "embedding": (6, 4),
  "blocks": [{"kernel": (4, 3), "bias": (3,)}, {"kernel": (3, 4), "bias": (4,)}],
  "stack": (2, 4, 3),
  "conv": (3, 3, 2, 4),
  "scale": (),
}
Numbers = optax.contrib.MuonDimensionNumbers


def tree(seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def by_rank(tree):
  return jax.tree.map(lambda x: "muon" if x.ndim == 2 else "adam", tree)


def by_numbers(numbers):
  return jax.tree.map(
    lambda x: "adam" if x is None else "muon",
    numbers,
    is_leaf=lambda x: x is None or hasattr(x, "reduction_axis"),
  )


def labels_of(rules):
  """A function from a tree to the labels of its leaves, or to a prefix of them."""
  if rules is None:
    return by_rank
  return lambda tree: by_numbers(rules(tree) if callable(rules) else rules)


def only_blocks(params):
  return {name: Numbers() if name == "blocks" else None for name in params} | {
    "blocks": [{"kernel": Numbers(), "bias": None}] * 2
  }


def by_shape(params):
  return jax.tree.map(
    lambda x: Numbers(-2, -1) if x.ndim > 1 and x.shape[-1] > 2 else None, params
  )


# What Muon may be told of dimensions: nothing, a tree, a prefix, functions.
RULES = {
  "by rank": None,
  "a tree": only_blocks(SHAPES),
  "a prefix": dict.fromkeys(SHAPES)
  | {"stack": Numbers(1, 2), "conv": Numbers((0, 1, 2), 3)},
  "a function to a prefix": lambda params: (
    dict.fromkeys(params) | {"embedding": Numbers()}
  ),
  "a function": by_shape,
  "all Adam": lambda params: dict.fromkeys(params),
}


def split(rules):
  """Which leaves change by Muon: those that move if only Muon's rate is not 0."""
  tx = optax.contrib.muon(
    1.0, adam_learning_rate=0.0, muon_weight_dimension_numbers=rules
  )
  params = tree()
  updates, _ = jax.jit(tx.update)(tree(1), tx.init(params), params)
  return jax.tree.map(lambda x: "muon" if np.any(x) else "adam", updates)


@pytest.mark.parametrize("name", RULES)
def test_labels_are_the_leaves_that_muon_takes(name):
  labels = labels_of(RULES[name])(tree())
  assert jax.tree.broadcast(labels, tree()) == split(RULES[name])


def test_the_rules_differ():
  """So that the test above could fail."""
  found = {str(split(rules)) for rules in RULES.values()}
  assert len(found) == len(RULES)


def test_of_shapes_alone_and_inside_a_transformation():
  tx = optax_clip.clip_by_group_norm(by_rank, {"muon": None, "adam": 1e-3})
  state = tx.init(jax.eval_shape(tree))
  updates, _ = jax.jit(tx.update)(tree(), state)
  np.testing.assert_array_equal(updates["embedding"], tree()["embedding"])
  rest = [updates["stack"], updates["conv"], updates["scale"]]
  rest += [block["bias"] for block in updates["blocks"]]
  total = np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in rest))
  assert total == pytest.approx(1e-3, rel=1e-6)


def test_what_other_leaves_leave_of_muons_update():
  """A clip by one norm starves Muon, whose eps is absolute; groups do not."""
  rng = np.random.default_rng(0)
  grads = {
    "kernel": jnp.asarray(rng.normal(size=(16, 16)), jnp.float32),
    "bias": jnp.asarray(rng.normal(size=16) * 1e12, jnp.float32),
  }

  def moved(clip):
    tx = optax.chain(clip, optax.contrib.muon(1.0))
    updates, _ = tx.update(grads, tx.init(grads), grads)
    return np.linalg.norm(updates["kernel"])

  alone = moved(optax.identity())
  groups = optax_clip.clip_by_group_norm(by_rank, {"muon": None, "adam": 1.0})
  assert moved(groups) == alone
  assert moved(optax_clip.clip_by_global_norm(1.0)) < 0.5 * alone
