"""The algebra of clipping: measure, threshold, action.

A clipping method measures updates, decides how large they may be, and acts on
what is larger. Each of the three is one value, and `clip_with` joins them::

    updates, params, extra_args
          |  measure     sees tensors, dtypes, groups, meshes; remembers nothing
          v
       norms             a few non-negative numbers, in blocks (`_layout`)
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

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip import _extended
from optax_clip import _groups
from optax_clip import _leaf
from optax_clip import _record
from optax_clip import _scalars
from optax_clip import _validate
from optax_clip._extended import Extended
from optax_clip._layout import Layout

Array = jax.Array


class Parts(NamedTuple):
  """How norms of many layers are made of those of each, for ``record="layers"``.

  Attributes:
    measure: the measure of each layer.
    combine: ``combine(norms, updates)``: the norms of the whole, of those of the
      layers; `None` if only the updates can tell.
  """

  measure: "Measure"
  combine: Callable[[Sequence[Extended], Any], Sequence[Extended]] | None


class Measure(NamedTuple):
  """How large updates are.

  Attributes:
    layout: ``layout(updates)``: which norms there are and which leaf they concern,
      from shapes alone. One of `optax_clip.measures` has it; take it from there for
      a measure of your own, as in ``measures.layer_norm()._replace(measure=mine)``.
    measure: ``measure(updates, params, **extra_args)``: the norms. A float array with
      one entry for each norm, an `Extended`, or a list with one for each block of the
      layout. Two measures are the same if these are equal.
    parts: where norms are of several layers each, how to have those of the layers
      from the same read; `None` if that cannot be said.
    ord: the order of the norms of each layer, by which they grow with its size;
      `None` if they do not.
  """

  layout: Callable[[Any], Layout]
  measure: Callable[..., Any]
  parts: Parts | None = None
  ord: float | None = None


class Threshold(NamedTuple):
  """How large updates may be: a gradient transformation, but on norms.

  Attributes:
    init: ``init(norms)``: the state; `optax.EmptyState` when there is none. `norms`
      are zeros: one array, of shape ``[]`` or ``[norms]``.
    update: ``update(norms, state, **extra_args)``: limits that broadcast to `norms`,
      of their dtype, and the new state.
  """

  init: Callable[[Any], Any]
  update: Callable[..., tuple[Any, Any]]


class Action(NamedTuple):
  """What happens to an update, given its norm and its limit.

  Attributes:
    weigh: ``weigh(norm, limit)``: the coefficient, an `Extended`; elementwise. A
      value of 1, which has the unit 1, leaves the update as it is, bit for bit.
    apply: ``apply(leaf, coefficient, limit)``: the new leaf, of equal dtype.
  """

  weigh: Callable[[Extended, Array], Extended]
  apply: Callable[[Array, Extended, Array], Array]


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


class Norms(NamedTuple):
  """What was measured of some updates.

  Attributes:
    blocks: the norms, one `Extended` for each block of the layout.
    layout: which leaf they concern.
  """

  blocks: list[Extended]
  layout: Layout

  def sizes(self) -> list[Array]:
    """The norms as floats."""
    return _scalars.each(_extended.as_float, [(x,) for x in self.blocks])

  def largest(self) -> Array:
    """For each layer its norm; of several, the largest."""
    return self.layout.rows(_largest, self.sizes())


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
  by_layer = record == "layers"

  def init(params: Any) -> Any:
    params = _groups.floats_only(params)
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
    updates: Any,
    state: Any,
    params: Any = None,
    *,
    norms: "Given | None" = None,
    **extra_args: Any,
  ) -> tuple[Any, Any]:
    given_updates, updates = updates, _groups.with_values(updates)
    params = _groups.floats_only(params)
    # optax lets stateless transformations be called with any state.
    stateful = isinstance(state, ClipState)
    memory = state.threshold if stateful else optax.EmptyState()
    if not stateful:
      blank = measure.layout(updates).blank()
      if not isinstance(jax.eval_shape(threshold.init, blank), optax.EmptyState):
        raise TypeError(
          f"The state of {name!r} must be the ClipState that its init returned, got a"
          f" {type(state).__name__}: {name!r} remembers norms. Pass the state of this"
          " same transformation; a checkpoint of another chain does not fit it."
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
    return _groups.restored(clipped, given_updates), state

  return optax.GradientTransformationExtraArgs(init, update)


@jax.tree_util.register_pytree_node_class
class Given:
  """Norms that are known already, and of which arrays; made by `given`.

  It is for the arrays that it was made of, and these are told by identity. What
  crosses the border of a transformation (`jax.jit`, a branch) is another array: on
  its way through one it forgets all, and norms are measured again.
  """

  def __init__(
    self,
    leaves: Sequence[Any] = (),
    params: Sequence[Any] = (),
    entries: Sequence[tuple[Callable[..., Any], list[Extended]]] = (),
  ):
    """Of updates and parameters, the norms by some measures."""
    self._leaves, self._params = tuple(leaves), tuple(params)
    self._entries = tuple(entries)

  def find(self, measure: Measure, updates: Any, params: Any) -> list[Extended] | None:
    """The norms of a measure, if they are known of these very arrays."""
    if not self._entries or not _identical(self._leaves, updates):
      return None
    for measuring, blocks in self._entries:
      if _equal(measuring, measure.measure):
        uses_params = getattr(measuring, "uses_params", True)
        if not uses_params or _identical(self._params, params):
          return blocks
    return None

  def moved(
    self,
    old: Any,
    new: Any,
    params: Any,
    change: Callable[[list[Extended]], list[Extended]] = lambda blocks: blocks,
  ) -> "Given":
    """What is known of updates, said of others of the same values.

    Args:
      old: updates; of others nothing is known.
      new: of the same structure: a copy, or the same in other units.
      params: the parameters beside them.
      change: from norms of the old ones to norms of the new ones.
    """
    if not self._entries or not _identical(self._leaves, old):
      return Given()
    entries = [(measuring, change(blocks)) for measuring, blocks in self._entries]
    return Given(jax.tree.leaves(new), jax.tree.leaves(params), entries)

  def tree_flatten(self) -> tuple[tuple[()], None]:
    """Nothing: see the class."""
    return (), None

  @classmethod
  def tree_unflatten(cls, aux: None, children: Any) -> "Given":
    """Knows nothing: see the class."""
    del aux, children
    return cls()


def given(
  updates: Any, norms: Any, measure: Measure | None = None, params: Any = None
) -> Given:
  r"""Hands norms that are known already to the clip that would measure them.

  For a norm of more than the updates at hand (of a model that is split over
  pipelines), or one that was measured for another purpose. The clip takes it instead
  of reading the updates, if it measures what `measure` does and gets these arrays.

  Args:
    updates: the updates the norms are of: the tree that is passed to ``tx.update``.
    norms: the norms: an array with one entry for each norm of `measure`, a scalar for
      the global norm, or an `Extended`.
    measure: what they are, from `optax_clip.measures`; the global norm by default.
    params: with a measure that compares with parameters, these.

  Returns:
    What to pass as ``tx.update(updates, state, params, norms=...)``. `optax.chain`,
    `optax.masked` and guards pass it on.

  Raises:
    ValueError: if `norms` have not the shape of the norms of `measure`.

  Example:
    >>> import jax.numpy as jnp, optax, optax_clip
    >>> tx = optax.chain(optax_clip.clip_by_global_norm(1.0), optax.sgd(1.0))
    >>> g = {"w": jnp.array([3.0, 4.0])}
    >>> norm = jnp.array(10.0)  # With the other half of the model.
    >>> updates, _ = tx.update(g, tx.init(g), norms=optax_clip.given(g, norm))
    >>> print(updates["w"])
    [-0.3 -0.4]
  """
  if measure is None:
    from optax_clip import measures

    measure = measures.global_norm()
  updates, params = _groups.with_values(updates), _groups.floats_only(params)
  blocks = as_blocks(norms, measure.layout(updates))
  leaves, weights = jax.tree.leaves(updates), jax.tree.leaves(params)
  return Given(leaves, weights, [(measure.measure, blocks)])


def measured(
  measure: Measure,
  by_layer: bool,
  updates: Any,
  params: Any,
  known: Given | None,
  extra_args: dict[str, Any],
) -> tuple[Norms, Norms | None]:
  """The norms of a measure; and those of each layer, from the same read, if asked for.

  What is known is not measured.
  """
  known = Given() if known is None else known

  def by(measure: Measure) -> list[Extended]:
    blocks = known.find(measure, updates, params)
    if blocks is None:
      found = measure.measure(updates, params, **extra_args)
      blocks = as_blocks(found, measure.layout(updates))
    return blocks

  layout, parts = measure.layout(updates), measure.parts
  if parts is None or not (by_layer or known.find(parts.measure, updates, params)):
    norms = Norms(by(measure), layout)
    return norms, norms if by_layer else None
  layers = by(parts.measure)
  blocks = known.find(measure, updates, params)
  if blocks is None and parts.combine is not None:
    blocks = list(parts.combine(layers, updates))
  norms = Norms(by(measure) if blocks is None else blocks, layout)
  return norms, Norms(layers, parts.measure.layout(updates)) if by_layer else None


def known_of(
  measure: Measure, updates: Any, params: Any, norms: Norms, layers: Norms | None
) -> Given:
  """What `measured` found, to be handed on."""
  entries = [(measure.measure, norms.blocks)]
  if layers is not None and measure.parts is not None:
    entries.append((measure.parts.measure.measure, layers.blocks))
  return Given(jax.tree.leaves(updates), jax.tree.leaves(params), entries)


def of_layers(measure: Measure, tree: Any) -> Measure:
  """The measure of each layer that goes with a measure.

  Raises:
    ValueError: if norms are of several leaves and it has no `Parts`.
  """
  if measure.parts is not None:
    return measure.parts.measure
  if measure.layout(tree).is_shared():
    raise ValueError(
      "record='layers' needs the norms of each layer, and this measure has norms of"
      " several layers without Parts. All of optax_clip.measures have them. Give"
      " yours a Parts, or pass record=True."
    )
  return measure


def as_blocks(norms: Any, layout: Layout) -> list[Extended]:
  """What a measure returned, or a caller knows, as one `Extended` for each block.

  Raises:
    ValueError: if the shapes do not fit.
  """
  if isinstance(norms, Extended) or not isinstance(norms, (list, tuple)):
    table = _extended.of(norms if isinstance(norms, Extended) else jnp.asarray(norms))
    blank = layout.blank()
    if table.value.shape != blank.shape:
      raise ValueError(
        f"norms must have the shape {list(blank.shape)}, one entry for each norm of the"
        f" measure, got {list(table.value.shape)}. For several in blocks, pass a list."
      )
    like = [jnp.zeros(*block) for block in layout.blocks]
    columns = [layout.untabled(x, like) for x in table]
    return [Extended(*pair) for pair in zip(*columns, strict=True)]
  found = [_extended.of(x) for x in norms]
  shapes = [jnp.shape(x.value) for x in found]
  if shapes != [block.shape for block in layout.blocks]:
    raise ValueError(
      f"norms must be arrays of the shapes {[list(b.shape) for b in layout.blocks]},"
      f" one for each block of the measure's layout, got {[list(s) for s in shapes]}."
    )
  return found


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


def layer_norms(measure: Measure, layers: Norms) -> LayerNorms:
  """What is recorded of each layer, from the norms of the measure of layers."""
  norm = layers.largest()
  ord = measure.parts.measure.ord if measure.parts else measure.ord
  if ord is None:
    return LayerNorms(norm, norm)
  powers = [p.size ** (1 / ord) for p in layers.layout.places]
  elements = layers.layout.per_layer(powers)
  return LayerNorms(norm, norm / jnp.asarray(elements, norm.dtype))


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
  updates: Any,
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
      clipped=layout.rows(_largest, above) > 0,
    )
  return entries


# A layer without elements has no norm: it counts as 0, and is never clipped.
_largest = functools.partial(jnp.max, initial=0)
_smallest = functools.partial(jnp.min, initial=jnp.inf)


def _identical(leaves: Sequence[Any], tree: Any) -> bool:
  """Whether the leaves of a tree are these very objects."""
  others = jax.tree.leaves(tree)
  return len(leaves) == len(others) and all(
    x is y for x, y in zip(leaves, others, strict=True)
  )


def _equal(a: Any, b: Any) -> bool:
  return a is b or (type(a) is type(b) and bool(a == b))
