"""Which leaves may stand in a tree: of any float, of several, and what is no float."""

from helpers import registry
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import measures


def guarding(name):
  return lambda **keywords: getattr(optax_clip, name)(
    optax_clip.clip_by_global_norm(0.5), **keywords
  )


GUARDS = ("skip_nonfinite", "skip_spikes", "dynamic_loss_scale", "observe")

# Every transformation, and what goes around them.
EVERY = {
  **{row.name: row.make for row in registry.ROWS},
  **{name: guarding(name) for name in GUARDS},
  "skip_spikes of losses": lambda **keywords: optax_clip.skip_spikes(
    optax_clip.clip_by_global_norm(0.5), signals=("norm", "loss"), **keywords
  ),
  "dynamic_loss_scale of layers": lambda **keywords: optax_clip.dynamic_loss_scale(
    optax_clip.clip_by_layer_norm(0.5), measure=measures.layer_norm(), **keywords
  ),
}
every = pytest.mark.parametrize("name", EVERY)


def update(tx, *args):
  """With a loss, for what judges it."""
  return optax.with_extra_args_support(tx).update(*args, loss=jnp.float32(1))


# --- Dtypes -------------------------------------------------------------------

# Of the leaves of a tree. The settings of all tests forbid implicit promotion.
DTYPES = (
  ("bfloat16", "float32"),
  ("float16",),
  ("float32", "float64"),
  ("float8_e4m3fn",),
)


@every
def test_dtypes_are_never_promoted_implicitly(name):
  with jax.enable_x64(True):
    tx = EVERY[name](record="layers")
    for dtypes in DTYPES:
      tree = {"a": jnp.ones((3, 2), dtypes[0]), "b": jnp.ones(4, dtypes[-1])}
      state = tx.init(tree)
      new, later = jax.eval_shape(lambda g, s: update(tx, g, s, g), tree, state)
      for old, shaped in ((tree, new), (state, later)):
        described = [
          jax.tree.map(lambda x: (x.shape, x.dtype), x) for x in (old, shaped)
        ]
        assert described[0] == described[1], dtypes


# --- Floats of eight bits and of four -------------------------------------------

# All that have a sign. float8_e8m0fnu, which has not, is for scales only.
SMALL = (
  "float8_e4m3fn",
  "float8_e5m2",
  "float8_e4m3",
  "float8_e3m4",
  "float8_e4m3b11fnuz",
  "float8_e4m3fnuz",
  "float8_e5m2fnuz",
  "float4_e2m1fn",
)
VALUES = (0.0, 0.5, -0.5, 1.0, -1.0, 1.5, -1.5, 4.0, -4.0, 6.0)


def finite_values(dtype):
  """Every finite number of a dtype of at most eight bits, in float64."""
  bits = np.arange(256 if ml_dtypes.finfo(dtype).bits == 8 else 16, dtype=np.uint8)
  values = bits.view(dtype).astype(np.float64)
  return np.unique(values[np.isfinite(values)])


@pytest.mark.parametrize("strict", [False, True], ids=["nearest", "strict"])
@pytest.mark.parametrize("dtype", SMALL)
def test_clip_of_small_floats(dtype, strict):
  numpy_dtype = np.dtype(getattr(ml_dtypes, dtype))
  g = jnp.asarray(np.array(VALUES).astype(numpy_dtype))
  limits = (1.0, 1.1, 0.9, 3.3)

  def clipped(limit):
    tx = optax_clip.clip(limit, strict=strict)
    return tx.update(g, tx.init(g))[0]

  # As constants: under `jit` a traced limit has been rounded before.
  for limit, new in zip(
    limits, jax.jit(lambda: list(map(clipped, limits)))(), strict=True
  ):
    known = finite_values(numpy_dtype)
    bound = known[known <= limit].max() if strict else _nearest(known, limit)
    assert new.dtype == g.dtype
    expected = np.clip(np.float64(g), -bound, bound)
    np.testing.assert_array_equal(np.float64(new), expected, f"limit {limit}")


def _nearest(values, x):
  return values[np.argmin(np.abs(values - x))]


def test_clip_of_small_floats_that_are_not_finite():
  g = jnp.asarray([np.nan, np.inf, -np.inf], jnp.float8_e5m2)
  tx = optax_clip.clip(1.0)
  new, _ = tx.update(g, tx.init(g))
  np.testing.assert_array_equal(np.float32(new), [np.nan, 1, -1])


# --- What is no float -----------------------------------------------------------

FLOATS = {"w": jnp.float32([3.0, 4.0]), "b": jnp.float32([[1.0, 2.0]])}
OTHERS = {"count": jnp.arange(3), "flag": jnp.array([True, False])}
MODEL = {**OTHERS, **FLOATS}

# What gradients of them may be: of `equinox.filter_grad`, or of `jax.grad` with
# `allow_int=True`, whose dtype is float0 and which have no values.
ABSENT = {
  "None": dict.fromkeys(OTHERS),
  "float0": {
    key: np.zeros(leaf.shape, jax.dtypes.float0) for key, leaf in OTHERS.items()
  },
}
absent = pytest.mark.parametrize("kind", ABSENT)


def test_float0_is_what_jax_makes_of_integers():
  found = jax.grad(lambda model: jnp.sum(model["w"]), allow_int=True)(MODEL)
  for key, leaf in ABSENT["float0"].items():
    assert found[key].dtype == leaf.dtype
    assert found[key].shape == leaf.shape


def assert_passed(found, leaf):
  assert (found is None) == (leaf is None)
  if leaf is not None:
    assert (found.dtype, found.shape) == (leaf.dtype, leaf.shape)


def two_steps(tx, kind, floats):
  """What two steps do to the floats beside leaves that get no updates."""
  others = {} if kind is None else ABSENT[kind]
  state = tx.init({**others, **FLOATS} if kind is None else MODEL)
  for factor in (1.0, 100.0):
    grads = {**others, **jax.tree.map(lambda x, k=factor: k * x, floats)}
    # Comparisons with parameters are of leaves that get updates.
    new, state = update(tx, grads, state, {**others, **FLOATS})
    for key, leaf in others.items():
      assert_passed(new.pop(key), leaf)
  return new, state


@absent
@every
def test_a_model_may_have_leaves_that_get_no_updates(name, kind):
  found, state = jax.eval_shape(lambda x: two_steps(EVERY[name](), kind, x), FLOATS)
  alone, other = jax.eval_shape(lambda x: two_steps(EVERY[name](), None, x), FLOATS)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(
    lambda x: (x.shape, x.dtype), alone
  )
  # So that a state restores whichever way it was made. Leaf by leaf: a tree in it that
  # is like the parameters has None where these have no updates.
  described = [[(x.shape, x.dtype) for x in jax.tree.leaves(s)] for s in (state, other)]
  assert described[0] == described[1]


@pytest.mark.parametrize(
  "name",
  [
    "clip_by_global_norm",
    "clip_by_layer_norm",
    "clip_by_group_norm",
    "adaptive_grad_clip",
    "adagc",
    "stable_spam",
    "skip_spikes",
    "observe",
  ],
)
def test_the_others_are_updated_as_without_them(name):
  kinds = (None, *ABSENT)
  tx = EVERY[name]()
  results = jax.jit(lambda x: [two_steps(tx, kind, x) for kind in kinds])(FLOATS)
  for found in results[1:]:
    jax.tree.map(np.testing.assert_array_equal, found, results[0])


@absent
def test_they_have_no_norm(kind):
  grads = {**ABSENT[kind], "w": FLOATS["w"]}
  assert optax_clip.global_norm(grads) == 5
  clipped, norm = optax_clip.clip_tree(grads, 1.0)
  assert norm == 5
  for key, leaf in ABSENT[kind].items():
    assert_passed(clipped[key], leaf)


@absent
def test_a_guarded_step_keeps_leaves_that_get_no_updates(kind):
  tx = optax_clip.skip_nonfinite(optax_clip.clip_by_global_norm(5.0))
  model = {**MODEL, "key": jax.random.key(3)}
  grads = {**ABSENT[kind], **FLOATS, "key": None}
  if kind == "float0":
    grads["key"] = np.zeros((), jax.dtypes.float0)
  bad = {**grads, "w": jnp.float32([jnp.nan, 0.0])}
  state = tx.init(model)

  @jax.jit
  def both(model):
    return [optax_clip.guarded_step(tx, g, state, model)[0] for g in (grads, bad)]

  taken, skipped = both(model)
  norm = np.sqrt(np.float64(9 + 16 + 1 + 4))
  for key, leaf in FLOATS.items():
    np.testing.assert_allclose(taken[key], leaf * (1 + 5 / norm), rtol=1e-6)
    np.testing.assert_array_equal(skipped[key], leaf)
  for new in (taken, skipped):
    for key, leaf in OTHERS.items():
      np.testing.assert_array_equal(new[key], leaf)
      assert new[key].dtype == leaf.dtype
    assert jax.random.key_data(new["key"]).tolist() == [0, 3]


# --- What has no leaves, or leaves without elements -----------------------------

ROUND = {
  **EVERY,
  "skip_spikes of layers": lambda **keywords: optax_clip.skip_spikes(
    optax_clip.clip_by_layer_norm(0.5), measure=measures.layer_norm(), **keywords
  ),
  "observe of layers": lambda **keywords: optax_clip.observe(
    optax_clip.clip_by_layer_norm(0.5), 4, measure=measures.layer_norm(), **keywords
  ),
  "a label without leaves": lambda **keywords: optax_clip.clip_by_group_norm(
    "a", {"a": 0.5, "b": 0.5}, **keywords
  ),
}
# As of a frozen stage, or of a label of `optax.multi_transform` that matches nothing.
BARE = {
  "no leaves": {},
  "only masked": {"w": optax.MaskedNode()},
  "no elements": {"a": jnp.zeros((0, 3)), "b": jnp.zeros(0)},
  "some without": {"a": jnp.zeros((3, 0)), "b": jnp.ones(2)},
}


def assert_storable(state):
  """Checkpointers refuse arrays of size 0."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    assert leaf.size, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ROUND)
def test_no_array_of_a_state_is_empty(name):
  tx = ROUND[name](record="layers")
  for kind, params in BARE.items():
    state = jax.eval_shape(tx.init, params)
    assert_storable(state)
    new, later = jax.eval_shape(lambda g, s: update(tx, g, s, g), params, state)
    assert later == state, kind
    assert new == jax.eval_shape(lambda x: x, params), kind


@pytest.mark.parametrize("make", [measures.layer_norm, measures.unit_norm])
def test_a_stack_of_no_layers_is_one_without_elements(make):
  tx = optax_clip.clip_with(
    make(stacked={"a": 0}),
    optax_clip.thresholds.percentile(window=2),
    optax_clip.actions.rescale(),
    record="layers",
  )
  params = BARE["no elements"]
  state = tx.init(params)
  assert_storable(state)
  _, later = jax.eval_shape(tx.update, params, state)
  assert later == jax.eval_shape(lambda x: x, state)
  assert list(optax_clip.layer_metrics(state, params).layers) == ["a", "b"]


def test_a_clip_of_nothing_reports_nothing():
  tx = optax_clip.adagc(record="layers")
  state = tx.init({})
  for _ in range(2):
    _, state = tx.update({}, state)
  report = optax_clip.layer_metrics(state, {})
  assert (report.layers, report.steps, report.nonfinite) == ({}, 2, None)
  assert str(report).startswith("layer ")
  found = optax_clip.metrics(state)
  assert (found["adagc/steps"], found["adagc/steps_clipped"]) == (2, 0)
  with pytest.raises(ValueError, match="has a record of 0 leaves, params has 1"):
    optax_clip.layer_metrics(state, {"w": jnp.ones(2)})


@pytest.mark.foreign
def test_a_label_that_matches_nothing_can_be_stored(tmp_path):
  checkpoint = pytest.importorskip("orbax.checkpoint")
  adagc = optax_clip.adagc(record="layers")
  tx = optax.multi_transform({"a": adagc, "b": adagc}, {"w": "a"})
  params = {"w": jnp.ones(3)}
  state = tx.init(params)
  with checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", state)
  with checkpoint.StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(tmp_path / "state", state)
  jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_a_state_with_empty_arrays_can_still_be_read():
  """As states of a label without leaves had them, and moments of empty leaves."""
  params = {"w": jnp.ones(3), "none": jnp.zeros((0, 2))}
  parts = {"a": optax_clip.adagc(), "b": optax_clip.clip_element_spikes()}
  labels = {"w": "b", "none": "b"}
  tx = optax.multi_transform(parts, labels)
  state = tx.init(params)
  _, state = tx.update(params, state)
  old = {**state.inner_states}
  empty = old["a"].inner_state
  old["a"] = old["a"]._replace(
    inner_state=empty._replace(threshold=jax.tree.map(lambda x: x[:0], empty.threshold))
  )
  spikes = old["b"].inner_state
  rms = {**spikes.rms, "none": jnp.zeros((0, 2))}
  old["b"] = old["b"]._replace(inner_state=spikes._replace(rms=rms))
  found = optax_clip.convert_state(tx, params, state._replace(inner_states=old))
  jax.tree.map(np.testing.assert_array_equal, found, state)
  # Which `update` takes, too.
  _, later = parts["b"].update(params, spikes._replace(rms=rms))
  assert later.rms["none"] is None
