"""Clips single elements far above their second moment (SPAM)."""

import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip import _validate
from optax_clip import actions
from optax_clip import measures
from optax_clip._algebra import handed as _handed
from optax_clip._algebra import measured as _measured
from optax_clip._algebra import record as _record
from optax_clip._algebra.clip_with import clip_with
from optax_clip._algebra.types import Action
from optax_clip._norms import extended as _extended
from optax_clip._norms import power_sums as _power_sums
from optax_clip._repr import named
from optax_clip._repr import short
from optax_clip._thresholds import limits as _limits
from optax_clip._thresholds import memory as _memory
from optax_clip._trees import leaf as _leaf
from optax_clip._trees import leaves as _leaves
from optax_clip._types import AxisName
from optax_clip._types import Nonfinite
from optax_clip._types import Params
from optax_clip._types import Recording
from optax_clip._types import Scalar
from optax_clip._types import Updates

Array = jax.Array


class ElementSpikesState(NamedTuple):
  """Holds the state of `clip_element_spikes`.

  Attributes:
    seen: i32[], the finite steps so far.
    rms: a tree of the updates' shapes, float32: the root of the running mean of
      squares, which a step that is not finite leaves as it is. `None` where a leaf
      has no elements, and if `update` is given the second moment.
    clip: the record, in an `optax_clip.states.ClipState` or `optax.EmptyState`.
  """

  seen: Array
  rms: Any
  clip: Any

  def __repr__(self) -> str:
    return short(self)


@named
def clip_element_spikes(
  theta: Scalar = 5000.0,
  decay: Scalar = 0.999,
  warmup: Scalar = 1,
  *,
  nonfinite: Nonfinite = "propagate",
  axis_name: AxisName = "auto",
  record: Recording = True,
  name: str = "clip_element_spikes",
) -> optax.GradientTransformationExtraArgs:
  r"""Clips elements that are far above their own past size (SPAM).

  .. math::
      g_i \leftarrow \text{sign}(g_i) \sqrt{\theta v_i}
      \text{ where } g_i^2 > \theta v_i, \quad
      v \leftarrow \beta v + (1 - \beta) g^2

  v is Adam's second moment before this step, without bias correction. By default
  this transformation keeps a v of its own, 4 bytes for each parameter, which equals
  Adam's if it directly precedes `optax.adam` with ``b2=decay``. An element whose v is
  0 has never moved, and passes. `theta`, `decay` and `warmup` may be traced.

  Args:
    theta: positive; 5000 is a factor of 71 over the root mean square.
    decay: beta, from 0 to below 1. With `None` it keeps no v, and `update` takes
      ``second_moment=v``, as in ``tx.update(grads, state, params,
      second_moment=optax.tree.get(adam_state, "nu"))``.
    warmup: how many steps pass at first, 0 or more; ignored if `decay` is `None`.
    nonfinite, name: as in `clip_with`.
    record: as in `clip_with`; the norm is the largest ratio of an element to its
      limit, the limit 1, and the fraction that of leaves with a spike.
    axis_name: the mesh axes of the record, as in `optax_clip.measures`.

  Returns:
    An `optax.GradientTransformationExtraArgs` with an `ElementSpikesState`.

  Raises:
    ValueError: if a number is outside its range; in `update`, if `second_moment`
      is needed and missing.

  ===================  =============================================================
  input                result
  ===================  =============================================================
  the first `warmup`   unchanged, remembered
  all zero             unchanged; remembered, as Adam does
  a NaN element        NaN; with ``"zero"`` all are zero; not remembered
  an inf element       its signed limit; with ``"zero"`` all are zero; not remembered
  an element of 1e30   clipped to its limit; v stays finite
  ===================  =============================================================

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.clip_element_spikes(theta=4.0, decay=0.0)
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> for g in (jnp.array([1.0, 1.0]), jnp.array([-100.0, 1.5])):
    ...   updates, state = tx.update({"w": g}, state)
    >>> print(updates["w"])
    [-2.   1.5]

  Differences: the official code starts to clip 20 steps after each reset of the
  momentum (``warmup=20``), and then zeroes elements whose v is 0. SPAM's resets are
  not part of this. We keep the root of v, as float32 does not hold the square of 1e20.

  References:
    Huang et al., SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM
    Training, 2025, arXiv:2501.06842.
  """
  _validate.positive(theta=theta)
  _validate.steps(warmup=warmup)
  if decay is not None:
    _validate.fraction(decay=decay)
    decay = _memory.number(decay)
  warmup = _memory.number(warmup)
  root = jnp.sqrt(jnp.asarray(theta, jnp.float32))
  peak = measures.layer_norm(ord=math.inf, axis_name=axis_name)

  # This records norms, and leaves the updates alone.
  recorded = clip_with(
    peak,
    _limits.constant(1.0),
    Action(actions.rescale().weigh, lambda leaf, coefficient, limit: leaf),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )

  def init(params: Params) -> ElementSpikesState:
    params = _leaves.floats_only(params)
    _leaves.floating_leaves(params)
    rms = None
    if decay is not None:
      # Checkpointers refuse arrays of size 0.
      rms = jax.tree.map(
        lambda p: jnp.zeros_like(p, jnp.float32) if jnp.size(p) else None, params
      )
    clip = recorded.init(params)
    return ElementSpikesState(jnp.zeros((), jnp.int32), rms, clip)

  def clipped(g: Array, rms: Array, ready: Any) -> tuple[Array, Array, Array]:
    """Returns clipped elements, their sizes, and what share of a limit each one was."""
    size = jnp.abs(g).astype(_power_sums.accumulator(g.dtype))
    limit = root.astype(size.dtype) * rms.astype(size.dtype)
    known = (limit > 0) & ready
    share = jnp.where(known, size, 0) / jnp.where(known, limit, 1)
    spike = known & (size > limit)
    if jnp.iscomplexobj(g):
      factor = jnp.where(spike, limit, 1) / jnp.where(spike, size, 1)
      new = (g * factor.astype(g.dtype)).astype(g.dtype)
    else:
      new = jnp.copysign(limit, g.astype(limit.dtype)).astype(g.dtype)
    share = jnp.minimum(share, jnp.finfo(share.dtype).max)
    return (
      jnp.where(spike, new, g),
      jnp.where(spike, limit, size),
      jnp.where(jnp.isfinite(size), share, size),
    )

  def update(
    updates: Updates,
    state: ElementSpikesState,
    params: Params = None,
    *,
    second_moment: Any = None,
    **extra_args: object,
  ) -> tuple[Any, ElementSpikesState]:
    del extra_args
    _validate.state(ElementSpikesState, state, repr(name))
    given_updates, updates = updates, _leaves.with_values(updates)
    leaves = _leaves.floating_leaves(updates)
    if decay is None:
      if second_moment is None:
        raise ValueError(
          "With decay=None, pass the second moment, as in"
          " tx.update(updates, state, second_moment=v)."
        )
      moments = _leaves.floating_leaves(second_moment)
      old, ready = [jnp.sqrt(v) for v in moments], jnp.asarray(True)
    else:
      old = _moments(state.rms, leaves)
      ready = state.seen.astype(jnp.float32) >= warmup
    new, sizes, shares = (
      zip(
        *(clipped(g, r, ready) for g, r in zip(leaves, old, strict=True)),
        strict=True,
      )
      if leaves
      else ((), (), ())
    )

    treedef = jax.tree.structure(updates)
    norms = peak.measure(jax.tree.unflatten(treedef, list(shares)))
    finite = _record.all_finite([_extended.as_float(x) for x in norms])
    rms = state.rms
    if decay is not None:
      rms = jax.tree.unflatten(
        treedef,
        [
          jnp.where(finite, _next_rms(1 - decay, r, size), r) if r.size else None
          for r, size in zip(old, sizes, strict=True)
        ],
      )
    seen = jnp.where(finite, optax.safe_increment(state.seen), state.seen)
    kept = [_leaf.keep_weak_type(g, x) for g, x in zip(leaves, new, strict=True)]
    clipped_tree = jax.tree.unflatten(treedef, kept)
    with _handed.scope(_measured.known(peak, clipped_tree, norms)):
      result, clip = recorded.update(clipped_tree, state.clip, params)
    result = _leaves.restored(result, given_updates)
    return result, ElementSpikesState(seen, rms, clip)

  return optax.GradientTransformationExtraArgs(init, update)


def _moments(rms: Any, leaves: list[Array]) -> list[Array]:
  """Returns the moment of each leaf; the state has none of leaves without elements."""
  moments = [x for x in jax.tree.leaves(rms) if x.size]
  moving = [x for x in leaves if x.size]
  if [x.shape for x in moments] != [x.shape for x in moving]:
    raise ValueError(
      f"The state of clip_element_spikes has {len(moments)} leaves, the updates"
      f" have {len(moving)}, or some of other shapes: it is of another model"
      " (a checkpoint of it, perhaps). Make a new state with tx.init."
    )
  found = iter(moments)
  return [next(found) if x.size else jnp.zeros_like(x, jnp.float32) for x in leaves]


def _next_rms(weight: Any, rms: Array, size: Array) -> Array:
  size = jnp.minimum(size, _memory.LARGEST).astype(jnp.float32)
  return _memory.root_mean(weight, rms, size)
