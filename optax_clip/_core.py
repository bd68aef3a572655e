"""The algebra of clipping: measure, threshold, action.

A clipping method measures updates, decides how large they may be, and acts on
what is larger. Each of the three is one value, and `clip_with` joins them::

    updates, params, extra_args
          |  measure     sees tensors, dtypes, groups, meshes; remembers nothing
          v
       norms             a few non-negative numbers: one, or one for each group
          |  threshold   sees only these; holds the only memory
          v
       limits            of the same shape
          |  action.weigh(norms, limits)     elementwise on the few numbers
          v
    coefficients  --measure.spread-->  one broadcastable for each leaf
          |  action.apply(leaf, coefficient, limit)      writes the updates
          v
       updates           same structure, shapes, dtypes, shardings

"ZClip for each layer" or "AGC with a percentile threshold" are then new
combinations, not new code. Precision, meshes, the policy for NaNs, recording
and the rules of dtypes each have one home, whatever the method.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip import _norms
from optax_clip import _validate

Array = jax.Array


class Coefficient(NamedTuple):
  """What an update is multiplied with: ``shift`` first, then ``factor``.

  Attributes:
    factor: f32 or f64.
    shift: of the same shape and dtype. It is 1 unless ``factor * shift`` is
      too small for one float (an update of 3e38 clipped to a norm of 1).
  """

  factor: Array
  shift: Array


class Measure(NamedTuple):
  """How large updates are.

  Attributes:
    like: ``like(params)``: zeros of the shapes that the threshold sees: one
      array, or a list of arrays where each leaf has norms of its own shape.
    measure: ``measure(updates, params, **extra_args)``: a `Norm`, or a list of
      one for each leaf. A list of scalars is one vector for the threshold.
    spread: ``spread(tree, updates)``: for each leaf of `updates`, the entry of
      a norm-shaped tree that concerns it, broadcastable to the leaf.
  """

  like: Callable[[Any], Any]
  measure: Callable[..., Any]
  spread: Callable[[Any, Any], list[Any]]


class Threshold(NamedTuple):
  """How large updates may be: a gradient transformation, but on norms.

  Attributes:
    init: ``init(norms)``: the state; `optax.EmptyState` when there is none.
    update: ``update(norms, state, **extra_args)``: limits of the same shape
      and dtype as `norms`, and the new state.
  """

  init: Callable[[Any], Any]
  update: Callable[..., tuple[Any, Any]]


class Action(NamedTuple):
  """What happens to an update, given its norm and its limit.

  Attributes:
    weigh: ``weigh(norm, limit)``: the `Coefficient`; elementwise.
    apply: ``apply(leaf, coefficient, limit)``: the new leaf, of equal dtype.
  """

  weigh: Callable[[_norms.Norm, Array], Coefficient]
  apply: Callable[[Array, Coefficient, Array], Array]


class Record(NamedTuple):
  """What clipping did. Where there are several norms, the worst of them.

  Attributes:
    norm: f32[], the largest norm of the last step, before clipping.
    limit: f32[], the smallest limit of the last step.
    coefficient: f32[], the smallest factor that the last step applied.
    clipped_fraction: f32[], the share of norms above their limit.
    steps: i32[], how many updates were seen.
    steps_clipped: i32[], in how many of them a norm was above its limit.
    steps_nonfinite: i32[], in how many of them a norm was NaN or inf.
  """

  norm: Array
  limit: Array
  coefficient: Array
  clipped_fraction: Array
  steps: Array
  steps_clipped: Array
  steps_nonfinite: Array


class ClipState(NamedTuple):
  """The state of a transformation made by `clip_with`.

  Attributes:
    threshold: the memory of the threshold.
    record: `{name: Record}`, or empty with `record=False`. The name is a key
      and not a field because a string cannot be a leaf of an optimizer state.
  """

  threshold: Any
  record: dict[str, Record]


def clip_with(
  measure: Measure,
  threshold: Threshold,
  action: Action,
  *,
  nonfinite: str = "propagate",
  record: bool = True,
  name: str = "clip",
) -> optax.GradientTransformationExtraArgs:
  r"""Joins a measure, a threshold and an action to a transformation.

  .. math::
      n = \text{measure}(u), \quad L = \text{threshold}(n), \quad
      u \leftarrow \text{action}(u, n, L)

  Args:
    measure: how large the updates are, from `optax_clip.measures`.
    threshold: how large they may be, from `optax_clip.thresholds`.
    action: what to do with what is larger, from `optax_clip.actions`.
    nonfinite: what to do when a norm is NaN or inf. ``"propagate"``: what the
      arithmetic gives, so that the problem is seen. ``"zero"``: the whole
      update becomes zero. (A norm of finite values is never inf here, even
      where its value is too large for a float.)
    record: whether the state keeps the last norm, limit and coefficient, and
      counters, for `optax_clip.metrics`.
    name: the prefix of the metrics' keys.

  Returns:
    A `optax.GradientTransformationExtraArgs`. Its state is a `ClipState`, or
    `optax.EmptyState` if nothing is recorded or remembered.

  Raises:
    ValueError: for an unknown `nonfinite`.

  Example:
    AGC for whole layers, with a bound that shrinks over 1000 steps:

    >>> import jax.numpy as jnp, optax, optax_clip
    >>> from optax_clip import actions, measures, thresholds
    >>> tx = optax_clip.clip_with(
    ...     measures.relative(measures.layer_norm(), eps=1e-3),
    ...     thresholds.scheduled(optax.linear_schedule(0.1, 0.01, 1000)),
    ...     actions.rescale(),
    ... )
    >>> params = {"w": jnp.array([3.0, 4.0])}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": jnp.array([6.0, 8.0])}, state, params)
    >>> print(updates["w"])
    [0.3 0.4]
  """
  _validate.choice(("propagate", "zero"), nonfinite=nonfinite)

  def init(params: Any) -> Any:
    memory = threshold.init(measure.like(params))
    if not record and isinstance(memory, optax.EmptyState):
      return optax.EmptyState()
    return ClipState(memory, {name: _blank()} if record else {})

  def update(
    updates: Any, state: Any, params: Any = None, **extra_args: Any
  ) -> tuple[Any, Any]:
    norms = measure.measure(updates, params, **extra_args)
    table = _norms.joined(norms)
    sizes = jax.tree.map(_norms.magnitude, table, is_leaf=_norms.is_norm)
    # optax lets stateless transformations be called with any state.
    stateful = isinstance(state, ClipState)
    memory = state.threshold if stateful else optax.EmptyState()
    limits, memory = threshold.update(sizes, memory, **extra_args)

    def weighed(norm: _norms.Norm, limit: Array) -> tuple[Coefficient, Array]:
      return action.weigh(norm, limit), limit

    each = jax.tree.map(
      weighed, norms, _norms.apart(limits, norms), is_leaf=_norms.is_norm
    )
    finite = jnp.asarray(True)
    if _size(sizes):
      finite = _fold(jnp.all, jax.tree.map(jnp.isfinite, sizes))

    leaves, treedef = jax.tree.flatten(updates)
    clipped = [
      keep_weak_type(leaf, action.apply(leaf, coefficient, limit))
      for leaf, (coefficient, limit) in zip(
        map(jnp.asarray, leaves), measure.spread(each, updates), strict=True
      )
    ]
    if nonfinite == "zero":
      clipped = [keep_weak_type(new, jnp.where(finite, new, 0)) for new in clipped]
    if stateful:
      factors = jax.tree.map(action.weigh, table, limits, is_leaf=_norms.is_norm)
      entries = {
        key: _noted(entry, sizes, limits, factors, finite)
        for key, entry in state.record.items()
      }
      state = ClipState(memory, entries)
    return jax.tree.unflatten(treedef, clipped), state

  return optax.GradientTransformationExtraArgs(init, update)


def _blank() -> Record:
  # Separate arrays: a donated state may not hold one buffer twice.
  floats = [jnp.zeros((), jnp.float32) for _ in range(4)]
  counts = [jnp.zeros((), jnp.int32) for _ in range(3)]
  return Record(*floats, *counts)._replace(coefficient=jnp.ones((), jnp.float32))


def _noted(
  last: Record, sizes: Any, limits: Any, coefficients: Any, finite: Array
) -> Record:
  """The record after one more step."""
  if not _size(sizes):
    return last._replace(steps=optax.safe_increment(last.steps))
  above = jax.tree.map(lambda n, limit: (n > limit).astype(jnp.float32), sizes, limits)
  factors = jax.tree.map(
    lambda c: c.factor * c.shift,
    coefficients,
    is_leaf=lambda c: isinstance(c, Coefficient),
  )
  number_above = _fold(jnp.sum, above)
  return Record(
    norm=_fold(jnp.max, sizes).astype(jnp.float32),
    limit=_fold(jnp.min, limits).astype(jnp.float32),
    coefficient=_fold(jnp.min, factors).astype(jnp.float32),
    clipped_fraction=number_above / _size(sizes),
    steps=optax.safe_increment(last.steps),
    steps_clipped=counted(finite & (number_above > 0), last.steps_clipped),
    steps_nonfinite=counted(~finite, last.steps_nonfinite),
  )


def _size(tree: Any) -> int:
  return sum(x.size for x in jax.tree.leaves(tree))


def counted(happened: Array, counter: Array) -> Array:
  """The counter, one higher if it happened."""
  return jnp.where(happened, optax.safe_increment(counter), counter)


def _fold(reduce: Callable[[Array], Array], tree: Any) -> Array:
  """Reduces a tree of arrays to one scalar.

  Each array first, so that no two that are sharded differently meet.
  """
  return reduce(jnp.stack([reduce(x) for x in jax.tree.leaves(tree) if x.size]))


def keep_weak_type(old: Array, new: Array) -> Array:
  """The new array, weakly typed if the old one is."""
  # A strongly typed scalar where a weakly typed one was would make `jit`
  # compile the training step twice.
  return old.at[...].set(new) if jax.typeof(old).weak_type else new
