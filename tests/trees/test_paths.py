"""What people call a leaf: one name, in patterns of paths and in reports."""

from typing import NamedTuple

import equinox as eqx
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import optax
import pytest

import optax_clip
from optax_clip import measures
from optax_clip._trees.paths import every_name
from optax_clip._trees.paths import every_path


@jax.tree_util.register_pytree_node_class
class Named:
  """An array with names, as haliax registers its own: without keys."""

  def __init__(self, array):
    """Takes the array."""
    self.array = array

  def tree_flatten(self):
    return (self.array,), None

  @classmethod
  def tree_unflatten(cls, aux, children):
    del aux
    return cls(*children)


class DataArray(eqx.Module):
  """As penzai's named array."""

  data_array: jax.Array


class Value(eqx.Module):
  """As a frozen parameter of penzai, and as a parameter of Flax."""

  value: object


class Attention(eqx.Module):
  """Its fields are weights, one of which may be missing; it is no box."""

  query: jax.Array | None
  value: jax.Array | None


class Pair(NamedTuple):
  """Its fields are no boxes either."""

  value: jax.Array


X = jnp.ones((2, 3))
# Trees, and their leaves' names.
TREES = {
  "plain": ({"b": [X, X], "a": {"value": X}}, ["a/value", "b/0", "b/1"]),
  "haliax": ({"a": Named(X), "b": [Named(X)]}, ["a", "b/0"]),
  "penzai": ({"layers": [{"weights": Value(DataArray(X))}]}, ["layers/0/weights"]),
  "one of several fields": (Attention(X, X), ["query", "value"]),
  "the others are absent": ([Attention(None, X)], ["0/value"]),
  "the others are masked": ([Attention(optax.MaskedNode(), X)], ["0/value"]),
  "boxes in a box": ({"a": Value({"b": Value(X)})}, ["a/value/b"]),
  "the whole tree is a box": (Value(X), ["value"]),
  "one array": (X, [""]),
  "nothing": ({}, []),
}


@pytest.mark.parametrize("name", TREES)
def test_names(name):
  tree, expected = TREES[name]
  assert every_name(tree) == expected


def test_a_named_tuple_of_one_field_is_a_box_like_any_other():
  assert every_name({"scale": Pair(X)}) == ["scale"]


def flax_variables():
  """Parameters of NNX, and of Linen in boxes."""
  model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

  class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
      ones = nn.with_partitioning(nn.initializers.ones_init(), ("embed", "mlp"))
      return nn.Dense(3, kernel_init=ones)(x)

  boxed = Dense().init(jax.random.key(0), jnp.ones((1, 2)))
  return {"nnx": nnx.state(model, nnx.Param), "linen": boxed["params"]["Dense_0"]}


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_flax(kind):
  params = flax_variables()[kind]
  assert every_name(params) == ["bias", "kernel"]
  assert "kernel/value" in every_path(params)


@pytest.mark.parametrize("pattern", ["^kernel$", "^kernel/value$", "kernel"])
@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_patterns_find_a_leaf_by_both_spellings(kind, pattern):
  params = flax_variables()[kind]
  labels = optax_clip.labels_by_path({pattern: "matrix", "": "rest"})(params)
  assert jax.tree.leaves(labels) == ["rest", "matrix"]
  functions = {"axis": {pattern: 1}, "stacked": {pattern: 0}}
  for keyword, rule in functions.items():
    tx = optax_clip.adaptive_grad_clip(0.1, **{keyword: rule})
    jax.eval_shape(tx.init, params)


def test_an_error_has_the_names_that_reports_have():
  params = flax_variables()["nnx"]
  labels = optax_clip.labels_by_path({"embedding": "x", "": "y"})
  with pytest.raises(ValueError, match=r"The paths are bias, kernel\.$"):
    labels(params)
  labels = optax_clip.labels_by_path({"kernel": "x"})
  with pytest.raises(ValueError, match=r"is found in bias\. Add one"):
    labels(params)


def test_reports_and_functions_of_paths_have_the_same_names():
  params = {"a": Named(X), "b": Value(DataArray(X)), **flax_variables()["nnx"]}
  seen = []

  def stacked(name, leaf):
    seen.append(name)
    return 0 if name == "a" else None

  tx = optax_clip.clip_by_layer_norm(1.0, stacked=stacked, record="layers")
  state = tx.init(params)
  report = optax_clip.layer_metrics(state, params)
  assert list(report.layers) == ["a[0]", "a[1]", "b", "bias", "kernel"]
  assert seen[:4] == ["a", "b", "bias", "kernel"]


def test_axes_by_name_of_boxes():
  params = {"up": Named(X), "down": Value(DataArray(X))}
  names = jax.tree.map(lambda x: jax.P("embed", "mlp"), params)
  axis = optax_clip.unit_axes_by_name(names, {"embed"})
  layout = measures.unit_norm(axis=axis).layout(params)
  assert [place.dims for place in layout.places] == [(1,), (1,)]
