"""How a clipping method is put together: measure, threshold, action.

AutoClip is these three parts::

    clip_with(
      measures.global_norm(),       # How large the updates are: one norm of all leaves.
      thresholds.percentile(10.0),  # How large they may be: as 10% of the norms before.
      actions.rescale(),            # What happens to larger ones: scaled to the limit.
    )

An update takes five steps, each a function below::

    updates, params, extra_args
          |  measure     sees tensors, dtypes, groups, meshes; remembers nothing
          v
       norms             a few non-negative numbers, and which leaf they are of
          |  threshold   sees only these, as one array; holds the only memory
          v
       limits
          |  action.weigh(norm, limit)       elementwise on the few numbers
          v
       weights           --spread--> one broadcastable for each leaf
          |  action.apply(leaf, coefficient, limit)      writes the updates
          v
       applied           same structure, shapes, dtypes, shardings
          |
          v
       noted             what was done, from values that exist anyway

"ZClip for each layer" and "AGC with a percentile threshold" are then new
combinations, not new code. Precision, meshes, the policy for NaNs, recording and
dtype rules each have one home, whatever the method.

Whoever knows the norms already (a guard that measured the same updates, a caller of
`clip_tree`) hands them on: `handed` says how.
"""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_clip import _backend
from optax_clip import _validate
from optax_clip._algebra import handed as _handed
from optax_clip._algebra import layers as _layers
from optax_clip._algebra import record as _record
from optax_clip._algebra.measured import LayerNorms
from optax_clip._algebra.measured import largest
from optax_clip._algebra.measured import layer_norms
from optax_clip._algebra.measured import measured
from optax_clip._algebra.measured import of_layers
from optax_clip._algebra.types import Action
from optax_clip._algebra.types import Measure
from optax_clip._algebra.types import Threshold
from optax_clip._norms import blocks as _blocks
from optax_clip._norms import scalars as _scalars
from optax_clip._norms.blocks import Norms
from optax_clip._norms.extended import Extended
from optax_clip._norms.layout import Layout
from optax_clip._norms.layout import Place
from optax_clip._repr import named
from optax_clip._repr import short
from optax_clip._trees import leaf as _leaf
from optax_clip._trees import leaves as _leaves
from optax_clip._types import ExtraArgs
from optax_clip._types import Nonfinite
from optax_clip._types import Params
from optax_clip._types import Recording
from optax_clip._types import Updates

Array = jax.Array


class ClipState(NamedTuple):
  """Holds the state of a transformation that `clip_with` made.

  Attributes:
    threshold: the memory of the threshold.
    record: `{name: Record}`, or empty with `record=False`. The name is a key, as a
      string cannot be a leaf of an optimizer state. With ``record="layers"`` also
      `{name/layers: LayerRecord}`.
  """

  threshold: Any
  record: dict[str, Any]

  def __repr__(self) -> str:
    return short(self)


@named
def clip_with(
  measure: Measure,
  threshold: Threshold,
  action: Action,
  *,
  nonfinite: Nonfinite = "propagate",
  record: Recording = True,
  name: str = "clip",
) -> optax.GradientTransformationExtraArgs:
  r"""Joins a measure, a threshold and an action into one transformation.

  .. math::
      n = \text{measure}(u), \quad L = \text{threshold}(n), \quad
      u \leftarrow \text{action}(u, n, L)

  Args:
    measure: how large the updates are, from `optax_clip.measures`.
    threshold: how large they may be, from `optax_clip.thresholds`.
    action: what to do with larger ones, from `optax_clip.actions`.
    nonfinite: what to do if a norm is NaN or inf, as it is if an element is.
      ``"propagate"`` keeps what the arithmetic gives, so that you see the problem.
      ``"zero"`` turns the whole update into zeros. (A norm of finite elements is never
      inf here, even where its value is too large for a float.)
    record: whether the state keeps what `metrics` reads: the last norm, limit and
      coefficient, and counters. ``"layers"`` also keeps them for each layer, from the
      same read, for `layer_metrics`. With `False` a clip by fixed thresholds has the
      state that optax's has, and restores its checkpoints.
    name: the prefix of the metrics' keys.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Its state is a `ClipState`, or
    `optax.EmptyState` if it records and remembers nothing. Its ``init`` leaves
    out all but floats: integers get no updates, and `None` or JAX's float0 may stand
    there. ``update`` refuses integers.

  Raises:
    ValueError: for an unknown `nonfinite` or `record`, or ``record="layers"`` with a
      measure of several layers that has no `Parts`.

  Example:
    AGC for whole layers, with a bound that shrinks over 1000 steps:

    >>> import jax.numpy as jnp, optax, optax_clip
    >>> from optax_clip import actions, measures, thresholds
    >>> tx = optax_clip.clip_with(
    ...     measures.relative(measures.layer_norm(), floor=1e-3),
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
  by_layer = record == "layers"

  def init(params: Params) -> Any:
    params = _leaves.floats_only(params)
    memory = threshold.init(_blocks.blank(measure.layout(params)))
    if not record and isinstance(memory, optax.EmptyState):
      return optax.EmptyState()
    entries: dict[str, Any] = {name: _record.blank()} if record else {}
    if by_layer:
      stacks = of_layers(measure, params).stacks()
      entries[name + _layers.LAYERS] = _layers.blank(stacks)
    return ClipState(memory, entries)

  def update(
    updates: Updates,
    state: Any,
    params: Params = None,
    **extra_args: Any,
  ) -> tuple[Any, Any]:
    given_updates, updates = updates, _leaves.with_values(updates)
    params = _leaves.floats_only(params)
    norms, layers = measured(measure, by_layer, updates, params, extra_args)
    memory = _memory(threshold, norms, state, name)
    finite = _record.all_finite(norms.values)
    if nonfinite == "zero":
      # Zeros must depend on nothing.
      updates, blocks = _leaf.gate((updates, list(norms.blocks)), finite)
      norms = Norms(blocks, norms.layout)
    limits, memory = _limits(threshold, norms, memory, extra_args)
    # optax lets stateless transformations be called with any state.
    is_recorded = isinstance(state, ClipState)
    weights = _weights(action, norms, limits, is_recorded)
    weights = _settled(action, weights, updates)
    clipped = _applied(action, weights, updates)
    if nonfinite == "zero":
      clipped = jax.tree.map(lambda x: _where_finite(finite, x), clipped)
    if is_recorded:
      seen = None if layers is None else layer_norms(measure, layers)
      if nonfinite == "zero":
        weights = weights.zeroed(finite)
      state = ClipState(memory, _noted(state.record, weights, seen, finite))
    return _leaves.restored(clipped, given_updates), state

  return optax.GradientTransformationExtraArgs(init, update)


class _Weights(NamedTuple):
  """Says what becomes of the leaves.

  Attributes:
    norms: the norms that were weighed.
    limits: for each block its limits, which broadcast to it.
    coefficients: for each block the factors of its leaves.
    effects: for each block its part of the record; empty without a record.
    settled: leaves that the action has made already, by their index.
  """

  norms: Norms
  limits: list[Array]
  coefficients: list[Extended]
  effects: list[_record.Effect]
  settled: dict[int, Array]

  def zeroed(self, finite: Array) -> "_Weights":
    """Makes the effect that of zeros, unless the step is finite."""
    return self._replace(effects=[x.zeroed(finite) for x in self.effects])


def _memory(threshold: Threshold, norms: Norms, state: Any, name: str) -> Any:
  """Returns the memory of the threshold.

  Raises:
    TypeError: if a memory is missing.
  """
  if isinstance(state, ClipState):
    return state.threshold
  blank = _blocks.blank(norms.layout)
  if not isinstance(jax.eval_shape(threshold.init, blank), optax.EmptyState):
    _validate.state(ClipState, state, repr(name))
  return optax.EmptyState()


def _limits(
  threshold: Threshold, norms: Norms, memory: Any, extra_args: ExtraArgs
) -> tuple[list[Array], Any]:
  """Asks the threshold for each block's limits, and for its memory after the step."""
  table = norms.table()
  with _handed.layout(norms.layout):
    limits, memory = threshold.update(table, memory, **extra_args)
  limits = jnp.asarray(limits)
  if limits.ndim:
    limits = jnp.broadcast_to(limits, table.shape)
  return norms.split(limits), memory


def _weights(
  action: Action, norms: Norms, limits: list[Array], is_recorded: bool
) -> _Weights:
  """Weighs each norm against its limit."""
  pairs = list(zip(norms.blocks, limits, strict=True))

  def shown(norm: Extended, limit: Array, coefficient: Extended) -> _record.Effect:
    del limit
    return _record.effect(norm, coefficient)

  last = len(Extended._fields)
  if not is_recorded:
    return _Weights(
      norms, limits, _scalars.each(action.weigh, pairs, last=last), [], {}
    )
  # What the record shows comes from the same kernels.
  both = _scalars.each(action.weigh, pairs, then=shown, last=last)
  return _Weights(norms, limits, [x for x, _ in both], [x for _, x in both], {})


def _settled(action: Action, weights: _Weights, updates: Updates) -> _Weights:
  """Has the action look at leaves again, if it does; weighs the norms it found."""
  if action.settle is None:
    return weights
  norms, settled, own = weights.norms, {}, []
  leaves = [jnp.asarray(x) for x in jax.tree.leaves(updates)]
  rows = zip(leaves, norms.layout.places, norms.spread(weights.limits), strict=True)
  for i, (leaf, place, (norm, limit)) in enumerate(rows):
    new = action.settle(leaf, place, norm, limit) if place.scaled else None
    if new is not None:
      settled[i], norm = new
    own.append(norm)
  norms = norms.gathered(own)
  effects = weights.effects
  if effects:
    effects = _weights(action, norms, weights.limits, True).effects
  return weights._replace(norms=norms, effects=effects, settled=settled)


def _applied(action: Action, weights: _Weights, updates: Updates) -> Updates:
  """Applies to each leaf its coefficient, unless it is settled."""
  leaves, treedef = jax.tree.flatten(updates)
  layout = weights.norms.layout
  own = Norms(weights.coefficients, layout).spread(weights.limits)
  apply = _backend.traced_once(action.apply)

  def new(i: int, place: Place, coefficient: Extended, limit: Array) -> Array:
    leaf = jnp.asarray(leaves[i])
    if not place.scaled:
      return leaf
    after = weights.settled.get(i)
    after = apply(leaf, coefficient, limit) if after is None else after
    return _leaf.keep_weak_type(leaf, after)

  rows = enumerate(zip(layout.places, own, strict=True))
  return jax.tree.unflatten(treedef, [new(i, place, *x) for i, (place, x) in rows])


def _where_finite(finite: Array, x: Array) -> Array:
  return _leaf.keep_weak_type(x, jnp.where(finite, x, jnp.zeros_like(x)))


def _noted(
  record: dict[str, Any], weights: _Weights, layers: LayerNorms | None, finite: Array
) -> dict[str, Any]:
  """Notes one more step in the records."""
  norms, limits, effects = weights.norms, weights.limits, weights.effects
  entries: dict[str, Any] = {}
  for key, last in record.items():
    if isinstance(last, _record.Record):
      entries[key] = _record.noted(last, norms.values, limits, effects, finite)
      continue
    if layers is None:
      entries[key] = last  # From a clip with record="layers", which this one is not.
      continue
    pairs = list(zip(limits, norms.values, strict=True))
    whole = [jnp.broadcast_to(limit, n.shape) for limit, n in pairs]
    above = [(n > x).astype(n.dtype) for (_, n), x in zip(pairs, whole, strict=True)]
    entries[key] = _layers.noted(
      last,
      *layers,
      limit=_where_scaled(norms.layout, norms.by_layer(_smallest, whole), jnp.inf),
      coefficient=_where_scaled(
        norms.layout, norms.by_layer(_smallest, [x.factor() for x in effects]), 1
      ),
      clipped=_where_scaled(norms.layout, norms.by_layer(largest, above), 0) > 0,
    )
  return entries


def _where_scaled(layout: Layout, rows: Array, otherwise: float) -> Array:
  """Gives rows of layers another value where a layer is counted and not scaled."""
  scaled = layout.scaled_layers()
  if all(scaled):
    return rows
  return jnp.where(np.asarray(scaled), rows, jnp.asarray(otherwise, rows.dtype))


_smallest = functools.partial(jnp.min, initial=jnp.inf)
