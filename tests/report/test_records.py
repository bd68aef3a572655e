"""What is recorded is of the last step and finite if it was; and what if nothing is."""

import functools

from flax import nnx
from flax import serialization
from helpers import registry
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import actions
from optax_clip import measures
from optax_clip import thresholds

LARGEST = float(np.finfo(np.float32).max)


class TestFloat64:
  """Records are float32. What is finite must not become inf in them."""

  @pytest.mark.parametrize("row", registry.FIXED, ids=lambda row: row.name)
  def test_a_norm_beyond_float32_is_recorded_as_the_largest(self, row):
    with jax.enable_x64(True):
      updates = {"a": jnp.full(4, 0.85e200), "b": jnp.full(2, 1e-9)}
      params = jax.tree.map(jnp.ones_like, updates)
      keywords = {"record": True} if row.takes("record") else {}
      tx = row.make(1e100, **keywords)
      _, state = jax.jit(tx.update)(updates, tx.init(params), params)
      record = optax_clip.metrics(state)
      for key, value in record.items():
        assert np.isfinite(value), key
      if row.name == "clip_by_global_norm":
        assert record[f"{row.name}/norm"] == np.float32(LARGEST)
        assert record[f"{row.name}/limit"] == np.float32(LARGEST)
        assert record[f"{row.name}/steps_clipped"] == 1
      assert record[f"{row.name}/steps_nonfinite"] == 0

  @pytest.mark.parametrize(
    "guard",
    [optax_clip.skip_nonfinite, optax_clip.skip_spikes, optax_clip.dynamic_loss_scale],
    ids=lambda guard: guard.__name__,
  )
  @pytest.mark.foreign  # About their record; whether dtypes may mix is another test.
  def test_guards_too(self, guard):
    with jax.enable_x64(True):
      updates = jnp.full(4, 0.85e200)
      tx = guard(optax_clip.clip_by_global_norm(1e100))
      _, state = jax.jit(tx.update)(updates, tx.init(updates))
      record = optax_clip.metrics(state)
      assert np.isfinite(record[f"{guard.__name__}/norm"])
      assert record[f"{guard.__name__}/skipped"] == 0
      _, state = jax.jit(tx.update)(updates.at[0].set(np.inf), state)
      assert np.isinf(optax_clip.metrics(state)[f"{guard.__name__}/norm"])


class TestSeveralDtypes:
  """Each norm is judged by its limit in its own dtype, whatever dtype comes first."""

  @pytest.mark.parametrize(
    ("limit", "norms", "clipped"),
    [
      (1e50, {"a": 0.0, "b": 1e60}, 1),
      (1e50, {"a": 0.0, "b": 1e40}, 0),
      (1e-50, {"a": 0.0, "b": 1e-60}, 0),
      (1e-50, {"a": 0.0, "b": 1e-40}, 1),
      # Above the limit in float64; equal to it in float32.
      (0.1, {"a": 0.0, "b": 0.1 * (1 + 5e-9)}, 1),
      # The float32 of 0.1 is above 0.1, and equal to the limit in its own dtype.
      (0.1, {"a": 0.1, "b": 0.0}, 0),
    ],
  )
  @pytest.mark.parametrize("first", ["float32", "float64"])
  @pytest.mark.parametrize("several", [False, True], ids=["one limit", "one each"])
  def test_of_layers(self, limit, norms, clipped, first, several):
    with jax.enable_x64(True):
      names = ("a", "b") if first == "float32" else ("b", "a")
      dtypes = {"a": jnp.float32, "b": jnp.float64}
      updates = [jnp.full(1, norms[name], dtypes[name]) for name in names]
      limits = jnp.full(2, limit) if several else limit
      tx = optax_clip.clip_with(
        measures.layer_norm(), thresholds.constant(limits), actions.rescale()
      )
      new, state = tx.update(updates, tx.init(updates))
      found = optax_clip.metrics(state)
      changed = [not np.array_equal(x, y) for x, y in zip(new, updates, strict=True)]
      assert sum(changed) == clipped
      assert found["clip/clipped"] == found["clip/steps_clipped"] == clipped
      assert found["clip/clipped_fraction"] == clipped / 2


class TestStepsNotTaken:
  """A guard keeps what it is around; of the record the last step is wanted."""

  CLIP = "clip_by_global_norm"
  COUNTS = ("steps", "steps_clipped", "steps_nonfinite")

  def spiked(self, *, whole=False, clip=None, **keywords):
    """The metrics after norms of 1, 1.1, 0.9 and one of 50, which is skipped."""
    clip = optax_clip.clip_by_global_norm(0.95) if clip is None else clip
    inner = optax.chain(clip, optax.sgd(0.1))
    history = thresholds.history(6, window=4)
    tx = optax_clip.skip_spikes(inner, history, **keywords)
    params = {"w": jnp.zeros(1)}
    state = tx.init(params)
    step = functools.partial(optax_clip.guarded_step, tx) if whole else tx.update
    step = jax.jit(step)
    for norm in (1.0, 1.1, 0.9, 50.0):
      _, state = step({"w": jnp.float32([norm])}, state, params)
    return optax_clip.metrics(state)

  @pytest.mark.parametrize("whole", [True, False], ids=["guarded_step", "update"])
  def test_the_norm_is_that_of_the_last_step_whether_taken_or_not(self, whole):
    record = self.spiked(whole=whole)
    assert record["skip_spikes/skipped"] == 1
    assert record["skip_spikes/norm"] == 50
    assert record[f"{self.CLIP}/norm"] == 50
    # Counters are of steps taken.
    assert [record[f"{self.CLIP}/{x}"] for x in self.COUNTS] == [3, 2, 0]

  def test_so_is_that_of_a_clip_of_layers(self):
    record = self.spiked(
      clip=optax_clip.clip_by_layer_norm(0.95), measure=measures.layer_norm()
    )
    assert record["skip_spikes/skipped"] == 1
    assert record["clip_by_layer_norm/norm"] == 50

  def test_a_step_that_is_not_finite(self):
    tx = optax_clip.skip_nonfinite(optax_clip.clip_by_global_norm(0.5))
    state, update = tx.init(jnp.zeros(2)), jax.jit(tx.update)
    for g in ([3.0, 4.0], [np.nan, 1.0]):
      _, state = update(jnp.float32(g), state)
    record = optax_clip.metrics(state)
    assert record["skip_nonfinite/skipped"] == 1
    assert np.isnan(record["skip_nonfinite/norm"])
    assert np.isnan(record[f"{self.CLIP}/norm"])
    assert [record[f"{self.CLIP}/{x}"] for x in self.COUNTS] == [1, 1, 0]
    # And back: the step after it is as if it had not been.
    _, state = update(jnp.float32([0.0, 2.0]), state)
    record = optax_clip.metrics(state)
    assert record[f"{self.CLIP}/norm"] == 2
    assert [record[f"{self.CLIP}/{x}"] for x in self.COUNTS] == [2, 2, 0]

  def test_a_guard_in_a_guard(self):
    """What the inner one says of its norm is of the last step, too."""
    tx = optax_clip.dynamic_loss_scale(
      optax_clip.skip_spikes(optax_clip.clip_by_global_norm(1.0)), init_scale=8.0
    )
    state, update = tx.init(jnp.zeros(2)), jax.jit(tx.update)
    for g in ([24.0, 32.0], [np.inf, 8.0]):
      _, state = update(jnp.float32(g), state)
    record = optax_clip.metrics(state)
    assert record["dynamic_loss_scale/skipped"] == 1
    for name in ("dynamic_loss_scale", "skip_spikes", self.CLIP):
      assert not np.isfinite(record[f"{name}/norm"]), name
    # It counts the steps that it judged.
    assert record["dynamic_loss_scale/steps"] == 2
    assert record["skip_spikes/steps"] == 1
    assert record["skip_spikes/steps_skipped"] == 0

  def test_so_does_one_that_is_not_directly_inside(self):
    history = thresholds.history(6, window=4)
    tx = optax_clip.skip_spikes(
      optax.chain(optax_clip.skip_nonfinite(optax.sgd(0.1))), history
    )
    state, update = tx.init(jnp.zeros(1)), jax.jit(tx.update)
    for norm in (1.0, 1.1, 0.9, 50.0):
      _, state = update(jnp.float32([norm]), state)
    record = optax_clip.metrics(state)
    assert record["skip_spikes/skipped"] == 1
    assert record["skip_nonfinite/norm"] == 50
    assert record["skip_nonfinite/steps"] == 3


def _restored():
  tx = optax.chain(optax_clip.clip_by_global_norm(1.0), optax.sgd(0.1))
  return serialization.to_state_dict(tx.init(jnp.zeros(2)))


NOTHING = {
  "a state of optax": lambda: optax.adam(1.0).init(jnp.zeros(2)),
  "without a record": lambda: optax_clip.clip_by_global_norm(1.0, record=False).init(
    jnp.zeros(2)
  ),
  "by default without": lambda: optax_clip.clip(1.0).init(jnp.zeros(2)),
  "plain dictionaries": _restored,
  "parameters": lambda: {"w": jnp.zeros(2)},
  "a transformation": lambda: optax_clip.clip_by_global_norm(1.0),
  "None": lambda: None,
  "a number": lambda: 3,
}


class TestNothingRecorded:
  @pytest.mark.parametrize("name", NOTHING)
  def test_is_an_error_that_says_what_was_looked_for(self, name):
    with pytest.raises(ValueError, match="record") as caught:
      optax_clip.metrics(NOTHING[name]())
    message = str(caught.value)
    assert "opt_state" in message
    assert "allow_empty=True" in message

  @pytest.mark.parametrize("name", NOTHING)
  def test_unless_it_is_allowed(self, name):
    assert optax_clip.metrics(NOTHING[name](), allow_empty=True) == {}

  def test_what_is_recorded_is_the_same_with_it(self):
    state = optax_clip.clip_by_global_norm(1.0).init(jnp.zeros(2))
    assert optax_clip.metrics(state, allow_empty=True) == optax_clip.metrics(state)

  def test_while_it_is_traced(self):
    with pytest.raises(ValueError, match="allow_empty=True"):
      jax.jit(optax_clip.metrics)(optax.adam(1.0).init(jnp.zeros(2)))


class Model(nnx.Module):
  """A model with what BatchNorm and Dropout have, which are no parameters."""

  def __init__(self):
    self.scale = nnx.Param(jnp.ones(3))
    self.mean = nnx.BatchStat(jnp.zeros(3))
    self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))


class TestLayersOfAPart:
  """Where the clip sees a part of what it is natural to pass."""

  def layers(self, make, fix):
    """What `layer_metrics` returns; or nothing, if its error names a fix."""
    refused = None
    try:
      return make().layers
    except ValueError as error:
      refused = str(error)
    assert fix in refused
    return None

  def test_of_one_label_of_multi_transform(self):
    params = {"a": {"w": jnp.full((2, 2), 2.0)}, "b": {"w": jnp.ones(3)}}
    clip = optax_clip.clip_by_layer_norm(1.0, record="layers")
    tx = optax.multi_transform(
      {"clip": clip, "rest": optax.identity()}, {"a": "clip", "b": "rest"}
    )
    _, state = jax.jit(tx.update)(params, tx.init(params))
    found = self.layers(
      lambda: optax_clip.layer_metrics(state, params), "optax.multi_transform"
    )
    if found is not None:
      assert {path: layer.norm for path, layer in found.items()} == {"a/w": 4.0}

  def test_of_a_model_of_flax_with_other_variables(self):
    model = Model()
    clip = optax_clip.clip_by_global_norm(1.0, record="layers")
    optimizer = nnx.Optimizer(model, optax.chain(clip, optax.sgd(0.1)), wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    nnx.jit(lambda model, optimizer: optimizer.update(model, params))(model, optimizer)
    expected = optax_clip.layer_metrics(optimizer, params).layers
    assert list(expected) == ["scale"]
    found = self.layers(
      lambda: optax_clip.layer_metrics(optimizer, model), "nnx.state(model, nnx.Param)"
    )
    assert found is None or found == expected

  @pytest.mark.parametrize(
    "tree",
    [
      {"a/b": jnp.ones(2), "a": {"b": jnp.full(3, 2.0)}},
      {"a/b": jnp.ones(2), "a": {"b": jnp.full(3, 2.0)}, "c": jnp.ones(1)},
    ],
    ids=len,
  )
  def test_of_two_leaves_whose_paths_read_alike(self, tree):
    tx = optax_clip.clip_by_layer_norm(1.0, record="layers")
    _, state = jax.jit(tx.update)(tree, tx.init(tree))
    found = self.layers(lambda: optax_clip.layer_metrics(state, tree), "a/b")
    if found is not None:
      norms = sorted(float(np.linalg.norm(x)) for x in jax.tree.leaves(tree))
      np.testing.assert_allclose(sorted(x.norm for x in found.values()), norms)

  def test_of_a_leaf_that_is_named_as_one_of_a_stack(self):
    tree = {"x[0]": jnp.ones(2), "x": jnp.full((2, 3), 2.0)}
    tx = optax_clip.clip_by_layer_norm(1.0, record="layers", stacked={"^x$": 0})
    _, state = jax.jit(tx.update)(tree, tx.init(tree))
    found = self.layers(lambda: optax_clip.layer_metrics(state, tree), "x[0]")
    assert found is None or len(found) == 3


def test_each_norm_is_compared_with_its_own_limit():
  limits = jnp.array([10.0, 1.0])
  each = optax_clip.Threshold(
    lambda norms: optax.EmptyState(), lambda norms, state, **_: (limits, state)
  )
  # Norms of units are in one array for each leaf.
  measure = measures.unit_norm(axis=0)
  tx = optax_clip.clip_with(measure, each, actions.rescale(), name="each")
  for norms, share in (((5.0, 0.5), 0), ((5.0, 2.0), 0.5), ((20.0, 2.0), 1)):
    updates = {name: jnp.full((1, 1), x) for name, x in zip("ab", norms, strict=True)}
    _, state = jax.jit(tx.update)(updates, tx.init(updates))
    found = optax_clip.metrics(state)
    assert found["each/clipped_fraction"] == share
    assert found["each/steps_clipped"] == (1 if share else 0)
