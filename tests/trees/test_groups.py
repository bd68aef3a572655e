"""Groups, and the axes of units, by path."""

import flax.linen as nn
from helpers import oracles
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip._trees.paths import every_name


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
    message = r"rules: 'head\[' is not a regular expression"
    with pytest.raises(ValueError, match=message):
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


class TestScaled:
  """Counted in the norm, not scaled."""

  rest = staticmethod(optax_clip.labels_by_path({"embedding": False, "": True}))

  def test_what_is_not_scaled_counts_and_passes(self):
    tx = optax_clip.clip_by_group_norm(
      "all", {"all": 1.0}, scaled=self.rest, record="layers"
    )
    updates, state = jax.jit(tx.update)(tree(), tx.init(tree()))
    n = norm(*jax.tree.leaves(tree()))
    found = optax_clip.metrics(state)
    assert found["clip_by_group_norm/norm"] == pytest.approx(n, rel=1e-6)
    np.testing.assert_array_equal(updates["embedding"], tree()["embedding"])
    np.testing.assert_allclose(updates["head"]["kernel"], 5 / n, rtol=1e-6)
    np.testing.assert_allclose(updates["blocks"][1]["bias"], 1 / n, rtol=1e-6)

  def test_each_layer_has_its_record(self):
    tx = optax_clip.clip_by_group_norm(
      "all", {"all": 1.0}, scaled=self.rest, record="layers"
    )
    _, state = jax.jit(tx.update)(tree(), tx.init(tree()))
    layers = optax_clip.layer_metrics(state, tree()).layers
    kept, cut = layers["embedding"], layers["head/kernel"]
    assert kept.norm == pytest.approx(norm(tree()["embedding"]), rel=1e-6)
    assert (kept.limit, kept.coefficient, kept.clipped) == (float("inf"), 1, 0)
    assert (cut.limit, cut.clipped) == (1, 1)
    n = norm(*jax.tree.leaves(tree()))
    assert cut.coefficient == pytest.approx(1 / n, rel=1e-6)

  @pytest.mark.parametrize("strict", [False, True])
  @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
  @pytest.mark.parametrize("bad", [1.0, np.nan, np.inf])
  def test_it_passes_bit_for_bit_whatever_the_norm_is(self, bad, dtype, strict):
    """Also subnormal numbers, which a product on a CPU makes zero."""
    least = np.finfo(np.float32).smallest_subnormal
    kept = np.asarray([-0.0, 6e4, least, -3 * least, bad], np.float32)
    updates = {"a": jnp.asarray(kept, dtype), "b": jnp.full(3, 7.0, dtype)}
    tx = optax_clip.clip_by_group_norm(
      "all", {"all": 1e-3}, scaled={"a": False, "b": True}, strict=strict
    )
    new, _ = jax.jit(tx.update)(updates, tx.init(updates))
    oracles.assert_identical(new["a"], updates["a"])
    assert not np.any(np.abs(oracles.wide(new["b"])) > 1e-3)

  def test_with_zero_a_norm_that_is_not_finite_makes_all_zero(self):
    tx = optax_clip.clip_by_group_norm(
      "all", {"all": 1.0}, scaled=self.rest, nonfinite="zero"
    )
    updates = tree() | {"head": {"kernel": jnp.full((2, 3), jnp.nan)}}
    new, _ = tx.update(updates, tx.init(updates))
    assert not any(np.any(x) for x in jax.tree.leaves(new))

  def test_what_neither_counts_nor_is_scaled_is_not_there(self):
    tx = optax_clip.clip_by_group_norm(
      "all", {"all": 1.0}, counted=self.rest, scaled=self.rest
    )
    updates, _ = tx.update(tree(), tx.init(tree()))
    without = {name: leaf for name, leaf in tree().items() if name != "embedding"}
    expected, _ = optax_clip.clip_tree(without, 1.0)
    jax.tree.map(np.testing.assert_array_equal, updates, tree() | expected)

  def test_derivatives(self):
    """Those of what is not scaled go through it unchanged."""
    tx = optax_clip.clip_by_group_norm(
      "all", {"all": 1.0}, scaled={"a": False, "b": True}
    )
    g = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}

    def total(g):
      new, _ = tx.update(g, tx.init(g))
      return jnp.sum(new["a"]) + jnp.sum(new["b"])

    # a + b / n with n = 5: by a, 1 - a b / n^3; by b, 1 / n - b^2 / n^3.
    found = jax.grad(total)(g)
    np.testing.assert_allclose(found["a"], 1 - 12 / 125, rtol=1e-6)
    np.testing.assert_allclose(found["b"], 1 / 5 - 16 / 125, rtol=1e-6)

  def test_bad_input(self):
    with pytest.raises(TypeError, match="scaled must hold True and False, got 1"):
      optax_clip.clip_by_group_norm("all", {"all": 1.0}, scaled=1).init(tree())
    with pytest.raises(ValueError, match="scaled must be a tree prefix"):
      optax_clip.clip_by_group_norm("all", {"all": 1.0}, scaled={"head": True}).init(
        tree()
      )


class TestUnits:
  def test_axes_by_path(self):
    """An embedding's units are its rows, which the rule by rank does not know."""
    params = tree()
    grads = jax.tree.map(lambda x: 10 * x, params)
    grads["embedding"] = grads["embedding"].at[0].multiply(1e-6)
    by_rank = optax_clip.adaptive_grad_clip(1.0)
    expected, _ = jax.jit(by_rank.update)(grads, by_rank.init(params), params)
    for axis in (
      {"embedding": 1},
      lambda path, leaf: 1 if path == "embedding" else None,
    ):
      tx = optax_clip.adaptive_grad_clip(1.0, axis=axis)
      updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
      # The first row is small and stays, the others are as large as their weights.
      np.testing.assert_array_equal(updates["embedding"][0], grads["embedding"][0])
      np.testing.assert_allclose(updates["embedding"][1:], 2, rtol=1e-6)
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
    paths = every_name(variables)
    leaves = jax.tree.leaves(variables)
    found = {p: axis(p, x) for p, x in zip(paths, leaves, strict=True)}
    # Rows of the embedding, columns of the kernel; the bias by rank.
    assert found == {
      "params/Dense_0/bias": None,
      "params/Dense_0/kernel": (0,),
      "params/Embed_0/embedding": (1,),
    }
    tx = optax_clip.adaptive_grad_clip(0.5, axis=axis)
    grads = jax.tree.map(lambda x: 10 * jnp.ones_like(x), variables)
    updates, _ = jax.jit(tx.update)(grads, tx.init(variables), variables)
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
