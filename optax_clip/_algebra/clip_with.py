"""The algebra of clipping: measure, threshold, action.

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

"ZClip for each layer" or "AGC with a percentile threshold" are then new
combinations, not new code. Precision, meshes, the policy for NaNs, recording
and the rules of dtypes each have one home, whatever the method.

Whoever knows the norms already (a guard, which measured the same updates; a caller
of `clip_tree`) hands them over: the extra argument ``norms`` of ``update``, made by
`given`, says which norms of which arrays they are. It travels as ``value=`` and
``grad=`` of optax do, and a clip that is given other arrays measures these.
"""

from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip import _validate
from optax_clip._algebra import record as _record
from optax_clip._algebra.given import Given
from optax_clip._algebra.given import LayerNorms
from optax_clip._algebra.given import largest
from optax_clip._algebra.given import layer_norms
from optax_clip._algebra.given import measured
from optax_clip._algebra.given import of_layers
from optax_clip._algebra.types import Action
from optax_clip._algebra.types import Measure
from optax_clip._algebra.types import Threshold
from optax_clip._norms import scalars as _scalars
from optax_clip._norms.extended import Extended
from optax_clip._norms.layout import Layout
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
  """The state of a transformation made by `clip_with`.

  Attributes:
    threshold: the memory of the threshold.
    record: `{name: Record}`, or empty with `record=False`. The name is a key
      and not a field because a string cannot be a leaf of an optimizer state.
      With ``record="layers"`` also `{name/layers: LayerRecord}`.
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
    An `optax.GradientTransformationExtraArgs`. Its state is a `ClipState`, or
    `optax.EmptyState` if nothing is recorded or remembered. Its ``update`` takes
    norms that are known already as ``norms=``, see `given`. Its ``init`` leaves out
    what is no float: integers get no updates, which may be `None` or, as JAX has them,
    of float0; these pass. ``update`` refuses integers.

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
    *,
    norms: "Given | None" = None,
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

    found, layers = measured(measure, by_layer, updates, params, norms, extra_args)
    sizes = found.sizes()
    finite = _record.all_finite(sizes)
    if nonfinite == "zero":
      # What is made zero depends on nothing.
      updates, blocks = jax.tree.map(
        lambda x: _leaf.gate(x, finite), (updates, found.blocks)
      )
      found = found._replace(blocks=blocks)
      sizes = found.sizes()
    limits, memory = _limited(threshold, found.layout, sizes, memory, extra_args)
    pairs = list(zip(found.blocks, limits, strict=True))
    coefficients = _scalars.each(action.weigh, pairs, is_last=True)
    clipped = _applied(action, found.layout, coefficients, limits, updates)
    if nonfinite == "zero":
      clipped = jax.tree.map(lambda x: _where_finite(finite, x), clipped)
    if stateful:
      seen = None if layers is None else layer_norms(measure, layers)
      state = ClipState(
        memory,
        _noted(state.record, found.layout, seen, sizes, limits, coefficients, finite),
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
  """The limits of each block, and the memory after the step."""
  table = layout.table(sizes)
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
) -> Any:
  """The updates, each leaf by its coefficient."""
  leaves, treedef = jax.tree.flatten(updates)
  own = layout.spread(list(zip(coefficients, limits, strict=True)))
  clipped = [
    _leaf.keep_weak_type(leaf, action.apply(leaf, coefficient, limit))
    for leaf, (coefficient, limit) in zip(map(jnp.asarray, leaves), own, strict=True)
  ]
  return jax.tree.unflatten(treedef, clipped)


def _where_finite(finite: Array, x: Array) -> Array:
  return _leaf.keep_weak_type(x, jnp.where(finite, x, jnp.zeros_like(x)))


def _noted(
  record: dict[str, Any],
  layout: Layout,
  layers: LayerNorms | None,
  sizes: Sequence[Array],
  limits: Sequence[Array],
  coefficients: Sequence[Extended],
  finite: Array,
) -> dict[str, Any]:
  """The records after one more step."""
  factors = [x.value * x.unit for x in coefficients]
  entries: dict[str, Any] = {}
  for key, last in record.items():
    if isinstance(last, _record.Record):
      entries[key] = _record.noted(last, sizes, limits, factors, finite)
      continue
    if layers is None:
      entries[key] = last  # Of a transformation with record="layers"; this is not.
      continue
    whole = [jnp.broadcast_to(x, n.shape) for x, n in zip(limits, sizes, strict=True)]
    above = [(n > x).astype(n.dtype) for n, x in zip(sizes, whole, strict=True)]
    entries[key] = _record.noted_layers(
      last,
      *layers,
      limit=layout.rows(_smallest, whole),
      coefficient=layout.rows(_smallest, factors),
      clipped=layout.rows(largest, above) > 0,
    )
  return entries


_smallest = functools.partial(jnp.min, initial=jnp.inf)
