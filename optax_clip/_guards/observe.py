"""How to watch norms without clipping: a history, kept where the norms are."""

from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from optax_clip import _validate
from optax_clip._algebra import handed as _handed
from optax_clip._algebra import record as _record
from optax_clip._algebra.clip_with import ClipState
from optax_clip._algebra.clip_with import clip_with
from optax_clip._algebra.types import Action
from optax_clip._algebra.types import Measure
from optax_clip._algebra.types import Threshold
from optax_clip._guards import guard as _guard
from optax_clip._guards import inside as _inside
from optax_clip._guards.measuring import Measuring
from optax_clip._norms import extended as _extended
from optax_clip._norms import mesh as _mesh
from optax_clip._norms.extended import Extended
from optax_clip._repr import named
from optax_clip._repr import short
from optax_clip._trees import leaves as _leaves
from optax_clip._types import GuardRecording
from optax_clip._types import Params
from optax_clip._types import Updates

Array = jax.Array


class NormHistory(NamedTuple):
  """Holds what `observe` remembers; `norm_history` brings it into order.

  Attributes:
    norms: f32[window], or f32[window, norms] for a measure with several: a ring, in
      which the norm of step t, counted from 0, stands at t modulo `window`. Entries
      that no step has reached are 0.
    steps: i32[], how many steps there were; grows by one at every update.
  """

  norms: Array
  steps: Array


class ObserveState(NamedTuple):
  """Holds the state of `observe`.

  Attributes:
    seen: a `ClipState`: ``{name: NormHistory}`` in `threshold`, and the record that
      `metrics` reads.
    inner: the state of the transformation inside.
  """

  seen: ClipState
  inner: Any

  def __repr__(self) -> str:
    return short(self)


@named
def observe(
  inner: optax.GradientTransformation,
  window: int = 10_000,
  *,
  measure: Measure | None = None,
  record: GuardRecording = True,
  name: str = "observe",
) -> optax.GradientTransformationExtraArgs:
  r"""Keeps the last norms of the updates that an optimizer gets, and clips nothing.

  .. math::
      h_{t \bmod W} \leftarrow n_t, \quad (u, s) \leftarrow \text{inner}(g, s)

  Use it for a first run, before you choose a threshold: `norm_history` reads the norms
  from the optimizer's state, `suggest_max_norm` makes a threshold from them. The norms
  stay on the device until you ask for them, so that no step waits for Python.

  It costs one read of the gradients, or none around a clip that measures the same and
  stands first in `inner`: the clip takes the norm over, so that you may observe for the
  whole run. That is why it stands around the optimizer, as guards do, and not before it
  in a chain.

  Args:
    inner, measure: as in `skip_nonfinite`.
    window: W, how many norms to keep, 4 bytes each. Static: with
      `optax.inject_hyperparams` pass ``static_args=("window",)``.
    record: as in `skip_nonfinite`; around a guard it says which layer was not finite.
    name: as in `clip_with`; also names this history for `norm_history`.

  Returns:
    An `optax.GradientTransformationExtraArgs`; its state is an `ObserveState`. `inner`
    gets what came in, bit for bit, and extra arguments. In the record that `metrics`
    reads the limit is inf and the coefficient 1.

  Raises:
    TypeError: if `inner` is not a transformation, `measure` no measure or `window` no
      Python integer; in `update`, if a leaf is an integer or a boolean.
    ValueError: if `window` is below 1; in `update`, if the state has another window or
      another number of norms.

  =========================  ==============================================
  input                      result
  =========================  ==============================================
  a NaN or inf element       passed on; keeps a norm of NaN or inf
  all zero, or no leaves     passed on; keeps a norm of 0
  a finite float64 norm      kept as the largest float32 if above that
  around `skip_nonfinite`    keeps the norms of all steps
  inside `skip_nonfinite`    keeps the norms of steps taken; stand there with
                             `guarded_step`
  inside `optax.MultiSteps`  one norm for each mean of gradients
  =========================  ==============================================

  Example:
    >>> import jax.numpy as jnp, optax, optax_clip
    >>> tx = optax_clip.observe(optax.sgd(0.1), window=2)
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> for scale in (1.0, 2.0, 3.0):
    ...   updates, state = tx.update({"w": scale * jnp.array([3.0, 4.0])}, state)
    >>> print(optax_clip.norm_history(state))
    [10. 15.]
    >>> print(optax_clip.metrics(state)["observe/norm"])
    15.0
  """
  _validate.instance(
    optax.GradientTransformation, "optax, as optax.adamw(1e-3)", inner=inner
  )
  measuring = Measuring.of(measure, record)
  watch = clip_with(
    measuring.measure,
    _ring(_validate.size(window=window), name),
    Action(_weigh, _untouched),
    record=record,
    name=name,
  )

  def init(params: Params) -> ObserveState:
    state = inner.init(params)
    if not isinstance(inner.update, _guard.Guard):
      _inside.refuse_loss_scales(name, state)
    return ObserveState(watch.init(params), state)

  def update(
    updates: Updates,
    state: ObserveState,
    params: Params = None,
    **extra_args: object,
  ) -> tuple[Any, ObserveState]:
    _validate.state(ObserveState, state, repr(name))
    given_updates, updates = updates, _leaves.with_values(updates)
    weights = _leaves.floats_only(params)
    known = measuring.measured(updates, weights, extra_args).known
    shown = known
    if isinstance(inner.update, _guard.Guard):
      # Norms have the unit that the clip inside sees, whatever the loss scale.
      for scale in inner.update.scales(state.inner):
        shown = _guard.in_units_of(scale, shown, updates, weights)
    with _handed.scope(shown):
      passed, seen = watch.update(updates, state.seen, params, **extra_args)
    if isinstance(inner.update, _guard.Guard):
      # A guard's branch takes buffers: what came in is one already.
      passed = updates
    handed = known.moved(passed, weights)
    passed = _leaves.restored(passed, given_updates)
    result, later = _inside.update(
      inner, handed, passed, state.inner, params, extra_args
    )
    return result, ObserveState(seen, later)

  return optax.GradientTransformationExtraArgs(init, update)


def _ring(window: int, name: str) -> Threshold:
  """Makes a threshold that remembers all norms, and limits none."""

  def init(norms: Array) -> dict[str, NormHistory]:
    # The name is a key, as in the record: `ClipState` says why.
    ring = jnp.zeros((window, *norms.shape), jnp.float32)
    return {name: NormHistory(ring, jnp.zeros((), jnp.int32))}

  def update(
    norms: Array, state: dict[str, NormHistory], **extra_args: object
  ) -> tuple[Array, dict[str, NormHistory]]:
    del extra_args
    ((key, (ring, steps)),) = state.items()
    _same_shape(ring, (window, *norms.shape))
    # inf says that an element was not finite: a large norm must not become inf.
    row = _record.single(norms)
    ring = _mesh.on_mesh_of(ring, row)
    # One row at a time: in place where the state is donated.
    ring = lax.dynamic_update_index_in_dim(ring, row, steps % window, 0)
    later = {key: NormHistory(ring, optax.safe_increment(steps))}
    return jnp.full_like(norms, jnp.inf), later

  return Threshold(init, update)


def _same_shape(ring: Array, wanted: tuple[int, ...]) -> None:
  if ring.shape != wanted:
    raise ValueError(
      f"The state of observe keeps norms of shape {list(ring.shape)}, but now"
      f" (window, norms) is {list(wanted)}: it was made with another window or for"
      " another model (a checkpoint, perhaps). Pass that window, or make a new"
      " state with tx.init."
    )


def _weigh(norm: Extended, limit: Array) -> Extended:
  """Returns 1 always, which XLA must not know: see `_untouched`."""
  del limit
  return _extended.where(norm.value != -1, _extended.of(jnp.ones_like(norm.value)), 0)


def _untouched(leaf: Array, coefficient: Extended, limit: Array) -> Array:
  """Returns the leaf, behind a choice that waits for the norm.

  If it returned the leaf itself, XLA would merge the norm's squares with Adam's, and
  write them down for both: a copy of all gradients.
  """
  del limit
  return jnp.where(coefficient.value == 1, leaf, jnp.zeros_like(leaf))
