"""Groups, and the axes of units, by path."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip._trees.paths import every_path


def tree():
  return {
    "embedding": jnp.full((3, 2), 2.0),
    "blocks": [{"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 1.0)}] * 2,
    "head": {"kernel": jnp.full((2, 3), 5.0)},
  }


def norm(*leaves):
  return np.sqrt(sum(np.sum(np.square(np.float64(x))) for x in leaves))


class TestLabelsByPath:
  def test_the_first_that_is_found_counts(self):
    labels = optax_clip.labels_by_path({"^head/": "head", "kernel": "body", "": "rest"})
    assert labels(tree()) == {
      "embedding": "rest",
      "blocks": [{"kernel": "body", "bias": "rest"}] * 2,
      "head": {"kernel": "head"},
    }

  def test_each_group_has_its_own_limit(self):
    labels = optax_clip.labels_by_path({"^head/": "head", "": "body"})
    tx = optax_clip.clip_by_group_norm(labels, {"head": 1.0, "body": float("inf")})
    updates, state = tx.update(tree(), tx.init(tree()))
    # Measured, never clipped.
    np.testing.assert_array_equal(updates["embedding"], tree()["embedding"])
    assert norm(updates["head"]["kernel"]) == pytest.approx(1, rel=1e-6)
    found = optax_clip.metrics(state)["clip_by_group_norm/norm"]
    assert found == pytest.approx(norm(tree()["head"]["kernel"]), rel=1e-6)

  @pytest.mark.foreign
  def test_labels_are_those_of_optax(self):
    labels = optax_clip.labels_by_path({"bias": "frozen", "": "trained"})
    tx = optax.multi_transform(
      {"frozen": optax.set_to_zero(), "trained": optax.sgd(1.0)}, labels
    )
    updates, _ = tx.update(tree(), tx.init(tree()))
    assert not np.any(updates["blocks"][0]["bias"])
    assert np.all(updates["blocks"][0]["kernel"] == -3)

  @pytest.mark.parametrize("rules", [{}, None, [("a", "b")]])
  def test_no_rules(self, rules):
    with pytest.raises(ValueError, match="rules must map regular expressions"):
      optax_clip.labels_by_path(rules)

  def test_no_regular_expression(self):
    with pytest.raises(ValueError, match=r"rules: 'head\[' is no regular expression"):
      optax_clip.labels_by_path({"head[": "x"})

  def test_one_that_is_found_nowhere(self):
    labels = optax_clip.labels_by_path({"heads": "x", "": "y"})
    words = "'heads' is found in no path. The paths are blocks/0/bias, blocks/0/kernel"
    with pytest.raises(ValueError, match=words):
      labels(tree())

  def test_leaves_in_which_none_is_found(self):
    tx = optax_clip.clip_by_group_norm(
      optax_clip.labels_by_path({"kernel": "x"}), {"x": 1.0}
    )
    with pytest.raises(
      ValueError, match="found in blocks/0/bias, blocks/1/bias, embedding"
    ):
      tx.init(tree())


class TestCounted:
  def test_what_does_not_count_is_scaled_with_its_group(self):
    counted = optax_clip.labels_by_path({"embedding": False, "": True})
    tx = optax_clip.clip_by_group_norm("all", {"all": 1.0}, counted=counted)
    updates, state = tx.update(tree(), tx.init(tree()))
    without = {name: leaf for name, leaf in tree().items() if name != "embedding"}
    n = norm(*jax.tree.leaves(without))
    assert optax_clip.metrics(state)["clip_by_group_norm/norm"] == pytest.approx(
      n, rel=1e-6
    )
    np.testing.assert_allclose(updates["embedding"], 2 / n, rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["kernel"], 5 / n, rtol=1e-6)

  def test_a_group_in_which_nothing_counts_is_left_alone(self):
    tx = optax_clip.clip_by_group_norm("all", {"all": 1.0}, counted=False)
    updates, _ = tx.update(tree(), tx.init(tree()))
    jax.tree.map(np.testing.assert_array_equal, updates, tree())

  def test_bad_input(self):
    with pytest.raises(TypeError, match="counted must hold True and False, got 1"):
      optax_clip.clip_by_group_norm("all", {"all": 1.0}, counted=1).init(tree())
    with pytest.raises(ValueError, match="counted must be a tree prefix"):
      optax_clip.clip_by_group_norm("all", {"all": 1.0}, counted={"head": True}).init(
        tree()
      )


class TestUnits:
  def test_axes_by_path(self):
    """An embedding's units are its rows, which the rule by rank does not know."""
    params = tree()
    grads = jax.tree.map(lambda x: 10 * x, params)
    grads["embedding"] = grads["embedding"].at[0].multiply(1e-6)
    for axis in (
      {"embedding": 1},
      lambda path, leaf: 1 if path == "embedding" else None,
    ):
      tx = optax_clip.adaptive_grad_clip(1.0, axis=axis)
      updates, _ = tx.update(grads, tx.init(params), params)
      # The first row is small and stays, the others are as large as their weights.
      np.testing.assert_array_equal(updates["embedding"][0], grads["embedding"][0])
      np.testing.assert_allclose(updates["embedding"][1:], 2, rtol=1e-6)
      by_rank = optax_clip.adaptive_grad_clip(1.0)
      expected, _ = by_rank.update(grads, by_rank.init(params), params)
      jax.tree.map(np.testing.assert_array_equal, updates["blocks"], expected["blocks"])

  def test_axes_by_name(self):
    """As the names of a Linen model have them, in boxes."""

    class Model(nn.Module):
      @nn.compact
      def __call__(self, tokens):
        def named(*names):
          return nn.with_partitioning(nn.initializers.ones_init(), names)

        x = nn.Embed(3, 4, embedding_init=named("vocab", "embed"))(tokens)
        return nn.Dense(2, kernel_init=named("embed", "mlp"))(x)

    variables = Model().init(jax.random.key(0), jnp.zeros(1, jnp.int32))
    names = nn.get_partition_spec(variables)
    axis = optax_clip.unit_axes_by_name(names, {"vocab", "mlp"})
    paths = every_path(variables)
    leaves = jax.tree.leaves(variables)
    found = {p: axis(p, x) for p, x in zip(paths, leaves, strict=True)}
    # Rows of the embedding, columns of the kernel; the bias by rank.
    assert found == {
      "params/Dense_0/bias": None,
      "params/Dense_0/kernel/value": (0,),
      "params/Embed_0/embedding/value": (1,),
    }
    tx = optax_clip.adaptive_grad_clip(0.5, axis=axis)
    grads = jax.tree.map(lambda x: 10 * jnp.ones_like(x), variables)
    updates, _ = tx.update(grads, tx.init(variables), variables)
    new = nn.unbox(updates)["params"]
    # Half of the norm of four ones, over four elements.
    np.testing.assert_allclose(new["Embed_0"]["embedding"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(new["Dense_0"]["kernel"], 0.5, rtol=1e-6)

  def test_names_that_do_not_exist(self):
    with pytest.raises(ValueError, match="outputs: head is the name of no axis"):
      optax_clip.unit_axes_by_name({"w": jax.P("embed", "mlp")}, {"mlp", "head"})
    with pytest.raises(TypeError, match="outputs must be a collection of names"):
      optax_clip.unit_axes_by_name({"w": jax.P("embed", "mlp")}, "mlp")

  def test_a_path_that_does_not_exist(self):
    tx = optax_clip.adaptive_grad_clip(1.0, axis={"embeddings": 1})
    with pytest.raises(ValueError, match="axis: 'embeddings' is found in no path"):
      tx.init(tree())
