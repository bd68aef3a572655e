"""What `metrics` reads out of every kind of optimizer state."""

import dataclasses

from flax import nnx
import flax.linen
from flax.training import train_state
from helpers.registry import RESCALING
from helpers.registry import ROWS
from helpers.registry import names
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import metrics

FIELDS = {
  "norm",
  "limit",
  "coefficient",
  "clipped_fraction",
  "norm_after",
  "clip_rate",
  "nonfinite_rate",
  "steps",
  "steps_clipped",
  "steps_nonfinite",
  "last_clipped",
  "last_nonfinite",
  "clipped",
  "nonfinite",
}
NAME = "clip_by_global_norm"
GRADS = {"w": jnp.array([3.0, 4.0]), "b": jnp.zeros(2)}
PARAMS = {"w": jnp.array([1.0, 1.0]), "b": jnp.ones(2)}


@pytest.fixture(autouse=True)
def implicit_promotion():
  """Optax and Flax promote dtypes and ranks implicitly."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def plain(values):
  return {key: value.item() for key, value in values.items()}


def of(name, values):
  """The metrics of one transformation, as Python numbers."""
  return {
    key.removeprefix(name + "/"): value.item()
    for key, value in values.items()
    if key.startswith(name + "/")
  }


def after(tx, *steps, params=PARAMS):
  state = tx.init(params)
  update = jax.jit(tx.update)
  for updates in steps:
    _, state = update(updates, state, params)
  return state


ONCE_CLIPPED = {
  "norm": 5.0,
  "limit": 1.0,
  "coefficient": np.float32(0.2).item(),
  "clipped_fraction": 1.0,
  "norm_after": 1.0,
  "clip_rate": 1.0,
  "nonfinite_rate": 0.0,
  "steps": 1,
  "steps_clipped": 1,
  "steps_nonfinite": 0,
  "last_clipped": 1,
  "last_nonfinite": 0,
  "clipped": 1,
  "nonfinite": 0,
}


def clipped():
  return optax_clip.clip_by_global_norm(1.0)


def labelled(params):
  return {"w": "clipped", "b": "free"} if isinstance(params, dict) else "clipped"


WRAPPERS = {
  "alone": clipped,
  "chain": lambda: optax.chain(clipped(), optax.adam(0.1)),
  "nested chain": lambda: optax.chain(
    optax.trace(0.9), optax.chain(optax.identity(), clipped())
  ),
  "named_chain": lambda: optax.named_chain(
    ("clip", clipped()), ("scale", optax.scale(-0.1))
  ),
  "masked": lambda: optax.masked(clipped(), {"w": True, "b": False}),
  "multi_transform": lambda: optax.multi_transform(
    {"clipped": optax.chain(clipped(), optax.sgd(0.1)), "free": optax.sgd(0.1)},
    labelled,
  ),
  "inject_hyperparams": lambda: optax.inject_hyperparams(
    optax_clip.clip_by_global_norm
  )(max_norm=1.0),
  "injected chain": lambda: optax.inject_hyperparams(
    lambda rate, limit: optax.chain(
      optax_clip.clip_by_global_norm(limit), optax.sgd(rate)
    )
  )(rate=0.1, limit=1.0),
  "MultiSteps": lambda: optax.MultiSteps(optax.chain(clipped(), optax.sgd(0.1)), 1),
  "apply_if_finite": lambda: optax.apply_if_finite(
    optax.chain(clipped(), optax.sgd(0.1)), 3
  ),
  "all of them": lambda: optax.apply_if_finite(
    optax.chain(
      optax.masked(optax.chain(clipped(), optax.identity()), {"w": True, "b": True}),
      optax.adamw(0.1),
    ),
    3,
  ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_through_wrappers(wrapper, jit):
  tx = WRAPPERS[wrapper]()
  state = tx.init(PARAMS)
  before = metrics(state)
  assert set(before) == {f"{NAME}/{field}" for field in FIELDS}
  assert before[f"{NAME}/steps"] == 0
  update = jax.jit(tx.update) if jit else tx.update
  _, state = update(GRADS, state, PARAMS)
  values = metrics(state)
  assert set(values) == set(before)
  got = of(NAME, values)
  assert got.pop("coefficient") == pytest.approx(0.2, rel=2e-7)
  assert got == {k: v for k, v in ONCE_CLIPPED.items() if k != "coefficient"}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_values_are_scalar_arrays_of_a_fixed_dtype(wrapper):
  for key, value in metrics(WRAPPERS[wrapper]().init(PARAMS)).items():
    assert isinstance(value, jax.Array), key
    assert value.shape == (), key
    field = key.rsplit("/", 1)[1]
    counts = field in ("clipped", "nonfinite") or field.startswith(("steps", "last"))
    assert value.dtype == (jnp.int32 if counts else jnp.float32), key


def test_accumulated_steps_count_once():
  """MultiSteps passes the mean of 3 gradients on: one clip."""
  tx = optax.MultiSteps(optax.chain(clipped(), optax.sgd(0.1)), 3)
  state = tx.init(PARAMS)
  for _ in range(3):
    assert metrics(state)[f"{NAME}/steps"] == 0
    _, state = tx.update(GRADS, state, PARAMS)
  assert of(NAME, metrics(state))["steps"] == 1
  assert of(NAME, metrics(state))["norm"] == pytest.approx(5.0, rel=5e-7)


def test_injected_limit_is_the_recorded_one():
  tx = WRAPPERS["inject_hyperparams"]()
  state = tx.init(PARAMS)
  state.hyperparams["max_norm"] = jnp.float32(2.0)
  _, state = tx.update(GRADS, state, PARAMS)
  assert of(NAME, metrics(state))["limit"] == 2.0


def test_scheduled_limit_is_the_recorded_one():
  tx = optax_clip.clip_by_global_norm(optax.linear_schedule(4.0, 1.0, 3))
  limits = []
  state = tx.init(PARAMS)
  for _ in range(4):
    _, state = tx.update(GRADS, state, PARAMS)
    limits.append(of(NAME, metrics(state))["limit"])
  assert limits == [4.0, 3.0, 2.0, 1.0]


# --- Flax ---------------------------------------------------------------------


class TwoLeaves(nnx.Module):
  def __init__(self):
    self.w = nnx.Param(jnp.array([3.0, 4.0]))

  def __call__(self):
    # Its gradient is w itself.
    return 0.5 * jnp.sum(self.w[...] ** 2)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_nnx_optimizer(jit):
  model = TwoLeaves()
  tx = optax.chain(clipped(), optax.sgd(0.1))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  def step(model, optimizer):
    grads = nnx.grad(lambda m: m())(model)
    optimizer.update(model, grads)
    return metrics(optimizer)

  values = (nnx.jit(step) if jit else step)(model, optimizer)
  assert of(NAME, values)["norm"] == 5.0
  assert plain(metrics(optimizer)) == plain(values)
  assert plain(metrics(optimizer.opt_state)) == plain(values)


def test_linen_train_state():
  model = flax.linen.Dense(2)
  x = jnp.ones((1, 3))
  params = model.init(jax.random.key(0), x)["params"]
  state = train_state.TrainState.create(
    apply_fn=model.apply,
    params=params,
    tx=optax.chain(clipped(), optax.sgd(0.1)),
  )

  @jax.jit
  def step(state):
    def loss(params):
      return 100 * jnp.sum(state.apply_fn({"params": params}, x))

    grads = jax.grad(loss)(state.params)
    state = state.apply_gradients(grads=grads)
    return state, metrics(state)

  state, values = step(state)
  # 6 weights and 2 biases, each with the gradient 100.
  assert of(NAME, values)["norm"] == pytest.approx(100 * 8**0.5, rel=5e-7)
  assert plain(metrics(state)) == plain(values)
  assert plain(metrics(state.opt_state)) == plain(values)


# --- Keys ---------------------------------------------------------------------


def test_several_clips_of_one_name():
  tx = optax.chain(
    optax_clip.clip_by_global_norm(2.0),
    optax_clip.clip(1.0, record=True),
    optax_clip.clip_by_global_norm(1.0),
    optax_clip.clip_by_global_norm(0.5),
  )
  state = tx.init(PARAMS)
  keys = list(metrics(state))
  assert len(keys) == 4 * len(FIELDS)
  _, state = jax.jit(tx.update)(GRADS, state, PARAMS)
  values = metrics(state)
  assert list(values) == keys
  assert of(NAME, values)["limit"] == 2.0
  assert of(f"{NAME}_1", values)["limit"] == 1.0
  assert of(f"{NAME}_2", values)["limit"] == 0.5
  assert of("clip", values)["norm"] == pytest.approx(1.6, rel=5e-7)


def test_names_chosen_by_the_user():
  tx = optax.chain(
    optax_clip.clip_by_global_norm(2.0, name="raw"),
    optax_clip.clip_by_layer_norm(1.0, name="layers"),
  )
  values = metrics(after(tx, GRADS))
  assert set(values) == {f"{n}/{f}" for n in ("raw", "layers") for f in FIELDS}
  assert values["raw/norm"] == 5.0
  assert values["layers/norm"] == 2.0


def test_a_chosen_name_that_looks_numbered_keeps_keys_distinct():
  tx = optax.chain(
    optax_clip.clip_by_global_norm(3.0, name="a_1"),
    optax_clip.clip_by_global_norm(2.0, name="a"),
    optax_clip.clip_by_global_norm(1.0, name="a"),
  )
  values = metrics(after(tx, GRADS))
  limits = {k: v.item() for k, v in values.items() if k.endswith("/limit")}
  assert limits == {"a_1/limit": 3.0, "a/limit": 2.0, "a_2/limit": 1.0}


every_row = pytest.mark.parametrize("row", ROWS, ids=names(ROWS))


@every_row
def test_default_name_is_that_of_the_function(row):
  tx = row.make(record=True)
  values = jax.eval_shape(
    lambda g: metrics(tx.update(g, tx.init(PARAMS), PARAMS)[1]), GRADS
  )
  assert set(values) == {f"{n}/{field}" for n in row.recorded() for field in FIELDS}


@every_row
def test_nothing_recorded_nothing_read(row):
  tx = optax.chain(row.make(record=False), optax.adam(0.1))
  state = tx.init(PARAMS)
  _, later = jax.eval_shape(tx.update, GRADS, state, PARAMS)
  assert metrics(state, allow_empty=True) == metrics(later, allow_empty=True) == {}


@pytest.mark.parametrize("state", [optax.EmptyState(), (), None, {"a": jnp.ones(2)}])
def test_states_of_others_hold_nothing(state):
  assert metrics(state, allow_empty=True) == {}


# --- Inside jit and scan ------------------------------------------------------


def test_carried_by_scan():
  tx = optax.chain(clipped(), optax.sgd(0.1))
  scales = jnp.array([0.1, 1.0, 2.0, 0.0])

  def step(state, scale):
    updates = jax.tree.map(lambda g: scale * g, GRADS)
    _, state = tx.update(updates, state, PARAMS)
    return state, metrics(state)

  state, history = jax.jit(lambda s: jax.lax.scan(step, s, scales))(tx.init(PARAMS))
  np.testing.assert_array_equal(history[f"{NAME}/norm"], np.float32([0.5, 5, 10, 0]))
  np.testing.assert_array_equal(history[f"{NAME}/clipped_fraction"], [0, 1, 1, 0])
  np.testing.assert_array_equal(history[f"{NAME}/steps"], [1, 2, 3, 4])
  np.testing.assert_array_equal(history[f"{NAME}/steps_clipped"], [0, 1, 2, 2])
  assert of(NAME, metrics(state))["steps"] == 4


def test_reading_computes_nothing_but_rates():
  """`metrics` takes vectors apart, and divides rates by the weight of all steps."""
  state = after(clipped(), GRADS)
  equations = jax.make_jaxpr(metrics)(state).eqns
  done = [
    x for x in equations if x.primitive.name not in ("slice", "squeeze", "copy_p")
  ]
  assert len(done) <= 9
  assert all(x.outvars[0].aval.size == 1 for x in done)


# --- Counters -----------------------------------------------------------------

NAN = {"w": jnp.array([jnp.nan, 1.0]), "b": jnp.zeros(2)}
INF = {"w": jnp.array([jnp.inf, 1.0]), "b": jnp.zeros(2)}
SMALL = {"w": jnp.array([0.3, 0.4]), "b": jnp.zeros(2)}
STEPS = (SMALL, GRADS, NAN, GRADS, INF, SMALL, NAN)


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
@pytest.mark.parametrize("row", RESCALING, ids=names(RESCALING))
def test_counters(row, nonfinite):
  # The gradients of 5 exceed a limit of 1, or of 2 in the odd group.
  tx = row.make(1.0, nonfinite=nonfinite)
  update = jax.jit(tx.update)
  state = tx.init(PARAMS)
  seen = []
  for updates in STEPS:
    _, state = update(updates, state, PARAMS)
    got = of(row.name, metrics(state))
    seen.append((got["steps"], got["steps_clipped"], got["steps_nonfinite"]))
  assert seen == [
    (1, 0, 0),
    (2, 1, 0),
    (3, 1, 1),
    (4, 2, 1),
    (5, 2, 2),
    (6, 2, 2),
    (7, 2, 3),
  ]


def test_nonfinite_norms_are_recorded_as_they_are():
  tx = clipped()
  assert np.isnan(of(NAME, metrics(after(tx, NAN)))["norm"])
  assert of(NAME, metrics(after(tx, INF)))["norm"] == float("inf")


def test_of_layers():
  """One of two layers is clipped: norms 5 and 0.5, limit 1."""
  updates = {"w": GRADS["w"], "b": SMALL["w"]}
  tx = optax_clip.clip_by_layer_norm(1.0)
  got = of("clip_by_layer_norm", metrics(after(tx, updates)))
  assert got["norm"] == 5.0
  assert got["limit"] == 1.0
  assert got["coefficient"] == pytest.approx(0.2, rel=2e-7)
  assert got["clipped_fraction"] == 0.5
  assert got["steps_clipped"] == 1


def test_of_groups():
  """Of three groups, two are clipped; the limit is the smallest."""
  tx = optax_clip.clip_by_group_norm(
    {"w": "x", "b": "y", "c": "z"}, {"x": 1.0, "y": 0.25, "z": float("inf")}
  )
  updates = {"w": GRADS["w"], "b": SMALL["w"], "c": 100 * jnp.ones(4)}
  got = of("clip_by_group_norm", metrics(after(tx, updates, params=updates)))
  assert got["norm"] == 200.0
  assert got["limit"] == 0.25
  assert got["coefficient"] == pytest.approx(0.2, rel=2e-7)
  assert got["clipped_fraction"] == pytest.approx(2 / 3, rel=1e-7)


def test_of_units():
  """Columns are units: ratios of 5, 0 and 0.5 to weights of norm 1; a bias of 2."""
  params = {"k": jnp.array([[0.6, 1.0, 0.0], [0.8, 0.0, 1.0]]), "b": jnp.ones(1)}
  updates = {"k": jnp.array([[3.0, 0.0, 0.3], [4.0, 0.0, 0.4]]), "b": jnp.full(1, 2.0)}
  tx = optax_clip.adaptive_grad_clip(1.0)
  got = of("adaptive_grad_clip", metrics(after(tx, updates, params=params)))
  assert got["norm"] == pytest.approx(5.0, rel=5e-7)
  assert got["limit"] == 1.0
  assert got["coefficient"] == pytest.approx(0.2, rel=5e-7)
  assert got["clipped_fraction"] == 0.5


def test_of_elements():
  tx = optax_clip.clip(1.0, record=True)
  got = of("clip", metrics(after(tx, GRADS)))
  assert got["norm"] == 4.0
  assert got["coefficient"] == 0.25


def test_empty_tree():
  got = of(NAME, metrics(after(clipped(), {}, params={})))
  assert (got["steps"], got["steps_clipped"], got["norm"]) == (1, 0, 0.0)


def test_norm_beyond_the_largest_float():
  updates = {"w": jnp.full(4, 3e38), "b": jnp.zeros(2)}
  got = of(NAME, metrics(after(clipped(), updates)))
  assert got["norm"] == np.finfo(np.float32).max
  assert got["steps_clipped"] == 1
  assert got["steps_nonfinite"] == 0


# --- States of several optimizers -----------------------------------------------


def sharpness_aware():
  """What SAM of optax keeps: the states of an outer and of an inner optimizer."""
  outer = optax_clip.dynamic_loss_scale(
    optax_clip.observe(
      optax.chain(
        optax_clip.clip_by_global_norm(1.0, name="outer", record="layers"),
        optax.sgd(0.1),
      ),
      4,
    )
  )
  inner = optax.chain(optax.contrib.normalize(), optax_clip.clip(1.0, record=True))
  return outer, optax.contrib.sam(outer, inner)


def test_all_optimizers_of_a_state_are_read():
  outer, tx = sharpness_aware()
  state = tx.init(PARAMS)
  keys = {key.split("/")[0] for key in metrics(state)}
  assert keys == {"outer", "observe", "dynamic_loss_scale", "clip"}
  # What others read does not stand in one of them only.
  twice = state._replace(adv_state=(state.adv_state, outer.init(PARAMS)))
  for read in (
    optax_clip.loss_scale,
    optax_clip.norm_history,
    lambda state: optax_clip.layer_metrics(state, PARAMS),
  ):
    read(state)
    with pytest.raises(ValueError, match="opt_state holds 2 "):
      read(twice)


def test_an_object_with_two_states_is_read_whole():
  @jax.tree_util.register_dataclass
  @dataclasses.dataclass
  class Both:
    opt_state: object
    slow: object

  first = optax_clip.clip_by_global_norm(1.0)
  second = optax_clip.clip_by_layer_norm(1.0)
  state = Both(first.init(PARAMS), second.init(PARAMS))
  keys = {key.split("/")[0] for key in metrics(state)}
  assert keys == {"clip_by_global_norm", "clip_by_layer_norm"}


def test_an_object_that_is_no_tree_is_asked_for_its_state():
  class Trainer:
    opt_state = optax_clip.clip_by_global_norm(1.0).init(PARAMS)

  assert metrics(Trainer())["clip_by_global_norm/steps"] == 0


def test_a_state_of_another_chain_says_how_to_convert_it():
  """A clip by a fixed limit takes the state that optax's has, and records nothing."""
  ours, theirs = (
    optax.chain(x.clip_by_global_norm(1.0), optax.sgd(0.1)) for x in (optax_clip, optax)
  )
  _, state = ours.update(GRADS, theirs.init(PARAMS))
  for read in (
    metrics,
    optax_clip.loss_scale,
    optax_clip.norm_history,
    lambda state: optax_clip.layer_metrics(state, PARAMS),
  ):
    with pytest.raises(ValueError, match=r"optax_clip\.convert_state\(tx, params"):
      read(state)
