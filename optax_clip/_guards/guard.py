"""Who decides whether a step is taken, and when: judges, before the step.

A guard is a transformation around another one. Its *judges* measure the updates and
decide. If one of them says no, nothing changes: no update, no optimizer moment, no
counter, no threshold's memory::

    updates, params, loss
          |  judges         see what the clip sees, and hand on what they measured
          v
       verdicts             say whether to take the step, and why not
          |  _skipped_step        takes or skips it, in the backend's form
          v
    inner.update, and with `guarded_step` also the addition to the parameters

Guards directly inside one another become one guard with several judges, the outermost
first: a judge neither learns from steps that one before it refused, nor counts them. A
loss scale comes before all others, wherever it stands among them: its scale must fall
in the very step that it refuses, and others judge unscaled norms.

On CPU, updates that leave the branch need a buffer of their own, as large as the
gradients. Parameters and state that leave it replace the old ones in place. Hence the
two ways to take a guarded step: as any optax transformation, or whole.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip import _validate
from optax_clip._algebra import handed as _handed
from optax_clip._algebra import layers as _layers
from optax_clip._algebra.handed import Known
from optax_clip._guards import inside as _inside
from optax_clip._guards import loss as _loss
from optax_clip._guards import skipped_step as _skipped_step
from optax_clip._guards.judge import Judge
from optax_clip._guards.record import SkipRecord
from optax_clip._guards.record import blank
from optax_clip._guards.record import noted
from optax_clip._guards.record import of_last_step
from optax_clip._norms import power_sums as _power_sums
from optax_clip._norms.extended import Extended
from optax_clip._repr import short
from optax_clip._trees import leaves as _leaves
from optax_clip._types import OptState
from optax_clip._types import Params
from optax_clip._types import PyTree
from optax_clip._types import Updates

Array = jax.Array


class GuardState(NamedTuple):
  """Holds the state of a guard.

  Attributes:
    inner: the state of the transformation inside. Only steps taken change it, but for
      the norms, limits and coefficients in its records, which show the last step.
    memory: the judge's memory.
    record: ``{name: SkipRecord}``; with ``record="layers"`` also
      ``{name/layers: LayerRecord}``, which covers all steps.
  """

  inner: Any
  memory: Any
  record: dict[str, Any]

  def __repr__(self) -> str:
    return short(self)


@dataclasses.dataclass(frozen=True)
class Guard:
  """Serves as the `update` of a guarded transformation, and can take a whole step.

  Attributes:
    inner: the transformation that all judges stand around.
    judges: the outermost first.
    kinds: checks of their memories.
  """

  inner: optax.GradientTransformation
  judges: tuple[Judge, ...]
  kinds: tuple[_validate.Kind, ...]

  def init(self, params: Params) -> GuardState:
    state = self.inner.init(params)
    _inside.refuse_loss_scales(self.judges[0].name, state)
    params = _leaves.floats_only(params)
    for judge in reversed(self.judges):
      record: dict[str, Any] = {judge.name: blank()}
      if judge.stacks is not None:
        layers = _layers.blank(judge.stacks(params))
        record[judge.name + _layers.LAYERS] = layers
      state = GuardState(state, judge.init(params), record)
    return state

  def __call__(
    self,
    updates: Updates,
    state: GuardState,
    params: Params = None,
    **extra_args: object,
  ) -> tuple[Any, GuardState]:
    new, later = self.step(
      _leaves.with_values, None, updates, state, params, extra_args
    )
    return _leaves.restored(new, updates), later

  def step(
    self,
    finish: Callable[[Any], Any],
    kept: PyTree,
    updates: Updates,
    state: GuardState,
    params: Params,
    extra_args: dict[str, Any],
  ) -> tuple[Any, GuardState]:
    """Takes or skips one step.

    Args:
      finish: maps updates to the result.
      kept: the result of a skipped step; `None`: zeros.
      updates: what `__call__` gets.
      state: the state of this guard.
      params: the parameters, or `None`.
      extra_args: for the transformation inside, and ``loss`` for the judges.
    """
    # Leaves of float0 have no values, and bypass the branch.
    given_updates, updates = updates, _leaves.with_values(updates)
    weights = _leaves.floats_only(params)
    states, inner_state = self._apart(state, updates)
    known = _handed.scope.get()
    seen, take = updates, jnp.asarray(True)
    reached, verdicts, scales = {}, {}, []
    order = sorted(range(len(states)), key=lambda i: not self.judges[i].scales)
    for i in order:
      judge, own = self.judges[i], states[i]
      with _handed.scope(known):
        verdict = judge.judge(seen, weights, own.memory, _own(own), extra_args)
      reached[i], verdicts[i] = take, verdict
      take = take & verdict.take
      scales.append(verdict.scale)
      known, seen = _unscaled(verdict.known, seen, weights, verdict.scale)

    def step(updates: Updates) -> tuple[Any, Any]:
      # Divided again here: XLA would hold in a buffer what goes into a branch.
      for scale in scales:
        updates = divided(updates, scale)
      handed = known.moved(updates, weights)
      updates = _leaves.restored(updates, given_updates)
      new, later = _inside.update(
        self.inner, handed, updates, inner_state, params, extra_args
      )
      return finish(new), later

    result, later = _skipped_step.taken_or_kept(take, step, updates, kept, inner_state)
    loss = _loss.recorded(extra_args, verdicts[order[0]].norm)
    for i, own in reversed(list(enumerate(states))):
      records = {key: noted(x, verdicts[i], loss) for key, x in own.record.items()}
      after = (verdicts[i].memory, records)
      if i != order[0]:
        after = _unless_refused(reached[i], after, (own.memory, own.record))
      later = GuardState(later, *after)
    return result, later

  def scales(self, state: GuardState) -> list[Array]:
    """Returns the scales by which updates are divided before they reach `inner`."""
    found = []
    for judge in self.judges:
      if judge.scales:
        found += [x.scale for x in state.memory.values()]
      state = state.inner
    return found

  def _apart(self, state: OptState, updates: Updates) -> tuple[list[GuardState], Any]:
    """Splits a state: one for each judge, and that of the transformation inside."""
    states = []
    for judge, kind in zip(self.judges, self.kinds, strict=True):
      owner = f"the guard {judge.name!r}"
      _validate.state(GuardState, state, owner)
      _validate.state(dict, state.record, f"the record of {owner}")
      kind.check(state.memory, functools.partial(judge.init, updates))
      states.append(state)
      state = state.inner
    return states, state


def guarded(inner: Any, judge: Judge) -> optax.GradientTransformationExtraArgs:
  """Makes a transformation that does what `inner` does when `judge` lets it.

  Args:
    inner: any transformation; a guard too.
    judge: decides.

  Returns:
    An `optax.GradientTransformationExtraArgs` that `guarded_step` accepts.
  """
  _validate.instance(
    optax.GradientTransformation, "optax, as optax.adamw(1e-3)", inner=inner
  )
  judges, kinds = [judge], [_validate.Kind(f"the guard {judge.name!r}")]
  if isinstance(inner.update, Guard):
    judges += inner.update.judges
    kinds += inner.update.kinds
    inner = inner.update.inner
  guard = Guard(inner, tuple(judges), tuple(kinds))
  return optax.GradientTransformationExtraArgs(guard.init, guard)


def guarded_step(
  tx: optax.GradientTransformation,
  grads: Updates,
  state: OptState,
  params: Params,
  **extra_args: object,
) -> tuple[Params, OptState]:
  r"""Takes a whole step of a guarded optimizer: returns new parameters, or the old.

  .. math::
      (p, s) \leftarrow \begin{cases} (p + u, s') & \text{if the step is taken,
      with } u, s' = \text{tx.update}(g, s, p) \\ (p, s) & \text{else} \end{cases}

  It does what ``tx.update`` and `optax.apply_updates` do, but in one branch, which the
  updates never leave. In a jitted AdamW step with donated parameters and state it holds
  and reads what clipping alone does; there ``tx.update`` needs a temporary as large as
  the gradients. Use ``tx.update`` where something stands between the two: a framework
  that calls it for you, `optax.MultiSteps` or another wrapper around `tx`.

  Args:
    tx: what `skip_nonfinite`, `skip_spikes` or `dynamic_loss_scale` returned; guards
      directly inside one another too, which then take the step together.
    grads: what ``tx.update`` would get.
    state: what ``tx.init(params)`` returned; ``tx.update`` takes the same one.
    params: the parameters.
    **extra_args: what ``tx.update`` would get, for example ``loss=``.

  Returns:
    The parameters, in the dtypes they had, and the state. Parameters whose gradient is
    `None` or JAX's float0, as integers have it, stay.

  Raises:
    TypeError: if `tx` is not a guard.

  Example:
    >>> import jax, jax.numpy as jnp, optax, optax_clip
    >>> tx = optax_clip.skip_nonfinite(
    ...     optax.chain(optax_clip.clip_by_global_norm(1.0), optax.sgd(0.1))
    ... )
    >>> params = {"w": jnp.ones(2)}
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def step(params, state, grads):
    ...   return optax_clip.guarded_step(tx, grads, state, params)
    >>> params, state = step(params, state, {"w": jnp.array([jnp.nan, 1.0])})
    >>> print(params["w"], optax_clip.metrics(state)["skip_nonfinite/skipped"])
    [1. 1.] 1
  """
  guard = getattr(tx, "update", None)
  if not isinstance(guard, Guard):
    raise TypeError(
      "tx must be what skip_nonfinite, skip_spikes or dynamic_loss_scale returned,"
      f" got {tx!r}. Put the guard outermost, as in"
      " skip_nonfinite(optax.chain(...))."
    )
  if params is None:
    raise ValueError("params must be the parameters that the step changes, got None.")

  def finish(updates: Updates) -> Any:
    return _leaves.applied(params, updates)

  return guard.step(finish, params, grads, state, params, extra_args)


def _own(state: GuardState) -> SkipRecord:
  return next(x for x in state.record.values() if isinstance(x, SkipRecord))


def _unless_refused(before: Array, new: PyTree, old: PyTree) -> Any:
  """Chooses a judge's state: the old one if a judge further out refused the step.

  In either case its record shows what was measured in the last step.
  """
  leaves, treedef = jax.tree.flatten(new)
  chosen = [
    x if shown else jnp.where(before, x, y)
    for shown, x, y in zip(of_last_step(new), leaves, jax.tree.leaves(old), strict=True)
  ]
  return jax.tree.unflatten(treedef, chosen)


def divided(updates: Updates, scale: Array | None) -> Any:
  """Divides updates by a scale in float32 or wider; `None` is 1."""
  if scale is None:
    return updates

  def quotient(x: Array) -> Array:
    wide = x.dtype if jnp.iscomplexobj(x) else _power_sums.accumulator(x.dtype)
    inverse = (1 / scale).astype(jnp.finfo(wide).dtype)
    return (x.astype(wide) * inverse).astype(x.dtype)

  return jax.tree.map(quotient, updates)


def _unscaled(
  known: Known, updates: Updates, params: Params, scale: Array | None
) -> tuple[Known, Any]:
  """Divides updates by a scale; returns the norms that stay known, and them."""
  if scale is None:
    return known, updates
  new = divided(updates, scale)
  if any(jnp.finfo(x.dtype).bits < 32 for x in jax.tree.leaves(updates)):
    # Division rounds them to few digits after they were measured: measure again.
    return Known(), new
  return in_units_of(scale, known, new, params), new


def in_units_of(scale: Array, known: Known, new: Updates, params: Params) -> Known:
  """Divides norms by a scale, and makes them those of other updates."""

  def change(norm: Extended) -> Extended:
    return norm._replace(value=norm.value / scale.astype(norm.value.dtype))

  return known.moved(new, params, change)
