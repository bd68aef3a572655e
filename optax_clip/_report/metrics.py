"""Where the metrics' keys are made, from the records in any optimizer state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_clip._algebra.record import Record
from optax_clip._algebra.slots import reported
from optax_clip._guards.judge import LossScale
from optax_clip._guards.record import SkipRecord
from optax_clip._report import stuck as _stuck
from optax_clip._types import OptState

Array = jax.Array
_REPORTED = (Record, SkipRecord, LossScale)
# Of errors: clips by fixed limits take any state, and so record nothing in it.
_CONVERT = (
  "The state of another chain has none either, even where update takes it:"
  " optax_clip.convert_state(tx, params, old_state) makes one of it."
)


def metrics(opt_state: OptState, *, allow_empty: bool = False) -> dict[str, Array]:
  """Reads what the clipping transformations of an optimizer did in the last step.

  It is a pure function of the state: call it inside `jit` and return its result, or
  outside.

  Args:
    opt_state: any optimizer state that holds states of this package, however deep: in
      `optax.chain`, `masked`, `multi_transform`, `inject_hyperparams`, `MultiSteps`,
      `apply_if_finite`, `contrib.sam`; or what has such a state in it, as a Flax NNX
      `Optimizer` or a Linen `TrainState`.
    allow_empty: whether to return an empty dictionary for a state without a record,
      instead of raising an error.

  Returns:
    A flat dictionary of scalars. For each transformation, under its name
    (``clip_by_global_norm``, or what was passed as ``name=``):

    * ``<name>/norm``: f32, before clipping; with several norms, the largest.
    * ``<name>/limit``: f32; with several limits, the smallest.
    * ``<name>/coefficient``: f32, the factor for the updates; with several, the
      smallest.
    * ``<name>/clipped_fraction``: f32, the share of norms above their limit.
    * ``<name>/norm_after``: f32, the norm after clipping. Of several, the largest.
    * ``<name>/clip_rate``, ``<name>/nonfinite_rate``: f32, the share of such steps
      among all at first, and among the last 100 or so later; running averages.
    * ``<name>/steps``, ``<name>/steps_clipped``, ``<name>/steps_nonfinite``:
      i32, counted since `init`.
    * ``<name>/last_clipped``, ``<name>/last_nonfinite``: i32, the last such step,
      counted from 1; 0 if there was none.
    * ``<name>/clipped``, ``<name>/nonfinite``: i32, 1 if the last step was one.

    For `skip_nonfinite`, `skip_spikes` and `dynamic_loss_scale`, the fields of
    `SkipRecord`: ``norm``, ``limit``, ``skipped``, ``reason``, ``consecutive``,
    ``steps``, ``steps_skipped`` and how many of these for a NaN, an inf or a spike,
    ``skip_rate``, and when the last non-finite step and the last spike were, and their
    losses; `dynamic_loss_scale` adds ``scale`` and
    ``finite_steps``. A clip inside a guard shows the norm, limit and coefficient of
    the last step, taken or skipped, but counts only steps taken.

    A second transformation with the same name is ``<name>_1``, and so on, in the
    state's order.

  Outside `jit` it warns if a guard inside `optax.MultiSteps` has skipped its last two
  steps for NaNs: the accumulator keeps them, and no step will be taken any more.

  Raises:
    ValueError: if `opt_state` holds no record, unless `allow_empty`.

  Example:
    >>> import jax.numpy as jnp, optax, optax_clip
    >>> tx = optax.chain(optax_clip.clip_by_global_norm(1.0), optax.sgd(0.1))
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> _, state = tx.update({"w": jnp.array([3.0, 4.0])}, state)
    >>> print(optax_clip.metrics(state)["clip_by_global_norm/norm"])
    5.0
  """
  found = entries(opt_state, _REPORTED)
  if not found and not allow_empty:
    is_tx = isinstance(opt_state, optax.GradientTransformation)
    kind = "a transformation" if is_tx else f"of type {type(opt_state).__name__}"
    raise ValueError(
      f"opt_state, {kind}, holds no record. Pass the state"
      " that init or update of a clip, a guard or observe returned (a checkpoint"
      " restored as plain dictionaries is none). With record=False they record"
      f" nothing, and clip records with record=True only. {_CONVERT} Or pass"
      " allow_empty=True."
    )
  _stuck.warn(_unwrapped(opt_state))
  # A user's name may look like a numbered one.
  chosen = {name for name, _ in found}
  result: dict[str, Array] = {}
  for name, entry in found:
    prefix, number = name, 0
    values = _values(entry)
    while any(f"{prefix}/{field}" in result for field in values) or (
      number and prefix in chosen
    ):
      number += 1
      prefix = f"{name}_{number}"
    for field, value in values.items():
      result[f"{prefix}/{field}"] = value
  return result


def _values(entry: Any) -> dict[str, Array]:
  # Flax NNX wraps each leaf of the state.
  entry = type(entry)._make(map(array, entry))
  return entry._asdict() if isinstance(entry, LossScale) else reported(entry)


def loss_scale(opt_state: OptState) -> Array:
  """Returns what to multiply the next loss by, see `dynamic_loss_scale`.

  Args:
    opt_state: what `metrics` takes.

  Returns:
    f32[].

  Raises:
    ValueError: if the state holds no loss scale, or several.

  Example:
    >>> import jax.numpy as jnp, optax, optax_clip
    >>> tx = optax_clip.dynamic_loss_scale(optax.sgd(0.1), init_scale=1024.0)
    >>> print(optax_clip.loss_scale(tx.init({"w": jnp.zeros(2)})))
    1024.0
  """
  found = entries(opt_state, (LossScale,))
  if len(found) != 1:
    raise ValueError(
      f"opt_state holds {len(found)} loss scales, and must hold one. Wrap the optimizer"
      " in one dynamic_loss_scale, and pass the state that its init returned."
      f" {_CONVERT}"
    )
  return array(found[0][1].scale)


def entries(opt_state: OptState, kinds: tuple[type, ...]) -> list[tuple[str, Any]]:
  """Finds the entries of some kinds in a state; returns each with its key."""
  nodes = jax.tree_util.tree_leaves_with_path(
    _unwrapped(opt_state), is_leaf=lambda node: isinstance(node, kinds)
  )
  return [(path[-1].key, node) for path, node in nodes if isinstance(node, kinds)]


def _unwrapped(opt_state: OptState) -> OptState:
  """Returns the state that a framework's optimizer holds.

  A state of optax may have a field ``opt_state`` beside others, so that only an
  object that is not a tree itself, as an `Optimizer` of some Flax NNX, is asked for it.
  """
  if jax.tree_util.all_leaves([opt_state]):
    return getattr(opt_state, "opt_state", opt_state)
  return opt_state


def the_entry(
  opt_state: OptState,
  kind: type,
  name: str | None,
  *,
  words: tuple[str, str],
  ask: str,
  suffix: str = "",
) -> tuple[str, Any]:
  """Finds the only entry of a kind in a state, or the only one with a name.

  Returns its name, too.

  Args:
    opt_state: what `metrics` takes.
    kind: the type of the entry.
    name: the name of its transformation, or `None`.
    words: for errors, what to call one entry, and several.
    ask: for errors, how to have one.
    suffix: what follows the name in its key.
  """
  found = [(key.removesuffix(suffix), x) for key, x in entries(opt_state, (kind,))]
  if not found:
    raise ValueError(
      f"opt_state holds no {words[0]}. {ask}, and pass the state that the last update"
      f" returned. {_CONVERT}"
    )
  fitting = [(key, entry) for key, entry in found if name in (None, key)]
  if len(fitting) != 1:
    names = ", ".join(repr(key) for key, _ in found)
    raise ValueError(
      f"opt_state holds {len(fitting)} {words[1]} for name={name!r}, among those named"
      f" {names}. Pass the name of one, and give each transformation its own name."
    )
  return fitting[0]


def array(leaf: Any) -> Array:
  """Converts a leaf of a state to an array."""
  # Flax NNX wraps each leaf of the state in a variable.
  return jnp.asarray(leaf.get_value() if hasattr(leaf, "get_value") else leaf)
