"""Norms that a guard measured reach what measures the same inside, and nobody else."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import actions
from optax_clip import measures
from optax_clip import thresholds

PARAMS = {"a": jnp.full(3, 2.0), "b": jnp.full((2, 2), 3.0)}
NORM = np.sqrt(3 * 4 + 4 * 9)
MASK = {"a": True, "b": False}


class Counting:
  """The global norm, and how often it was measured."""

  def __init__(self):
    self.reads = 0
    norm = measures.global_norm()

    def measured(updates, params=None, **extra_args):
      self.reads += 1
      return norm.measure(updates, params, **extra_args)

    measured.uses_params = False
    self.measure = norm._replace(measure=measured, parts=None)

  def clip(self):
    return optax_clip.clip_with(
      self.measure, thresholds.constant(1.0), actions.rescale()
    )


def closed(key="loss"):
  """A transformation that takes one keyword, and refuses all others."""
  if key == "loss":

    def update(updates, state, params=None, *, loss):
      del loss
      return updates, state
  else:

    def update(updates, state, params=None):
      return updates, state

  return optax.GradientTransformationExtraArgs(lambda params: (), update)


skip, observe = optax_clip.skip_nonfinite, optax_clip.observe


def spikes(inner, **kwargs):
  return optax_clip.skip_spikes(inner, thresholds.constant(100.0), **kwargs)


# What stands around and inside, from a measure and a clip by it; and how many reads of
# how many trees there are.
CASES = {
  "clip": (lambda m, c: skip(c, measure=m), 1),
  "chain": (lambda m, c: skip(optax.chain(c, optax.adam(0.1)), measure=m), 1),
  "in a chain of chains": (
    lambda m, c: skip(optax.chain(optax.chain(closed(), c)), measure=m),
    1,
  ),
  "behind a stranger that changes nothing": (
    lambda m, c: skip(optax.chain(closed(), c), measure=m),
    1,
  ),
  "before a stranger": (lambda m, c: skip(optax.chain(c, closed()), measure=m), 1),
  "behind a stranger that changes all": (
    lambda m, c: skip(optax.chain(optax.scale(2.0), c), measure=m),
    2,
  ),
  "two clips": (lambda m, c: skip(optax.chain(c, c), measure=m), 2),
  "a mask that hides a leaf": (
    lambda m, c: skip(optax.masked(c, MASK), measure=m),
    2,
  ),
  "a mask that hides none": (
    lambda m, c: skip(optax.masked(c, {"a": True, "b": True}), measure=m),
    1,
  ),
  "multi_transform": (
    lambda m, c: skip(
      optax.multi_transform(
        {"one": c, "other": optax.chain(closed(), c)}, {"a": "one", "b": "other"}
      ),
      measure=m,
    ),
    3,
  ),
  "multi_transform of one label": (
    lambda m, c: skip(
      optax.multi_transform({"one": c}, {"a": "one", "b": "one"}), measure=m
    ),
    1,
  ),
  "guards": (lambda m, c: spikes(skip(c, measure=m), measure=m), 1),
  "guards with a stranger between": (
    lambda m, c: spikes(optax.chain(closed(), skip(c, measure=m)), measure=m),
    1,
  ),
  # The inner measure sees the updates, which are known, and the parameters.
  "a clip by a ratio": (
    lambda m, c: skip(
      optax_clip.clip_with(
        measures.relative(m), thresholds.constant(1.0), actions.rescale()
      ),
      measure=m,
    ),
    2,
  ),
  "a guard by another measure shadows": (
    lambda m, c: skip(optax.chain(spikes(c)), measure=m),
    2,
  ),
  "observer": (lambda m, c: observe(optax.chain(c), 4, measure=m), 1),
  "observer around a guard": (
    lambda m, c: observe(skip(c, measure=m), 4, measure=m),
    1,
  ),
  "guard around an observer": (
    lambda m, c: skip(observe(c, 4, measure=m), measure=m),
    1,
  ),
  "loss scale": (lambda m, c: optax_clip.dynamic_loss_scale(c, 4.0, measure=m), 1),
  "accumulation": (
    lambda m, c: skip(optax.MultiSteps(c, 2).gradient_transformation(), measure=m),
    # Of the step at hand, and of the accumulator, once for each of its branches.
    3,
  ),
}


def step(tx, grads=PARAMS):
  state = tx.init(PARAMS)
  return tx.update(grads, state, PARAMS, loss=jnp.float32(1.0))


@pytest.mark.foreign  # MultiSteps and masks mix dtypes.
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", CASES)
def test_updates_are_read_once(name, compiled):
  wrapped, reads = CASES[name]
  counting = Counting()
  tx = wrapped(counting.measure, counting.clip())
  state = tx.init(PARAMS)

  def update(grads):
    return tx.update(grads, state, PARAMS, loss=jnp.float32(1.0))

  # Not the very arrays of the parameters, which would be known as well.
  grads = jax.tree.map(jnp.array, PARAMS)
  counting.reads = 0
  if compiled:
    jax.eval_shape(update, grads)
  else:
    update(grads)
  # Eagerly, MultiSteps traces no branch that it does not take; so it reads less.
  assert counting.reads == reads or (name == "accumulation" and counting.reads < reads)


def test_no_keyword_goes_to_a_transformation_that_its_user_did_not_pass():
  seen = []

  def update(updates, state, params=None, **extra_args):
    seen.append(sorted(extra_args))
    return updates, state

  spy = optax.GradientTransformationExtraArgs(lambda params: (), update)
  for wrap in (
    skip,
    spikes,
    observe,
    optax_clip.dynamic_loss_scale,
    optax_clip.protect,
  ):
    tx = wrap(spy)
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, mine=1)
    jax.eval_shape(
      lambda g, tx=tx: tx.update(g, tx.init(PARAMS), PARAMS, loss=jnp.float32(1)),
      PARAMS,
    )
  assert seen
  assert {key for keys in seen for key in keys} == {"mine", "loss"}


def test_leaving_a_guard_forgets_its_norms():
  """Also if what stands inside fails; and the next guard's are its own."""
  counting = Counting()

  def broken(updates, state, params=None):
    raise RuntimeError("inside")

  fails = optax.GradientTransformation(lambda params: (), broken)
  tx = skip(fails, measure=counting.measure)
  with pytest.raises(RuntimeError, match="inside"):
    tx.update(PARAMS, tx.init(PARAMS))
  clip = counting.clip()
  counting.reads = 0
  clip.update(PARAMS, clip.init(PARAMS))
  assert counting.reads == 1


def test_a_tree_of_the_same_leaves_in_another_structure_is_measured_again():
  """A group has another norm where its leaves have other names."""
  measure = measures.group_norm(lambda tree: {key: key for key in tree}, ["x", "y"])
  clip = optax_clip.clip_with(measure, thresholds.constant(1.0), actions.rescale())
  swapped = optax.GradientTransformation(
    clip.init, lambda u, s, p=None: clip.update({"x": u["y"], "y": u["x"]}, s, p)
  )
  grads = {"x": jnp.full(1, 2.0), "y": jnp.full(1, 8.0)}
  tx = skip(swapped, measure=measure)
  updates, _ = tx.update(grads, tx.init(grads))
  expected, _ = swapped.update(grads, clip.init(grads))
  jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_threads_do_not_see_each_others_norms():
  barrier, reads, wrong = threading.Barrier(2, timeout=60), [], []

  def work(scale):
    counting = Counting()
    meeting = optax.GradientTransformation(
      lambda params: (), lambda u, s, p=None: (barrier.wait(), (u, s))[1]
    )
    tx = skip(optax.chain(meeting, counting.clip()), measure=counting.measure)
    grads = jax.tree.map(lambda x: scale * x, PARAMS)
    state = tx.init(PARAMS)
    counting.reads = 0
    try:
      _, state = tx.update(grads, state)
      norm = optax_clip.metrics(state)["clip/norm"]
      np.testing.assert_allclose(norm, scale * NORM, rtol=1e-6)
    except BaseException as error:
      wrong.append(error)
      barrier.abort()
      raise
    reads.append(counting.reads)

  threads = [threading.Thread(target=work, args=(scale,)) for scale in (2.0, 3.0)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong
  assert reads == [1, 1]


WRAPS = {
  "skip": skip,
  "spikes": spikes,
  "observe": observe,
  "scale": lambda inner: optax_clip.dynamic_loss_scale(inner, 1.0),
  "protect": lambda inner: optax_clip.protect(inner, 1e6),
}


class TestStrangers:
  """What runs in `optax.apply_if_finite` runs in a guard."""

  def check(self, wrap, inner, **extra_args):
    """Equals what stands inside alone."""
    params = {"w": jnp.float32([1.0, -2.0])}
    tx = WRAPS[wrap](inner)

    def run(tx, params):
      state = tx.init(params)
      for _ in range(2):
        grads = jax.tree.map(lambda w: 2 * w, params)
        updates, state = tx.update(grads, state, params, **extra_args)
        params = optax.apply_updates(params, updates)
      return params

    wanted = run(inner, params)
    for found in (run(tx, params), jax.jit(lambda p: run(tx, p))(params)):
      np.testing.assert_allclose(found["w"], wanted["w"], rtol=1e-5, atol=1e-6)

  @pytest.mark.parametrize("wrap", WRAPS)
  def test_closed_keywords(self, wrap):
    self.check(wrap, optax.chain(closed(), optax.sgd(0.1)), loss=jnp.float32(1))

  @pytest.mark.foreign
  @pytest.mark.parametrize("wrap", WRAPS)
  def test_sam(self, wrap):
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    self.check(wrap, optax.contrib.sam(optax.sgd(0.1), adversary))

  @pytest.mark.foreign
  @pytest.mark.parametrize("wrap", ["skip", "observe", "scale"])
  def test_lbfgs(self, wrap):
    def loss(params):
      return jnp.sum(jnp.square(params["w"]))

    # Its line search calls the function with all keywords that it does not know.
    params = {"w": jnp.float32([1.0, -2.0])}
    tx = WRAPS[wrap](optax.lbfgs())
    value_and_grad = optax.value_and_grad_from_state(loss)

    @jax.jit
    def step(params, state):
      value, grad = value_and_grad(params, state=state)
      updates, state = tx.update(
        grad, state, params, value=value, grad=grad, value_fn=loss
      )
      return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
      params, state = step(params, state)
    assert loss(params) < 1e-6

  @pytest.mark.parametrize("compiled", [False, True])
  def test_a_loss_for_the_guard_does_not_fail_inside(self, compiled):
    refuses = closed(key=None)
    tx = spikes(optax.chain(refuses, optax.sgd(1.0)), signals=("loss",))

    def update(loss):
      return tx.update(PARAMS, tx.init(PARAMS), PARAMS, loss=loss)[0]

    update = jax.jit(update) if compiled else update
    np.testing.assert_array_equal(update(jnp.float32(1))["a"], -PARAMS["a"])

  def test_a_loss_for_the_guard_does_not_reach_the_function_of_a_line_search(self):
    tx = spikes(
      optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(4)),
      signals=("loss",),
    )

    def loss(params):
      return jnp.sum(jnp.square(params["a"])) + jnp.sum(jnp.square(params["b"]))

    value, grad = jax.value_and_grad(loss)(PARAMS)
    updates, _ = jax.jit(
      lambda: tx.update(
        grad, tx.init(PARAMS), PARAMS, loss=value, value=value, grad=grad, value_fn=loss
      )
    )()
    assert loss(optax.apply_updates(PARAMS, updates)) < value

  def test_another_keyword_that_is_refused_stays_an_error(self):
    tx = skip(closed(key=None))
    with pytest.raises(TypeError, match="unexpected keyword argument 'mine'"):
      tx.update(PARAMS, tx.init(PARAMS), PARAMS, mine=1)
