"""Every transformation, one row each: the contract tests run over this table.

A new transformation is one row. `bounds` is its oracle: what it measures and
what it allows, in float64 NumPy, independent of the package's code.
"""

from collections.abc import Callable
from collections.abc import Mapping
import inspect
import math
import types
from typing import Any
from typing import NamedTuple

import jax
import numpy as np
import pytest

from helpers import oracles
import optax_clip

# For tests that mean a limit of 0, of which the package warns.
ZERO_IS_MEANT = pytest.mark.filterwarnings(
  "ignore:.*=.* turns every update into zeros:UserWarning"
)


class Row(NamedTuple):
  """One transformation.

  Attributes:
    name: the public name.
    factory: the public function.
    arguments: from a threshold to the keyword arguments of `factory`.
    threshold: a typical one, that clips unit-normal updates.
    kind: "rescaling" (direction is kept, group by group), "elementwise" or "spectral".
    bounds: `bounds(updates, params, threshold, ord)`, on lists of float64
      arrays: for each leaf its (norm, limit), broadcastable to the leaf. `None`
      for a threshold that learns, and for singular values.
    needs_params: whether `update` must be given parameters.
    stateful: whether a step depends on the steps before it.
    extremes: thresholds at the ends of what is allowed.
    scheduled: whether the threshold may be a schedule.
    copies: whether measuring needs temporary copies of the updates.
    layers: whether each leaf has a limit of its own.
    short: keyword arguments that make its warm-up, or its memory, short.
    waits: for how many steps a threshold that learns has no limit.
    parts: a transformation that is a chain records one entry for each part, whose
      names are its own and these endings.
  """

  name: str
  factory: Callable[..., Any]
  arguments: Callable[[Any], dict[str, Any]]
  threshold: float
  kind: str
  bounds: Callable[..., list[tuple[Any, Any]]] | None = None
  needs_params: bool = False
  stateful: bool = False
  extremes: tuple[float, ...] = (0.0, 1.0, math.inf)
  scheduled: bool = True
  layers: bool = False
  short: Mapping[str, Any] = types.MappingProxyType({})
  waits: int = 1
  parts: tuple[str, ...] = ("",)
  copies: bool = False

  def __hash__(self) -> int:
    """A row is found by its name, as one of its fields is a mapping."""
    return hash(self.name)

  def make(self, threshold=None, **keywords):
    """The transformation with its typical threshold, or another one."""
    threshold = self.threshold if threshold is None else threshold
    return self.factory(**self.arguments(threshold), **keywords)

  def takes(self, keyword):
    """Whether the public function has this keyword."""
    return keyword in inspect.signature(self.factory).parameters

  def first(self):
    """The name of the public function's first argument."""
    return next(iter(inspect.signature(self.factory).parameters))

  def recorded(self, name=None):
    """The prefixes of the metrics' keys, in the order of the chain."""
    return [(self.name if name is None else name) + part for part in self.parts]

  def expected(self, updates, params=None, threshold=None, ord=2.0):
    """The updates that should come out: float64 arrays, one for each leaf."""
    leaves = oracles.wide_leaves(updates)
    threshold = self.threshold if threshold is None else threshold
    pairs = self.bounds(leaves, oracles.wide_leaves(params), threshold, ord)
    results = []
    for leaf, (norm, limit) in zip(leaves, pairs, strict=True):
      norm, limit = (np.asarray(x, np.float64) for x in (norm, limit))
      if self.kind == "elementwise":
        results.append(np.clip(leaf, -limit, limit))
        continue
      exceeds = norm > limit
      # In this order no quotient or product underflows before the result does.
      scaled = np.where(exceeds, leaf, 0) / np.where(exceeds, norm, 1) * limit
      results.append(np.where(exceeds, scaled, leaf))
    return results


def _alternating(tree):
  """Labels the leaves of a tree "even", "odd", "even", ..."""
  leaves, treedef = jax.tree.flatten(tree)
  labels = ["odd" if i % 2 else "even" for i in range(len(leaves))]
  return jax.tree.unflatten(treedef, labels)


def _but_each_third(tree):
  """Flags for the leaves of a tree: True, True, False, True, True, False, ..."""
  leaves, treedef = jax.tree.flatten(tree)
  return jax.tree.unflatten(treedef, [i % 3 != 2 for i in range(len(leaves))])


def _elements(updates, params, limit, ord):
  del params, ord
  return [(np.abs(x), limit) for x in updates]


def _global(updates, params, limit, ord):
  del params
  return [(oracles.tree_norm(updates, ord), limit)] * len(updates)


def _layers(updates, params, limit, ord):
  del params
  return [(oracles.norm(x, ord), limit) for x in updates]


def _groups(updates, params, limit, ord):
  del params
  norms = [oracles.tree_norm(updates[i::2], ord) for i in range(2)]
  return [(norms[i % 2], (limit, 2 * limit)[i % 2]) for i in range(len(updates))]


def _groups_in_part(updates, params, limit, ord):
  pairs = _groups(updates, params, limit, ord)
  # What is left alone is as if it had no norm.
  return [(n if i % 3 != 2 else 0.0, c) for i, (n, c) in enumerate(pairs)]


def _rms(updates, params, limit, ord):
  del params, ord
  return [(oracles.norm(x) / np.sqrt(max(x.size, 1)), limit) for x in updates]


def _units(updates, params, limit, ord):
  def axes(x):
    if sum(n != 1 for n in x.shape) <= 1:
      return tuple(range(x.ndim))
    return (0,) if x.ndim <= 3 else tuple(range(x.ndim - 1))

  return [
    (
      oracles.norm(u, ord, axes(u)),
      limit * np.maximum(oracles.norm(p, ord, axes(p)), 1e-3),
    )
    for u, p in zip(updates, params, strict=True)
  ]


def _weights(updates, params, share, ord):
  del ord
  # Clippy compares elements with bounds; an element that is 0 has none. In these
  # units 1e307 over 1e-7 is a number.
  unit = 2.0**100
  norms = []
  for u, p in zip(updates, params, strict=True):
    moves = u != 0
    bounds = share * np.abs(p[moves]) + 1e-7
    norms.append((np.max(np.abs(u[moves]) / unit / bounds, initial=0), 1 / unit))
  return norms


ROWS = (
  Row(
    "clip", optax_clip.clip, lambda c: {"max_delta": c}, 0.5, "elementwise", _elements
  ),
  Row(
    "clip_by_global_norm",
    optax_clip.clip_by_global_norm,
    lambda c: {"max_norm": c},
    1.0,
    "rescaling",
    _global,
  ),
  Row(
    "clip_by_layer_norm",
    optax_clip.clip_by_layer_norm,
    lambda c: {"max_norm": c},
    0.7,
    "rescaling",
    _layers,
    layers=True,
  ),
  Row(
    "clip_by_group_norm",
    optax_clip.clip_by_group_norm,
    lambda c: {
      "labels": _alternating,
      "max_norms": {"even": c, "odd": c if callable(c) else 2 * c},
    },
    0.6,
    "rescaling",
    _groups,
  ),
  Row(
    "clip_by_block_rms",
    optax_clip.clip_by_block_rms,
    lambda c: {"threshold": c},
    0.4,
    "rescaling",
    _rms,
    layers=True,
  ),
  Row(
    "adaptive_grad_clip",
    optax_clip.adaptive_grad_clip,
    lambda c: {"clipping": c},
    0.05,
    "rescaling",
    _units,
    needs_params=True,
  ),
  Row(
    "clippy",
    optax_clip.clippy,
    lambda c: {"relative": c},
    0.1,
    "rescaling",
    _weights,
    needs_params=True,
    scheduled=False,
    copies=True,
  ),
  # Singular values, which no coefficient of a leaf describes, or which are bounds:
  # their oracles are in `tests/matrices`.
  Row(
    "spectral_clip",
    optax_clip.spectral_clip,
    lambda c: {"max_norm": c},
    0.7,
    "spectral",
    copies=True,
  ),
  Row(
    "clip_by_spectral_norm",
    optax_clip.clip_by_spectral_norm,
    lambda c: {"max_norm": c},
    0.7,
    "rescaling",
    copies=True,
  ),
  # Thresholds that learn: `threshold` is what each has instead of one.
  Row(
    "autoclip",
    optax_clip.autoclip,
    lambda c: {"percentile": c},
    10.0,
    "rescaling",
    stateful=True,
    extremes=(0.0, 100.0),
    scheduled=False,
    short={"window": 50},
  ),
  Row(
    "clip_by_layer_percentile",
    optax_clip.clip_by_layer_percentile,
    lambda c: {"percentile": c},
    5.0,
    "rescaling",
    stateful=True,
    extremes=(0.0, 100.0),
    scheduled=False,
    layers=True,
    short={"window": 50},
  ),
  Row(
    "clip_by_history",
    optax_clip.clip_by_history,
    lambda c: {"sigmas": c},
    3.0,
    "rescaling",
    stateful=True,
    extremes=(0.0, 3.0),
    scheduled=False,
    short={"window": 32},
  ),
  Row(
    "zclip",
    optax_clip.zclip,
    lambda c: {"max_norm": c},
    1.0,
    "rescaling",
    stateful=True,
    short={"warmup": 10, "max_norm": None},
  ),
  Row(
    "adagc",
    optax_clip.adagc,
    lambda c: {"warmup_norm": c},
    1.0,
    "rescaling",
    stateful=True,
    extremes=(1e-30, 1.0, 1e30),
    scheduled=False,
    layers=True,
    short={"warmup": 10},
  ),
  Row(
    "adaclip",
    optax_clip.adaclip,
    lambda c: {"decay": c},
    0.999,
    "elementwise",
    stateful=True,
    extremes=(0.0, 0.999),
    scheduled=False,
    layers=True,
  ),
  Row(
    "adagn",
    optax_clip.adagn,
    lambda c: {"decay_mean": c},
    0.7,
    "rescaling",
    stateful=True,
    extremes=(0.0, 0.999),
    scheduled=False,
    layers=True,
    waits=0,
  ),
  Row(
    "clip_element_spikes",
    optax_clip.clip_element_spikes,
    lambda c: {"theta": c},
    5000.0,
    "elementwise",
    stateful=True,
    extremes=(1e-30, 1e30),
    scheduled=False,
    short={"theta": 25.0, "decay": 0.9},
  ),
  Row(
    "stable_spam",
    optax_clip.stable_spam,
    lambda c: {"decay_max": c},
    0.999,
    "elementwise",
    stateful=True,
    extremes=(0.0, 0.999),
    scheduled=False,
    parts=("_adaclip", "_adagn"),
    layers=True,
  ),
)

# A transformation that leaves some leaves alone: its own norm may stay above the limit,
# so that it keeps the laws of single leaves only.
IN_PART = (
  next(row for row in ROWS if row.name == "clip_by_group_norm")._replace(
    arguments=lambda c: {
      "labels": _alternating,
      "max_norms": {"even": c, "odd": 2 * c},
      "scaled": _but_each_third,
    },
    bounds=_groups_in_part,
  ),
)

# Rows whose limits are known without their history.
FIXED = tuple(row for row in ROWS if row.bounds is not None)
RESCALING = tuple(row for row in FIXED if row.kind == "rescaling")
# Rows that measure norms of any order.
ORDERED = tuple(row for row in FIXED if row.takes("ord"))
# Rows that learn, and those of them that learn a limit for each leaf.
LEARNED = tuple(row for row in ROWS if row.stateful)
LAYERWISE = tuple(row for row in LEARNED if row.layers)
# Rows whose norms can be collected over mesh axes, whatever the specs: not of units.
COLLECTED = tuple(
  row for row in FIXED if row.takes("axis_name") and not row.takes("axis")
)


def names(rows):
  """The ids of a parametrization over rows."""
  return [row.name for row in rows]


# Public transformations around another one: their tests are those of guards.
AROUND = ("dynamic_loss_scale", "observe", "skip_nonfinite", "skip_spikes")
