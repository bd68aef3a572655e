"""How a clipping method is put together: measure, threshold, action.

A clipping method measures updates, decides how large they may be, and acts on
what is larger. Each of the three is one value, and `clip_with` joins them::

    updates, params, extra_args
          |  measure     sees tensors, dtypes, groups, meshes; remembers nothing
          v
       norms             a few non-negative numbers, in blocks (`layout`)
          |  threshold   sees only these, as one array; holds the only memory
          v
       limits
          |  action.weigh(norms, limits)     elementwise on the few numbers
          v
    coefficients  --layout.spread-->  one broadcastable for each leaf
          |  action.apply(leaf, coefficient, limit)      writes the updates
          v
       updates           same structure, shapes, dtypes, shardings

"ZClip for each layer" and "AGC with a percentile threshold" are then new
combinations, not new code. Precision, meshes, the policy for NaNs, recording and
dtype rules each have one home, whatever the method.

Whoever knows the norms already (a guard that measured the same updates, a caller of
`clip_tree`) hands them on: `handed` says how.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_clip import _validate
from optax_clip._algebra import record as _record
from optax_clip._algebra import shapes as _shapes
from optax_clip._algebra.measured import LayerNorms
from optax_clip._algebra.measured import Norms
from optax_clip._algebra.measured import largest
from optax_clip._algebra.measured import layer_norms
from optax_clip._algebra.measured import measured
from optax_clip._algebra.measured import of_layers
from optax_clip._algebra.types import Action
from optax_clip._algebra.types import Measure
from optax_clip._algebra.types import Threshold
from optax_clip._norms import extended as _extended
from optax_clip._norms import scalars as _scalars
from optax_clip._norms.extended import Extended
from optax_clip._norms.layout import Layout
from optax_clip._norms.layout import Place
from optax_clip._repr import named
from optax_clip._repr import short
from optax_clip._trees import leaf as _leaf
from optax_clip._trees import leaves as _leaves
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
    out what is no float: integers get no updates, and `None` or JAX's float0 may stand
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
    layout = measure.layout(params)
    memory = threshold.init(layout.blank())
    if not record and isinstance(memory, optax.EmptyState):
      return optax.EmptyState()
    entries: dict[str, Any] = {name: _record.blank()} if record else {}
    if by_layer:
      stacks = of_layers(measure, params).layout(params).stacks()
      entries[name + _record.LAYERS] = _record.blank_layers(stacks)
    return ClipState(memory, entries)

  def update(
    updates: Updates,
    state: Any,
    params: Params = None,
    **extra_args: Any,
  ) -> tuple[Any, Any]:
    given_updates, updates = updates, _leaves.with_values(updates)
    params = _leaves.floats_only(params)
    # optax lets stateless transformations be called with any state.
    stateful = isinstance(state, ClipState)
    memory = state.threshold if stateful else optax.EmptyState()
    if not stateful:
      blank = measure.layout(updates).blank()
      if not isinstance(jax.eval_shape(threshold.init, blank), optax.EmptyState):
        raise TypeError(
          f"The state of {name!r} must be the ClipState that its init returned, got a"
          f" {type(state).__name__}: {name!r} remembers norms. Pass the state of this"
          " same transformation; of a checkpoint of another chain,"
          " optax_clip.convert_state(tx, params, old_state) makes one."
        )

    found, layers = measured(measure, by_layer, updates, params, extra_args)
    sizes = found.sizes()
    finite = _record.all_finite(sizes)
    if nonfinite == "zero":
      # Zeros must depend on nothing.
      updates, blocks = jax.tree.map(
        lambda x: _leaf.gate(x, finite), (updates, found.blocks)
      )
      found = found._replace(blocks=blocks)
      sizes = found.sizes()
    limits, memory = _limited(threshold, found.layout, sizes, memory, extra_args)

    def weighed(norm: Extended, limit: Array) -> tuple[Extended, Any]:
      coefficient = action.weigh(norm, limit)
      # What the record shows, from the same kernels.
      shown = _factor_and_norm(norm, coefficient) if stateful else None
      return coefficient, shown

    def weights(found: Norms) -> tuple[list[Extended], list[Any]]:
      pairs = list(zip(found.blocks, limits, strict=True))
      both = _scalars.each(weighed, pairs, last=len(Extended._fields))
      return [x for x, _ in both], [x for _, x in both]

    coefficients, applied = weights(found)
    settled: Any = {}
    if action.settle is not None:
      settled, found = _settled(action.settle, found, limits, updates)
      _, applied = weights(found)
      sizes = found.sizes()
    clipped = _applied(action, found.layout, coefficients, limits, updates, settled)
    if nonfinite == "zero":
      clipped = jax.tree.map(lambda x: _where_finite(finite, x), clipped)
    if stateful:
      seen = None if layers is None else layer_norms(measure, layers)
      zeroed = nonfinite == "zero"
      state = ClipState(
        memory,
        _noted(state.record, found, seen, sizes, limits, applied, finite, zeroed),
      )
    return _leaves.restored(clipped, given_updates), state

  return optax.GradientTransformationExtraArgs(init, update)


def _limited(
  threshold: Threshold,
  layout: Layout,
  sizes: Sequence[Array],
  memory: Any,
  extra_args: dict[str, Any],
) -> tuple[list[Array], Any]:
  """Asks the threshold for each block's limits, and for its memory after the step."""
  table = layout.table(sizes)
  with _shapes.of(layout):
    limits, memory = threshold.update(table, memory, **extra_args)
  limits = jnp.asarray(limits)
  if limits.ndim:
    limits = jnp.broadcast_to(limits, table.shape)
  return layout.untabled(limits, sizes), memory


def _applied(
  action: Action,
  layout: Layout,
  coefficients: Sequence[Extended],
  limits: Sequence[Array],
  updates: Updates,
  settled: dict[int, Array],
) -> Any:
  """Applies to each leaf its coefficient, unless it is settled."""
  leaves, treedef = jax.tree.flatten(updates)
  own = layout.spread(list(zip(coefficients, limits, strict=True)))

  def new(i: int, place: Place, coefficient: Extended, limit: Array) -> Array:
    leaf = jnp.asarray(leaves[i])
    if not place.scaled:
      return leaf
    after = settled.get(i)
    after = action.apply(leaf, coefficient, limit) if after is None else after
    return _leaf.keep_weak_type(leaf, after)

  rows = enumerate(zip(layout.places, own, strict=True))
  return jax.tree.unflatten(treedef, [new(i, place, *x) for i, (place, x) in rows])


def _settled(
  settle: Callable[..., Any], found: Norms, limits: Sequence[Array], updates: Updates
) -> tuple[dict[int, Array], Norms]:
  """Has the action look at leaves again; returns what it made, and the norms then."""
  leaves = [jnp.asarray(x) for x in jax.tree.leaves(updates)]
  layout = found.layout
  own = layout.spread(list(zip(found.blocks, limits, strict=True)))
  settled, norms = {}, [norm for norm, _ in own]
  for i, (leaf, place, pair) in enumerate(zip(leaves, layout.places, own, strict=True)):
    new = settle(leaf, place, *pair) if place.scaled else None
    if new is not None:
      settled[i], norms[i] = new
  return settled, found._replace(blocks=layout.gathered(found.blocks, norms))


def _where_finite(finite: Array, x: Array) -> Array:
  return _leaf.keep_weak_type(x, jnp.where(finite, x, jnp.zeros_like(x)))


def _noted(
  record: dict[str, Any],
  found: Norms,
  layers: LayerNorms | None,
  sizes: Sequence[Array],
  limits: Sequence[Array],
  applied: Sequence[Any],
  finite: Array,
  zeroed: bool,
) -> dict[str, Any]:
  """Notes one more step in the records; `zeroed`: if it is not finite, it is zero."""
  layout = found.layout
  if zeroed:
    stays = jnp.stack([jnp.asarray(True), finite])
    applied = [
      jnp.where(stays, x, jnp.zeros_like(x))
      if isinstance(x, jax.Array)
      else (x[0], jnp.where(finite, x[1], jnp.zeros_like(x[1])))
      for x in applied
    ]
  entries: dict[str, Any] = {}
  for key, last in record.items():
    if isinstance(last, _record.Record):
      entries[key] = _record.noted(last, sizes, limits, applied, finite)
      continue
    if layers is None:
      entries[key] = last  # From a clip with record="layers", which this one is not.
      continue
    whole = [jnp.broadcast_to(x, n.shape) for x, n in zip(limits, sizes, strict=True)]
    above = [(n > x).astype(n.dtype) for n, x in zip(sizes, whole, strict=True)]
    entries[key] = _record.noted_layers(
      last,
      *layers,
      limit=_where_scaled(layout, layout.rows(_smallest, whole), jnp.inf),
      coefficient=_where_scaled(
        layout, layout.rows(_smallest, [x[0] for x in applied]), 1
      ),
      clipped=_where_scaled(layout, layout.rows(largest, above), 0) > 0,
    )
  return entries


def _factor_and_norm(norm: Extended, coefficient: Extended) -> Any:
  """Returns what a norm was multiplied with, and the norm after that.

  Of a scalar they are one array, as a TPU has a kernel for each operation on a scalar.
  """
  if norm.value.ndim:
    factor = coefficient.value * coefficient.unit
    return factor, _product(norm, coefficient)
  beside = Extended(*(jnp.stack([jnp.ones_like(x), x]) for x in norm))
  return _product(beside, coefficient)


def _product(norm: Extended, coefficient: Extended) -> Array:
  """Multiplies two numbers; in this order nothing leaves the range on the way."""
  value, unit = norm.value * coefficient.unit, coefficient.value * norm.unit
  return _extended.as_float(Extended(value, unit))


def _where_scaled(layout: Layout, rows: Array, otherwise: float) -> Array:
  """Gives rows of layers another value where a layer is counted and not scaled."""
  scaled = layout.scaled_layers()
  if all(scaled):
    return rows
  return jnp.where(np.asarray(scaled), rows, jnp.asarray(otherwise, rows.dtype))


_smallest = functools.partial(jnp.min, initial=jnp.inf)
