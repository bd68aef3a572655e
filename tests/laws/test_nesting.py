"""Every order of what may stand around an optimizer, on every kind of tree.

It runs, or is refused with the order that works. It skips for good only where an
accumulator of optax keeps the NaN. A healthy state holds no NaN and nothing of size 0,
and an eager update compiles nothing that it would not compile without us.

By default a sample in which each wrapper meets each other one, each core, each tree and
both modes; all cases with `-m slow`.
"""

import functools
import itertools

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import thresholds

pytestmark = pytest.mark.foreign  # The wrappers of optax mix dtypes.

compiled = []


def _note(event, duration, **kwargs):
  del duration, kwargs
  if event == "/jax/core/compile/backend_compile_duration":
    compiled.append(event)


jax.monitoring.register_event_duration_secs_listener(_note)


def every_second(tree):
  leaves, treedef = jax.tree.flatten(tree)
  return treedef.unflatten([i % 2 == 0 for i in range(len(leaves))])


def labels(tree):
  return jax.tree.map(lambda x: "all", tree)


def closed():
  """A transformation that wants the loss, and refuses any other keyword."""

  def update(updates, state, params=None, *, loss):
    del loss
    return updates, state

  return optax.GradientTransformationExtraArgs(lambda params: (), update)


def clip():
  return optax_clip.clip_by_global_norm(1.0)


CORES = {
  "momentum": lambda: optax.chain(clip(), optax.trace(0.5)),
  "lbfgs": lambda: optax.chain(clip(), optax.scale_by_lbfgs(2)),
  # No clip of ours in it: it multiplies states by 0 and 1, which would keep the NaN
  # that a record shows of a skipped step.
  "sam": lambda: optax.contrib.sam(optax.sgd(1.0), optax.sgd(0.1), sync_period=1),
  "closed": lambda: optax.chain(closed(), clip(), closed()),
}
OURS = {
  "scale": lambda inner: optax_clip.dynamic_loss_scale(inner, 8.0),
  "skip": optax_clip.skip_nonfinite,
  "spikes": lambda inner: optax_clip.skip_spikes(
    inner, thresholds.history(6, window=8)
  ),
  "protect": optax_clip.protect,
  "observe": lambda inner: optax_clip.observe(inner, 4),
}
THEIRS = {
  "MultiSteps": lambda inner: optax.MultiSteps(inner, 2).gradient_transformation(),
  "masked": lambda inner: optax.masked(inner, every_second),
  "multi_transform": lambda inner: optax.multi_transform(
    {"all": inner, "none": clip()}, labels
  ),
}
WRAPPERS = OURS | THEIRS
GUARDS = ("scale", "skip", "spikes", "protect")
TREES = {
  "empty": lambda: {},
  "integer": lambda: {"w": jnp.ones(2), "n": jnp.ones(2, jnp.int32)},
  "None": lambda: {"w": jnp.ones(2), "x": None},
  "leaf": lambda: jnp.ones(2),
  "dtypes": lambda: {"w": jnp.ones(2), "h": jnp.ones(2, jnp.bfloat16)},
}
MODES = ("jit", "eager")
GOOD, BAD = (1.0, 2.0, 1.5), (np.nan,)
STEPS = (*GOOD, *BAD, *GOOD)

ORDERS = [order for n in (1, 2) for order in itertools.permutations(WRAPPERS, n)]
CASES = list(itertools.product(ORDERS, CORES, TREES, MODES))


def pairs_of(order, *others):
  """What a case lets meet: its wrappers, and each of them with all else."""
  return {frozenset(order), *itertools.product(order, others)}


def sample():
  """Each unordered pair of wrappers once, with what the two have not met yet."""
  met = set()
  for i, order in enumerate(x for x in ORDERS if len(x) == 2 and x[0] < x[1]):
    turned = order[::-1] if i % 2 else order
    # Eagerly an accumulator is compiled in each step, by itself.
    modes = MODES[:1] if "MultiSteps" in order else MODES
    options = itertools.product(CORES, TREES, modes)
    others = max(options, key=lambda x, order=order: len(pairs_of(order, *x) - met))
    met |= pairs_of(order, *others)
    yield turned, *others


def built(order, core):
  tx = CORES[core]()
  for name in reversed(order):
    tx = WRAPPERS[name](tx)
  return tx


def is_refused(order):
  """Whether something is between a guard or an observer and a loss scale inside."""
  if "scale" not in order:
    return False
  around = order[: order.index("scale")]
  return any(
    name == "protect"
    or (name in OURS and any(x not in ("skip", "spikes") for x in around[i + 1 :]))
    for i, name in enumerate(around)
  )


def gradients(params, value):
  """The updates of a step; as `jax.grad` has it, integers get float0."""

  def one(x):
    if jnp.issubdtype(x.dtype, jnp.integer):
      return np.zeros(x.shape, jax.dtypes.float0)
    return jnp.full_like(x, value)

  return jax.tree.map(one, params)


def run(tx, order, core, params, mode):
  """For each step its updates, its state, and how many programs it compiled."""
  state, rows = tx.init(params), []
  is_guarded = bool(order) and order[0] in GUARDS
  keywords = {"loss": jnp.float32(1)} if core == "closed" or is_guarded else {}

  def step(grads, state, params):
    return tx.update(grads, state, params, **keywords)

  if mode == "jit":
    step = jax.jit(step)
  for value in STEPS:
    factor = optax_clip.loss_scale(state) if "scale" in order else 1.0
    grads = gradients(params, value * factor)
    before = len(compiled)
    updates, state = step(grads, state, params)
    rows.append((updates, state, len(compiled) - before))
  return rows


@functools.cache
def bare(order, core, tree, mode):
  """What happens without ours, which may be an error."""
  try:
    # As every wrapper of optax does, which drops keywords before a plain one.
    tx = optax.with_extra_args_support(built(order, core))
    return run(tx, order, core, TREES[tree](), mode)
  except Exception as error:
    return error


def floats(tree):
  return [
    np.asarray(x, np.float64)
    for x in jax.tree.leaves(tree)
    if jnp.issubdtype(x.dtype, jnp.inexact)
  ]


def faults_of(state):
  found = {x for x in map(np.shape, jax.tree.leaves(state)) if 0 in x}
  return found | {"NaN" for x in floats(state) if np.any(np.isnan(x))}


def check(order, core, tree, mode):
  params = TREES[tree]()
  without = bare(tuple(name for name in order if name in THEIRS), core, tree, mode)
  if isinstance(without, Exception):
    pytest.skip(f"not without ours either: {without!r:.80}")
  if is_refused(order):
    with pytest.raises(ValueError, match=r"dynamic_loss_scale\("):
      built(order, core).init(params)
    return
  rows = run(built(order, core), order, core, params, mode)

  # Types, and a healthy state.
  for (updates, state, _), (wanted, *_) in zip(rows, without, strict=True):
    assert jax.tree.structure(updates) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(wanted), strict=True):
      assert (x.dtype, x.shape) == (y.dtype, y.shape)
    assert jax.tree.structure(state) == jax.tree.structure(rows[0][1])
  healthy = len(GOOD) - 1
  assert faults_of(rows[healthy][1]) <= faults_of(without[healthy][1])

  # What a guard sees first does no harm, and good gradients move it again.
  first = next((i for i, x in enumerate(order) if x in GUARDS), None)
  if first is not None and "MultiSteps" not in order[:first]:
    # A history keeps the norms of all steps.
    if "observe" not in order[:first]:
      assert faults_of(rows[-1][1]) <= faults_of(without[healthy][1])
    later = [floats(updates) for updates, *_ in rows[-len(GOOD) :]]
    assert all(np.all(np.isfinite(x)) for row in later for x in row)
    moves = [any(np.any(x) for x in row) for row in later]
    assert any(moves) == bool(floats(params))

  # Eager updates.
  if mode == "eager":
    for i in (healthy, len(STEPS) - 1):
      assert rows[i][2] <= without[i][2]


SAMPLE = list(sample())


def named(case):
  order, *others = case
  return "-".join(["(".join(order), *others])


def test_the_sample_covers_what_it_says():
  met = set().union(*(pairs_of(*case) for case in SAMPLE))
  missing = set().union(*(pairs_of(*case) for case in CASES)) - met
  alone = {frozenset([name]) for name in WRAPPERS}
  assert missing == alone | {("MultiSteps", "eager")}
  assert set(SAMPLE) <= set(CASES)


@pytest.mark.parametrize("case", SAMPLE, ids=named)
def test_laws_of_the_sample(case):
  check(*case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=named)
def test_laws(case):
  check(*case)
