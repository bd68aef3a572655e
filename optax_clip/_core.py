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
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip import _norms
from optax_clip import _once
from optax_clip import _record
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


class Layers(NamedTuple):
  """Which norms concern which layer, for ``record="layers"``.

  A layer is a leaf, or one layer of a stacked leaf.

  Attributes:
    stacks: ``stacks(tree)``: for each leaf how many layers are stacked in it; 0 if
      it is no stack.
    rows: ``rows(reduce, tree, updates)``: of a norm-shaped tree what concerns each
      layer, ``[layers]``; `reduce` folds axes of an array where it is several norms.
    elements: ``elements(updates)``: for each layer how many elements its norm is of,
      to the power at which the norm grows with them; `None` if it does not.
    finer: a measure of each layer that the same read gives, where norms are of
      several layers.
  """

  stacks: Callable[[Any], list[int]]
  rows: Callable[[Callable[..., Array], Any, Any], Array]
  elements: Callable[[Any], list[float]] | None = None
  finer: "Measure | None" = None


class Measure(NamedTuple):
  """How large updates are.

  Attributes:
    like: ``like(params)``: zeros of the shapes that the threshold sees: one
      array, or a list of arrays where each leaf has norms of its own shape.
    measure: ``measure(updates, params, **extra_args)``: a `Norm`, or a list of
      one for each leaf. A list of scalars is one vector for the threshold.
    spread: ``spread(tree, updates)``: for each leaf of `updates`, the entry of
      a norm-shaped tree that concerns it, broadcastable to the leaf.
    layers: which norms concern which layer, or `None` if that cannot be said.
  """

  like: Callable[[Any], Any]
  measure: Callable[..., Any]
  spread: Callable[[Any, Any], list[Any]]
  layers: Layers | None = None


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


class ClipState(NamedTuple):
  """The state of a transformation made by `clip_with`.

  Attributes:
    threshold: the memory of the threshold.
    record: `{name: Record}`, or empty with `record=False`. The name is a key
      and not a field because a string cannot be a leaf of an optimizer state.
      With ``record="layers"`` also `{name/layers: LayerRecord}`.
  """

  threshold: Any
  record: dict[str, Any]


def clip_with(
  measure: Measure,
  threshold: Threshold,
  action: Action,
  *,
  nonfinite: str = "propagate",
  record: bool | str = True,
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
      counters, for `optax_clip.metrics`. ``"layers"``: and those of each layer,
      for `optax_clip.layer_metrics`, from the same read.
    name: the prefix of the metrics' keys.

  Returns:
    A `optax.GradientTransformationExtraArgs`. Its state is a `ClipState`, or
    `optax.EmptyState` if nothing is recorded or remembered.

  Raises:
    ValueError: for an unknown `nonfinite` or `record`, or ``record="layers"`` with a
      measure that has no `Layers`.

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
  _validate.choice((True, False, "layers"), record=record)
  layers = layers_of(measure, record)

  def init(params: Any) -> Any:
    memory = threshold.init(measure.like(params))
    if not record and isinstance(memory, optax.EmptyState):
      return optax.EmptyState()
    entries: dict[str, Any] = {name: _record.blank()} if record else {}
    if layers is not None:
      entries[name + _record.LAYERS] = _record.blank_layers(layers.stacks(params))
    return ClipState(memory, entries)

  def update(
    updates: Any, state: Any, params: Any = None, **extra_args: Any
  ) -> tuple[Any, Any]:
    norms, by_layer = measured(measure, layers, updates, params, extra_args)
    table = _norms.joined(norms)
    sizes = _norms.magnitudes(table)
    # optax lets stateless transformations be called with any state.
    stateful = isinstance(state, ClipState)
    memory = state.threshold if stateful else optax.EmptyState()
    limits, memory = threshold.update(sizes, memory, **extra_args)

    def weighed(norm: _norms.Norm, limit: Array) -> tuple[Coefficient, Array]:
      return action.weigh(norm, limit), limit

    each = jax.tree.map(
      weighed, norms, _norms.apart(limits, norms), is_leaf=_norms.is_norm
    )
    finite = _record.all_finite(sizes)

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
      weighs = jax.tree.map(action.weigh, table, limits, is_leaf=_norms.is_norm)
      factors = jax.tree.map(
        lambda c: c.factor * c.shift,
        weighs,
        is_leaf=lambda node: isinstance(node, Coefficient),
      )

      def noted(entry: Any) -> Any:
        if isinstance(entry, _record.Record):
          return _record.noted(entry, sizes, limits, factors, finite)
        if layers is None or by_layer is None:
          return entry  # The state is of one with record="layers", and this is not.
        above = jax.tree.map(
          lambda n, limit: (n > limit).astype(n.dtype), sizes, limits
        )
        return _record.noted_layers(
          entry,
          *by_layer,
          limit=layers.rows(_smallest, limits, updates),
          coefficient=layers.rows(_smallest, factors, updates),
          clipped=layers.rows(_largest, above, updates) > 0,
        )

      entries = {key: noted(entry) for key, entry in state.record.items()}
      state = ClipState(memory, entries)
    return jax.tree.unflatten(treedef, clipped), state

  return optax.GradientTransformationExtraArgs(init, update)


def layers_of(measure: Measure, record: bool | str) -> Layers | None:
  """The layers of a measure if they are to be recorded."""
  if record != "layers":
    return None
  if measure.layers is None:
    raise ValueError(
      "record='layers' needs a measure that says which norms concern which layer, as"
      " all of optax_clip.measures do. Give yours a Layers, or pass record=True."
    )
  return measure.layers


class LayerNorms(NamedTuple):
  """What one read of the updates says of each layer; both f32 or f64 ``[layers]``.

  Attributes:
    norm: of the layer; the largest of its norms where it has several.
    size: for one element, to compare layers by.
  """

  norm: Array
  size: Array

  def divided(self, scale: Array) -> "LayerNorms":
    """Those of the updates divided by a number."""
    return LayerNorms(*(x / scale.astype(x.dtype) for x in self))


def measured(
  measure: Measure,
  layers: Layers | None,
  updates: Any,
  params: Any,
  extra_args: dict[str, Any],
) -> tuple[Any, LayerNorms | None]:
  """The norms of a measure; and of each layer, from the same read, if asked for."""
  if layers is None:
    return measure.measure(updates, params, **extra_args), None
  by, finer = layers, layers.finer
  with _once.noting() as known:
    own = (finer or measure).measure(updates, params, **extra_args)
  norms = own
  if finer is not None and finer.layers is not None:
    by = finer.layers
    with _once.reusing(known):
      norms = measure.measure(updates, params, **extra_args)
  norm = by.rows(_largest, _norms.magnitudes(_norms.joined(own)), updates)
  elements = jnp.asarray(by.elements(updates) if by.elements else 1, norm.dtype)
  return norms, LayerNorms(norm, norm / elements)


# A layer without elements has no norm: it counts as 0, and is never clipped.
_largest = functools.partial(jnp.max, initial=0)
_smallest = functools.partial(jnp.min, initial=jnp.inf)


def keep_weak_type(old: Array, new: Array) -> Array:
  """The new array, weakly typed if the old one is."""
  # A strongly typed scalar where a weakly typed one was would make `jit`
  # compile the training step twice.
  return old.at[...].set(new) if jax.typeof(old).weak_type else new
