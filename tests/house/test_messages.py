"""Errors about what users mix up name the argument, what it was, and what to do."""

from helpers import registry
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import thresholds

pytestmark = pytest.mark.house

G = {"a": jnp.float32([3.0, 4.0]), "b": jnp.ones(3)}
LABELS = {"a": "x", "b": "x"}


def stepped(tx, tree=G, state=None):
  """A step, traced only: the errors are raised by then."""
  state = tx.init(tree) if state is None else state
  tx = optax.with_extra_args_support(tx)
  return jax.eval_shape(
    lambda g, p: tx.update(g, state, p, loss=jnp.float32(1)), tree, tree
  )


def complaint(call):
  """What the error of a call says; it must not be an accident inside."""
  with pytest.raises((TypeError, ValueError)) as caught:
    call()
  return str(caught.value)


def assert_says(message, words):
  """All of the words; of a tuple at least one."""
  for word in words:
    options = word if isinstance(word, tuple) else (word,)
    assert any(option in message for option in options), (word, message)


# --- States ---------------------------------------------------------------------


def scheduled():
  return optax_clip.clip_by_global_norm(optax.constant_schedule(1.0))


def spikes(threshold=None):
  return optax_clip.skip_spikes(optax.sgd(1.0), threshold)


def scaling():
  return optax_clip.dynamic_loss_scale(optax.sgd(1.0))


TAKERS = {
  "skip_nonfinite": lambda: optax_clip.skip_nonfinite(optax.sgd(1.0)),
  "skip_spikes": spikes,
  "dynamic_loss_scale": scaling,
  "observe": lambda: optax_clip.observe(optax.sgd(1.0)),
  "a schedule": scheduled,
  **{row.name: row.make for row in registry.LEARNED},
  # Whatever the default is.
  "zclip without a cap": lambda: optax_clip.zclip(max_norm=None),
}
GUARDS = ("skip_nonfinite", "skip_spikes", "dynamic_loss_scale")

# States of something else, and how an error may call what it was given.
FOREIGN = {
  "of Adam": (optax.adam(1.0).init(G), ("tuple", "ScaleByAdamState")),
  "of a chain": (
    optax.chain(optax_clip.clip_by_global_norm(1.0), optax.adam(1.0)).init(G),
    ("tuple", "ClipState", "ScaleByAdamState"),
  ),
  "of a clip": (optax_clip.clip_by_global_norm(1.0).init(G), "ClipState"),
  "empty": (optax.EmptyState(), "EmptyState"),
  "a dictionary": ({"w": jnp.zeros(2)}, "dict"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", TAKERS)
def test_a_state_of_something_else(name, kind):
  state, called = FOREIGN[kind]
  message = complaint(lambda: stepped(TAKERS[name](), state=state))
  assert_says(message, ["state", called, "init"])
  # It is not of a model with another number of layers, which is another error.
  assert "number of layers" not in message


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", GUARDS)
def test_a_state_of_something_else_in_a_whole_step(name, kind):
  state, called = FOREIGN[kind]
  tx = TAKERS[name]()
  message = complaint(
    lambda: jax.eval_shape(
      lambda g: optax_clip.guarded_step(tx, g, state, G, loss=jnp.float32(1)), G
    )
  )
  assert_says(message, ["state", called, "init"])


# Which of them was given that of which.
RELATED = [
  ("skip_nonfinite", "skip_spikes"),
  ("skip_nonfinite", "dynamic_loss_scale"),
  ("skip_spikes", "skip_nonfinite"),
  ("skip_spikes", "dynamic_loss_scale"),
  ("skip_spikes", "skip_spikes by an average"),
  ("dynamic_loss_scale", "skip_nonfinite"),
  ("dynamic_loss_scale", "skip_spikes"),
  ("autoclip", "adagc"),
  ("autoclip", "a schedule"),
  ("adagc", "autoclip"),
  ("zclip", "zclip without a cap"),
  ("zclip without a cap", "zclip"),
  ("adaclip", "autoclip"),
  ("a schedule", "autoclip"),
  ("stable_spam", "zclip"),
  ("clip_element_spikes", "zclip"),
]


@pytest.mark.parametrize(("name", "other"), RELATED)
def test_a_state_of_another_transformation_of_the_package(name, other):
  makers = {
    **TAKERS,
    "skip_spikes by an average": lambda: spikes(thresholds.average()),
  }
  state = makers[other]().init(G)
  message = complaint(lambda: stepped(makers[name](), state=state))
  assert_says(message, ["state", "init"])


def test_a_state_of_another_window_is_still_said_to_be_that():
  for tx, state in (
    (
      spikes(thresholds.history(6)),
      spikes(thresholds.history(6, window=32)).init(G),
    ),
    (optax_clip.autoclip(window=16), optax_clip.autoclip(window=32).init(G)),
  ):
    assert_says(
      complaint(lambda tx=tx, s=state: stepped(tx, state=s)), ["32", "window"]
    )


# --- Numbers that are none ---------------------------------------------------------

THREE = jnp.ones(3)

# A call that gives several limits where there is one, and the argument.
VECTORS = {
  "clip": (lambda x: stepped(optax_clip.clip(x)), "max_delta"),
  "clip_by_global_norm": (
    lambda x: stepped(optax_clip.clip_by_global_norm(x)),
    "max_norm",
  ),
  "clip_by_layer_norm": (
    lambda x: stepped(optax_clip.clip_by_layer_norm(x)),
    "max_norm",
  ),
  "clip_by_block_rms": (
    lambda x: stepped(optax_clip.clip_by_block_rms(x)),
    "threshold",
  ),
  "adaptive_grad_clip": (
    lambda x: stepped(optax_clip.adaptive_grad_clip(x)),
    "clipping",
  ),
  "zclip": (lambda x: stepped(optax_clip.zclip(max_norm=x)), "max_norm"),
  "clip_by_group_norm": (
    lambda x: stepped(optax_clip.clip_by_group_norm(LABELS, {"x": x})),
    "max_norms['x']",
  ),
  "clip_tree": (lambda x: optax_clip.clip_tree(G, x), "max_norm"),
  "clip_tree, norm": (lambda x: optax_clip.clip_tree(G, 1.0, norm=x), "norm"),
}


@pytest.mark.parametrize("name", VECTORS)
def test_several_limits_where_there_is_one(name):
  call, argument = VECTORS[name]
  message = complaint(lambda: call(THREE))
  assert_says(message, [argument, ("(3,)", "[3]"), "scalar"])


def test_a_known_norm_that_is_an_integer():
  expected, _ = optax_clip.clip_tree(G, 1.0, norm=5.0)
  for norm in (5, np.int64(5), np.array(5)):
    found, same = optax_clip.clip_tree(G, 1.0, norm=norm)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert same == 5
    assert jnp.issubdtype(same.dtype, jnp.floating)


@pytest.mark.parametrize("norm", ["5", True, -5.0, float("nan"), 1j], ids=repr)
def test_a_known_norm_that_is_none(norm):
  if norm != norm:
    # As one that was measured of a NaN would be.
    clipped, _ = optax_clip.clip_tree(G, 1.0, norm=norm, nonfinite="zero")
    assert not any(np.any(x) for x in jax.tree.leaves(clipped))
    return
  message = complaint(lambda: optax_clip.clip_tree(G, 1.0, norm=norm))
  assert_says(message, ["norm must be", f"got {norm!r}"])


@pytest.mark.parametrize("limits", [1.0, [1.0], None, "x", 3], ids=repr)
def test_limits_of_groups_that_are_no_mapping(limits):
  message = complaint(lambda: optax_clip.clip_by_group_norm(LABELS, limits))
  assert_says(message, ["max_norms", f"got {limits!r}", "{'"])


@pytest.mark.parametrize("percentile", [101, -1, float("nan")])
@pytest.mark.parametrize(
  "make", [row.factory for row in registry.ROWS if row.first() == "percentile"]
)
def test_a_percentile_out_of_range(make, percentile):
  message = complaint(lambda: make(percentile))
  assert_says(message, [f"percentile must be between 0 and 100, got {percentile}"])


def test_a_percentile_of_the_threshold_has_its_own_name():
  assert_says(complaint(lambda: thresholds.percentile(101)), ["q must be between"])


SCHEDULE = optax.constant_schedule(1.0)

# Arguments that are numbers only.
NUMBERS = {
  **{
    row.name: (row.factory, row.first())
    for row in registry.ROWS
    if not row.scheduled or row.name == "zclip"
  },
  "zclip, decay": (lambda x: optax_clip.zclip(decay=x), "decay"),
  "zclip, eps": (lambda x: optax_clip.zclip(eps=x), "eps"),
  "adagc, warmup": (lambda x: optax_clip.adagc(warmup=x), "warmup"),
  "adaptive_grad_clip, eps": (lambda x: optax_clip.adaptive_grad_clip(1.0, x), "eps"),
  "clip_by_global_norm, eps": (
    lambda x: optax_clip.clip_by_global_norm(1.0, eps=x),
    "eps",
  ),
  "skip_spikes": (lambda x: optax_clip.skip_spikes(optax.sgd(1.0), factor=x), "factor"),
  "skip_nonfinite": (
    lambda x: optax_clip.skip_nonfinite(optax.sgd(1.0), x),
    "max_consecutive",
  ),
  "dynamic_loss_scale": (
    lambda x: optax_clip.dynamic_loss_scale(optax.sgd(1.0), x),
    "init_scale",
  ),
  "clip_tree": (lambda x: optax_clip.clip_tree(G, x), "max_norm"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_schedule_where_a_number_is_wanted(name):
  make, argument = NUMBERS[name]
  message = complaint(lambda: make(SCHEDULE))
  assert_says(message, [argument, "number", "function"])


@pytest.mark.parametrize("ord", [True, False])
@pytest.mark.parametrize(
  "call",
  [
    lambda x: optax_clip.clip_by_global_norm(1.0, ord=x),
    lambda x: optax_clip.global_norm(G, ord=x),
    lambda x: optax_clip.clip_tree(G, 1.0, ord=x),
    lambda x: optax_clip.measures.layer_norm(ord=x),
  ],
  ids=["clip_by_global_norm", "global_norm", "clip_tree", "measures"],
)
def test_an_order_that_is_a_flag(call, ord):
  assert_says(complaint(lambda: call(ord)), ["ord must be", f"got {ord}"])


# --- Trees ------------------------------------------------------------------------

# Not traced: tracing has errors of its own for such leaves.
CALLS = {
  "clip": lambda tree: optax_clip.clip(1.0).update(tree, ()),
  "clip_by_global_norm": lambda tree: optax_clip.clip_by_global_norm(1.0).update(
    tree, ()
  ),
  "clip_by_layer_norm": lambda tree: optax_clip.clip_by_layer_norm(1.0).update(
    tree, ()
  ),
  "global_norm": optax_clip.global_norm,
  "clip_tree": lambda tree: optax_clip.clip_tree(tree, 1.0),
}


class Thing:
  def __repr__(self):
    return "a thing"


@pytest.mark.parametrize(
  "leaf", ["linear", Thing(), jnp.tanh], ids=["str", "object", "function"]
)
@pytest.mark.parametrize("name", CALLS)
def test_a_leaf_that_is_no_array(name, leaf):
  tree = {"layer": {"w": jnp.ones(2), "kind": leaf}}
  message = complaint(lambda: CALLS[name](tree))
  assert_says(message, ["['layer']['kind']", repr(leaf), "optax.masked"])


TUPLE = ("encoder", "w")
GIVEN = {
  "a tree": {"a": TUPLE, "b": TUPLE},
  "a function": lambda tree: jax.tree.map(lambda _: TUPLE, tree),
  "rules": optax_clip.labels_by_path({"": TUPLE}),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_labels_that_are_tuples_are_labels_or_said_to_be_none(kind):
  refused = None
  try:
    tx = optax_clip.clip_by_group_norm(GIVEN[kind], {TUPLE: 1.0})
    stepped(tx)
  except (TypeError, ValueError) as error:
    refused = str(error)
  if refused is not None:
    assert_says(refused, ["labels", ("tuple", repr(TUPLE)), ("string", "str")])


def test_labels_that_are_arrays():
  labels = {"a": jnp.ones(2), "b": "x"}
  message = complaint(
    lambda: stepped(optax_clip.clip_by_group_norm(labels, {"x": 1.0}))
  )
  assert_says(message, ["labels", "['a']", ("string", "hashable")])


# --- Histories --------------------------------------------------------------------

NORMS = np.linspace(1.0, 2.0, 100)
REPLAYED = {
  "a chain with weight decay": (
    lambda: optax.chain(optax_clip.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    ("params", "one clip"),
  ),
  "a clip by weights": (
    lambda: optax_clip.adaptive_grad_clip(0.1),
    ("params", "one clip"),
  ),
  "groups": (
    lambda: optax_clip.clip_by_group_norm(LABELS, {"x": 1.0}),
    ("one number", "one clip", "labels"),
  ),
  "no transformation": (lambda: 3, ("got 3",)),
  "a name": (lambda: "autoclip", ("got 'autoclip'",)),
}


@pytest.mark.parametrize("name", REPLAYED)
def test_what_cannot_be_replayed(name):
  make, reasons = REPLAYED[name]
  message = complaint(lambda: optax_clip.replay_limits(make(), NORMS))
  assert_says(message, ["tx must", reasons, ("autoclip", "clip_by_global_norm")])


@pytest.mark.parametrize(
  "norms",
  [optax.adam(1.0).init(G), {"norms": NORMS}, None, "norms"],
  ids=["state", "dict", "None", "str"],
)
def test_histories_that_are_none(norms):
  message = complaint(lambda: optax_clip.suggest_max_norm(norms))
  assert_says(message, ["norms must", "norm_history"])
