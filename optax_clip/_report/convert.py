"""Builds one optimizer's state from another's, and keeps all that a checkpoint holds.

Parts of the two states that hold values of the same names belong together, in their
order: wherever they stand, and whatever is around them. `parts` defines a part.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import optax

from optax_clip import _validate
from optax_clip._report import parts as _parts
from optax_clip._report.parts import Names
from optax_clip._report.parts import Part
from optax_clip._report.parts import State
from optax_clip._types import OptState
from optax_clip._types import Params

# How many parts an error lists.
_LISTED = 8


def convert_state(
  tx: optax.GradientTransformation,
  params: Params,
  old_state: OptState,
  *,
  drop: Sequence[str] = (),
  report: Callable[[str], object] | None = None,
) -> Any:
  r"""Builds one optimizer's state from another optimizer's state or checkpoint.

  .. math::
      s_i \leftarrow \begin{cases} \text{old}_j & \text{if the value } j \text{ belongs
      to } i \\ \text{tx.init}(p)_i & \text{else} \end{cases}

  To resume a run with another clip, with a guard, or without one, from a checkpoint
  that was written before. Moments, counts and what thresholds have learned are kept
  bit for bit, wherever they stand in the chain and whatever is around it; what the old
  state does not have is as `tx` begins. The states of two transformations belong
  together if they hold values of the same names (``count, mu, nu``), in the order of
  the chain.

  Args:
    tx: the new optimizer: optax's, or with transformations of this package.
    params: the parameters, for ``tx.init``.
    old_state: as ``init`` or ``update`` of the old optimizer returned it; as restored
      with that as the target; or as Orbax and ``flax.serialization.msgpack_restore``
      return it without a target, as lists and dictionaries. An `Optimizer` of Flax NNX
      or a `TrainState` may be passed whole.
    drop: paths in `old_state`, as the report and the error print them; each stands for
      all below it. What it names is not taken over and begins anew, although it might
      fit. ``""`` names what fits nowhere.
    report: called with a text that says what was kept, is new, and was left out, as
      ``report=print``; of hyperparameters, the values.

  Returns:
    A state of `tx`, with the structure of ``tx.init(params)``. Arrays stay on their
    devices, sharded or not. Those that are on one device or none, while the parameters
    are on several, are placed as the parameter that they belong to is, or on all. Of
    `params` and an `old_state` made by `jax.eval_shape`, such a state.

  Raises:
    ValueError: if a part of `old_state` would be lost, or fits in several places; the
      error names it. Only what reports may be lost: records for `metrics`, and the
      counters of a wrapper that is not there any more, as `optax.apply_if_finite`.
      Also if a path in `drop` is none.
    TypeError: if `tx` is not a transformation, or if `params` have no values and a
      new one is to be made of them.

  ============================  ===============================================
  the old state                 result
  ============================  ===============================================
  of optax's clip               a new memory and record of ours, the rest kept
  without a guard               kept, inside the new guard
  of a guard that `tx` lacks    kept, without it; a loss scale or a learned limit
                                must be named in `drop`
  of a clip of the same memory  what it learned is kept: ``zclip()`` to
                                ``zclip(max_norm=1.0)``
  another window or shape       `ValueError`
  arrays without elements       none: they are as `tx` begins
  without a schedule            the new one begins at step 0
  hyperparameters, injected     their old values; by
                                ``drop=(".hyperparams['max_norm']",)`` the new one
  a record of another name      a new record
  ============================  ===============================================

  Example:
    >>> import jax.numpy as jnp, optax, optax_clip
    >>> params = {"w": jnp.zeros(2)}
    >>> old = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    >>> _, old_state = old.update({"w": jnp.ones(2)}, old.init(params))
    >>> tx = optax_clip.skip_nonfinite(
    ...     optax.chain(optax_clip.clip_by_global_norm(1.0), optax.adam(0.1))
    ... )
    >>> state = optax_clip.convert_state(tx, params, old_state, report=print)
    kept      [1][0] as .inner[1][0]: count, mu, nu
    new       .inner[0].record['clip_by_global_norm']
    new       .record['skip_nonfinite']
    >>> print(state.inner[1][0].mu["w"])
    [0.07071068 0.07071068]
  """
  _validate.instance(optax.GradientTransformation, "optax, as optax.adam(1e-3)", tx=tx)
  if not isinstance(old_state, tuple):
    old_state = getattr(old_state, "opt_state", old_state)
  shapes = jax.eval_shape(tx.init, params)
  chained = _parts.chained_names(shapes)
  old, new = State(old_state, chained), State(shapes, chained)
  dropped, may_be_lost = _dropped(old, drop)
  pairs, problems = _pairs(old, new, dropped)
  if not may_be_lost:
    _refuse_loss(old, new, pairs, problems, dropped)
  if report is not None:
    report(_report(old, new, pairs, dropped))

  sources: list[int | None] = [None] * len(new.leaves)
  for before, after in pairs:
    theirs = after.named()
    for names, i in before.named().items():
      sources[theirs[names]] = None if i in dropped else i
  abstract = [isinstance(x, jax.ShapeDtypeStruct) for x in old.leaves]
  if any(abstract):
    fresh = new.leaves
  else:
    fresh = _fresh(tx, params, [i is None for i in sources])
  placed = _placer(params)
  leaves = [
    fresh[i] if source is None else placed(new.names[i], old.leaves[source])
    for i, source in enumerate(sources)
  ]
  return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _dropped(old: State, drop: Sequence[str]) -> tuple[frozenset[int], bool]:
  """Finds the leaves that `drop` names, and whether all that fits nowhere may go."""
  paths = (drop,) if isinstance(drop, str) else tuple(drop)
  dropped: frozenset[int] = frozenset()
  for path in filter(None, paths):
    below = old.below(path)
    if not below:
      every = [x for part in old.parts for x in old.places(part)]
      raise ValueError(
        f"drop has {path!r}, which is not a part of old_state. Its parts are"
        f" {', '.join(map(repr, every[:_LISTED]))}."
      )
    dropped |= below
  return dropped, "" in paths


def _pairs(
  old: State, new: State, dropped: frozenset[int]
) -> tuple[list[tuple[Part, Part]], dict[str, str]]:
  """Pairs parts that belong together; says by path why the others fit nowhere."""
  there = _by_key([part for part in old.parts if part.split(dropped)[0].values])
  here = _by_key(new.parts)
  pairs, problems = [], {}
  for key, befores in there.items():
    afters = here.get(key, [])
    if len(befores) == len(afters):
      for before, after in zip(befores, afters, strict=True):
        misfit = _misfit(old, new, before.split(dropped)[0], after)
        if misfit is None:
          pairs.append((before, after))
        else:
          problems[before.path] = misfit
    elif afters:
      places = " or ".join(part.path or "the whole state" for part in afters)
      many = f"{len(befores)} of these are in old_state, and {len(afters)} in tx's"
      for part in befores:
        problems[part.path] = f"{many} state, {places}: which is which?"
  free = [part for key, parts in here.items() if key not in there for part in parts]
  for key, befores in there.items():
    if key not in here:
      problems.update((part.path, _nearest(part, free)) for part in befores)
  return pairs, problems


def _by_key(parts: list[Part]) -> dict[Any, list[Part]]:
  found: dict[Any, list[Part]] = {}
  for part in parts:
    found.setdefault(part.key(), []).append(part)
  return found


def _misfit(old: State, new: State, before: Part, after: Part) -> str | None:
  """Names the first value of another shape or dtype."""
  theirs = after.named()
  for names, i in before.named().items():
    j = theirs[names]
    if _parts.type_of(old.leaves[i]) != _parts.type_of(new.leaves[j]):
      return f"{old.text(i)}, and in tx's state {new.text(j)}"
  return None


def _nearest(part: Part, free: list[Part]) -> str:
  """Says why a part fits nowhere, compared with the part that resembles it."""
  for other in free:
    alike = (other.kind, other.name, other.fields())
    if alike == (part.kind, part.name, part.fields()):
      ours, theirs = set(part.named()), set(other.named())
      texts = [
        f"{verb} {'/'.join(min(names))}"
        for verb, names in (("lacks", ours - theirs), ("also has", theirs - ours))
        if names
      ]
      if other.scope != part.scope:
        texts.append(f"is of {'/'.join(other.scope) or 'no label'}")
      return f"{other.path or 'the state'} of tx {' and '.join(texts)}"
  return "tx's state has no such part"


def _refuse_loss(
  old: State,
  new: State,
  pairs: list[tuple[Part, Part]],
  problems: dict[str, str],
  dropped: frozenset[int],
) -> None:
  """Raises if something would be lost that may not be."""
  begun = {part.key() for part in new.parts}
  lost = [
    part
    for part in _left(old, [before for before, _ in pairs])
    if part.kind != "record"
    and not (old.only_counts(part) and part.key() not in begun)
    and part.split(dropped)[0].values
  ]
  if not lost:
    return
  lines = [
    f"  old_state{part.path} ({old.content(part)}): {problems[part.path]}"
    for part in lost[:_LISTED]
  ]
  if len(lost) > _LISTED:
    lines.append(f"  and {len(lost) - _LISTED} more")
  fix = (
    "Give tx the transformation that it is of, or say that it may be lost:"
    f" drop={_named(old, lost)!r}."
  )
  if isinstance(old.state, dict) and "opt_state" in old.state:
    fix = "old_state is a whole checkpoint: pass its 'opt_state'."
  raise ValueError(
    "The state of tx has no place for a part of old_state, which would be lost:\n"
    + "\n".join(lines)
    + f"\nNothing was converted. {fix}"
  )


def _named(old: State, lost: list[Part]) -> tuple[str, ...]:
  """Names parts by their paths; all hyperparameters of a wrapper by the one above."""
  named: list[str] = []
  for part in lost[:_LISTED]:
    beside = [x for x in old.parts if x.where[:-1] == part.where[:-1]]
    is_injected = part.kind in ("hyperparameter", "schedule")
    if is_injected and all(x in lost for x in beside):
      named.append(old.above(part))
    else:
      named += old.places(part)
  return tuple(dict.fromkeys(named))


def _left(state: State, placed: list[Part]) -> Iterator[Part]:
  """Yields the parts that were not placed."""
  taken = {part.where for part in placed}
  return (part for part in state.parts if part.where not in taken)


def _report(
  old: State,
  new: State,
  pairs: list[tuple[Part, Part]],
  dropped: frozenset[int],
) -> str:
  kept, begun, lost = [], [], []
  for before, after in pairs:
    moved = f" as {after.path}" if after.path != before.path else ""
    rest, gone = before.split(dropped)
    kept.append(f"kept      {before.path}{moved}: {old.content(rest)}")
    if gone.values:
      begun.append(f"new       {after.path}: {old.content(gone)}")
      lost.append(f"left out  {before.path}: {old.content(gone)}")
  begun += [f"new       {x.path}" for x in _left(new, [after for _, after in pairs])]
  without = _left(old, [before for before, _ in pairs])
  lost += [f"left out  {part.path}: {old.content(part)}" for part in without]
  return "\n".join(kept + begun + lost)


def _fresh(
  tx: optax.GradientTransformation, params: Params, wanted: list[bool]
) -> list[Any]:
  """Makes the leaves of ``tx.init(params)`` that are wanted, and no others."""
  if not any(wanted):
    return [None] * len(wanted)
  if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
    raise TypeError(
      "params have no values: they are of jax.eval_shape, and so new values of the"
      " state cannot be made. Pass the parameters that were restored."
    )

  def made(params: Params) -> list[Any]:
    leaves = jax.tree.leaves(tx.init(params))
    return [x for x, want in zip(leaves, wanted, strict=True) if want]

  # A moment that the old state has is not allocated.
  values = iter(jax.jit(made)(params))
  return [next(values) if want else None for want in wanted]


def _placer(params: Params) -> Callable[[Names, Any], Any]:
  """Places a leaf on the devices of the parameters, if it is not on several."""
  places: dict[Names, Any] = {}
  everywhere = None
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    if _is_spread(x):
      names = _parts.names_of(path)
      places[names] = x.shape, x.sharding
      if isinstance(x.sharding, jax.sharding.NamedSharding):
        spec = jax.sharding.PartitionSpec()
        everywhere = jax.sharding.NamedSharding(x.sharding.mesh, spec)

  def placed(names: Names, leaf: ArrayLike) -> Any:
    if isinstance(leaf, (jax.ShapeDtypeStruct, jax.core.Tracer)):
      return leaf
    if not places or _is_spread(leaf):
      return jnp.asarray(leaf)
    for i in range(len(names) + 1):
      shape, sharding = places.get(names[i:], (None, None))
      if shape == jnp.shape(leaf):
        return jax.device_put(leaf, sharding)
    return jnp.asarray(leaf) if everywhere is None else jax.device_put(leaf, everywhere)

  return placed


def _is_spread(x: object) -> bool:
  """Returns whether a value is an array on several devices."""
  if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
    return False
  return len(x.sharding.device_set) > 1
