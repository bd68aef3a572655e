"""What may stand inside a guard, and which keywords it gets: its user's, no others."""

from typing import Any

import jax
import optax

from optax_clip._algebra import handed as _handed
from optax_clip._algebra.handed import Known
from optax_clip._guards.judge import LossScale
from optax_clip._types import OptState
from optax_clip._types import Params
from optax_clip._types import Updates

# What guards read themselves. It goes no further where it is refused.
_OWN = ("loss", "value")


def update(
  inner: optax.GradientTransformation,
  known: Known,
  updates: Updates,
  state: OptState,
  params: Params,
  extra_args: dict[str, Any],
) -> tuple[Any, OptState]:
  """Updates, and hands norms on to whatever inside measures the same.

  A loss reaches a transformation that takes it, but does not fail in one that refuses
  it: `optax.contrib.sam`, or the function that a line search calls with all keywords.
  """
  inside = optax.with_extra_args_support(inner)
  with _handed.scope(known):
    try:
      return inside.update(updates, state, params, **extra_args)
    except TypeError as error:
      refused = _refused(error, extra_args)
      if refused is None:
        raise
  rest = {key: x for key, x in extra_args.items() if key != refused}
  return update(inner, known, updates, state, params, rest)


def _refused(error: TypeError, extra_args: dict[str, Any]) -> str | None:
  # Only a call says who refuses a keyword: chains and masks take all, for others. The
  # first words are Python's; optax's line searches say almost the same.
  text = str(error)
  if "unexpected keyword argument" not in text.lower():
    return None
  return next((x for x in _OWN if x in extra_args and repr(x) in text), None)


def refuse_loss_scales(name: str, state: OptState) -> None:
  """Raises if what stands inside has a loss scale in its state.

  A guard around it would freeze the scale in the very step in which it must fall, and
  learn norms whose unit changes. Guards directly around a loss scale judge after it.

  Raises:
    ValueError: names the order that works.
  """
  nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, LossScale))
  if any(isinstance(node, LossScale) for node in nodes):
    raise ValueError(
      f"A dynamic_loss_scale stands inside {name!r}, behind another transformation, so"
      " that its scale could not fall in a step that overflowed. Put it outermost:"
      f" dynamic_loss_scale({name}(...)), with optax.MultiSteps, clips and masks in it."
    )
