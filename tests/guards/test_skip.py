"""Guards: the contract of optax transformations, and what a step of theirs costs."""

import functools

from flax import nnx
import flax.linen as nn
from flax.training import train_state
from helpers.programs import planned
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import measures
from optax_clip import thresholds

pytestmark = pytest.mark.foreign  # Adam of optax mixes dtypes.

NAN = float("nan")


def inner():
  return optax.chain(optax_clip.clip_by_global_norm(1.0), optax.adamw(1e-2))


GUARDS = {
  "skip_nonfinite": optax_clip.skip_nonfinite,
  "skip_spikes": optax_clip.skip_spikes,
  "dynamic_loss_scale": lambda inner, **kw: optax_clip.dynamic_loss_scale(
    inner, init_scale=4.0, **kw
  ),
  "both": lambda inner, **kw: optax_clip.dynamic_loss_scale(
    optax_clip.skip_spikes(inner, signals=("norm", "loss"), **kw), init_scale=4.0, **kw
  ),
}
guards = pytest.mark.parametrize("guard", GUARDS)


@functools.cache
def compiled(guard):
  """A guard around `inner`: it, its jitted update, and its jitted whole step."""
  tx = GUARDS[guard](inner())
  whole = jax.jit(lambda g, s, p: optax_clip.guarded_step(tx, g, s, p, **LOSS))
  return tx, jax.jit(tx.update), whole


@functools.cache
def without_guard():
  return jax.jit(inner().update)


def params():
  return {"w": jnp.ones((8, 4)), "b": jnp.full(4, 0.5)}


def gradient(value=0.3):
  grads = jax.tree.map(lambda p: value * p, params())
  return {**grads, "w": grads["w"] * jnp.linspace(-1, 1, 32).reshape(8, 4)}


def broken():
  grads = gradient()
  return {**grads, "w": grads["w"].at[5, 1].set(NAN)}


LOSS = {"loss": jnp.float32(1)}


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


# What records show of the last step, taken or not.
SHOWN = {
  optax_clip.states.Record: ("shown",),
  optax_clip.states.SkipRecord: ("shown",),
}


def kept(before, after):
  """What is inside a guard is as it was, but for what is shown of the last step."""

  def remembered(node):
    return node._replace(**dict.fromkeys(SHOWN[type(node)], 0))

  def is_record(node):
    return type(node) in SHOWN

  states = [
    jax.tree.map(
      lambda node: remembered(node) if is_record(node) else node,
      state,
      is_leaf=is_record,
    )
    for state in (before, after)
  ]
  same(*states)


def close(a, b):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), a, b
  )


class TestContract:
  @guards
  def test_healthy_steps_are_those_of_the_transformation_inside(self, guard):
    tx, update, _ = compiled(guard)
    alone = without_guard()
    scale = 4 if guard in ("dynamic_loss_scale", "both") else 1
    state, plain = tx.init(params()), inner().init(params())
    p = params()
    for i in range(1, 4):
      scaled = jax.tree.map(lambda g: g * scale, gradient(i))
      updates, state = update(scaled, state, p, **LOSS)
      expected, plain = alone(gradient(i), plain, p)
      close(updates, expected)
      p = optax.apply_updates(p, updates)

  @guards
  def test_a_broken_step_changes_nothing(self, guard):
    tx, update, whole = compiled(guard)
    _, state = update(gradient(), tx.init(params()), params(), **LOSS)
    updates, after = update(broken(), state, params(), **LOSS)
    same(updates, jax.tree.map(jnp.zeros_like, params()))
    kept(after.inner, state.inner)
    p, after = whole(broken(), state, params())
    same(p, params())
    kept(after.inner, state.inner)

  @guards
  def test_states_keep_their_types_and_are_donated(self, guard):
    tx = GUARDS[guard](inner())

    @jax.jit
    def start():
      return params(), tx.init(params())

    step = jax.jit(
      lambda p, s, g: optax_clip.guarded_step(tx, g, s, p, **LOSS),
      donate_argnums=(0, 1),
    )
    p, state = start()
    before = jax.tree.map(jax.typeof, (p, state))
    for grads in (gradient(), broken(), gradient()):
      p, state = step(p, state, grads)
      assert jax.tree.map(jax.typeof, (p, state)) == before
    assert step._cache_size() == 1

  @guards
  def test_weakly_typed_updates_stay_weakly_typed(self, guard):
    tx = GUARDS[guard](optax.sgd(1.0))
    updates = {"w": jnp.full(3, 0.5), "b": jnp.ones(2)}
    new, _ = jax.jit(tx.update)(updates, tx.init(updates), **LOSS)
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, updates)

  @guards
  def test_scan_and_vmap(self, guard):
    tx = GUARDS[guard](inner())
    sequence = [gradient(), broken(), gradient(2.0)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *sequence)

    def body(carry, grads):
      p, state = optax_clip.guarded_step(tx, grads, carry[1], carry[0], **LOSS)
      return (p, state), p

    start = (params(), tx.init(params()))
    _, trajectory = jax.jit(lambda: jax.lax.scan(body, start, stacked))()
    # Each member of an ensemble skips on its own.
    many = jax.tree.map(lambda x: jnp.stack([x] * 3), (params(), tx.init(params())))
    members = jax.jit(
      jax.vmap(
        lambda carry, g: optax_clip.guarded_step(tx, g, carry[1], carry[0], **LOSS)
      )
    )(many, stacked)
    same(jax.tree.map(lambda x: x[1], members[0]), params())
    close(
      jax.tree.map(lambda x: x[0], members[0]), jax.tree.map(lambda x: x[0], trajectory)
    )
    record = optax_clip.metrics(members[1])
    name = "dynamic_loss_scale" if guard == "both" else guard
    np.testing.assert_array_equal(record[f"{name}/skipped"], [0, 1, 0])

  @pytest.mark.mesh
  @guards
  @pytest.mark.parametrize(
    "kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit]
  )
  def test_sharded_steps_are_those_of_one_device(self, guard, kind):
    tx, _, local = compiled(guard)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    specs = {"w": jax.P("d"), "b": jax.P()}

    def put(tree):
      return jax.tree.map(
        lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec)), tree, specs
      )

    expected = [
      local(grads, tx.init(params()), params()) for grads in (gradient(), broken())
    ]
    with jax.set_mesh(mesh):
      p = put(params())
      state = jax.jit(tx.init)(p)
      whole = jax.jit(lambda g, s, p: optax_clip.guarded_step(tx, g, s, p, **LOSS))
      wrapped = jax.jit(lambda g, s, p: tx.update(g, s, p, **LOSS))
      for grads, alone in zip((gradient(), broken()), expected, strict=True):
        found = whole(put(grads), state, p)
        updates = wrapped(put(grads), state, p)[0]
        close(found, alone)
        close(optax.apply_updates(p, updates), alone[0])
        assert found[0]["w"].sharding.is_equivalent_to(p["w"].sharding, 2)

  @pytest.mark.mesh
  @guards
  def test_one_broken_shard_skips_the_step_on_all_devices(self, guard):
    tx, _, local = compiled(guard)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    state = tx.init(params())

    def spec(tree):
      return jax.tree.map(lambda x: jax.P("d") if x.shape == (8, 4) else jax.P(), tree)

    carry = (spec(params()), spec(state))
    whole = jax.shard_map(
      lambda g, s, p: optax_clip.guarded_step(tx, g, s, p, **LOSS),
      mesh=mesh,
      in_specs=(spec(params()), carry[1], carry[0]),
      out_specs=carry,
    )
    wrapped = jax.shard_map(
      lambda g, s, p: tx.update(g, s, p, **LOSS)[0],
      mesh=mesh,
      in_specs=(spec(params()), carry[1], carry[0]),
      out_specs=carry[0],
    )
    for grads in (gradient(), broken()):
      alone = local(grads, state, params())
      close(jax.jit(whole)(grads, state, params()), alone)
      updates = jax.jit(wrapped)(grads, state, params())
      close(optax.apply_updates(params(), updates), alone[0])

  @pytest.mark.mesh
  def test_pmap_with_a_named_axis(self):
    tx = optax_clip.skip_nonfinite(
      optax.sgd(1.0), measure=measures.global_norm(axis_name="d")
    )
    grads = jnp.ones((2, 3)).at[1, 2].set(NAN)
    updates = jax.pmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="d")(grads)
    # Finite on the first device, but not on the second.
    same(updates, jnp.zeros((2, 3)))

  @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
  def test_updates_keep_their_dtypes(self, dtype):
    g = {"w": jnp.array([1.0, -2.0], dtype)}
    for make in GUARDS.values():
      tx = make(optax_clip.clip_by_global_norm(0.5))
      update = functools.partial(tx.update, **LOSS)
      for grads in (g, {"w": g["w"] * NAN}):
        updates, _ = jax.eval_shape(update, grads, tx.init(g), g)
        assert updates["w"].dtype == dtype

  def test_the_largest_finite_gradient_is_no_reason_to_skip(self):
    tx = optax_clip.skip_nonfinite(optax_clip.clip_by_global_norm(1.0))
    g = {"w": jnp.full(4, 3e38)}
    updates, state = tx.update(g, tx.init(g))
    np.testing.assert_allclose(updates["w"], 0.5, rtol=1e-6)
    assert optax_clip.metrics(state)["skip_nonfinite/skipped"] == 0

  def test_empty_trees_and_masked_leaves(self):
    for tree in ({}, {"w": None}, {"w": optax.MaskedNode(), "b": jnp.ones(2)}):
      for make in GUARDS.values():
        tx = make(optax.identity())
        state = tx.init(tree)
        updates, _ = jax.eval_shape(
          functools.partial(tx.update, **LOSS), tree, state, tree
        )
        assert jax.tree.structure(updates) == jax.tree.structure(tree)


class TestSkipNonfinite:
  def test_never_applies_a_nan_by_default(self):
    tx = optax_clip.skip_nonfinite(optax.sgd(1.0))
    state = tx.init(params())
    update = jax.jit(tx.update)
    for _ in range(50):
      updates, state = update(broken(), state)
      same(updates, jax.tree.map(jnp.zeros_like, params()))
    record = optax_clip.metrics(state)
    assert record["skip_nonfinite/consecutive"] == 50
    assert record["skip_nonfinite/steps_skipped"] == 50
    _, state = update(gradient(), state)
    record = optax_clip.metrics(state)
    assert record["skip_nonfinite/consecutive"] == 0
    assert record["skip_nonfinite/steps"] == 51

  @pytest.mark.parametrize("most", [0, 2])
  def test_gives_up_after_so_many_in_a_row_if_asked_to(self, most):
    tx = optax_clip.skip_nonfinite(optax.sgd(1.0), max_consecutive=most)
    state = tx.init(params())
    for _ in range(most):
      updates, state = tx.update(broken(), state)
      assert not np.any(updates["w"])
    updates, state = tx.update(broken(), state)
    assert np.isnan(updates["w"]).any()


class TestSkipSpikes:
  def limits(self, values, **keywords):
    """Which of a sequence of norms are skipped, and the last state."""
    keywords = {"threshold": thresholds.history(6, 8), **keywords}
    tx = optax_clip.skip_spikes(optax.sgd(1.0), **keywords)

    def body(state, value):
      _, state = tx.update({"w": value[None]}, state, loss=value)
      return state, optax_clip.metrics(state)["skip_spikes/skipped"]

    values = jnp.asarray(values, jnp.float32)
    state, skipped = jax.lax.scan(body, tx.init({"w": jnp.zeros(1)}), values)
    return np.flatnonzero(skipped).tolist(), state

  CALM = (1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1.0, 1.1)

  def test_a_rise_that_lasts_is_followed(self):
    steps, state = self.limits([*self.CALM, *[50.0] * 10, 5e3], max_consecutive=3)
    assert steps == [8, 9, 10, 18]
    assert optax_clip.metrics(state)["skip_spikes/reason"] == 3

  def test_a_rise_that_lasts_is_skipped_for_ever_if_asked_to(self):
    steps, _ = self.limits([*self.CALM, *[50.0] * 40], max_consecutive=None)
    assert steps == list(range(8, 48))

  def test_nan_neither_counts_as_a_spike_nor_interrupts_them(self):
    steps, _ = self.limits(
      [*self.CALM, 50, NAN, 50, NAN, NAN, 50, 50, 50], max_consecutive=3
    )
    # Three spikes are skipped, the fourth is the new level.
    assert steps == [8, 9, 10, 11, 12, 13]

  def test_a_spike_is_not_remembered(self):
    _, spiked = self.limits([*self.CALM, 1e30, 1.0])
    _, calm = self.limits([*self.CALM, 1.0])
    same(spiked.memory.threshold, calm.memory.threshold)

  def test_cooldown(self):
    values = [*self.CALM, 50, 50, 50, 1, 50]
    assert self.limits(values)[0] == [8, 9, 10, 12]
    # What is not skipped is learned: the window then holds the spikes.
    assert self.limits(values, cooldown=2)[0] == [8]
    tight = thresholds.constant(2.0)
    assert self.limits(values, threshold=tight, cooldown=1)[0] == [8, 10, 12]

  def test_warmup(self):
    values = [5.0, 1.0, 5.0, 1.0, 5.0]
    tight = thresholds.constant(2.0)
    assert self.limits(values, threshold=tight)[0] == [0, 2, 4]
    assert self.limits(values, threshold=tight, warmup=2)[0] == [2, 4]
    # Steps that are skipped do not count.
    values = [5.0, NAN, 5.0, 5.0]
    assert self.limits(values, threshold=tight, warmup=2)[0] == [1, 3]

  def test_factor(self):
    values = [*self.CALM, 8.0, 40.0]
    median = thresholds.percentile(50, 8)
    assert self.limits(values, threshold=median, factor=10)[0] == [9]
    assert self.limits(values, threshold=median, factor=5)[0] == [8, 9]

  def test_the_loss_alone(self):
    steps, state = self.limits([*self.CALM, 50, 1], signals=("loss",))
    assert steps == [8]
    assert optax_clip.metrics(state)["skip_spikes/reason"] == 4
    assert optax_clip.metrics(state)["skip_spikes/norm"] == 1

  def test_hyperparameters_may_be_traced(self):
    def skipped(factor, warmup, cooldown, most):
      tx = optax_clip.skip_spikes(
        optax.sgd(1.0),
        thresholds.constant(1.0),
        factor=factor,
        warmup=warmup,
        cooldown=cooldown,
        max_consecutive=most,
      )
      _, state = tx.update(jnp.ones(1) * 3, tx.init(jnp.ones(1)))
      return optax_clip.metrics(state)["skip_spikes/skipped"]

    run = jax.jit(skipped)
    assert run(2.0, 0, 0, 5) == 1
    assert run(4.0, 0, 0, 5) == 0
    assert run(2.0, 1, 0, 5) == 0
    assert run(2.0, 0, 0, 0) == 0


class TestLossScale:
  def test_unscales_in_front_of_everything_inside(self):
    tx = optax_clip.dynamic_loss_scale(
      optax_clip.clip_by_global_norm(1.0), init_scale=1024.0
    )
    g = {"w": jnp.array([3.0, 4.0]) * 1024}
    updates, state = tx.update(g, tx.init(g))
    np.testing.assert_allclose(updates["w"], [0.6, 0.8], rtol=1e-6)
    record = optax_clip.metrics(state)
    assert record["dynamic_loss_scale/norm"] == 5
    # The clip took the norm over, and divided it.
    assert record["clip_by_global_norm/norm"] == 5

  @pytest.mark.parametrize("size", [1e-30, 1e30])
  def test_norms_out_of_the_plain_range_are_divided_too(self, size):
    tx = optax_clip.dynamic_loss_scale(
      optax_clip.clip_by_global_norm(1.0), init_scale=1024.0
    )
    g = {"w": jnp.array([3.0, 4.0]) * size}
    _, state = tx.update(g, tx.init(g))
    norm = optax_clip.metrics(state)["clip_by_global_norm/norm"]
    np.testing.assert_allclose(norm, 5 * size / 1024, rtol=1e-6)

  def test_grows_and_falls_within_its_bounds(self):
    tx = optax_clip.dynamic_loss_scale(
      optax.sgd(1.0), init_scale=8.0, growth_interval=2, min_scale=4.0, max_scale=16.0
    )
    state = tx.init(params())
    scales = []
    update = jax.jit(tx.update)
    for grads in (gradient(),) * 6 + (broken(),) * 4 + (gradient(),) * 2:
      _, state = update(grads, state)
      scales.append(float(optax_clip.loss_scale(state)))
    assert scales == [8, 16, 16, 16, 16, 16, 8, 4, 4, 4, 4, 8]

  def test_float16_leaves_are_unscaled_in_float32(self):
    tx = optax_clip.dynamic_loss_scale(optax.identity(), init_scale=2.0**24)
    g = jnp.array([65504.0, 1.0], jnp.float16)
    updates, _ = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(updates, np.float16([65504 / 2**24, 2.0**-24]))

  def test_a_state_without_a_scale_is_refused(self):
    with pytest.raises(ValueError, match="holds 0 loss scales"):
      optax_clip.loss_scale(optax.sgd(0.1).init(params()))

  def test_flax_nnx_loop(self):
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    tx = optax_clip.dynamic_loss_scale(inner(), growth_interval=3)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jnp.ones((8, 4), jnp.float16)

    @nnx.jit
    def step(model, optimizer):
      def loss(model):
        kernel = model.kernel[...].astype(jnp.float16)
        return jnp.mean((x @ kernel) ** 2).astype(jnp.float32)

      scale = optax_clip.loss_scale(optimizer)
      value, grads = nnx.value_and_grad(lambda m: loss(m) * scale)(model)
      optimizer.update(model, grads)
      return value / scale, optax_clip.metrics(optimizer)

    losses, scales = [], []
    for _ in range(12):
      value, metrics = step(model, optimizer)
      losses.append(float(value))
      scales.append(float(metrics["dynamic_loss_scale/scale"]))
    assert len(set(scales)) > 1
    assert losses[-1] < losses[0]
    assert np.isfinite(losses[-1])

  def test_flax_linen_loop(self):
    module = nn.Dense(1, dtype=jnp.float16)
    x = jnp.ones((8, 4))
    state = train_state.TrainState.create(
      apply_fn=module.apply,
      params=module.init(jax.random.key(0), x),
      tx=optax_clip.dynamic_loss_scale(inner(), init_scale=2.0**20),
    )

    @jax.jit
    def step(state):
      scale = optax_clip.loss_scale(state)

      def loss(params):
        out = state.apply_fn(params, x)
        return jnp.mean((out - 1) ** 2).astype(jnp.float32) * scale

      value, grads = jax.value_and_grad(loss)(state.params)
      return state.apply_gradients(grads=grads), value / scale

    first = float(step(state)[1])
    for _ in range(12):
      state, value = step(state)
    record = optax_clip.metrics(state)
    assert 0 < record["dynamic_loss_scale/steps_skipped"] < 12
    assert float(value) < first


class TestAccumulation:
  """`optax.MultiSteps`: what is clipped is a choice of the order."""

  GRADS = ([3.0, 4.0], [0.0, 1.0], [30.0, 40.0])

  def run(self, tx, grads=GRADS):
    params = jnp.zeros(2)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for g in grads:
      updates, state = update(jnp.asarray(g), state, params)
      params = optax.apply_updates(params, updates)
    return np.asarray(params), state

  def test_clipped_after_accumulation(self):
    tx = optax.MultiSteps(
      optax.chain(optax_clip.clip_by_global_norm(1.0), optax.sgd(1.0)), 3
    )
    mean = np.mean(np.float64(self.GRADS), axis=0)
    expected = -mean / np.linalg.norm(mean)
    np.testing.assert_allclose(self.run(tx)[0], expected, rtol=1e-6)

  def test_clipped_before_accumulation(self):
    tx = optax.chain(
      optax_clip.clip_by_global_norm(1.0),
      optax.MultiSteps(optax.sgd(1.0), 3).gradient_transformation(),
    )
    clipped = [g / max(1, np.linalg.norm(g)) for g in np.float64(self.GRADS)]
    np.testing.assert_allclose(self.run(tx)[0], -np.mean(clipped, axis=0), rtol=1e-6)

  def test_a_guard_around_it_leaves_out_one_microbatch(self):
    tx = optax_clip.skip_nonfinite(
      optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    )
    found, _ = self.run(tx, ([1.0, 2.0], [NAN, 1.0], [3.0, 4.0]))
    np.testing.assert_array_equal(found, [-2, -3])

  def test_optax_keeps_a_nan_that_a_guard_inside_it_cannot_see(self):
    # It forgets what it has accumulated by multiplying with 0. Hence the guard goes
    # around it, and the docs say so.
    tx = optax.MultiSteps(optax_clip.skip_nonfinite(optax.sgd(1.0)), 2)
    found, state = self.run(tx, ([1.0, 2.0], [NAN, 1.0], [3.0, 4.0], [1.0, 2.0]))
    np.testing.assert_array_equal(found, [0, 0])
    assert np.isnan(state.acc_grads).any()


@pytest.fixture(scope="module")
def shapes():
  """A million parameters, without values."""
  layer = {
    "w": jax.ShapeDtypeStruct((512, 768), jnp.float32),
    "b": jax.ShapeDtypeStruct((768,), jnp.float32),
  }
  return [*[layer] * 3, jax.ShapeDtypeStruct((512,), jnp.float32)]


@pytest.mark.optimized
class TestCost:
  """From the compiled AdamW step, with donation: no timing."""

  def compiled(self, tx, shapes, whole=False):
    def step(params, state, grads):
      if whole:
        return optax_clip.guarded_step(tx, grads, state, params, **LOSS)
      wide = optax.with_extra_args_support(tx)
      updates, state = wide.update(grads, state, params, **LOSS)
      return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, shapes)
    return planned(jax.jit(step, donate_argnums=(0, 1)).lower(shapes, state, shapes))

  def figures(self, compiled):
    memory = compiled.memory_analysis().temp_size_in_bytes
    return memory, compiled.cost_analysis()["bytes accessed"]

  @guards
  def test_a_whole_step_reads_and_holds_what_clipping_alone_does(self, guard, shapes):
    size = sum(x.size for x in jax.tree.leaves(shapes)) * 4
    memory, read = self.figures(self.compiled(inner(), shapes))
    ours, ours_read = self.figures(
      self.compiled(GUARDS[guard](inner()), shapes, whole=True)
    )
    assert ours <= memory + size / 100
    assert ours_read <= 1.01 * read

  def test_a_clip_of_each_layer_is_read_once_with_its_own_measure(self, shapes):
    chain = optax.chain(optax_clip.adagc(), optax.adamw(1e-2))
    _, read = self.figures(self.compiled(chain, shapes))
    guarded = optax_clip.skip_nonfinite(chain, measure=measures.layer_norm())
    _, ours = self.figures(self.compiled(guarded, shapes, whole=True))
    assert ours <= 1.01 * read

  def test_a_wrapped_step_is_no_worse_than_that_of_optax(self, shapes):
    memory, read = self.figures(
      self.compiled(optax.apply_if_finite(inner(), 5), shapes)
    )
    ours, ours_read = self.figures(
      self.compiled(optax_clip.skip_nonfinite(inner()), shapes)
    )
    # Scalars aside: it keeps more of them.
    assert ours <= memory + 1024
    assert ours_read < read

  def test_what_was_changed_in_between_is_measured_anew(self):
    tx = optax_clip.skip_nonfinite(
      optax.chain(optax.scale(2.0), optax_clip.clip_by_global_norm(1.0))
    )
    g = jnp.array([3.0, 4.0])
    updates, state = tx.update(g, tx.init(g))
    np.testing.assert_allclose(updates, [0.6, 0.8], rtol=1e-6)
    assert optax_clip.metrics(state)["clip_by_global_norm/norm"] == 10


class TestBadInput:
  @pytest.mark.parametrize(
    ("make", "error", "words"),
    [
      (lambda: optax_clip.skip_nonfinite(optax.adamw), TypeError, "inner must be"),
      (
        lambda: optax_clip.skip_nonfinite(optax.sgd(1.0), -1),
        ValueError,
        "max_consecutive must be a whole number of steps from 0 .*, got -1",
      ),
      (
        lambda: optax_clip.skip_spikes(optax.sgd(1.0), signals="norm"),
        ValueError,
        "signals must be",
      ),
      (
        lambda: optax_clip.skip_spikes(optax.sgd(1.0), signals=("norms",)),
        ValueError,
        "signals must be",
      ),
      (
        lambda: optax_clip.skip_spikes(optax.sgd(1.0), 10.0),
        TypeError,
        "threshold must be",
      ),
      (
        lambda: optax_clip.skip_spikes(optax.sgd(1.0), factor=0),
        ValueError,
        "factor must be positive, got 0",
      ),
      (
        lambda: optax_clip.skip_spikes(optax.sgd(1.0), warmup=-1),
        ValueError,
        "warmup must be a whole number of steps",
      ),
      *(
        (
          functools.partial(optax_clip.skip_spikes, optax.sgd(1.0), **{name: value}),
          ValueError,
          f"{name} must be a whole number of steps from 0 .*, got {value!r}",
        )
        for name in ("warmup", "cooldown", "max_consecutive")
        for value in (0.5, float("inf"), 2**31)
      ),
      (
        lambda: optax_clip.skip_nonfinite(optax.sgd(1.0), 0.5),
        ValueError,
        "max_consecutive must be a whole number of steps",
      ),
      (
        lambda: optax_clip.dynamic_loss_scale(optax.sgd(1.0), growth_interval=0.5),
        ValueError,
        "growth_interval must be a whole number of steps from 1",
      ),
      (
        lambda: thresholds.warmup(thresholds.percentile(), 0.5),
        ValueError,
        "steps must be a whole number of steps",
      ),
      (
        lambda: optax_clip.skip_nonfinite(optax.sgd(1.0), measure="global_norm"),
        TypeError,
        "measure must be",
      ),
      (
        lambda: optax_clip.dynamic_loss_scale(optax.sgd(1.0), 0.0),
        ValueError,
        "init_scale must be positive, got 0.0",
      ),
      (
        lambda: optax_clip.dynamic_loss_scale(optax.sgd(1.0), growth_factor=0.5),
        ValueError,
        "growth_factor must be between 1 and inf, got 0.5",
      ),
      (
        lambda: optax_clip.dynamic_loss_scale(optax.sgd(1.0), backoff_factor=2.0),
        ValueError,
        "backoff_factor must be between 0 and 1, got 2.0",
      ),
      (
        lambda: optax_clip.dynamic_loss_scale(optax.sgd(1.0), 2.0**30),
        ValueError,
        "init_scale must be between",
      ),
    ],
  )
  def test_at_construction(self, make, error, words):
    with pytest.raises(error, match=words):
      make()

  def test_guarded_step_wants_a_guard(self):
    tx = inner()
    with pytest.raises(TypeError, match="Put the guard outermost"):
      optax_clip.guarded_step(tx, gradient(), tx.init(params()), params())

  def test_guarded_step_wants_parameters(self):
    tx = optax_clip.skip_nonfinite(inner())
    with pytest.raises(ValueError, match="params must be"):
      optax_clip.guarded_step(tx, gradient(), tx.init(params()), None)

  def test_a_missing_loss_and_one_of_a_batch(self):
    tx = optax_clip.skip_spikes(optax.sgd(1.0), signals=("loss",))
    state = tx.init(params())
    with pytest.raises(TypeError, match="loss=loss"):
      tx.update(gradient(), state)
    with pytest.raises(ValueError, match="loss must be a scalar"):
      tx.update(gradient(), state, loss=jnp.ones(3))


def test_a_guard_counts_what_it_skipped():
  tx = optax_clip.skip_nonfinite(optax.sgd(0.1))
  state, update = tx.init({"w": jnp.zeros(1)}), jax.jit(tx.update)
  seen = []
  for g in (1.0, jnp.nan, 1.0, jnp.inf, jnp.nan):
    _, state = update({"w": jnp.array([g])}, state)
    found = optax_clip.metrics(state)
    names = ("skipped", "consecutive", "steps", "steps_skipped")
    seen.append([int(found[f"skip_nonfinite/{name}"]) for name in names])
  assert seen == [[0, 0, 1, 0], [1, 1, 2, 1], [0, 0, 3, 1], [1, 1, 4, 2], [1, 2, 5, 3]]
