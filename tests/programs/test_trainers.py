"""What training frameworks do with an optimizer and its state works with ours.

Each part is named after a framework and imitates what its source does: how it makes a
state and finds its shardings, calls an update, walks through the state, logs it and
brings it to disk. `docs/trainers.md` says where that is in their sources, and when they
were read, or run. Flax, Equinox and Haiku are there and are used.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
from typing import Any
from typing import ClassVar
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("equinox")
pytest.importorskip("flax")
pytest.importorskip("haiku")
pytest.importorskip("orbax.checkpoint")
import equinox as eqx
from flax import nnx
from flax import serialization
from flax import traverse_util
import flax.linen as nn
from flax.training.train_state import TrainState
import haiku as hk
import helpers.registry as registry
import orbax.checkpoint as ocp

import optax_clip
from optax_clip import states

# Flax, Equinox and Haiku promote implicitly.
pytestmark = [pytest.mark.foreign, pytest.mark.programs]

P = jax.sharding.PartitionSpec
PARAMS = {
  "blocks": {"kernel": jnp.full((8, 4), 0.5), "bias": jnp.zeros(4)},
  "head": jnp.ones((4, 8)),
}
SPECS = {"blocks": {"kernel": P("x"), "bias": P()}, "head": P(None, "x")}
GRADS = jax.tree.map(jnp.ones_like, PARAMS)
LOSS = jnp.float32(1.0)
SCHEDULE = optax.linear_schedule(0.1, 0.0, 100)


def chain(clip=None, optimizer=None):
  clip = optax_clip.clip_by_global_norm(1.0) if clip is None else clip
  return optax.chain(clip, optax.adamw(SCHEDULE) if optimizer is None else optimizer)


TXS = {
  **{
    row.name: functools.partial(lambda row: chain(row.make()), row)
    for row in registry.ROWS
  },
  "layers": lambda: chain(optax_clip.clip_by_global_norm(1.0, record="layers")),
  "groups": lambda: chain(
    optax_clip.clip_by_group_norm({"blocks": "a", "head": "b"}, {"a": 1.0, "b": 2.0})
  ),
  "stacks": lambda: chain(optax_clip.clip_by_layer_norm(1.0, stacked={"kernel": 0})),
  "skip_nonfinite": lambda: optax_clip.skip_nonfinite(chain(), record="layers"),
  "skip_spikes": lambda: optax_clip.skip_spikes(chain(), signals=("norm", "loss")),
  "dynamic_loss_scale": lambda: optax_clip.dynamic_loss_scale(chain()),
  "observe": lambda: optax_clip.observe(chain(), window=8),
  "all": lambda: optax_clip.observe(
    optax_clip.skip_spikes(optax_clip.skip_nonfinite(chain(optax_clip.autoclip())))
  ),
}
# One for each kind of state. `pytest -m "programs or slow"` tries all others, too.
KINDS = {
  *("clip", "clip_by_global_norm", "adaptive_grad_clip", "zclip", "adagc"),
  *("clip_element_spikes", "stable_spam", "layers", "groups", "skip_spikes", "all"),
}


def slow_unless_kinds(names, parameters):
  return [
    pytest.param(x, marks=[] if name in KINDS else pytest.mark.slow)
    for name, x in zip(names, parameters, strict=True)
  ]


def named(names):
  """A test for each of some transformations, by name."""
  return pytest.mark.parametrize("name", slow_unless_kinds(names, names))


each_tx = pytest.mark.parametrize(
  "tx", slow_unless_kinds(TXS, [make() for make in TXS.values()]), ids=list(TXS)
)


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])


# --- What they share: specs of the state from those of the parameters ----------------


def state_specs(tx, params, specs):
  """As in docs/trainers.md."""
  return optax.tree_utils.tree_map_params(
    tx,
    lambda _, spec: spec,
    jax.eval_shape(tx.init, params),
    specs,
    transform_non_params=lambda _: P(),
  )


@pytest.mark.mesh
@each_tx
def test_specs_of_a_state_and_a_sharded_step(tx, mesh):
  specs = state_specs(tx, PARAMS, SPECS)
  shapes = jax.eval_shape(tx.init, PARAMS)
  assert jax.tree.structure(specs) == jax.tree.structure(shapes)
  moments = optax.tree_utils.tree_get(specs, "nu")
  assert moments == SPECS
  place = functools.partial(jax.tree.map, functools.partial(jax.NamedSharding, mesh))
  params = jax.device_put(PARAMS, place(SPECS))
  state = jax.jit(tx.init, out_shardings=place(specs))(params)
  step = jax.jit(
    optax.with_extra_args_support(tx).update,
    out_shardings=(place(SPECS), place(specs)),
    donate_argnums=1,
  )
  for _ in range(2):
    updates, state = step(jax.device_put(GRADS, place(SPECS)), state, params, loss=LOSS)
  assert jax.tree.map(lambda x: x.sharding.spec, state) == specs
  assert jax.tree.structure(updates) == jax.tree.structure(params)


# --- Loops that do not give the state back ------------------------------------------


def logged(tx, log):
  """As in docs/metrics.md."""

  def update(updates, state, params=None, **extra_args):
    updates, state = tx.update(updates, state, params, **extra_args)
    jax.debug.callback(log, optax_clip.metrics(state))
    return updates, state

  return optax.GradientTransformationExtraArgs(tx.init, update)


def scanned(tx, steps):
  """GPJax, and the agents of Brax: a scan in one program."""

  @jax.jit
  def fit(params):
    def step(carry, _):
      grads = jax.grad(lambda p: jnp.sum(p["head"] ** 2))(carry[0])
      updates, state = tx.update(grads, carry[1], carry[0])
      return (optax.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), None, length=steps)[0][0]

  fit(PARAMS)


def eager(tx, steps):
  """dynamax' `run_sgd`: updates without `jit`, and without parameters."""
  state = tx.init(PARAMS)
  for _ in range(steps):
    _, state = tx.update(GRADS, state)


def stepwise(tx, steps):
  """flowjax: a jitted step, with `params=` by name."""

  @jax.jit
  def step(params, state):
    updates, state = tx.update(GRADS, state, params=params)
    return optax.apply_updates(params, updates), state

  params, state = PARAMS, tx.init(PARAMS)
  for _ in range(steps):
    params, state = step(params, state)


@pytest.mark.parametrize("loop", [scanned, eager, stepwise])
def test_metrics_of_a_loop_that_keeps_the_state(loop):
  rows = []
  clip = optax_clip.clip_by_global_norm(1.0)
  tx = optax_clip.skip_nonfinite(optax.chain(clip, optax.adam(0.1)), record="layers")
  loop(logged(tx, rows.append), 4)
  jax.effects_barrier()
  steps = sorted(int(row["clip_by_global_norm/steps"]) for row in rows)
  assert steps == [1, 2, 3, 4]
  assert all(row["skip_nonfinite/steps_skipped"] == 0 for row in rows)


def test_the_state_is_the_same_with_metrics_sent_out_of_it():
  tx = chain()
  assert jax.tree.structure(logged(tx, print).init(PARAMS)) == jax.tree.structure(
    tx.init(PARAMS)
  )


# --- MaxText -------------------------------------------------------------------------


class TestMaxText:
  @each_tx
  def test_calls(self, tx):
    """`train_step` of a TrainState hands both signals to the optimizer."""
    tx = optax.with_extra_args_support(tx)
    state = jax.eval_shape(tx.init, PARAMS)
    _, later = jax.eval_shape(
      lambda g, s, p: tx.update(g, s, p, loss=LOSS, grad_norm=LOSS),
      GRADS,
      state,
      PARAMS,
    )
    assert jax.tree.structure(later) == jax.tree.structure(state)

  @each_tx
  def test_boxes_with_names_of_axes(self, tx):
    """`get_abstract_state`: parameters in boxes, whose names become specs."""
    boxed = jax.tree.map(
      lambda x, spec: nn.LogicallyPartitioned(
        x, (*spec, *[None] * (x.ndim - len(spec)))
      ),
      PARAMS,
      SPECS,
    )
    shapes = jax.eval_shape(tx.init, boxed)
    specs = nn.get_partition_spec(shapes)
    assert optax.tree_utils.tree_get(specs, "nu")["head"] == P(None, "x")
    rules = (("x", "x"),)
    placed = nn.logical_to_mesh(specs, rules)
    plain = nn.unbox(shapes)
    assert jax.tree.structure(placed) == jax.tree.structure(plain)
    assert jax.tree.structure(plain) == jax.tree.structure(
      jax.eval_shape(tx.init, PARAMS)
    )

  def test_what_it_asks_of_the_state(self):
    """Its own ``is_skipped`` is read of a dictionary, and only of one."""
    model = Net(nnx.Rngs(0))
    tx = optax_clip.skip_spikes(chain())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    state = nnx.to_pure_dict(nnx.state(optimizer))["opt_state"]
    assert state.get("is_skipped") is None
    assert optax_clip.metrics(optimizer)["skip_spikes/skipped"] == 0

  def test_a_checkpoint_of_its_own_guard(self):
    """Its state is a dictionary with windows of losses and norms."""
    old = {
      "inner_state": optax.adamw(SCHEDULE).init(PARAMS),
      "losses": jnp.zeros(128),
      "grad_norms": jnp.zeros(128),
      "count": jnp.int32(7),
      "is_skipped": jnp.array(False),
    }
    tx = optax_clip.skip_spikes(chain(), signals=("norm", "loss"))
    drop = [f"[{key!r}]" for key in old if key != "inner_state"]
    state = optax_clip.convert_state(tx, PARAMS, old, drop=drop)
    assert jax.tree.structure(state.inner[1]) == jax.tree.structure(old["inner_state"])
    with pytest.raises(ValueError, match="grad_norms"):
      optax_clip.convert_state(tx, PARAMS, old)


# --- AXLearn -------------------------------------------------------------------------


@dataclasses.dataclass
class ParameterSpec:
  """`OptStateSpec` and `ParameterSpec`: no leaves of a tree are in it."""

  dtype: Any
  shape: Any
  mesh_axes: Any


@dataclasses.dataclass
class OptParam:
  value: Any


class PartitionedGradientTransformation(NamedTuple):
  init: Any
  update: Any
  partition: Any


def with_partition_fn(base, partition):
  def values(params):
    return jax.tree.map(lambda p: p.value, params)

  return PartitionedGradientTransformation(
    lambda params: base.init(values(params)),
    lambda updates, state, params: base.update(updates, state, values(params)),
    partition,
  )


def partitioned(tx):
  """As in docs/trainers.md."""

  def spec(leaf, axes):
    return ParameterSpec(dtype=leaf.dtype, shape=leaf.shape, mesh_axes=axes)

  def partition(specs):
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs)
    return optax.tree_utils.tree_map_params(
      tx,
      lambda leaf, own: spec(leaf, own.mesh_axes),
      jax.eval_shape(tx.init, shapes),
      specs,
      transform_non_params=lambda leaf: spec(leaf, P()),
    )

  return with_partition_fn(tx, partition)


# Labels in a tree must be those of all leaves that get updates.
AXLEARN = [(name, False) for name in TXS if name != "skip_spikes"]
AXLEARN += [(name, True) for name, _ in AXLEARN if name != "groups"]


@pytest.mark.parametrize(
  ("name", "masked"),
  [pytest.param(*x, marks=[] if x[0] in KINDS else pytest.mark.slow) for x in AXLEARN],
)
def test_axlearn(name, masked):
  """What no optimizer updates is `None`, in parameters and in their specs."""
  tx = partitioned(TXS[name]())
  values, axes = ({**x, "head": None} if masked else x for x in (PARAMS, SPECS))
  specs = jax.tree.map(lambda x, s: ParameterSpec(x.dtype, x.shape, s), values, axes)
  params = jax.tree.map(OptParam, values)
  state = tx.init(params)
  fits = jax.tree.map(
    lambda s, x: (s.shape, s.dtype) == (x.shape, x.dtype), tx.partition(specs), state
  )
  assert jax.tree.structure(fits) == jax.tree.structure(state)
  assert all(jax.tree.leaves(fits))
  _, later = tx.update(jax.tree.map(jnp.ones_like, values), state, params)
  assert jax.tree.structure(later) == jax.tree.structure(state)


# --- praxis --------------------------------------------------------------------------


@each_tx
def test_praxis(tx):
  """`partition_params`, also of an optimizer for some of the parameters."""
  hparams = jax.tree.map(lambda x, s: ParameterSpec(x.dtype, x.shape, s), PARAMS, SPECS)

  def specs_of(tx):
    return optax.tree_utils.tree_map_params(
      tx,
      lambda leaf, spec: None if isinstance(leaf, optax.MaskedNode) else spec,
      jax.eval_shape(tx.init, PARAMS),
      hparams,
      transform_non_params=lambda x: ParameterSpec(jnp.int32, x.shape, []),
      is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )

  specs = specs_of(tx)
  assert optax.tree_utils.tree_get(specs, "nu") == hparams
  assert jax.tree.structure(specs) == jax.tree.structure(
    jax.eval_shape(tx.init, PARAMS)
  )


def test_praxis_with_a_mask():
  tx = optax.masked(chain(optax_clip.adagc()), {"blocks": True, "head": False})
  specs = optax.tree_utils.tree_map_params(
    tx,
    lambda leaf, spec: None if isinstance(leaf, optax.MaskedNode) else spec,
    jax.eval_shape(tx.init, PARAMS),
    SPECS,
    transform_non_params=lambda _: P(),
    is_leaf=lambda x: isinstance(x, optax.MaskedNode),
  )
  assert optax.tree_utils.tree_get(specs, "nu") == {**SPECS, "head": None}


# --- T5X -----------------------------------------------------------------------------


class Rules:
  """`OptaxStatePartitionRules` with the rules that are needed here."""

  _RULES: ClassVar = {
    optax.EmptyState: lambda state, axes: optax.EmptyState(),
    optax.ScaleByAdamState: lambda state, axes: optax.ScaleByAdamState(
      None, axes, axes
    ),
    optax.ScaleByScheduleState: lambda state, axes: optax.ScaleByScheduleState(None),
  }

  @classmethod
  def _is_optax_state(cls, x):
    is_named_tuple = isinstance(x, tuple) and hasattr(x, "_asdict")
    return is_named_tuple and type(x).__name__.endswith("State")

  @classmethod
  def derive_optax_logical_axes(cls, state, axes):
    leaves, treedef = jax.tree.flatten(state, is_leaf=cls._is_optax_state)

    def derive(x):
      if type(x) not in cls._RULES:
        if cls._is_optax_state(x):
          raise ValueError(f"unregistered optax state type {type(x).__name__}")
        return None
      return cls._RULES[type(x)](x, axes)

    return jax.tree.unflatten(treedef, [derive(x) for x in leaves])


def register(rules):
  """As in docs/trainers.md."""

  def nowhere(state):
    return jax.tree.map(lambda _: None, state)

  def around(state, axes):
    inner = rules.derive_optax_logical_axes(state.inner, axes)
    return nowhere(state._replace(inner=None))._replace(inner=inner)

  rules._RULES[states.ClipState] = lambda state, axes: nowhere(state)
  rules._RULES[states.GuardState] = around
  rules._RULES[states.ObserveState] = around


class TestT5X:
  @named(sorted(set(TXS) - {"clip_element_spikes"}))
  def test_axes_and_checkpoints(self, name, monkeypatch):
    monkeypatch.setattr(Rules, "_RULES", dict(Rules._RULES))
    tx = TXS[name]()
    state = tx.init(PARAMS)
    if optax_clip.metrics(state, allow_empty=True):
      with pytest.raises(ValueError, match="unregistered"):
        Rules.derive_optax_logical_axes(state, SPECS)
    register(Rules)
    axes = Rules.derive_optax_logical_axes(state, SPECS)
    assert optax.tree_utils.tree_get(axes, "nu") == SPECS
    # `derive_logical_axes` and `state_dict` of its OptaxWrapper.
    written = serialization.to_state_dict(axes)
    assert flat(written).keys() == flat(serialization.to_state_dict(state)).keys()
    stored = serialization.to_state_dict(state)
    stored = traverse_util.unflatten_dict(
      traverse_util.flatten_dict(stored, sep="/"), sep="/"
    )
    if name in ("layers", "skip_nonfinite"):
      return  # Whose names hold a slash: docs/trainers.md says so.
    restored = restored_by_t5x(state, stored)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    converted = optax_clip.convert_state(tx, PARAMS, stored)
    assert jax.tree.structure(converted) == jax.tree.structure(state)


def leaves_of(state, kind):
  return jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))


def flat(tree):
  return traverse_util.flatten_dict(tree, keep_empty_nodes=True, sep="/")


def restored_by_t5x(state, stored):
  """Its `restore_state`, which brings back what was empty."""
  reference = flat(serialization.to_state_dict(state))
  values = traverse_util.flatten_dict(stored, sep="/")
  for key, value in reference.items():
    if key not in values:
      assert value == traverse_util.empty_node, key
      values[key] = value
  stored = traverse_util.unflatten_dict(values, sep="/")
  return serialization.from_state_dict(state, stored)


# --- tunix ---------------------------------------------------------------------------


class Net(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(4, 8, rngs=rngs)
    self.second = nnx.Linear(8, 2, rngs=rngs)

  def __call__(self, x):
    return self.second(nnx.relu(self.first(x)))


def learning_rate(optimizer):
  """`_try_get_learning_rate` of its PeftTrainer."""
  try:
    return optimizer.opt_state.hyperparams["learning_rate"].get_value()
  except AttributeError:
    for part in optimizer.opt_state:
      if isinstance(part, optax.EmptyState):
        break
      if hasattr(part, "hyperparams"):
        return part.hyperparams["learning_rate"].get_value()
    return None


def injected(wrap=lambda tx: tx):
  """As in docs/trainers.md: the hyperparameters outermost."""

  @optax.inject_hyperparams
  def make(learning_rate):
    return wrap(chain(optimizer=optax.adamw(learning_rate)))

  return make(learning_rate=SCHEDULE)


class TestTunix:
  X = jax.random.normal(jax.random.key(0), (16, 4))

  def trained(self, tx, steps=3, bad=()):
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, scale):
      def loss_fn(model):
        return jnp.mean((model(self.X) - self.X[:, :2]) ** 2) * scale

      loss, grads = nnx.value_and_grad(loss_fn)(model)
      optimizer.update(model, grads)
      return loss

    losses = [
      float(step(model, optimizer, jnp.float32(jnp.nan if i in bad else 1)))
      for i in range(steps)
    ]
    return model, optimizer, losses

  def test_the_learning_rate_is_seen(self):
    around = optax_clip.skip_nonfinite
    for tx in (injected(), injected(around)):
      _, optimizer, _ = self.trained(tx)
      np.testing.assert_allclose(learning_rate(optimizer), SCHEDULE(2))
      assert optax_clip.metrics(optimizer)["clip_by_global_norm/steps"] == 3
    # Around the optimizer alone it is found as well, and in a chain with a clip not.
    inside = optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE)
    for tx, seen in (
      (around(inside), True),
      (chain(optimizer=inside), True),
      (around(chain(optimizer=inside)), False),
    ):
      _, optimizer, _ = self.trained(tx, 1)
      assert (learning_rate(optimizer) is not None) == seen

  def test_its_accumulation_leaves_a_guard_inside_without_a_step(self):
    """It puts `optax.MultiSteps` around what it gets: as docs/trainers.md says."""
    tx = optax.MultiSteps(injected(optax_clip.skip_nonfinite), 2)
    _, optimizer, _ = self.trained(tx, 10, bad=(3,))
    with pytest.warns(UserWarning, match="accumulator keeps a NaN"):
      logs = optax_clip.metrics(optimizer)
    assert logs["skip_nonfinite/steps_skipped"] == 4
    assert logs["clip_by_global_norm/steps"] == 1

  def test_a_guard_around_the_accumulation_leaves_out_one_microbatch(self):
    """The recipe of docs/trainers.md, with the trainer's accumulation off."""

    @optax.inject_hyperparams
    def accumulating(learning_rate):
      steps = optax.MultiSteps(chain(optimizer=optax.adamw(learning_rate)), 2)
      return optax_clip.skip_nonfinite(steps.gradient_transformation())

    tx = accumulating(learning_rate=lambda microbatch: SCHEDULE(microbatch // 2))
    _, optimizer, losses = self.trained(tx, 21, bad=(3,))
    logs = optax_clip.metrics(optimizer)
    assert logs["skip_nonfinite/steps_skipped"] == 1
    assert logs["clip_by_global_norm/steps"] == 10
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(learning_rate(optimizer), SCHEDULE(10))

  def test_a_schedule_outside_of_a_guard_counts_all_steps(self):
    _, optimizer, _ = self.trained(injected(optax_clip.skip_nonfinite), 5, bad=(1, 2))
    np.testing.assert_allclose(learning_rate(optimizer), SCHEDULE(4))
    assert optax_clip.metrics(optimizer)["skip_nonfinite/steps_skipped"] == 2
    assert (
      optax.tree_utils.tree_get(
        optimizer.opt_state, "ScaleByAdamState"
      ).count.get_value()
      == 3
    )

  def test_dtypes_of_its_variables_and_conditions(self):
    """`_restore_opt_state_float_dtypes`, and an update in a branch of `nnx.cond`."""
    model, optimizer, _ = self.trained(TXS["all"](), 1)
    kinds = nnx.optimizer.OptState

    def dtypes(optimizer):
      return jax.tree.map(
        lambda x: x.get_value().dtype,
        nnx.state(optimizer, kinds),
        is_leaf=lambda x: isinstance(x, nnx.Variable),
      )

    before = dtypes(optimizer)
    grads = nnx.grad(lambda m: jnp.mean(m(self.X) ** 2))(model)

    @nnx.jit
    def step(model, optimizer, grads, do):
      def update(model, optimizer):
        optimizer.update(model, grads)
        return jnp.float32(1)

      return nnx.cond(do, update, lambda m, o: jnp.float32(0), model, optimizer)

    for do in (False, True):
      step(model, optimizer, grads, jnp.array(do))
    assert dtypes(optimizer) == before
    assert optax_clip.metrics(optimizer)["observe/steps"] == 2

  def test_its_checkpoint_of_an_old_chain(self, tmp_path):
    """Saved as the state of all variables of the optimizer."""
    old_tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(SCHEDULE))
    model, old, _ = self.trained(old_tx)
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(tmp_path / "a", nnx.state(old, nnx.optimizer.OptState))
      checkpointer.wait_until_finished()
      # With an optimizer of the old chain, as `maybe_restore` has it.
      empty = nnx.Optimizer(model, old_tx, wrt=nnx.Param)
      like = nnx.state(empty, nnx.optimizer.OptState)
      nnx.update(empty, checkpointer.restore(tmp_path / "a", like))
    tx = optax_clip.skip_nonfinite(chain())
    new = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    nnx.update(new.opt_state, nnx.state(optax_clip.convert_state(tx, params, empty)))
    adam = nnx.as_pure(new.opt_state).inner[1][0]
    assert int(adam.count) == 3


# --- Levanter, and Equinox -----------------------------------------------------------


class Model(eqx.Module):
  first: eqx.nn.Linear
  second: eqx.nn.Linear
  name: str = eqx.field(static=True, default="model")

  def __call__(self, x):
    return self.second(jax.nn.relu(self.first(x)))

  @classmethod
  def make(cls):
    one, two = jax.random.split(jax.random.key(0))
    return cls(eqx.nn.Linear(4, 8, key=one), eqx.nn.Linear(8, 2, key=two))


def eqx_train(tx, steps, model, state, loss=None):
  """As the documentation of Equinox has it; with Levanter's extra arguments."""
  x = jax.random.normal(jax.random.key(1), (16, 4))
  tx = optax.with_extra_args_support(tx)

  @eqx.filter_jit
  def step(model, state):
    def loss_fn(model):
      return jnp.mean((jax.vmap(model)(x) - x[:, :2]) ** 2)

    loss, grads = eqx.filter_value_and_grad(loss_fn)(model)
    updates, state = tx.update(
      grads,
      state,
      params=eqx.filter(model, eqx.is_inexact_array),
      obj_fn=loss_fn,
      loss=loss,
    )
    return eqx.apply_updates(model, updates), state, loss

  losses = []
  for _ in range(steps):
    model, state, loss = step(model, state)
    losses.append(float(loss))
  return model, state, losses


def check_metrics(state):
  """Finite, but for limits that are off and the losses of bad steps that never were."""
  for key, value in optax_clip.metrics(state).items():
    assert np.isfinite(float(value)) or key.endswith(("limit", "_loss")), key


def outputs_first(path, leaf):
  """As in docs/meshes.md."""
  is_kernel = "weight" in path and leaf.ndim > 1
  return tuple(range(1, leaf.ndim)) if is_kernel else None


class TestEquinox:
  @pytest.mark.parametrize(
    "name", ["layers", "skip_spikes", "all", "clippy", "stable_spam"]
  )
  def test_training(self, name):
    tx, model = TXS[name](), Model.make()
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    model, state, losses = eqx_train(tx, 30, model, state)
    assert losses[-1] < 0.7 * losses[0]
    check_metrics(state)

  def test_units_of_agc(self):
    """Kernels are ``[out, in]``: clipped as their transposes are by rank."""
    key = jax.random.key(0)
    model = {
      "linear": eqx.nn.Linear(3, 5, key=key),
      "conv": eqx.nn.Conv2d(3, 8, 3, key=key),
      "embedding": eqx.nn.Embedding(7, 4, key=key),
      "norm": eqx.nn.LayerNorm(4),
    }
    params = eqx.filter(model, eqx.is_inexact_array)
    scale = iter(range(1, 100))
    grads = jax.tree.map(
      lambda x: next(scale) * jax.random.normal(jax.random.key(1), x.shape), params
    )

    def clipped(tx, grads, params):
      return jax.jit(tx.update)(grads, tx.init(params), params)[0]

    def inputs_first(tree):
      return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), tree)

    by_path = optax_clip.adaptive_grad_clip(0.01, axis=outputs_first)
    by_rank = optax_clip.adaptive_grad_clip(0.01)
    found = clipped(by_path, grads, params)
    expected = clipped(by_rank, inputs_first(grads), inputs_first(params))
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-6),
      inputs_first(found),
      expected,
    )

  def test_names_of_layers(self):
    tx, model = TXS["layers"](), Model.make()
    arrays = eqx.filter(model, eqx.is_inexact_array)
    _, state, _ = eqx_train(tx, 1, model, tx.init(arrays))
    report = optax_clip.layer_metrics(state, arrays)
    assert list(report.layers)[:2] == ["first/weight", "first/bias"]

  def test_a_checkpoint(self, tmp_path):
    old, model = (
      optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(SCHEDULE)),
      Model.make(),
    )
    arrays = eqx.filter(model, eqx.is_inexact_array)
    model, state, _ = eqx_train(old, 5, model, old.init(arrays))
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", state)
    like = eqx.filter_eval_shape(old.init, arrays)
    restored = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", like)
    tx = optax_clip.skip_nonfinite(chain())
    arrays = eqx.filter(model, eqx.is_inexact_array)
    converted = optax_clip.convert_state(tx, arrays, restored)
    assert int(converted.inner[1][0].count) == 5
    _, _, resumed = eqx_train(tx, 5, model, converted)
    _, _, whole = eqx_train(old, 5, model, state)
    np.testing.assert_allclose(resumed, whole, rtol=1e-6)


class TestLevanter:
  @each_tx
  def test_calls(self, tx):
    """`take_train_step` passes the loss and the objective to every optimizer."""
    tx = optax.with_extra_args_support(tx)
    state = tx.init(PARAMS)
    update = jax.jit(lambda g, s, p: tx.update(g, s, params=p, obj_fn=None, loss=LOSS))
    _, later = jax.eval_shape(update, GRADS, state, PARAMS)
    assert jax.tree.structure(later) == jax.tree.structure(state)

  def test_hyperparameters_are_logged(self):
    """`log_optimizer_hyperparams` reads them of the outermost state."""
    tx = injected(lambda tx: optax_clip.skip_spikes(tx, signals=("norm", "loss")))
    model = Model.make()
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    _, state, losses = eqx_train(tx, 4, model, state)
    logged = {f"optim/{k}": float(v) for k, v in state.hyperparams.items()}
    np.testing.assert_allclose(logged["optim/learning_rate"], SCHEDULE(3))
    assert optax_clip.metrics(state)["skip_spikes/steps"] == 4
    assert losses[-1] < losses[0]

  def test_a_checkpoint_of_its_own_guard(self):
    """Whose leaves stand among those of the chain in it."""
    chained = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(SCHEDULE))
    inner = chained.init(PARAMS)
    old = SkipStepState(inner, jnp.zeros(8), jnp.int32(0))
    tx = optax_clip.skip_spikes(chain(), signals=("norm", "loss"))
    with pytest.raises(ValueError, match="drop=") as caught:
      optax_clip.convert_state(tx, PARAMS, old)
    drop = ("._skipstep_losses", "._skipstep_count")
    assert str(caught.value).endswith(f"drop={drop!r}.")
    state = optax_clip.convert_state(tx, PARAMS, old, drop=drop)
    assert jax.tree.structure(state.inner[1]) == jax.tree.structure(inner[1])


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class SkipStepState:
  inner: Any
  losses: Any
  count: Any

  def tree_flatten_with_keys(self):
    key = jax.tree_util.GetAttrKey
    inner = [(jax.tree_util.SequenceKey(i), x) for i, x in enumerate(self.inner)]
    own = [(key("_skipstep_losses"), self.losses), (key("_skipstep_count"), self.count)]
    return [*inner, *own], jax.tree.structure(self.inner)

  @classmethod
  def tree_unflatten(cls, treedef, children):
    return cls(tuple(children[:-2]), *children[-2:])


# --- EasyDeL -------------------------------------------------------------------------


class TestEasyDeL:
  @named(sorted(set(TXS) - {"skip_spikes"}))
  def test_calls(self, name):
    """`apply_gradients` names all arguments, and passes no loss."""
    tx = TXS[name]()
    state = jax.eval_shape(tx.init, PARAMS)
    updates, later = jax.eval_shape(
      lambda s: tx.update(updates=GRADS, state=s, params=PARAMS), state
    )
    assert jax.tree.structure(later) == jax.tree.structure(state)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)

  @each_tx
  def test_shardings(self, tx):
    """`init_tx` finds specs by expressions of paths."""
    rules = ((r"kernel$", P("x")), (r"head$", P(None, "x")), (r".*", P()))
    state = jax.eval_shape(lambda: tx.init(PARAMS))

    def spec(path, leaf):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      if not leaf.shape or leaf.size == 1:
        return P()
      return next(s for rule, s in rules if re.search(rule, name))

    specs = jax.tree_util.tree_map_with_path(spec, state)
    assert optax.tree_utils.tree_get(specs, "nu") == SPECS


# --- kauldron ------------------------------------------------------------------------


def test_kauldron():
  """A chain with names; parameters that are integers; the state before the step."""
  tx = optax_clip.skip_nonfinite(
    optax.named_chain(
      ("clip", optax_clip.clip_by_global_norm(1.0)),
      (
        "adam",
        optax.masked(optax.scale_by_adam(), {"head": False, "w": True, "ids": False}),
      ),
      ("lr", optax.masked(optax.scale(-0.1), {"head": True, "w": True, "ids": False})),
    )
  )
  params = {"head": jnp.ones(2), "w": jnp.ones(3), "ids": jnp.arange(3)}

  @functools.partial(jax.jit, donate_argnums=0)
  def init(params):
    return params, tx.init(params)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state):
    def loss(p):
      return jnp.sum(p["w"] ** 2) + jnp.sum(p["head"])

    grads = jax.grad(loss, allow_int=True)(params)
    assert grads["ids"].dtype == jax.dtypes.float0
    updates, later = tx.update(grads, state, params)
    logged = optax_clip.metrics(state)
    kept = jax.tree.map(
      lambda p, u: p if u.dtype == jax.dtypes.float0 else p + u, params, updates
    )
    return kept, later, logged

  params, state = init(params)
  assert set(state.inner) == {"clip", "adam", "lr"}
  for i in range(2):
    params, state, logged = step(params, state)
    # Of the step before this one.
    assert logged["skip_nonfinite/steps"] == i
  assert optax_clip.metrics(state)["clip_by_global_norm/steps_clipped"] == 2


# --- big_vision ----------------------------------------------------------------------


def with_names(tree):
  """Its `_traverse_with_names`: NamedTuples are tuples, and keys are text."""
  if isinstance(tree, dict):
    for key in sorted(tree):
      for path, value in with_names(tree[key]):
        yield (key + "/" + path).rstrip("/"), value
  elif isinstance(tree, (list, tuple)):
    for i, item in enumerate(tree):
      for path, value in with_names(item):
        yield (str(i) + "/" + path).rstrip("/"), value
  elif tree is not None:
    yield "", tree


class TestBigVision:
  @each_tx
  def test_names_and_shardings(self, tx):
    state = {"params": PARAMS, "opt": tx.init(PARAMS)}
    leaves = jax.tree.leaves(state)
    names = [name for name, _ in with_names(state)]
    values = [value for _, value in with_names(state)]
    assert len(set(names)) == len(leaves)
    # It finds the order of the leaves by numbering them.
    numbered = jax.tree.unflatten(jax.tree.structure(state), range(len(leaves)))
    order = [n for _, n in with_names(numbered)]
    assert sorted(order) == list(range(len(leaves)))
    assert all(values[i] is leaves[n] for i, n in enumerate(order))
    specs = jax.tree.map(lambda x: (None,) * x.ndim, state)
    specs = jax.tree.map(lambda _, spec: P(*spec), state, specs)
    assert jax.tree.structure(specs) == jax.tree.structure(state)

  def test_its_count_of_steps(self):
    """`get_count` asks for the one schedule of the learning rate."""
    clip = optax_clip.clip_by_global_norm(optax.linear_schedule(1.0, 0.1, 10))
    frozen = {"blocks": True, "head": False}
    tx = optax_clip.skip_nonfinite(
      optax.chain(
        optax.masked(clip, frozen),
        optax.masked(optax.scale_by_adam(), frozen),
        optax.masked(optax.scale_by_schedule(SCHEDULE), frozen),
      )
    )
    state = tx.init(PARAMS)
    bad = jax.tree.map(lambda x: x * jnp.nan, GRADS)
    for grads in (GRADS, bad, GRADS):
      _, state = jax.jit(tx.update)(grads, state, PARAMS)
    kind = optax.ScaleByScheduleState
    (found,) = [x for x in leaves_of(state, kind) if isinstance(x, kind)]
    # Steps taken: docs/trainers.md says what that does to its loop.
    assert int(found.count) == 2


# --- NumPyro, optimistix, jaxopt -----------------------------------------------------


def test_numpyro_passes_the_loss_as_a_value():
  """`optax_to_numpyro`: a number of steps beside parameters and the state."""
  tx = optax_clip.skip_spikes(chain(), signals=("norm", "loss"))

  @jax.jit
  def update(state, value):
    step, (params, opt_state) = state
    updates, opt_state = optax.with_extra_args_support(tx).update(
      GRADS, opt_state, params, value=value
    )
    return step + 1, (optax.apply_updates(params, updates), opt_state)

  state = (jnp.int32(0), (PARAMS, tx.init(PARAMS)))
  for value in (1.0, jnp.nan, 2.0):
    state = update(state, value)
  logs = optax_clip.metrics(state)
  assert logs["skip_spikes/steps"] == 3
  assert logs["skip_spikes/steps_skipped"] == 1


@each_tx
def test_optimistix_and_jax_privacy(tx):
  """They pass the value, the gradient and the function of a line search."""
  tx = optax.with_extra_args_support(tx)
  state = jax.eval_shape(tx.init, PARAMS)
  updates, later = jax.eval_shape(
    lambda g, s, y: tx.update(g, s, y, value=LOSS, grad=g, value_fn=lambda y: LOSS),
    GRADS,
    state,
    PARAMS,
  )
  assert jax.tree.structure(later) == jax.tree.structure(state)
  assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


class SolverState(NamedTuple):
  """Of jaxopt's `OptaxSolver`."""

  iter_num: Any
  value: Any
  error: Any
  aux: Any
  internal_state: Any


def test_jaxopt_keeps_the_state_among_its_own():
  tx = optax_clip.skip_nonfinite(chain())
  inf = jnp.float32(jnp.inf)
  state = SolverState(jnp.int32(0), inf, inf, None, tx.init(PARAMS))
  _, opt_state = jax.jit(tx.update)(GRADS, state.internal_state, PARAMS)
  state = state._replace(internal_state=opt_state)
  assert optax_clip.metrics(state)["skip_nonfinite/steps"] == 1


# --- NetKet and BlackJAX -------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def apply_gradient(update, state, gradient, params):
  """NetKet's: the update is static, and so must be hashable."""
  updates, state = update(gradient, state, params)
  return state, optax.apply_updates(params, updates)


def test_netket():
  tx = optax_clip.skip_nonfinite(chain(), record="layers")
  params = {"Dense": {"kernel": jnp.ones((4, 4), jnp.complex64)}, "bias": jnp.ones(4)}
  state = tx.init(params)
  for _ in range(3):
    state, params = apply_gradient(tx.update, state, params, params)
  assert optax_clip.metrics(state)["skip_nonfinite/steps"] == 3
  assert params["Dense"]["kernel"].dtype == jnp.complex64


def test_blackjax_has_one_norm_for_all_particles_or_one_for_each():
  particles = jnp.float32([[3.0, 4.0], [0.3, 0.4]])
  for tx, first in (
    (optax_clip.clip_by_global_norm(1.0), 3 / np.sqrt(25.25)),
    (optax_clip.clip_by_layer_norm(1.0, stacked={"": 0}), 0.6),
  ):
    updates, _ = jax.jit(tx.update)(particles, tx.init(particles), particles)
    np.testing.assert_allclose(updates[0, 0], first, rtol=1e-6)


# --- Brax, rejax and dynamax ---------------------------------------------------------


def test_brax_has_replicated_states_and_no_parameters():
  """`gradient_update_fn` in `pmap`; and its check, a sum over all leaves."""
  tx = optax_clip.skip_spikes(chain(optimizer=optax.adam(0.1)), record="layers")

  @functools.partial(jax.pmap, axis_name="i")
  def step(grads, state):
    return tx.update(jax.lax.pmean(grads, "i"), state)

  @functools.partial(jax.pmap, axis_name="i")
  def is_replicated(tree):
    fingerprint = sum(jnp.sum(x).astype(jnp.float32) for x in jax.tree.leaves(tree))
    return jax.lax.pmin(fingerprint, "i") == jax.lax.pmax(fingerprint, "i")

  one = functools.partial(jax.tree.map, lambda x: jnp.asarray(x)[None])
  _, state = step(one(GRADS), one(tx.init(PARAMS)))
  assert is_replicated(state)[0]
  logs = optax_clip.metrics(jax.tree.map(lambda x: x[0], state))
  assert logs["skip_spikes/steps"] == 1


def test_rejax_has_a_record_for_each_seed():
  """Networks in a `TrainState`, trained side by side by `vmap`."""

  def train(seed):
    params = jax.tree.map(lambda x: x + jax.random.normal(seed, x.shape), PARAMS)
    state = TrainState.create(apply_fn=(), params=params, tx=chain())
    return state.apply_gradients(grads=jax.tree.map(jnp.square, params))

  states = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 3))
  norms = optax_clip.metrics(states)["clip_by_global_norm/norm"]
  assert norms.shape == (3,)
  assert len(set(norms.tolist())) == 3


@pytest.mark.parametrize(
  "tx",
  [optax_clip.adaptive_grad_clip(0.01), optax_clip.clippy()],
  ids=["adaptive_grad_clip", "clippy"],
)
def test_dynamax_passes_no_parameters(tx):
  """What needs them says so."""
  with pytest.raises(ValueError, match="params"):
    tx.update(GRADS, tx.init(PARAMS))


# --- haliax, flowjax and penzai ------------------------------------------------------


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class NamedArray:
  """As haliax registers its own: without keys, and axes with names."""

  array: Any
  axes: tuple

  def tree_flatten(self):
    return (self.array,), self.axes

  @classmethod
  def tree_unflatten(cls, axes, children):
    return cls(*children, axes)


def test_haliax_says_by_names_which_axes_are_outputs():
  model = {
    "first": {"weight": NamedArray(jnp.ones((5, 3)), ("mlp", "embed"))},
    "last": {"weight": NamedArray(jnp.ones((3, 5)), ("embed", "mlp"))},
  }
  names = jax.tree.map(
    lambda x: P(*x.axes), model, is_leaf=lambda x: isinstance(x, NamedArray)
  )
  axis = optax_clip.unit_axes_by_name(names, outputs={"mlp"})
  grads = jax.tree.map(
    lambda x: jnp.arange(1.0, 16.0).reshape((5, 3)) if x.shape[0] == 5 else x, model
  )
  grads["last"]["weight"].array = grads["first"]["weight"].array.T
  tx = optax_clip.adaptive_grad_clip(0.01, axis=axis, record="layers")
  updates, state = jax.jit(tx.update)(grads, tx.init(model), model)
  first, last = (updates[key]["weight"].array for key in ("first", "last"))
  np.testing.assert_allclose(first, last.T, rtol=1e-6)
  norms = np.linalg.norm(np.float64(first), axis=1)
  np.testing.assert_allclose(norms, 0.01 * np.sqrt(3), rtol=1e-6)
  assert list(optax_clip.layer_metrics(state, model).layers) == [
    *("first/weight", "last/weight")
  ]


def test_flowjax_has_stacks_of_kernels_with_outputs_first():
  layer = {"weight": jnp.ones((2, 8, 3)), "bias": jnp.ones((2, 8))}
  model = {"conditioner": {"layers": [layer]}, "loc": jnp.ones(2)}
  tx = optax_clip.adaptive_grad_clip(
    0.01, axis={"weight": 1}, stacked={"conditioner/layers": 0}
  )
  updates, _ = jax.jit(tx.update)(model, tx.init(model), model)
  found = updates["conditioner"]["layers"][0]
  # Of each layer: a unit of three inputs for each output; a bias as a whole.
  np.testing.assert_allclose(found["weight"], np.full((2, 8, 3), 0.01), rtol=1e-6)
  np.testing.assert_allclose(found["bias"], np.full((2, 8), 0.01), rtol=1e-6)


def test_penzai_has_a_tuple_of_parameters():
  params = (PARAMS["head"], PARAMS["blocks"]["bias"])
  tx = optax_clip.skip_nonfinite(chain(), record="layers")
  _, state = jax.jit(tx.update)(params, tx.init(params), params)
  report = optax_clip.layer_metrics(state, params, name="skip_nonfinite")
  assert list(report.layers) == ["0", "1"]


# --- Solves that fail, and Orbax -----------------------------------------------------


def test_a_solve_that_failed_is_a_step_that_is_skipped():
  """As in docs/trainers.md: by a product, as `jnp.where` has a gradient of 0."""

  def skipped(checked):
    tx = optax_clip.skip_nonfinite(optax.sgd(0.1))
    grads = jax.grad(lambda x: checked(jnp.sum(x**2), jnp.array(False)))(jnp.ones(2))
    _, state = tx.update(grads, tx.init(jnp.ones(2)))
    return optax_clip.metrics(state)["skip_nonfinite/steps_skipped"]

  assert skipped(lambda loss, ok: loss * jnp.where(ok, 1.0, jnp.nan)) == 1
  assert skipped(lambda loss, ok: jnp.where(ok, loss, jnp.nan)) == 0


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("name", ["all"])
def test_orbax_v1(name, tmp_path):
  v1 = getattr(ocp, "v1", None)
  if v1 is None:
    pytest.skip("This Orbax has no second API")
  tx = TXS[name]()
  _, state = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
  v1.save(tmp_path / "state", state)
  typed = v1.load(tmp_path / "state", jax.eval_shape(tx.init, PARAMS))
  untyped = v1.load(tmp_path / "state")
  for restored in (typed, optax_clip.convert_state(tx, PARAMS, untyped)):
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


# --- Keras ---------------------------------------------------------------------------

KERAS = """
import numpy as np
import jax.numpy as jnp


def transformation():
  clip = optax_clip.clip_by_global_norm(0.5, record="layers")
  return optax_clip.skip_nonfinite(optax.chain(clip, optax.adam(1e-2)))


keras.utils.set_random_seed(0)
model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(2)])
model.compile(optimizer=Optax(transformation()), loss="mse")
params = {v.path: jnp.copy(v.value) for v in model.trainable_variables}
x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
y = x[:, :2].copy()
keywords = dict(batch_size=16, shuffle=False, verbose=0)
seen = model.fit(x, y, epochs=5, callbacks=[LogMetrics()], **keywords).history
assert seen["clip_by_global_norm/steps"] == [4.0, 8.0, 12.0, 16.0, 20.0], seen
assert seen["loss"][-1] < seen["loss"][0], seen


# A loop of optax takes the same steps.
tx = transformation()
state = tx.init(params)
bias, kernel = sorted(params, key=lambda path: params[path].ndim)


@jax.jit
def step(params, state, x, y):
  def loss(p):
    return jnp.mean((x @ p[kernel] + p[bias] - y) ** 2)

  updates, state = tx.update(jax.grad(loss)(params), state, params)
  return optax.apply_updates(params, updates), state


for i in range(20):
  batch = slice(16 * (i % 4), 16 * (i % 4) + 16)
  params, state = step(params, state, x[batch], y[batch])
for v in model.trainable_variables:
  np.testing.assert_allclose(v.value, params[v.path], rtol=1e-5)

x[3] = np.nan
model.fit(x, y, **keywords)
logs = optax_clip.metrics(model.optimizer.opt_state())
assert logs["skip_nonfinite/steps_skipped"] == 1
assert all(np.isfinite(w).all() for w in model.get_weights())


class Mine(Optax):
  @classmethod
  def from_config(cls, config):
    return cls(transformation())


model.save("model.keras")
same = keras.saving.load_model("model.keras", custom_objects={"Optax": Mine})
for x, y in zip(*(jax.tree.leaves(m.optimizer.opt_state()) for m in (model, same))):
  np.testing.assert_array_equal(x, y)
"""


def test_keras(tmp_path):
  """The block of docs/trainers.md, in a process where Keras runs on JAX."""
  if importlib.util.find_spec("keras") is None:
    pytest.skip("Keras is not installed")
  root = pathlib.Path(__file__).parents[2]
  (block,) = re.findall(
    r"```python\n(import os\n.*?class Optax.*?)```",
    (root / "docs" / "trainers.md").read_text(),
    re.DOTALL,
  )
  done = subprocess.run(
    [sys.executable, "-c", block + KERAS],
    cwd=tmp_path,
    env={**os.environ, "PYTHONPATH": str(root)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr


# --- Flax NNX and Linen, Haiku -------------------------------------------------------


@pytest.mark.parametrize("name", ["layers", "all", "clippy", "stable_spam"])
def test_flax_nnx(name):
  _, optimizer, losses = TestTunix().trained(TXS[name](), 30)
  assert losses[-1] < 0.7 * losses[0]
  check_metrics(optimizer)


def test_flax_nnx_with_a_loss():
  """`nnx.Optimizer.update` passes keywords on."""
  tx = optax_clip.skip_spikes(chain(), signals=("norm", "loss"))
  model = Net(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(TestTunix.X) ** 2))(model)
  optimizer.update(model, grads, loss=loss)
  assert optax_clip.metrics(optimizer)["skip_spikes/steps"] == 1


@pytest.mark.parametrize(
  "name", ["layers", "skip_spikes", "all", "clippy", "stable_spam"]
)
def test_flax_linen(name):
  class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(2)(nn.relu(nn.Dense(8)(x)))

  x = jax.random.normal(jax.random.key(1), (16, 4))
  params = Mlp().init(jax.random.key(0), x)["params"]
  state = TrainState.create(apply_fn=Mlp().apply, params=params, tx=TXS[name]())

  @jax.jit
  def step(state):
    def loss_fn(params):
      return jnp.mean((state.apply_fn({"params": params}, x) - x[:, :2]) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    if name != "skip_spikes":
      return state.apply_gradients(grads=grads), loss
    # Which passes no loss on.
    updates, opt_state = state.tx.update(
      grads, state.opt_state, state.params, loss=loss
    )
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), loss

  losses = []
  for _ in range(30):
    state, loss = step(state)
    losses.append(float(loss))
  assert losses[-1] < 0.7 * losses[0]
  assert optax_clip.metrics(state)


@pytest.mark.parametrize(
  "name", ["layers", "skip_spikes", "all", "clippy", "stable_spam"]
)
def test_haiku(name):
  x = jax.random.normal(jax.random.key(1), (16, 4))
  network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 2])(x)))
  params = network.init(jax.random.key(0), x)
  tx = optax.with_extra_args_support(TXS[name]())
  state = tx.init(params)

  @jax.jit
  def step(params, state):
    def loss_fn(params):
      return jnp.mean((network.apply(params, x) - x[:, :2]) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = tx.update(grads, state, params, loss=loss)
    return optax.apply_updates(params, updates), state, loss

  losses = []
  for _ in range(30):
    params, state, loss = step(params, state)
    losses.append(float(loss))
  assert losses[-1] < 0.7 * losses[0]
  if name == "layers":
    assert "mlp/~/linear_0/w" in optax_clip.layer_metrics(state, params).layers
