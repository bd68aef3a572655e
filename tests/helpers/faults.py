"""A small real model under a plan of faults: what goes wrong, and at which step.

The model classifies handwritten digits and is trained for 400 steps in one
`lax.scan`. A plan is data, with one entry for each step: one compiled program runs
them all. It also runs the plan without the steps that the guard should skip. The
steps that both runs take must be equal bit for bit.

`python -m helpers.faults`, in `tests`, prints the table of docs/skipping.md.
"""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets

import optax_clip
from optax_clip.states import SkipRecord

STEPS = 400
BATCH = 32
SEED = 0


class Plan(NamedTuple):
  """What happens at each step: arrays of `STEPS` entries.

  Attributes:
    batch: i32, which batch is trained on.
    loss: f32, the loss is multiplied with it before it is differentiated.
    gradient: f32, all gradients are multiplied with it.
    element: f32, added to one element of the first gradient.
    leaf: f32, added to all elements of the first gradient.
    reported: f32, the loss that is passed on is multiplied with it.
    unit: bool, whether gradients are scaled to a norm of 1.
  """

  batch: np.ndarray
  loss: np.ndarray
  gradient: np.ndarray
  element: np.ndarray
  leaf: np.ndarray
  reported: np.ndarray
  unit: np.ndarray

  def without(self, steps):
    """The plan in which the steps of a mask do not happen, filled up at its end."""
    rest = ~np.asarray(steps)
    return Plan(
      *(
        np.concatenate([mine[rest], calm[: len(mine) - rest.sum()]])
        for mine, calm in zip(self, healthy(), strict=True)
      )
    )


def healthy():
  """The plan in which nothing goes wrong."""
  ones, zeros = np.ones(STEPS, np.float32), np.zeros(STEPS, np.float32)
  batches = np.arange(STEPS, dtype=np.int32)
  return Plan(batches, ones, ones, zeros, zeros, ones, zeros.astype(bool))


def fault(steps, **values):
  """The plan with these values of some fields at some steps."""
  plan = healthy()
  mask = np.zeros(STEPS, bool)
  mask[steps] = True
  return plan._replace(
    **{
      field: np.where(mask, value, getattr(plan, field)).astype(
        getattr(plan, field).dtype
      )
      for field, value in values.items()
    }
  ), mask


NAN, INF = np.nan, np.inf

# Steps that no guard may take.
NONFINITE = {
  "NaN element, first step": fault(0, element=NAN),
  "NaN element, warm-up": fault(5, element=NAN),
  "NaN element": fault(250, element=NAN),
  "inf element": fault(250, element=-INF),
  "NaN leaf": fault(250, leaf=NAN),
  "NaN loss": fault(250, loss=NAN),
  "inf loss": fault(250, loss=INF),
  "first 10 steps NaN": fault(slice(0, 10), loss=NAN),
  "10 steps NaN": fault(slice(250, 260), loss=NAN),
  "200 steps NaN": fault(slice(100, 300), element=NAN),
  "200 steps inf": fault(slice(100, 300), leaf=INF),
}

# Steps that a guard against spikes skips, and others take.
SPIKES = {
  "gradient x 10": fault(250, gradient=10),
  "gradient x 1e3": fault(250, gradient=1e3),
  "gradient x 1e30": fault(250, gradient=1e30),
  "element of 1e30": fault(250, element=1e30),
  "10 steps x 1e3": fault(slice(250, 260), gradient=1e3),
}

# Steps that no guard skips for good: a level that stays is followed.
LEVELS = {
  "healthy": fault([], gradient=1),
  "200 steps x 1e3": fault(slice(150, 350), gradient=1e3),
  "level x 30 from here on": fault(slice(200, STEPS), gradient=30),
  "level / 30 from here on": fault(slice(200, STEPS), gradient=1 / 30),
  "10 zero gradients": fault(slice(250, 260), gradient=0),
  "first 10 gradients zero": fault(slice(0, 10), gradient=0),
  "constant norm": fault(slice(0, STEPS), unit=True),
}


@functools.cache
def _data():
  images, labels = sklearn.datasets.load_digits(return_X_y=True)
  order = np.random.default_rng(SEED).integers(0, len(images), (STEPS, BATCH))
  return (
    np.asarray(images / 16, np.float32)[order],
    np.asarray(labels, np.int32)[order],
  )


def every_image():
  """All images that are trained on, and their labels."""
  return tuple(x.reshape(-1, *x.shape[2:]) for x in _data())


@functools.cache
def start():
  """The parameters before the first step."""
  rng = np.random.default_rng(SEED + 1)
  sizes = ((64, 16), (16, 10))
  weights = [rng.normal(size=s) / np.sqrt(s[0]) for s in sizes]
  return [
    {"w": np.asarray(w, np.float32), "b": np.zeros(w.shape[1], np.float32)}
    for w in weights
  ]


def loss(params, images, labels, dtype=jnp.float32):
  """The cross-entropy, computed in a dtype."""
  first, last = jax.tree.map(lambda x: x.astype(dtype), params)
  hidden = jnp.tanh(images.astype(dtype) @ first["w"] + first["b"][None])
  logits = (hidden @ last["w"] + last["b"][None]).astype(jnp.float32)
  log_probs = jax.nn.log_softmax(logits)
  return -jnp.mean(jnp.take_along_axis(log_probs, labels[:, None], axis=1))


class Run(NamedTuple):
  """A run: parameters and metrics after each step, and the last state."""

  params: Any
  metrics: Any
  state: Any

  def finite(self):
    """Whether all parameters at all steps, and the last state, are finite."""
    # Limits are inf where nothing is limited.
    inner = getattr(self.state, "inner", self.state)

    def judged(x):  # The loss of a bad step is NaN where no loss was passed.
      return x.shown if isinstance(x, SkipRecord) else x

    inner = jax.tree.map(judged, inner, is_leaf=lambda x: isinstance(x, SkipRecord))
    leaves = [*jax.tree.leaves(self.params), *jax.tree.leaves(inner)]
    return not any(np.isnan(x).any() for x in leaves) and all(
      np.isfinite(x).all() for x in jax.tree.leaves(self.params)
    )


def runner(tx, dtype=jnp.float32, scaled=False, whole=True):
  """The function from a plan to the run of an optimizer under it, compiled once.

  Args:
    tx: the transformation.
    dtype: what the model computes in.
    scaled: whether the state of `tx` holds a loss scale.
    whole: whether steps are taken by `guarded_step`.
  """

  def step(carry, now):
    params, state = carry
    plan, images, labels = now
    scale = optax_clip.loss_scale(state) if scaled else jnp.float32(1)

    def scaled_loss(params):
      plain = loss(params, images, labels, dtype)
      return plain * plan.loss * scale, plain

    grads, plain = jax.grad(scaled_loss, has_aux=True)(params)
    length = jnp.where(plan.unit, optax_clip.global_norm(grads) / scale, 1)
    grads = jax.tree.map(lambda g: g * (plan.gradient / length), grads)
    first = grads[0]["w"]
    grads[0]["w"] = first.at[3, 5].add(plan.element) + plan.leaf
    reported = plain * plan.reported
    if whole:
      params, state = optax_clip.guarded_step(tx, grads, state, params, loss=reported)
    else:
      wide = optax.with_extra_args_support(tx)
      updates, state = wide.update(grads, state, params, loss=reported)
      params = optax.apply_updates(params, updates)
    return (params, state), (params, optax_clip.metrics(state))

  @jax.jit
  def run(plan):
    images, labels = (jnp.asarray(x)[plan.batch] for x in _data())
    params = jax.tree.map(jnp.asarray, start())
    (_, state), (params, metrics) = jax.lax.scan(
      step, (params, tx.init(params)), (plan, images, labels)
    )
    return Run(params, metrics, state)

  return lambda plan: jax.tree.map(np.asarray, run(Plan(*map(jnp.asarray, plan))))


def same_trajectory(run, reference, skipped):
  """Whether a run is, step by step, another one in which some steps are not."""
  taken = np.cumsum(~skipped)
  for mine, other, first in zip(
    *map(jax.tree.leaves, (run.params, reference.params, start())), strict=True
  ):
    before = np.concatenate([first[None], other])
    if not np.array_equal(mine, before[taken]):
      return False
  return True


# For each fault: a plan, and the mask of the faulty steps.
PLANS = {**NONFINITE, **SPIKES, **LEVELS}


def inner():
  """The optimizer that is guarded."""
  return optax.chain(optax_clip.clip_by_global_norm(1.0), optax.adam(3e-3))


# For each guard: how to make it, and the arguments of `runner`.
GUARDS = {
  "skip_nonfinite": (lambda: optax_clip.skip_nonfinite(inner()), {}),
  "skip_spikes": (lambda: optax_clip.skip_spikes(inner()), {}),
  "skip_spikes, norm and loss": (
    lambda: optax_clip.skip_spikes(inner(), signals=("norm", "loss")),
    {},
  ),
  "dynamic_loss_scale": (
    lambda: optax_clip.dynamic_loss_scale(inner()),
    {"scaled": True},
  ),
  "dynamic_loss_scale of skip_spikes": (
    lambda: optax_clip.dynamic_loss_scale(optax_clip.skip_spikes(inner())),
    {"scaled": True},
  ),
}
PEER = "optax.apply_if_finite"


@functools.cache
def runner_of(name):
  """The function from a plan to the run of a guard in `GUARDS`, or of `PEER`."""
  if name == PEER:
    return runner(optax.apply_if_finite(inner(), 5), whole=False)
  make, keywords = GUARDS[name]
  return runner(make(), **keywords)


def expected(name, plan):
  """The steps that a guard skips."""
  skipped = PLANS[plan][1].copy()
  judges = "skip_spikes" in name
  if plan in SPIKES and not judges:
    skipped[:] = False
  if plan in LEVELS:
    # The guard follows a level that stays up after 20 steps, and skips none of the
    # others.
    up = judges and plan in ("200 steps x 1e3", "level x 30 from here on")
    skipped[:] = False
    if up:
      skipped[np.flatnonzero(PLANS[plan][1])[:20]] = True
  return skipped


def outcome(name, plan):
  """Says in words what a guard did under a plan."""
  arrays, faulty = PLANS[plan]
  run = runner_of(name)(arrays)
  broken = ~np.isfinite(run.params[0]["w"]).all(axis=(1, 2))
  if broken.any():
    return f"**NaN from step {np.argmax(broken)} on**"
  some = f"{faulty.sum()} skipped" if faulty.any() else "taken"
  # Compared with the same optimizer without the faults. optax's wrapper is compared
  # with itself: two programs may round differently.
  reference = runner_of(PEER if name == PEER else "skip_nonfinite")
  for skipped, words in (
    (faulty, some),
    (np.zeros_like(faulty), "taken"),
    (expected(name, plan), f"{expected(name, plan).sum()} skipped, then taken"),
  ):
    if same_trajectory(run, reference(arrays.without(skipped)), skipped):
      return words
  return "differs"


def table():
  """The rows of docs/skipping.md, in Markdown."""
  names = [PEER, "skip_nonfinite", "skip_spikes", "dynamic_loss_scale"]
  lines = [
    f"| fault | {' | '.join(f'`{name}`' for name in names)} |",
    "|---|" + "---|" * len(names),
  ]
  for plan in PLANS:
    cells = [outcome(name, plan) for name in names]
    lines.append(f"| {plan} | {' | '.join(cells)} |")
  return "\n".join(lines)


if __name__ == "__main__":
  print(table())
