"""How a threshold learns, remembers, forgets and ignores.

A method that learns is an equation, plus housekeeping that all such methods share.
The equation is a *rule*, alone in a function in the paper's symbols::

    rule(norms, memory, count) -> limits, memory

It acts on vectors with one entry for each norm of the measure, be it one norm or one
for each unit. `remembering` makes a `Threshold` of it and owns the rest:

* *Forgetting.* A step in which any norm is NaN or inf leaves the memory and the
  count bit for bit as they were: one NaN in a running mean stays there for good.
  A norm of 0 (an expert that no token reached, a frozen layer, a partner of LoRA
  that starts at zero, an empty batch) says nothing about how large updates are and
  is left out too, for its own entry. The count is therefore a vector: how many norms
  each entry has learned from, which is also what a warm-up counts.
* *What a rule sees.* Finite float32 norms; 0 stands for "nothing to learn from",
  and the limit is then what the memory alone says.
* *Range.* Norms of finite gradients reach 3e38, where squares overflow: rules
  keep roots (a standard deviation, not a variance) and divide before they
  square. An average that has seen 1e30 once is useless for thousands of steps:
  from one norm it learns at most a million times its own value (`plausible`).
* *Dtypes.* Memory is float32 whatever the gradients are, as bfloat16 rounds the
  small increments of an average away. Limits come back in the norms' dtype.
* *Noise.* Norms are right to 1e-6 relative. One that exceeds its limit by less
  than 2e-6 of it passes: otherwise rounding errors would clip equal norms, whose
  deviation is 0.
"""

from collections.abc import Callable
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip import _validate
from optax_clip._algebra.types import Threshold
from optax_clip._norms import power_sums as _power_sums
from optax_clip._norms import scalars as _scalars
from optax_clip._types import Scalar

Array = jax.Array
# The largest norm that is remembered.
LARGEST = float(jnp.finfo(jnp.float32).max)
# An average learns at most this many times its value: more than any spike after which
# it could still be of use, and less than broken steps produce.
LEAP = 2.0**20
# A norm that exceeds its limit by this share of it still counts as equal.
NOISE = 2.0**-19


class MemoryState(NamedTuple):
  """Holds the state of a threshold that learns.

  Attributes:
    seen: i32[norms], how many norms each entry has learned from; grows by one
      unless the step was not finite or the norm 0.
    memory: what the rule remembers, in float32 arrays whose first axis counts norms;
      changes when `seen` does.
  """

  seen: Array
  memory: Any


def remembering(
  start: Callable[[Array], Any],
  rule: Callable[[Array, Any, Array], tuple[Array, Any]],
) -> Threshold:
  """Makes a threshold of a rule, see the module's docstring.

  Args:
    start: from zeros, f32[norms], to the memory before the first step.
    rule: from norms, f32[norms], the memory and the count, i32[norms], to limits,
      f32[norms], and the memory with these norms learned. It need not care about
      dtypes, NaN or inf. Where a norm is 0 the old memory stays.
  """
  kind = _validate.Kind("this threshold")

  def init(norms: Array) -> MemoryState:
    like = jnp.zeros_like(norms.ravel(), jnp.float32)
    return MemoryState(jnp.zeros_like(like, jnp.int32), start(like))

  def update(
    norms: Array, state: MemoryState, **extra_args: object
  ) -> tuple[Array, MemoryState]:
    del extra_args
    exact = norms.ravel()
    kind.check(state, lambda: init(jnp.zeros_like(norms)))
    _same_size(exact.size, state)
    finite = jnp.isfinite(exact)
    n = jnp.where(finite, jnp.minimum(exact, LARGEST), 0).astype(jnp.float32)
    limits, memory = rule(n, state.memory, state.seen)

    keep = learned(exact)

    def kept(new: Array, old: Array) -> Array:
      mask = keep.reshape(keep.shape + (1,) * (old.ndim - 1))
      return jnp.where(mask, new.astype(old.dtype), old)

    limits = limits.astype(exact.dtype)
    near = exact <= limits * (1 + NOISE)
    limits = jnp.where(near, jnp.maximum(limits, exact), limits)
    return limits.reshape(norms.shape), MemoryState(
      kept(optax.safe_increment(state.seen), state.seen),
      jax.tree.map(kept, memory, state.memory),
    )

  return Threshold(init, Arithmetic(update))


class Arithmetic:
  """Serves as the `update` of a threshold that is arithmetic on its norms alone.

  Attributes:
    plain: the same function, for a caller that is such arithmetic itself.
  """

  def __init__(self, plain: Callable[..., tuple[Array, Any]]):
    self.plain = plain

  def __call__(
    self, norms: Array, state: Any, **extra_args: object
  ) -> tuple[Array, Any]:
    del extra_args
    update = _scalars.paired(self.plain) if norms.size == 1 else self.plain
    limits, state = update(norms, state)
    return limits, state


def is_arithmetic(*thresholds: Threshold) -> bool:
  """Returns whether the `update` of each is `Arithmetic`."""
  return all(isinstance(x.update, Arithmetic) for x in thresholds)


def plain(threshold: Threshold) -> Callable[..., tuple[Array, Any]]:
  """Returns the `update` of a threshold for a caller that is `Arithmetic` itself."""
  update = threshold.update
  return update.plain if isinstance(update, Arithmetic) else update


def learned(exact: Array) -> Array:
  """Returns which norms of a step are to be learned from: bool[norms]."""
  return jnp.all(jnp.isfinite(exact)) & (exact > 0)


def debiasing(decay: float | Array, count: Array) -> Array:
  r"""Returns the weight of the newest value in a bias-corrected running average.

  .. math::
      w = (1 - \beta) / (1 - \beta^t), \quad t = \text{count} + 1

  With it, ``a + w * (x - a)`` is the average that starts at 0, divided by
  :math:`1 - \beta^t`; but it needs no start, and stays at x if x is constant.
  """
  t = count.astype(jnp.float32) + 1
  # 1 - beta^t from powers in float32 has lost half its digits at beta .999.
  if isinstance(decay, float):
    log: Any = math.log(decay) if decay > 0 else -math.inf
  else:
    log = jnp.log(decay)
  return jnp.where(count == 0, 1, (1 - decay) / -jnp.expm1(t * log))


def number(value: Scalar) -> Any:
  """Converts a hyperparameter to a Python float where it is known, else to f32[]."""
  if callable(value):
    raise TypeError(
      f"Expected a number, got {value!r}: this hyperparameter takes no schedule."
      " optax.inject_hyperparams evaluates schedules for transformations whose"
      " arguments are numbers."
    )
  if isinstance(value, (int, float)):
    return float(value)
  return jnp.asarray(value, jnp.float32)


def plausible(n: Array, mean: Array, count: Array) -> tuple[Array, Array]:
  """Caps a new norm at `LEAP` times the running average that absorbs it.

  Returns:
    The capped norm; and whether the average should start anew with it, because the
    only norm before it was more than `LEAP` times as large.
  """
  most = jnp.where((count > 0) & (mean > 0), LEAP * mean, LARGEST)
  return jnp.minimum(n, most), (count == 1) & (mean > LEAP * n)


def root_mean(weight: Scalar, old: Array, new: Array) -> Array:
  r"""Takes the root of a weighted mean square, :math:`\sqrt{(1-w) a^2 + w b^2}`.

  The squares of both may be out of range.
  """
  unit = _power_sums.as_unit(jnp.maximum(old, new))
  mean = (1 - weight) * (old / unit) ** 2 + weight * (new / unit) ** 2
  # A square root with a finite derivative at 0.
  positive = mean > 0
  root = jnp.sqrt(jnp.where(positive, mean, 1))
  return jnp.where(positive, unit * root, 0).astype(old.dtype)


def _same_size(size: int, state: MemoryState) -> None:
  sizes = {x.shape[:1] for x in jax.tree.leaves(state)}
  if sizes != {(size,)}:
    found = ", ".join(sorted(str(s[0]) if s else "a scalar" for s in sizes))
    raise ValueError(
      f"The state of this threshold remembers {found} norms, but the updates"
      f" have {size}: it belongs to a model with another number of layers or"
      " groups (a checkpoint of it, perhaps). Make a new state with tx.init,"
      " which learns afresh, or restore the checkpoint that fits."
    )
