"""What is recorded of each layer, and how it is named: against float64."""

from flax import nnx
from helpers.programs import adamw
from helpers.programs import bytes_accessed
from helpers.programs import compiled_step
from helpers.programs import reductions_by_size
from helpers.programs import temporary
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import layer_metrics
from optax_clip import measures

SHAPES = {"a": (3, 4), "b": (5,), "stack": (4, 2, 3)}
PATHS = ["a", "b", *(f"stack[{i}]" for i in range(4))]


def tree(seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  sizes = {"a": 1, "b": 10, "stack": 0.1}
  return {
    name: jnp.asarray(scale * sizes[name] * rng.normal(size=shape), jnp.float32)
    for name, shape in SHAPES.items()
  }


def parts(updates, stacked=False):
  """The layers of a tree in float64, in the order of its leaves."""
  found = {}
  for name, x in updates.items():
    x = np.asarray(x, np.float64)
    if stacked and name == "stack":
      found |= {f"{name}[{i}]": layer for i, layer in enumerate(x)}
    else:
      found[name] = x
  return found


def root(x):
  return np.sqrt(np.sum(x * x))


def rms(x):
  return np.sqrt(np.mean(x * x))


def of_unit(x, w):
  """The largest ratio of a unit's update to its weights, with eps 1e-3."""
  axes = 0 if x.ndim == 2 else None
  norms = [np.sqrt(np.sum(y * y, axis=axes)) for y in (x, w)]
  return np.max(norms[0] / np.maximum(norms[1], 1e-3))


STACK = {"stacked": {"stack": 0}}
# Each: the transformation, whether its layers are stacked, its norm of a layer, its
# limits, and the norm for one element.
METHODS = {
  "global": (optax_clip.clip_by_global_norm, {}, lambda x, w: root(x), rms),
  "layer": (optax_clip.clip_by_layer_norm, STACK, lambda x, w: root(x), rms),
  "rms": (optax_clip.clip_by_block_rms, STACK, lambda x, w: rms(x), rms),
  "agc": (optax_clip.adaptive_grad_clip, STACK, of_unit, None),
  "value": (optax_clip.clip, {}, lambda x, w: np.max(np.abs(x)), None),
}


@pytest.mark.parametrize(
  ("name", "jit"), [*((name, True) for name in METHODS), ("global", False)]
)
def test_each_layer_against_float64(name, jit):
  make, keywords, norm, size = METHODS[name]
  tx = make(0.5, record="layers", **keywords)
  update = jax.jit(tx.update) if jit else tx.update
  params = tree(1)
  state = tx.init(params)
  seen = []
  for scale in (1e-4, 1.0, 1e-4, 2.0):
    updates = tree(2, scale)
    new, state = update(updates, state, params)
    weights = parts(params, bool(keywords))
    old = parts(updates, bool(keywords))
    norms = {path: norm(x, weights[path]) for path, x in old.items()}
    every = norms
    if name == "global":
      every = dict.fromkeys(norms, root(np.concatenate([*map(np.ravel, old.values())])))
    if name == "value":
      every = dict.fromkeys(norms, max(norms.values()))
    seen.append({path: n > 0.5 for path, n in every.items()})
    report = layer_metrics(state, params)
    assert list(report.layers) == list(norms)
    for path, layer in report.layers.items():
      np.testing.assert_allclose(layer.norm, norms[path], rtol=1e-6)
      expected = size(old[path]) if size else norms[path]
      np.testing.assert_allclose(layer.size, expected, rtol=1e-6)
      assert layer.limit == 0.5
      assert layer.clipped == np.mean([step[path] for step in seen])
      if name not in ("agc", "value"):
        ratio = root(parts(new, bool(keywords))[path]) / root(old[path])
        np.testing.assert_allclose(layer.coefficient, ratio, rtol=2e-6)
  assert report.steps == 4
  assert report.nonfinite is None
  assert report.scalars()["a/norm"] == report.layers["a"].norm


def test_groups_have_the_limits_of_their_group():
  labels = {"a": "x", "b": "y", "stack": "x"}
  tx = optax_clip.clip_by_group_norm(labels, {"x": 1.0, "y": 2.0}, record="layers")
  updates = tree()
  _, state = jax.jit(tx.update)(updates, tx.init(updates))
  layers = layer_metrics(state, updates).layers
  assert [layer.limit for layer in layers.values()] == [1.0, 2.0, 1.0]
  x = root(np.concatenate([np.ravel(parts(updates)[k]) for k in ("a", "stack")]))
  np.testing.assert_allclose(layers["a"].coefficient, 1 / x, rtol=1e-6)
  np.testing.assert_allclose(layers["stack"].norm, root(parts(updates)["stack"]))


@pytest.mark.parametrize("ord", [1, 2, 3, float("inf")])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_norm_merged_of_layers_is_that_of_float64(ord, scale):
  """Recording layers changes how the global norm is added up, not what it is."""
  tx = optax_clip.clip_by_global_norm(scale, ord=ord, record="layers")
  updates = tree(3, scale)
  new, state = jax.jit(tx.update)(updates, tx.init(updates))
  flat = np.concatenate([np.ravel(x) for x in parts(updates).values()])
  exact = np.linalg.norm(flat / scale, ord) * scale
  norm = optax_clip.metrics(state)["clip_by_global_norm/norm"]
  np.testing.assert_allclose(norm, exact, rtol=1e-6)
  clipped = np.concatenate([np.ravel(x) for x in parts(new).values()])
  np.testing.assert_allclose(clipped / scale, flat / exact, rtol=2e-6)


def test_derivatives_are_those_without_the_record():
  updates = tree(4)
  for ord in (2, float("inf")):

    def loss(updates, record, ord=ord):
      tx = optax_clip.clip_by_global_norm(0.1, ord=ord, record=record)
      new, _ = tx.update(updates, tx.init(updates))
      return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(new))

    with_layers, without = (
      jax.jit(jax.grad(loss), static_argnums=1)(updates, r) for r in ("layers", True)
    )
    for a, b in zip(*map(jax.tree.leaves, (with_layers, without)), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def guarded(record="layers", **keywords):
  chain = optax.chain(optax_clip.clip_by_global_norm(1.0), optax.sgd(0.1))
  return optax_clip.skip_nonfinite(chain, record=record, **keywords)


GUARDS = {
  "skip_nonfinite": guarded,
  "skip_spikes": lambda: optax_clip.skip_spikes(optax.sgd(0.1), record="layers"),
  "dynamic_loss_scale": lambda: optax_clip.dynamic_loss_scale(
    optax.sgd(0.1), 1.0, record="layers"
  ),
  "stacked": lambda: guarded(measure=measures.layer_norm(**STACK)),
  "observe": lambda: optax_clip.observe(guarded(True), 4, record="layers"),
}


@pytest.mark.parametrize("name", GUARDS)
def test_a_bad_step_names_the_first_layer_that_is_not_finite(name):
  tx = GUARDS[name]()
  params = tree(1)
  state = tx.init(params)
  step = jax.jit(
    lambda g, s, p: (
      tx.update(g, s, p)[1]
      if name == "observe"
      else optax_clip.guarded_step(tx, g, s, p)[1]
    )
  )
  bad = tree(2)
  bad["stack"] = bad["stack"].at[2, 0, 0].set(jnp.nan)
  first = "stack[2]" if name == "stacked" else "stack"
  state = step(tree(2), state, params)
  assert layer_metrics(state, params).nonfinite is None
  state = step(bad, state, params)
  report = layer_metrics(state, params)
  assert (report.nonfinite, report.nonfinite_step) == (first, 2)
  assert report.exploding == [first]
  assert "NOT FINITE" in str(report)
  # It is remembered until another one comes.
  state = step(tree(2), state, params)
  state = step(tree(3), state, params)
  report = layer_metrics(state, params)
  assert (report.nonfinite, report.nonfinite_step) == (first, 2)
  np.testing.assert_allclose(
    report.layers["b"].norm, root(parts(tree(3))["b"]), rtol=1e-6
  )
  assert step._cache_size() == 1
  bad["b"] = bad["b"].at[0].set(jnp.inf)
  report = layer_metrics(step(bad, state, params), params)
  assert (report.nonfinite, report.nonfinite_step) == ("b", 5)


def test_layers_that_explode_or_vanish_against_the_rest():
  tx = optax_clip.clip_by_layer_norm(1.0, record="layers", **STACK)
  updates = jax.tree.map(jnp.ones_like, tree())
  updates["stack"] = updates["stack"].at[1].mul(2e3).at[3].mul(4e-4)
  updates["b"] = 0 * updates["b"]
  _, state = jax.jit(tx.update)(updates, tx.init(updates))
  report = layer_metrics(state, updates)
  assert report.exploding == ["stack[1]"]
  assert report.vanishing == ["b", "stack[3]"]
  report = layer_metrics(state, updates, factor=1e4)
  assert (report.exploding, report.vanishing) == ([], ["b"])


def test_the_table_fits_80_columns():
  params = {"a" * 60: {"kernel": jnp.ones(2)}, "b": jnp.ones(3), "empty": jnp.ones(0)}
  tx = optax_clip.clip_by_global_norm(1.0, record="layers")
  state = tx.init(params)
  assert not layer_metrics(state, params).vanishing
  _, state = tx.update({**params, "b": jnp.full(3, jnp.nan)}, state)
  lines = str(layer_metrics(state, params)).splitlines()
  assert max(map(len, lines)) <= 80
  assert lines[1].startswith("b ")
  assert lines[1].endswith("NOT FINITE")
  assert lines[-1] == "step 1 was not finite: first b"


WRAPPERS = {
  "chain": lambda tx: optax.chain(optax.identity(), tx, optax.sgd(0.1)),
  "inject": lambda tx: optax.inject_hyperparams(
    lambda c: optax_clip.clip_by_layer_norm(c, record="layers", name="own")
  )(1.0),
  "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
  "masked": lambda tx: optax.masked(tx, {"a": True, "b": False, "stack": True}),
}


@pytest.mark.foreign  # optax mixes dtypes.
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_through_wrappers(wrapper):
  tx = WRAPPERS[wrapper](
    optax_clip.clip_by_layer_norm(1.0, record="layers", name="own")
  )
  params = tree(1)
  state = tx.init(params)
  _, state = jax.jit(tx.update)(tree(2), state, params)
  if wrapper == "masked":
    with pytest.raises(ValueError, match=r"of 2 leaves, params has 3"):
      layer_metrics(state, params)
    params = {**params, "b": optax.MaskedNode()}
  layers = layer_metrics(state, params, name="own").layers
  np.testing.assert_allclose(
    layers["stack"].norm, root(parts(tree(2))["stack"]), rtol=1e-6
  )


def test_flax_nnx():
  model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  clip = optax_clip.clip_by_global_norm(1.0, record="layers")
  optimizer = nnx.Optimizer(model, optax.chain(clip, optax.sgd(0.1)), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2)))))(model)
    optimizer.update(model, grads)

  step(model, optimizer)
  layers = layer_metrics(optimizer, nnx.state(model, nnx.Param)).layers
  assert {path: layer.norm for path, layer in layers.items()} == {
    "bias": pytest.approx(3**0.5),
    "kernel": pytest.approx(6**0.5),
  }


def test_donation_scan_and_vmap():
  tx = optax_clip.clip_by_global_norm(1.0, record="layers")
  grads = [tree(i) for i in range(3)]
  state = tx.init(grads[0])
  step = jax.jit(lambda g, s: tx.update(g, s)[1], donate_argnums=1)
  for g in grads:
    state = step(g, state)
  stack = jax.tree.map(lambda *x: jnp.stack(x), *grads)
  scanned, _ = jax.lax.scan(lambda s, g: (step(g, s), None), tx.init(grads[0]), stack)
  ours, theirs = (layer_metrics(s, grads[0]) for s in (state, scanned))
  assert list(ours.layers) == list(theirs.layers)
  for path, layer in ours.layers.items():
    np.testing.assert_allclose(layer, theirs.layers[path], rtol=1e-6)
  members = jax.jit(jax.vmap(lambda g: tx.update(g, tx.init(g))[1]))(stack)
  with pytest.raises(ValueError, match=r"ensemble of shape \[3\]"):
    layer_metrics(members, grads[0])
  one = layer_metrics(jax.tree.map(lambda x: x[2], members), grads[0])
  np.testing.assert_allclose(one.layers["b"], (*ours.layers["b"][:4], 1.0))


# --- What it costs ----------------------------------------------------------------

LARGE = [jax.ShapeDtypeStruct((512, 512 + 16 * i), jnp.float32) for i in range(4)]
SIZE = sum(4 * x.size for x in LARGE)


def costly(record):
  return {
    "global": optax_clip.clip_by_global_norm(1.0, record=record),
    "layer": optax_clip.clip_by_layer_norm(1.0, record=record),
    "autoclip": optax_clip.autoclip(record=record),
  }


@pytest.mark.optimized
@pytest.mark.foreign  # AdamW of optax mixes dtypes.
@pytest.mark.usefixtures("no_rescue")
@pytest.mark.parametrize("name", costly(True))
def test_recording_layers_reads_no_gradient_again(name):
  new, old = (compiled_step(adamw(costly(r)[name]), LARGE) for r in ("layers", True))
  assert abs(bytes_accessed(new) - bytes_accessed(old)) <= 0.005 * SIZE
  assert temporary(new) <= temporary(old) + 2**16
  large = [n for n in reductions_by_size(new) if n >= LARGE[0].size]
  assert sorted(large) == [x.size for x in LARGE]


@pytest.mark.optimized
@pytest.mark.foreign
@pytest.mark.usefixtures("no_rescue")
def test_norms_of_layers_serve_the_guard_and_the_clip_inside():
  clip = optax_clip.clip_by_global_norm(1.0)
  tx = optax_clip.skip_nonfinite(adamw(clip), record="layers")
  compiled = compiled_step(tx, LARGE)
  large = [n for n in reductions_by_size(compiled) if n >= LARGE[0].size]
  assert sorted(large) == [x.size for x in LARGE]


# --- Errors -----------------------------------------------------------------------


def test_what_cannot_be_recorded():
  bare = measures.global_norm()._replace(parts=None)
  clip = optax_clip.clip_with(
    bare,
    optax_clip.thresholds.constant(1.0),
    optax_clip.actions.rescale(),
    record="layers",
  )
  with pytest.raises(ValueError, match="norms of several layers without Parts"):
    clip.init(tree())
  with pytest.raises(ValueError, match="record must be one of True, False, 'layers'"):
    optax_clip.clip_by_global_norm(1.0, record="leaves")
  with pytest.raises(ValueError, match="record must be one of True, 'layers'"):
    optax_clip.skip_nonfinite(optax.sgd(0.1), record=False)


def test_what_cannot_be_read():
  params = tree()
  clip = optax_clip.clip_by_global_norm(1.0, record="layers", name="one")
  state = clip.init(params)
  with pytest.raises(ValueError, match="holds no record of layers"):
    layer_metrics(optax_clip.autoclip().init(params), params)
  with pytest.raises(ValueError, match=r"0 records of layers for name='two'.*'one'"):
    layer_metrics(state, params, name="two")
  with pytest.raises(ValueError, match="2 records of layers"):
    layer_metrics((state, state), params)
  with pytest.raises(ValueError, match="factor must be above 1, got 1"):
    layer_metrics(state, params, factor=1)
  with pytest.raises(TypeError, match="called on a traced state"):
    jax.jit(lambda s: layer_metrics(s, params).steps)(state)


def test_a_state_made_without_layers_goes_on_without():
  """As a checkpoint from before they were asked for."""
  params = tree()
  state = optax_clip.clip_by_global_norm(1.0).init(params)
  tx = optax_clip.clip_by_global_norm(1.0, record="layers")
  _, state = tx.update(params, state)
  assert optax_clip.metrics(state)["clip_by_global_norm/steps"] == 1
  with_layers = tx.init(params)
  _, later = optax_clip.clip_by_global_norm(1.0).update(params, with_layers)
  assert jax.tree.structure(later) == jax.tree.structure(with_layers)
