"""States of other optimizers become ours: what they hold is kept, nothing is lost."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
pytest.importorskip("orbax.checkpoint")
from flax import nnx
from flax import serialization
from flax.training.train_state import TrainState
import helpers.registry as registry
import orbax.checkpoint as ocp

import optax_clip
from optax_clip import thresholds

# optax, Flax and Orbax promote implicitly.
pytestmark = pytest.mark.foreign

PARAMS = {
  "w": jnp.full((4, 3), 0.5),
  "b": {"inner": jnp.zeros(3), "value": jnp.ones(2)},
}
SCHEDULE = optax.piecewise_constant_schedule(2.0**-4, {15: 0.5, 40: 0.5})


@jax.jit
def gradients(params, step):
  """Gradients of a small loss that depends on the step."""
  key = jax.random.fold_in(jax.random.key(0), step)
  x = jax.random.normal(key, (8, 4))

  def loss(p):
    y = jnp.tanh(x @ p["w"] + p["b"]["inner"])
    return jnp.mean((y.sum(axis=1) * p["b"]["value"][0] - x[:, 0]) ** 2)

  return short(jax.grad(loss)(params))


def short(grads):
  """Rounds gradients to 8 bits, so that their squares are floats."""
  return jax.tree.map(lambda g: g.astype(jnp.bfloat16).astype(jnp.float32), grads)


def trained(tx, params, state, first, steps):
  update = jax.jit(tx.update)
  for i in range(first, first + steps):
    updates, state = update(gradients(params, i), state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def adamw():
  """AdamW in which no product is rounded that XLA may contract with an addition.

  Beside a clip it may contract others: then the bits would not be the same.
  """
  inner = optax.adamw(SCHEDULE, b1=0.5, b2=0.5, weight_decay=2.0**-7)
  return optax.chain(optax.identity(), inner, optax.identity())


def old_chain(max_norm=1e3):
  return optax.chain(optax.clip_by_global_norm(max_norm), adamw())


def new_chain(max_norm=1e3, **keywords):
  return optax.chain(optax_clip.clip_by_global_norm(max_norm, **keywords), adamw())


def same(a, b):
  """Whether two trees have the same structure and bits."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  return all(
    x.dtype == y.dtype and x.tobytes() == y.tobytes()
    for x, y in zip(*(map(np.asarray, jax.tree.leaves(t)) for t in (a, b)), strict=True)
  )


def by_orbax(folder, state, *target):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / "state", state)
    checkpointer.wait_until_finished()
    return checkpointer.restore(folder / "state", *target)


READERS = {
  "as it is": lambda folder, state: state,
  "pickle": lambda folder, state: pickle.loads(pickle.dumps(state)),
  "orbax": by_orbax,
  "orbax with a target": lambda folder, state: by_orbax(
    folder, state, jax.eval_shape(lambda: state)
  ),
  "msgpack": lambda folder, state: serialization.msgpack_restore(
    serialization.to_bytes(state)
  ),
}
OURS = {
  "record": new_chain,
  "layers": lambda: new_chain(record="layers"),
  "no limit": lambda: new_chain(float("inf")),
  "guard": lambda: optax_clip.skip_nonfinite(new_chain()),
  "guards": lambda: optax_clip.observe(
    optax_clip.skip_spikes(optax_clip.skip_nonfinite(new_chain(), record="layers"))
  ),
  "a threshold that learns": lambda: optax.chain(
    optax_clip.autoclip(percentile=100.0), adamw()
  ),
}


CASES = [
  *(("guards", reader) for reader in READERS),
  *((new, "msgpack") for new in OURS if new != "guards"),
]


@pytest.fixture(scope="module")
def undisturbed():
  """Parameters and states after 20 steps of optax, and after 50 more."""
  old = old_chain()
  middle = trained(old, PARAMS, old.init(PARAMS), 0, 20)
  return middle, trained(old, *middle, 20, 50)


@pytest.mark.parametrize(("new", "reader"), CASES)
def test_a_run_goes_on_as_if_nothing_had_changed(new, reader, undisturbed, tmp_path):
  (params, state), (last_params, last_state) = undisturbed
  tx = OURS[new]()
  restored = READERS[reader](tmp_path, state)
  converted = optax_clip.convert_state(tx, params, restored)
  assert jax.tree.structure(converted) == jax.tree.structure(tx.init(params))
  resumed, converted = trained(tx, params, converted, 20, 50)
  assert same(last_params, resumed)
  assert not same(last_params, params)
  # And back: what the new chain learned is named.
  back = optax_clip.convert_state(old_chain(), params, converted, drop=("",))
  assert same(back, last_state)


class Linear(nnx.Module):
  def __init__(self, rngs):
    self.layer = nnx.Linear(4, 3, rngs=rngs)


def nnx_steps(model, optimizer, first, steps):
  @nnx.jit
  def grads(model, i):
    x = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (8, 4))
    return short(nnx.grad(lambda m: jnp.mean((m.layer(x) - x[:, :3]) ** 2))(model))

  @nnx.jit
  def update(model, optimizer, grads):
    optimizer.update(model, grads)

  for i in range(first, first + steps):
    update(model, optimizer, grads(model, i))


def stored_states(folder, whole):
  """What may be left of an `nnx.Optimizer` after it was stored."""
  state = nnx.state(whole)
  return {
    "the optimizer": whole,
    "the state": state,
    "its pure dictionary": nnx.to_pure_dict(state)["opt_state"],
    "orbax": by_orbax(folder / "a", state)["opt_state"],
    "orbax, pure": by_orbax(folder / "b", nnx.to_pure_dict(state))["opt_state"],
  }


def test_an_optimizer_of_nnx(tmp_path):
  model = Linear(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, old_chain(), wrt=nnx.Param)
  nnx_steps(model, optimizer, 0, 20)
  weights = nnx.to_pure_dict(nnx.state(model))
  stored = stored_states(tmp_path, nnx.clone(optimizer))
  nnx_steps(model, optimizer, 20, 50)
  tx = optax_clip.skip_nonfinite(new_chain(record="layers"))
  restored = Linear(nnx.Rngs(1))
  nnx.update(restored, weights)
  # As in docs/resuming.md.
  resumed = nnx.Optimizer(restored, tx, wrt=nnx.Param)
  params = nnx.as_pure(nnx.state(restored, nnx.Param))
  states = [optax_clip.convert_state(tx, params, old) for old in stored.values()]
  assert all(same(states[0], state) for state in states[1:])
  nnx.update(resumed.opt_state, nnx.state(states[0]))
  nnx_steps(restored, resumed, 20, 50)
  assert same(*(nnx.as_pure(nnx.state(m)) for m in (model, restored)))
  assert optax_clip.metrics(resumed)["skip_nonfinite/steps"] == 50


def test_a_train_state():
  def steps(state, first, steps):
    params, opt_state = trained(state.tx, state.params, state.opt_state, first, steps)
    return state.replace(params=params, opt_state=opt_state)

  old = TrainState.create(apply_fn=None, params=PARAMS, tx=old_chain())
  old = steps(old, 0, 20)
  stored = serialization.msgpack_restore(serialization.to_bytes(old))
  tx = optax_clip.skip_nonfinite(new_chain())
  for part in (old, stored["opt_state"]):
    state = optax_clip.convert_state(tx, old.params, part)
    new = old.replace(tx=tx, opt_state=state)
    assert same(steps(new, 20, 5).params, steps(old, 20, 5).params)


# --- Whatever the transformation ------------------------------------------------


def used(tx, params=PARAMS):
  """A state of a transformation, no two values of which are equal."""
  leaves, treedef = jax.tree.flatten(tx.init(params))
  ends = np.cumsum([x.size for x in leaves])
  values = [
    jnp.arange(end - x.size + 1, end + 1).reshape(x.shape).astype(x.dtype)
    for x, end in zip(leaves, ends, strict=True)
  ]
  return jax.tree.unflatten(treedef, values)


def plain(state):
  """A state as msgpack restores it: arrays of NumPy in dictionaries."""
  if hasattr(state, "_asdict"):
    state = state._asdict()
  elif isinstance(state, (list, tuple)):
    state = {str(i): x for i, x in enumerate(state)}
  elif not isinstance(state, dict):
    return np.asarray(state)
  return {key: plain(x) for key, x in state.items()}


def made(row, **keywords):
  return optax.chain(row.make(**keywords), optax.adam(1e-3))


def around(inner):
  inner = optax_clip.skip_nonfinite(optax_clip.dynamic_loss_scale(inner))
  inner = optax_clip.skip_spikes(inner, thresholds.average(), signals=("norm", "loss"))
  return optax_clip.observe(inner, window=4)


@pytest.mark.parametrize("row", registry.ROWS, ids=registry.names(registry.ROWS))
class TestRows:
  def test_its_own_state_is_kept_whole(self, row):
    for record in (True, "layers"):
      tx = made(row, record=record)
      state = used(tx)
      for old in (state, plain(state)):
        assert same(optax_clip.convert_state(tx, PARAMS, old), state)

  def test_what_it_learned_outlives_records_names_and_guards(self, row):
    bare = made(row, record=False)
    state = used(bare)
    others = {
      made(row, record="layers", name="mine"): (),
      around(made(row)): (".inner.memory", ".inner.inner.inner.memory", ".seen"),
      optax.chain(optax.identity(), optax.chain(optax.masked(made(row), True))): (),
    }
    for tx, drop in others.items():
      for old in (state, plain(state)):
        converted = optax_clip.convert_state(tx, PARAMS, old)
        back = optax_clip.convert_state(bare, PARAMS, converted, drop=drop)
        assert same(back, state)


def test_methods_do_not_take_over_what_means_something_else():
  learning = [row for row in registry.ROWS if row.stateful]
  taken = set()
  for row in learning:
    state = used(made(row, record=False))
    for other in learning:
      try:
        optax_clip.convert_state(made(other, record=False), PARAMS, state)
      except ValueError:
        continue
      if other is not row:
        taken.add((row.name, other.name))
  # Which is a chain of the two.
  assert taken == {("adaclip", "stable_spam"), ("adagn", "stable_spam")}


def test_a_cap_and_a_warmup_do_not_cost_what_was_learned():
  def tx(threshold):
    measure, action = optax_clip.measures.global_norm(), optax_clip.actions.rescale()
    return optax_clip.clip_with(measure, threshold, action)

  average = thresholds.average()
  known = used(tx(average))
  capped = tx(thresholds.at_most(thresholds.warmup(average, 10), SCHEDULE))
  state = optax_clip.convert_state(capped, PARAMS, known)
  assert same(state.threshold.threshold.threshold, known.threshold)
  assert int(state.threshold.cap.step) == 0
  with pytest.raises(ValueError, match=r"old_state\.threshold\.threshold \(seen"):
    optax_clip.convert_state(tx(average), PARAMS, used(capped))


# --- What is never lost ---------------------------------------------------------


def refused(tx, old, params=PARAMS, **keywords):
  with pytest.raises(ValueError, match=r"old_state") as caught:
    optax_clip.convert_state(tx, params, old, **keywords)
  return str(caught.value)


class TestLosses:
  def test_a_moment_without_a_place_is_named(self):
    tx = optax.chain(optax_clip.clip_by_global_norm(1.0), optax.sgd(0.1))
    for old in (used(old_chain()), plain(used(old_chain()))):
      message = refused(tx, old)
      assert "(count, mu, nu): tx's state has no such part" in message
      path = "[1][1][0]" if isinstance(old, tuple) else "['1']['1']['0']"
      assert f"old_state{path} (" in message
      # What the error says is what may be passed.
      drop = eval(message.rpartition("drop=")[2].rstrip("."))
      state = optax_clip.convert_state(tx, PARAMS, old, drop=drop)
      assert same(state, tx.init(PARAMS))

  def test_moments_of_other_shapes_and_dtypes(self):
    other = {**PARAMS, "w": jnp.zeros((4, 5))}
    message = refused(new_chain(), used(old_chain()), other)
    assert "mu['w'] is float32[4, 3]" in message
    assert "mu['w'] is float32[4, 5]" in message
    half = optax.adam(0.1, mu_dtype=jnp.bfloat16)
    assert "bfloat16[3]" in refused(half, used(optax.adam(0.1)))
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), used(optax.adam(0.1)))
    assert "float64" in refused(optax.adam(0.1), wide)

  def test_moments_of_another_model(self):
    more = {**PARAMS, "head": jnp.zeros(2)}
    assert "also has mu/head" in refused(new_chain(), used(old_chain()), more)
    less = {"w": PARAMS["w"]}
    assert "lacks mu/b" in refused(new_chain(), used(old_chain()), less)

  def test_moments_of_another_optimizer(self):
    assert "(count, mu, nu)" in refused(optax.lion(0.1), used(optax.adam(0.1)))
    assert "(trace)" in refused(optax.adam(0.1), used(optax.sgd(0.1, momentum=0.9)))

  def test_windows_of_another_length(self):
    message = refused(
      optax_clip.autoclip(window=8), used(optax_clip.autoclip(window=9))
    )
    assert "float32[1, 9]" in message
    assert "float32[1, 8]" in message

  def test_what_guards_have_learned(self):
    inner = optax.adam(0.1)
    for guard, part in (
      (optax_clip.dynamic_loss_scale, ".memory (dynamic_loss_scale)"),
      (optax_clip.skip_spikes, ".memory.threshold (early)"),
    ):
      assert part in refused(inner, used(guard(inner)))
      state = optax_clip.convert_state(
        inner, PARAMS, used(guard(inner)), drop=(".memory",)
      )
      assert int(state[0].count) > 0

  def test_what_counts_but_one_count_does_not_say_where(self):
    one = optax.chain(optax.scale_by_schedule(SCHEDULE), optax.scale(1.0))
    two = optax.chain(one, optax.scale_by_schedule(SCHEDULE))
    for old, tx in ((one, two), (two, one)):
      assert "which is which?" in refused(tx, used(old))
    # Not even of a wrapper, whose counters may be lost with it.
    once = optax.apply_if_finite(optax.sgd(0.1), 1)
    twice = optax.chain(once, once)
    assert "which is which?" in refused(twice, used(once))

  def test_what_a_wrapper_keeps_is_named_without_what_is_in_it(self):
    old = optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()
    state = used(old)
    message = refused(optax.adam(0.1), state)
    assert message.endswith("drop=('.mini_step', '.gradient_step', '.acc_grads').")
    drop = (".mini_step", ".gradient_step", ".acc_grads")
    converted = optax_clip.convert_state(optax.adam(0.1), PARAMS, state, drop=drop)
    assert same(converted, state.inner_opt_state)
    assert "(count, mu, nu)" in refused(optax.sgd(0.1), state, drop=drop)

  def test_a_path_that_is_none(self):
    for path in ("[7]", "[1][1", ".mu"):
      message = refused(new_chain(), used(old_chain()), drop=(path,))
      assert repr(path) in message
      assert "'[1][1][0]'" in message

  def test_no_path_stands_for_what_fits_nowhere(self):
    state = used(old_chain())
    converted = optax_clip.convert_state(new_chain(), PARAMS, state, drop="")
    assert same(converted[1], state[1])

  def test_what_is_dropped_begins_anew_though_it_fits(self):
    state, tx = used(old_chain()), new_chain()
    converted = optax_clip.convert_state(tx, PARAMS, state, drop="[1][1][0].nu")
    assert same(converted[1][1][0].mu, state[1][1][0].mu)
    assert same(converted[1][1][0].nu, tx.init(PARAMS)[1][1][0].nu)

  def test_a_drop_says_which_is_which(self):
    counts = optax.scale_by_schedule(SCHEDULE)
    old = used(optax.chain(counts, optax.scale(1.0), counts))
    converted = optax_clip.convert_state(counts, PARAMS, old, drop="[0]")
    assert same(converted, old[2])

  def test_a_whole_checkpoint(self):
    state = {"params": PARAMS, "opt_state": used(old_chain())}
    assert "pass its 'opt_state'" in refused(new_chain(), state)

  def test_no_transformation(self):
    with pytest.raises(TypeError, match="tx must be"):
      optax_clip.convert_state(PARAMS, new_chain(), used(old_chain()))

  def test_errors_of_steps_lead_here(self):
    for tx in (optax_clip.autoclip(), optax_clip.skip_nonfinite(optax.sgd(0.1))):
      with pytest.raises(TypeError, match=r"optax_clip\.convert_state"):
        tx.update(PARAMS, optax.EmptyState())


def test_the_report_has_everything():
  tx = optax_clip.skip_nonfinite(optax.chain(optax_clip.autoclip(), optax.adam(0.1)))
  old = optax.apply_if_finite(optax.chain(optax.identity(), optax.adam(0.1)), 3)
  lines = []
  optax_clip.convert_state(tx, PARAMS, used(old), report=lines.append)
  assert lines == [
    "kept      .inner_state[1][0] as .inner[1][0]: count, mu, nu\n"
    "new       .inner[0].record['autoclip']\n"
    "new       .inner[0].threshold\n"
    "new       .record['skip_nonfinite']\n"
    "left out  : notfinite_count, last_finite, total_notfinite"
  ]


# --- Hyperparameters ------------------------------------------------------------


def injected(**values):
  """AdamW behind a clip; what is given is injected, numbers or schedules."""

  def make(learning_rate=0.1, max_norm=1.0):
    clip = optax_clip.clip_by_global_norm(max_norm, record=False)
    return optax.chain(clip, optax.adamw(learning_rate))

  static = tuple({"learning_rate", "max_norm"} - set(values))
  return optax.inject_hyperparams(make, static_args=static)(**values)


def stepped(tx, steps=2):
  state = tx.init(PARAMS)
  for _ in range(steps):
    _, state = tx.update(PARAMS, state, PARAMS)
  return state


class TestHyperparameters:
  OLD = injected(learning_rate=SCHEDULE, max_norm=1.0)
  NEW = injected(learning_rate=SCHEDULE, max_norm=5.0)

  @pytest.mark.parametrize("form", [lambda state: state, plain])
  def test_a_new_value_by_drop(self, form):
    old = form(stepped(self.OLD))
    paths = (".hyperparams['max_norm']", ".hyperparams")
    if form is plain:
      paths = ("['hyperparams']['max_norm']", "['hyperparams']")
    kept = optax_clip.convert_state(self.NEW, PARAMS, old)
    assert float(kept.hyperparams["max_norm"]) == 1.0
    for path in paths:
      state = optax_clip.convert_state(self.NEW, PARAMS, old, drop=path)
      assert float(state.hyperparams["max_norm"]) == 5.0
      # Moments, and the step of the schedule, are those of the checkpoint.
      assert same(state.inner_state, kept.inner_state)
      assert same(state.hyperparams_states, kept.hyperparams_states)

  def test_the_report_names_them_and_their_values(self):
    old, lines = stepped(self.OLD), []
    for drop in ((), ".hyperparams['max_norm']"):
      optax_clip.convert_state(self.NEW, PARAMS, old, drop=drop, report=lines.append)
    assert "kept      .hyperparams['learning_rate']: 0.0625" in lines[0]
    assert "kept      .hyperparams['max_norm']: 1\n" in lines[0]
    assert "kept      .hyperparams_states['learning_rate']: count" in lines[0]
    assert "new       .hyperparams['max_norm']\n" in lines[1]
    assert lines[1].endswith("left out  .hyperparams['max_norm']: 1")

  def test_one_more_keeps_the_others(self):
    old = stepped(injected(learning_rate=SCHEDULE))
    state = optax_clip.convert_state(self.NEW, PARAMS, old)
    assert float(state.hyperparams["max_norm"]) == 5.0
    assert same(state.hyperparams_states, old.hyperparams_states)
    assert same(state.inner_state, old.inner_state)
    assert int(state.count) == 2

  def test_one_less_is_named(self):
    less, old = injected(learning_rate=SCHEDULE), stepped(self.OLD)
    message = refused(less, old)
    assert "old_state.hyperparams['max_norm'] (1): tx's state has no such" in message
    assert message.endswith("""drop=(".hyperparams['max_norm']",).""")
    state = optax_clip.convert_state(
      less, PARAMS, old, drop=(".hyperparams['max_norm']",)
    )
    assert same(state.hyperparams_states, old.hyperparams_states)

  def test_all_are_named_at_once(self):
    wide = optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE)
    tx = optax.adamw(0.1)
    message = refused(tx, stepped(wide))
    drop = (".hyperparams", ".hyperparams_states")
    assert message.endswith(f"drop={drop!r}.")
    state = optax_clip.convert_state(tx, PARAMS, stepped(wide), drop=drop)
    assert int(state[0].count) == 2

  def test_one_of_another_dtype(self):
    old = stepped(self.OLD)
    half = optax.tree_utils.tree_set(old, max_norm=jnp.float16(1))
    message = refused(self.NEW, half)
    assert ".hyperparams['max_norm'] is float16[], and in tx's state" in message

  def test_of_shapes_alone(self):
    lines = []
    optax_clip.convert_state(
      self.NEW, PARAMS, jax.eval_shape(self.OLD.init, PARAMS), report=lines.append
    )
    assert "kept      .hyperparams['max_norm']: float32[]\n" in lines[0]


# --- Wrappers of optax ----------------------------------------------------------

WRAPPERS = {
  "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
  "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
  "inject_hyperparams": lambda tx: optax.inject_hyperparams(
    lambda rate: optax.chain(tx, optax.scale(rate))
  )(0.1),
  "masked": lambda tx: optax.masked(tx, {"w": True, "b": False}),
  "labels": lambda tx: optax.multi_transform(
    {"x": tx, "10": tx, "2": optax.set_to_zero()}, {"w": "x", "b": "10"}
  ),
  "conditionally_transform": lambda tx: optax.conditionally_transform(
    tx, lambda step: step > 2
  ),
  "named_chain": lambda tx: optax.named_chain(("clip", tx), ("adam", optax.adam(0.1))),
  "flatten": optax.flatten,
  "sam": lambda tx: optax.contrib.sam(tx, optax.chain(tx, optax.sgd(0.1))),
  "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_of_optax(wrapper):
  wrap = WRAPPERS[wrapper]
  old = wrap(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)))
  new = wrap(optax.chain(optax_clip.clip_by_global_norm(1.0), optax.adam(0.1)))
  guarded = optax_clip.observe(optax_clip.skip_nonfinite(new))
  state = used(old)
  for tx in (new, guarded):
    for form in (state, plain(state)):
      converted = optax_clip.convert_state(tx, PARAMS, form)
      drop = (".seen",) if tx is guarded else ()
      assert same(optax_clip.convert_state(old, PARAMS, converted, drop=drop), state)


def test_a_wrapper_whose_state_is_a_dictionary():
  """As that of MaxText which skips spikes."""

  def wrap(tx):
    def init(params):
      return {"inner_state": tx.init(params), "losses": jnp.zeros(3), "count": 0}

    return optax.GradientTransformation(init, tx.update)

  old, state = wrap(old_chain()), used(old_chain())
  own = {"losses": np.ones(3, np.float32), "count": np.int32(3)}
  drop = ("['count']", "['losses']")
  for inner in (state, plain(state)):
    whole = {"inner_state": inner, **own}
    assert same(optax_clip.convert_state(old, PARAMS, whole)["inner_state"], state)
    assert refused(new_chain(), whole).endswith(f"drop={drop!r}.")
    converted = optax_clip.convert_state(new_chain(), PARAMS, whole, drop=drop)
    assert same(converted[1], state[1])


def test_labels_are_not_confused():
  def tx(*names):
    parts = {name: optax.trace(0.9) for name in names}
    labels = dict(zip(PARAMS, names, strict=True))
    return optax.partition(parts, labels)

  state = used(tx("x", "y"))
  assert "(trace)" in refused(tx("x", "z"), state)
  converted = optax_clip.convert_state(
    optax_clip.skip_nonfinite(tx("x", "y")), PARAMS, state
  )
  assert same(converted.inner, state)


# --- Without values, and on many devices ----------------------------------------


def test_shapes_alone():
  tx, old = (
    optax_clip.skip_nonfinite(new_chain()),
    jax.eval_shape(old_chain().init, PARAMS),
  )
  expected = jax.eval_shape(tx.init, PARAMS)
  shapes = jax.eval_shape(lambda: PARAMS)
  assert optax_clip.convert_state(tx, shapes, old) == expected
  assert optax_clip.convert_state(tx, PARAMS, old) == expected
  traced = jax.eval_shape(lambda p, s: optax_clip.convert_state(tx, p, s), shapes, old)
  assert traced == expected
  with pytest.raises(TypeError, match="params have no values"):
    optax_clip.convert_state(tx, shapes, used(old_chain()))
  # Nothing is made that the old state has.
  state = used(old_chain())
  bare = new_chain(record=False)
  assert same(optax_clip.convert_state(bare, shapes, state), state)


@pytest.mark.mesh
class TestMesh:
  def on(self, *spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

  def params(self):
    return jax.device_put(
      PARAMS, {"w": self.on("x"), "b": {"inner": self.on(), "value": self.on("y")}}
    )

  def test_arrays_stay_where_they_are(self):
    state = jax.device_put(used(old_chain()), self.on())
    state[1][1][0].mu["w"] = jax.device_put(state[1][1][0].mu["w"], self.on(None, None))
    params = self.params()
    tx = optax_clip.skip_nonfinite(new_chain())
    for converted in (
      optax_clip.convert_state(tx, params, state),
      optax_clip.convert_state(tx, PARAMS, state),
    ):
      kept = converted.inner[1]
      assert same(kept, state[1])
      assert [x.sharding for x in jax.tree.leaves(kept)] == [
        x.sharding for x in jax.tree.leaves(state[1])
      ]

  @pytest.mark.parametrize("reader", ["orbax", "msgpack", "pickle"])
  def test_others_go_where_the_parameters_are(self, reader, tmp_path):
    state, params = used(old_chain()), self.params()
    old = READERS[reader](tmp_path, state)
    tx = optax_clip.skip_nonfinite(new_chain(record="layers"))
    converted = optax_clip.convert_state(tx, params, old)
    adam = converted.inner[1][1][0]
    assert same(converted.inner[1], state[1])
    for moments in (adam.mu, adam.nu):
      assert jax.tree.map(lambda m, p: m.sharding == p.sharding, moments, params) == (
        jax.tree.map(lambda _: True, params)
      )
    assert adam.count.sharding == self.on()
    # One program takes all of them.
    _, later = jax.jit(tx.update)(params, converted, params)
    assert int(optax_clip.metrics(later)["skip_nonfinite/steps"]) == 1

  def test_shardings_of_a_jitted_conversion(self):
    tx, params = optax_clip.skip_nonfinite(new_chain()), self.params()
    everywhere = jax.tree.map(lambda _: self.on(), jax.eval_shape(tx.init, params))
    convert = jax.jit(
      lambda p, s: optax_clip.convert_state(tx, p, s), out_shardings=everywhere
    )
    state = used(old_chain())
    converted = convert(params, jax.device_put(state, self.on()))
    assert same(converted.inner[1], state[1])
    assert {x.sharding for x in jax.tree.leaves(converted)} == {self.on()}
