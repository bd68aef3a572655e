"""Trees whose class can be called, as modules of Equinox, are trees; and functions."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import measures
from optax_clip._trees.functions import is_function


class Model(eqx.Module):
  """A model, or what stands in its place: labels, flags, axes, limits."""

  w: object
  b: object

  def __call__(self, x):
    raise AssertionError("A tree was called.")


GRADS = Model(jnp.float32([[3.0, 4.0], [0.0, 0.0]]), jnp.float32([5.0, 12.0]))


def clipped(tx):
  updates, _ = tx.update(GRADS, tx.init(GRADS), GRADS)
  return updates


def test_labels():
  tx = optax_clip.clip_by_group_norm(Model("x", "y"), {"x": 1.0, "y": 2.0})
  updates = clipped(tx)
  np.testing.assert_allclose(updates.w, GRADS.w / 5, rtol=1e-6)
  np.testing.assert_allclose(updates.b, GRADS.b * 2 / 13, rtol=1e-6)
  with pytest.raises(ValueError, match="has no limit for the labels 'z'"):
    optax_clip.clip_by_group_norm(Model("x", "z"), {"x": 1.0, "y": 2.0})


@pytest.mark.parametrize("keyword", ["counted", "scaled"])
def test_flags(keyword):
  make = optax_clip.clip_by_group_norm
  tree, function = (
    clipped(make("all", {"all": 1.0}, **{keyword: flags}))
    for flags in (Model(True, False), lambda tree: Model(True, False))
  )
  assert eqx.tree_equal(tree, function)


def test_a_measure_of_groups():
  measure = measures.group_norm(Model(0, 1), [0, 1])
  (norms,) = measure.measure(GRADS)
  np.testing.assert_allclose(norms.value, [5, 13], rtol=1e-6)


@pytest.mark.parametrize("keyword", ["axis", "stacked"])
def test_axes(keyword):
  """A tree of axes is as a mapping from paths."""
  measure = {
    name: measures.unit_norm(**{keyword: rule})
    for name, rule in {"tree": Model(1, None), "paths": {"w": 1}}.items()
  }
  layouts = [x.layout(GRADS) for x in measure.values()]
  assert layouts[0] == layouts[1]
  assert layouts[0] != measures.unit_norm().layout(GRADS)


def test_a_tree_of_several_axes_for_a_leaf():
  measure = measures.unit_norm(axis=Model((0, 1), None))
  assert measure.layout(GRADS).places[0].entry == 0


def test_a_tree_of_axes_that_does_not_fit():
  with pytest.raises(ValueError, match="axis must map regular expressions of paths"):
    measures.unit_norm(axis=Model(1, None)).layout({"w": GRADS.w})


def test_limits_of_a_tree():
  updates, norms = optax_clip.clip_tree(GRADS, Model(1.0, 2.0))
  np.testing.assert_allclose(updates.w, GRADS.w / 5, rtol=1e-6)
  assert (norms.w, norms.b) == (5, 13)
  updates, _ = optax_clip.clip_tree(GRADS, Model(1.0, 2.0), norm=Model(10.0, 4.0))
  np.testing.assert_allclose(updates.b, GRADS.b / 2, rtol=1e-6)


class Rules(eqx.Module):
  """Makes labels by a method, which Equinox makes a tree."""

  scale: jax.Array

  def labels(self, tree):
    return Model("x", "y")


class Labelling(eqx.Module):
  """Makes labels by a call; it has no leaves."""

  name: str = eqx.field(static=True)

  def __call__(self, tree):
    return Model(self.name, "y")


def with_names(names, tree):
  """Makes labels of names that were bound to it."""
  return Model(*names)


FUNCTIONS = {
  "a function": lambda tree: Model("x", "y"),
  "of filter_jit": eqx.filter_jit(lambda tree: Model("x", "y")),
  "a method": Rules(jnp.ones(2)).labels,
  "without leaves": Labelling("x"),
  "partial": jax.tree_util.Partial(with_names, ("x", "y")),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_called(name):
  tx = optax_clip.clip_by_group_norm(FUNCTIONS[name], {"x": 1.0, "y": 2.0})
  np.testing.assert_allclose(clipped(tx).b, GRADS.b * 2 / 13, rtol=1e-6)


@pytest.mark.parametrize("given", [GRADS, "x", 1, None, {"a": 1}, (0, 1), jnp.ones(2)])
def test_what_is_not(given):
  assert not is_function(given)


# --- Functions, taken for schedules -----------------------------------------------


def test_injected_labels_are_no_schedule():
  labels, limits = optax_clip.labels_by_path({"": "x"}), {"x": 1.0}
  make = optax_clip.clip_by_group_norm
  with pytest.raises(TypeError, match=r"labels_by_path made .*\('labels',\)"):
    optax.inject_hyperparams(make)(labels, limits).init(GRADS)
  tx = optax.inject_hyperparams(make, static_args=("labels",))(labels, limits)
  alone = make(labels, limits)
  assert eqx.tree_equal(clipped(tx), clipped(alone))


def test_injected_axes_are_no_schedule():
  make = optax.inject_hyperparams(optax_clip.adaptive_grad_clip)
  names = {"w": jax.P("embed", "mlp")}
  axis = optax_clip.unit_axes_by_name(names, {"mlp"})
  for given in (axis, 1):
    with pytest.raises(TypeError, match=r"static_args=\('axis',\)"):
      make(0.1, axis=given).init({"w": GRADS.w})
