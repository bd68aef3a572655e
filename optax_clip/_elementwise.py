"""Clippy, and the element rules of SPAM and Stable-SPAM."""

import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip import _extended
from optax_clip import _groups
from optax_clip import _leaf
from optax_clip import _memory
from optax_clip import _moments
from optax_clip import _record
from optax_clip import _validate
from optax_clip import actions
from optax_clip import measures
from optax_clip import thresholds
from optax_clip._core import Action
from optax_clip._core import Measure
from optax_clip._core import clip_with
from optax_clip._core import given
from optax_clip._extended import Extended

Array = jax.Array


def clippy(
  relative: Any = 0.1,
  absolute: Any = 1e-7,
  accumulator_relative: Any = None,
  *,
  nonfinite: str = "propagate",
  strict: bool = False,
  axis_name: Any = "auto",
  specs: Any = None,
  stacked: _groups.Stacked = None,
  record: bool | str = True,
  name: str = "clippy",
) -> optax.GradientTransformationExtraArgs:
  r"""Scales each leaf so that no weight changes by more than a share of itself.

  `absolute`, 1e-7 by default as in the authors' code, is in the units of weights.

  .. math::
      u_l \leftarrow u_l \cdot \min\left(1, \min_{i \in l}
      \frac{r |p_i| + s / \sqrt{v_i} + a}{|u_i|}\right)

  To be placed after the optimizer and its learning rate, as it compares steps
  with weights. One weight at 0 limits its whole leaf to steps of `absolute`: with
  a tiny one, leaves that start at zero stay there. Mask them, or raise it. Needs
  `params` in `update`.

  Args:
    relative: r >= 0, the share of a weight. May be traced.
    absolute: a >= 0, in the units of the weights. May be traced.
    accumulator_relative: s >= 0; by default the term is left out. With it,
      `update` needs ``accumulator=v``, a tree like the updates: Adagrad's sum of
      squares. May be traced.
    nonfinite: ``"zero"`` turns the whole step into zeros if an element is NaN or
      inf.
    strict: whether no element may exceed its bound in exact arithmetic, up to the
      rounding of the bound.
    axis_name: mesh axes to collect over, see `optax_clip.measures`.
    specs: which dimension of which leaf is sharded, see `optax_clip.measures`.
    stacked: which leaves hold many layers, and along which axis, see
      `optax_clip.measures`.
    record: whether the state keeps what `metrics` reads; ``"layers"``: and what
      `layer_metrics` does. The recorded norm is the largest ratio of an element to
      its bound, and the limit 1.
    name: the prefix of the metrics' keys.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: if a number is negative or NaN; in `update`, if `params` is
      missing or of another structure, or `accumulator` is needed and missing.
    TypeError: in `update`, if a leaf is an integer or a boolean.

  ==========================  =============================================
  input                       result
  ==========================  =============================================
  all zero                    unchanged
  a weight of 0, absolute 0   its leaf is 0, unless its own update is
  a NaN element               its leaf is NaN; with ``"zero"`` all are zero
  ==========================  =============================================

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.clippy(0.1, 0.01)
    >>> params = {"w": jnp.array([1.0, 0.1])}
    >>> updates, _ = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
    >>> print(updates["w"])
    [0.02 0.02]

  References:
    Tang et al., Improving Training Stability for Multitask Ranking Models in
    Recommender Systems, 2023, arXiv:2302.09178. Defaults are those of the
    authors' code in TensorFlow Recommenders.
  """
  _validate.nonnegative(relative=relative, absolute=absolute)
  if accumulator_relative is not None:
    _validate.nonnegative(accumulator_relative=accumulator_relative)
  return clip_with(
    _share_of_bound(
      _exact(relative),
      _exact(absolute),
      # `None`, as `optax.inject_hyperparams` traces every number: also a 0.
      0.0 if accumulator_relative is None else _exact(accumulator_relative),
      axis_name,
      specs,
      stacked,
    ),
    thresholds.constant(1.0),
    actions.rescale(strict=strict),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )


def _exact(value: Any) -> Any:
  """A hyperparameter in the dtype it has: float64 weights deserve float64 bounds."""
  known = _memory.number(value)
  return known if isinstance(known, float) else jnp.asarray(value)


def _share_of_bound(
  r: Any, a: Any, s: Any, axis_name: Any, specs: Any, stacked: _groups.Stacked
) -> Measure:
  """For each leaf the largest ratio of an element to what it may be."""
  peak = measures.layer_norm(
    ord=math.inf, axis_name=axis_name, specs=specs, stacked=stacked
  )

  def measure(
    updates: Any, params: Any = None, *, accumulator: Any = None, **extra: Any
  ) -> list[Extended]:
    del extra
    _groups.same_structure(updates, params)
    leaves = _groups.floating_leaves(updates)
    weights = _groups.floating_leaves(params)
    sums: list[Any] = [None] * len(leaves)
    if not (isinstance(s, float) and s == 0):
      if accumulator is None:
        raise ValueError(
          "With accumulator_relative, pass the sums of squares, as in"
          " tx.update(updates, state, params, accumulator=v)."
        )
      sums = _groups.floating_leaves(accumulator)

    def ratio(far: bool, u: Array, p: Array, v: Array | None) -> Array:
      wide = _moments.accumulator(u.dtype)
      unit = _far(wide) if far else 1.0
      size = jnp.abs(u).astype(wide)
      bound = jnp.asarray(r, wide) * jnp.abs(p).astype(wide) + jnp.asarray(a, wide)
      if v is not None:
        bound = bound + jnp.asarray(s, wide) * jax.lax.rsqrt(v.astype(wide))
      moves = size != 0
      share = jnp.where(moves, size / unit, 0) / jnp.where(moves, bound, 1)
      most = jnp.finfo(wide).max
      return jnp.where(jnp.isfinite(size), jnp.minimum(share, most), size)

    def largest(far: bool) -> list[Extended]:
      shares = [ratio(far, *x) for x in zip(leaves, weights, sums, strict=True)]
      tree = jax.tree.unflatten(jax.tree.structure(updates), shares)
      return list(peak.measure(tree))

    def chosen(near: Extended, far: Extended) -> Extended:
      dtype = near.value.dtype
      use = jnp.isfinite(near.value) & (near.value > 2 * _far(dtype))
      # Of a bound of 0, whose ratio is no number.
      never = far.value >= float(jnp.finfo(dtype).max)
      unit = jnp.where(never, _extended.beyond(dtype), _far(dtype))
      return Extended(jnp.where(use, far.value, near.value), jnp.where(use, unit, 1))

    return list(map(chosen, largest(False), largest(True)))

  return peak._replace(measure=measure, ord=None)


def _far(dtype: Any) -> float:
  """The unit of ratios that are no floats, as that of 3e38 to 1e-7 is none.

  Elements of such a ratio are above 1, and still floats in this unit.
  """
  return float(2.0 ** (jnp.finfo(dtype).maxexp - 2))


class ElementSpikesState(NamedTuple):
  """The state of `clip_element_spikes`.

  Attributes:
    seen: i32[], the finite steps so far.
    rms: a tree of the updates' shapes, float32: the root of the running mean of
      squares; stands still in a step that is not finite. `None` if it is given.
    clip: `optax_clip.ClipState` or `optax.EmptyState`, the record.
  """

  seen: Array
  rms: Any
  clip: Any


def clip_element_spikes(
  theta: Any = 5000.0,
  decay: Any = 0.999,
  warmup: Any = 1,
  *,
  nonfinite: str = "propagate",
  axis_name: Any = "auto",
  record: bool | str = True,
  name: str = "clip_element_spikes",
) -> optax.GradientTransformationExtraArgs:
  r"""Clips elements that are far beyond what they were before (SPAM).

  .. math::
      g_i \leftarrow \text{sign}(g_i) \sqrt{\theta v_i}
      \text{ where } g_i^2 > \theta v_i, \quad
      v \leftarrow \beta v + (1 - \beta) g^2

  v is Adam's second moment before this step, without bias correction. By default
  this transformation keeps its own (4 bytes for each parameter), which is Adam's
  if it directly precedes `optax.adam` with ``b2=decay``. Elements whose v is 0
  were never moved, and pass.

  Args:
    theta: positive; 5000 is a factor of 71 over the root mean square.
    decay: beta, from 0 to below 1. `None`: keep no v, but take it in `update` as
      ``second_moment=v``, as in ``tx.update(grads, state, params,
      second_moment=optax.tree.get(adam_state, "nu"))``.
    warmup: how many steps pass at first; with ``decay=None`` it says nothing.
    nonfinite: ``"zero"`` turns the whole step into zeros if an element is NaN or
      inf.
    axis_name: mesh axes to collect the record over, see `optax_clip.measures`.
    record: whether the state keeps what `metrics` reads; ``"layers"``: and what
      `layer_metrics` does. The recorded norm is the largest ratio of an element to
      its limit, and the limit 1; the fraction is that of leaves with a spike.
    name: the prefix of the metrics' keys.

  `theta`, `decay` and `warmup` may be traced.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Its state is an
    `ElementSpikesState`.

  Raises:
    ValueError: if `theta` is not positive, `decay` not in [0, 1) or `warmup`
      negative; in `update`, if `second_moment` is needed and missing.
    TypeError: in `update`, if a leaf is an integer or a boolean.

  ======================  =================================================
  input                   result
  ======================  =================================================
  the first `warmup`      unchanged, remembered
  all zero                unchanged; remembered, as Adam does
  a NaN element           NaN; with ``"zero"`` all are zero; not remembered
  an inf element          its limit, with its sign; with ``"zero"`` all are
                          zero; not remembered
  an element of 1e30      clipped to its limit; v stays finite
  ======================  =================================================

  Example:
    >>> import jax.numpy as jnp, optax_clip
    >>> tx = optax_clip.clip_element_spikes(theta=4.0, decay=0.0)
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> for g in (jnp.array([1.0, 1.0]), jnp.array([-100.0, 1.5])):
    ...   updates, state = tx.update({"w": g}, state)
    >>> print(updates["w"])
    [-2.   1.5]

  Differences: the official code clips from step 20 after each reset of the
  momentum on (``warmup=20``), and then zeroes elements whose v is 0. SPAM's
  resets of the momentum are not part of this. We keep the root of v: the square of
  1e20 is no float32.

  References:
    Huang et al., SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM
    Training, 2025, arXiv:2501.06842.
  """
  _validate.positive(theta=theta)
  _validate.nonnegative(warmup=warmup)
  if decay is not None:
    _validate.fraction(decay=decay)
    decay = _memory.number(decay)
  warmup = _memory.number(warmup)
  root = jnp.sqrt(jnp.asarray(theta, jnp.float32))
  peak = measures.layer_norm(ord=math.inf, axis_name=axis_name)

  # Writes norms down, and leaves the updates alone.
  recorded = clip_with(
    peak,
    thresholds.constant(1.0),
    Action(actions.rescale().weigh, lambda leaf, coefficient, limit: leaf),
    nonfinite=nonfinite,
    record=record,
    name=name,
  )

  def init(params: Any) -> ElementSpikesState:
    params = _groups.floats_only(params)
    _groups.floating_leaves(params)
    rms = None
    if decay is not None:
      rms = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    clip = recorded.init(params)
    return ElementSpikesState(jnp.zeros((), jnp.int32), rms, clip)

  def clipped(g: Array, rms: Array, ready: Any) -> tuple[Array, Array, Array]:
    """The clipped element, its size, and its share of the limit before."""
    size = jnp.abs(g).astype(_moments.accumulator(g.dtype))
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
    updates: Any,
    state: ElementSpikesState,
    params: Any = None,
    *,
    second_moment: Any = None,
    **extra_args: Any,
  ) -> tuple[Any, ElementSpikesState]:
    del extra_args
    if not isinstance(state, ElementSpikesState):
      raise TypeError(
        f"The state of {name!r} must be the ElementSpikesState that its init returned,"
        f" got a {type(state).__name__}: it is of another transformation."
      )
    given_updates, updates = updates, _groups.with_values(updates)
    leaves = _groups.floating_leaves(updates)
    if decay is None:
      if second_moment is None:
        raise ValueError(
          "With decay=None, pass the second moment, as in"
          " tx.update(updates, state, second_moment=v)."
        )
      moments = _groups.floating_leaves(second_moment)
      old, ready = [jnp.sqrt(v) for v in moments], jnp.asarray(True)
    else:
      old = jax.tree.leaves(state.rms)
      if [x.shape for x in old] != [x.shape for x in leaves]:
        raise ValueError(
          f"The state of clip_element_spikes is of {len(old)} leaves, the"
          f" updates have {len(leaves)} or other shapes: it is of another model"
          " (a checkpoint of it, perhaps). Make a new state with tx.init."
        )
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
          jnp.where(finite, _next_rms(1 - decay, r, size), r)
          for r, size in zip(old, sizes, strict=True)
        ],
      )
    seen = jnp.where(finite, optax.safe_increment(state.seen), state.seen)
    kept = [_leaf.keep_weak_type(g, x) for g, x in zip(leaves, new, strict=True)]
    clipped_tree = jax.tree.unflatten(treedef, kept)
    known = given(clipped_tree, norms, peak)
    result, clip = recorded.update(clipped_tree, state.clip, params, norms=known)
    result = _groups.restored(result, given_updates)
    return result, ElementSpikesState(seen, rms, clip)

  return optax.GradientTransformationExtraArgs(init, update)


def _next_rms(weight: Any, rms: Array, size: Array) -> Array:
  size = jnp.minimum(size, _memory.LARGEST).astype(jnp.float32)
  return _memory.root_mean(weight, rms, size)
