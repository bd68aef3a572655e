"""What clipping did to each layer, by name, from any optimizer state."""

import collections
import dataclasses
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from optax_clip import _validate
from optax_clip._algebra.layers import LAYERS
from optax_clip._algebra.layers import LayerRecord
from optax_clip._algebra.slots import reported
from optax_clip._guards.record import SkipRecord
from optax_clip._report import metrics as _metrics
from optax_clip._trees import leaves as _leaves
from optax_clip._trees import paths as _paths
from optax_clip._types import OptState
from optax_clip._types import Params


class LayerMetrics(NamedTuple):
  """Says what clipping did to one layer.

  Attributes:
    norm: its norm in the last step, before clipping; with units, the largest.
    limit: the limit of the layer, or of its group, in the last step.
    coefficient: its factor in the last step; with units, the smallest.
    size: the norm for one element, which compares layers: the root mean square for
      norms of order 2. Ratios and RMS stay as they are.
    clipped: the share of all steps that clipped it.
  """

  norm: float
  limit: float
  coefficient: float
  size: float
  clipped: float


@dataclasses.dataclass(frozen=True)
class LayerReport:
  """Says what clipping did to each layer, and prints as a table.

  Attributes:
    layers: `LayerMetrics` by path, in the order of the parameters. A stacked leaf has
      the layers ``path[0]``, ``path[1]``, and so on; along two axes ``path[0][0]``.
    steps: how many updates came in.
    nonfinite: the first layer with a NaN or an inf, in the last step that had one;
      `None` if there was no such step.
    nonfinite_step: which step that was, counted from 1; 0 if there was none.
    spike: the layer that grew most in the last step that the guard skipped as a spike;
      `None` if there was none.
    spike_step: which step that was; 0 if there was none.
    spike_growth: that layer's norm, divided by its norm in the last step taken before.
    skips: the metrics of the guard that recorded these layers; empty of a clip.
    exploding: layers whose size was more than `factor` times the median size of the
      others in the last step, or not finite; the largest first.
    vanishing: layers whose size was less than the median over `factor`, or 0; the
      smallest first.
  """

  layers: dict[str, LayerMetrics]
  steps: int
  nonfinite: str | None
  nonfinite_step: int
  spike: str | None
  spike_step: int
  spike_growth: float
  skips: dict[str, float]
  exploding: list[str]
  vanishing: list[str]

  def scalars(self) -> dict[str, float]:
    """Returns all numbers in one flat dictionary, as ``<path>/norm``, for a logger."""
    return {
      f"{path}/{field}": value
      for path, layer in self.layers.items()
      for field, value in layer._asdict().items()
    }

  def __str__(self) -> str:
    """Writes one line for each layer, the largest norm first, in 80 columns at most."""
    # A NaN is larger than all.
    order = sorted(
      self.layers, key=lambda path: (-_order(self.layers[path].norm), path)
    )
    width = min(max(map(len, ["layer", *order])), 28)
    heading = "".join(f"{x:>10}" for x in ("norm", "limit", "coeff", "clipped"))
    lines = [f"{'layer':{width}}{heading}"]
    for path in order:
      x = self.layers[path]
      # A path's end says more than its start.
      shown = path if len(path) <= width else "..." + path[3 - width :]
      mark = ""
      if path in self.exploding:
        mark = "  EXPLODES" if np.isfinite(x.norm) else "  NOT FINITE"
      elif path in self.vanishing:
        mark = "  VANISHES"
      lines.append(
        f"{shown:{width}}{x.norm:10.3g}{x.limit:10.3g}{x.coefficient:10.3g}"
        f"{x.clipped:10.1%}{mark}"
      )
    if self.nonfinite is not None:
      lines.append(
        f"step {self.nonfinite_step} was not finite: first {self.nonfinite}"
        f"{self._outcome(self.nonfinite_step, 'last_nonfinite', 'nonfinite_step_loss')}"
      )
    if self.spike is not None:
      lines.append(
        f"step {self.spike_step} was a spike: {self.spike} grew"
        f" x{self.spike_growth:.3g}"
        f"{self._outcome(self.spike_step, 'last_spike', 'spike_loss')}"
      )
    return "\n".join(lines)

  def _outcome(self, step: int, counter: str, loss: str) -> str:
    """Says whether the guard skipped a step, and with what loss."""
    if not self.skips:
      return ""
    if self.skips[counter] != step:
      return "; taken"
    value = self.skips[loss]
    if not value:
      return "; skipped"  # None was passed.
    shown = f"{value:.4g}" if np.isfinite(value) else "not finite"
    return f"; skipped, loss {shown}"


def layer_metrics(
  opt_state: OptState, params: Params, *, name: str | None = None, factor: float = 1e3
) -> LayerReport:
  r"""Reads what a transformation with ``record="layers"`` did to each layer, by name.

  A layer explodes, or vanishes, if its size :math:`s_l`, the norm for one element, is
  far from the others' sizes in the last step:

  .. math::
      s_l > F \cdot \text{median}_k(s_k), \quad s_l < \text{median}_k(s_k) / F

  Clipping needed these norms anyway, or took them in the same read: no gradient is
  read twice. Call this outside `jax.jit`, as names are not arrays; it fetches a few
  vectors from the device.

  Args:
    opt_state: any optimizer state that holds such a record, however deep: what
      `metrics` takes.
    params: the parameters that ``init`` got, or anything with their structure; in Flax
      NNX ``nnx.state(model, nnx.Param)``, without what BatchNorm and Dropout have. For
      a transformation in `optax.masked` or `optax.multi_transform`, the part that it
      sees, with `optax.MaskedNode` for the rest, as ``jax.tree.map(lambda p, l: p if
      l == "clip" else optax.MaskedNode(), params, labels)``.
    name: which one, if there are several: the prefix of its metrics' keys.
    factor: F > 1. Layers differ by some powers of ten without harm; the default of
      1000 is beyond that.

  Returns:
    A `LayerReport`.

  Raises:
    ValueError: if the state holds no such record, or several; if its number of leaves
      is not that of `params`; if `factor` is not above 1.
    TypeError: inside `jax.jit`.

  Example:
    >>> import jax.numpy as jnp, optax, optax_clip
    >>> tx = optax.chain(
    ...     optax_clip.clip_by_global_norm(1.0, record="layers"), optax.sgd(0.1))
    >>> params = {"body": jnp.ones(4), "head": jnp.ones(4), "stem": jnp.ones(4)}
    >>> state = tx.init(params)
    >>> g = {"body": 2 + jnp.zeros(4), "head": 3 + jnp.zeros(4), "stem": jnp.zeros(4)}
    >>> _, state = tx.update(g, state)
    >>> report = optax_clip.layer_metrics(state, params)
    >>> print(report.layers["head"].norm, report.vanishing)
    6.0 ['stem']
    >>> print(report)
    layer      norm     limit     coeff   clipped
    head          6         1     0.139    100.0%
    body          4         1     0.139    100.0%
    stem          0         1     0.139    100.0%  VANISHES
  """
  _validate.above(1, factor=factor)
  found, record = _metrics.the_entry(
    opt_state,
    LayerRecord,
    name,
    words=("record of layers", "records of layers"),
    ask='Ask for one, as in optax_clip.clip_by_global_norm(1.0, record="layers")',
    suffix=LAYERS,
  )
  values: Any = LayerRecord._make(map(_host, record))
  params = _leaves.floats_only(params)
  paths, empty = _named(params, values)
  rows = zip(
    values.norm,
    values.limit,
    values.coefficient,
    values.size,
    values.steps_clipped / max(int(values.steps), 1),
    strict=True,
  )
  # Without leaves one row stands for none.
  layers = {
    path: LayerMetrics(*map(float, row))
    for path, row in zip(paths, rows, strict=bool(paths))
  }
  wrong, spike = int(values.nonfinite_layer), int(values.spike_layer)
  skips = [
    SkipRecord._make(map(_host, x))
    for key, x in _metrics.entries(opt_state, (SkipRecord,))
    if key == found
  ]
  exploding, vanishing = _apart(layers, factor)
  return LayerReport(
    layers=layers,
    steps=int(values.steps),
    nonfinite=paths[wrong] if wrong >= 0 else None,
    nonfinite_step=int(values.nonfinite_step),
    spike=paths[spike] if spike >= 0 else None,
    spike_step=int(values.spike_step),
    spike_growth=float(values.spike_growth),
    skips={k: v.item() for x in skips for k, v in reported(x).items()},
    exploding=exploding,
    # Before the first step all are 0, and leaves without elements always.
    vanishing=[path for path in vanishing if values.steps and path not in empty],
  )


def _host(leaf: Any) -> np.ndarray:
  value = _metrics.array(leaf)
  if isinstance(value, jax.core.Tracer):
    raise TypeError(
      "layer_metrics was called on a traced state, but returns names. Call it outside"
      " of jax.jit, on the state that the step returned."
    )
  return np.asarray(value)


def _named(params: Params, record: Any) -> tuple[list[str], set[str]]:
  """Names all layers; returns these names, and those of leaves without elements."""
  if record.steps.ndim:
    raise ValueError(
      f"opt_state holds an ensemble of shape {list(record.steps.shape)}. Pass one"
      " member's state, as jax.tree.map(lambda x: x[0], opt_state)."
    )
  stacks = record.stacks[:0] if np.all(record.stacks < 0) else record.stacks
  paths, leaves = _paths.every_name(params), jax.tree.leaves(params)
  if len(paths) != len(stacks):
    raise ValueError(
      f"opt_state has a record of {len(stacks)} leaves, params has {len(paths)}. Pass"
      " the parameters that init got: in Flax NNX nnx.state(model, nnx.Param); inside"
      " optax.masked or optax.multi_transform the part that the transformation sees,"
      " with optax.MaskedNode() for the rest."
    )
  # Of each leaf the sizes of its axes of layers; none if it is not a stack.
  counts = [row[row > 0] for row in np.atleast_2d(stacks.T).T]

  def layers(path: str, sizes: np.ndarray) -> list[str]:
    return [path + "".join(f"[{i}]" for i in index) for index in np.ndindex(*sizes)]

  used = collections.Counter(
    name for row in zip(paths, counts, strict=True) for name in layers(*row)
  )
  # With all quotes, where paths read alike: of "a/b", and of "b" in "a".
  exact = [jax.tree_util.keystr(x) for x, _ in jax.tree.leaves_with_path(params)]
  names, empty = [], set()
  for path, quoted, leaf, sizes in zip(paths, exact, leaves, counts, strict=True):
    own = layers(path, sizes)
    if any(used[name] > 1 for name in own):
      own = layers(quoted, sizes)
    names += own
    if not getattr(leaf, "size", 1):
      empty |= set(own)
  return names, empty


def _apart(
  layers: dict[str, LayerMetrics], factor: float
) -> tuple[list[str], list[str]]:
  """Returns the layers that are far above the others, and those far below."""
  sizes = {path: layer.size for path, layer in layers.items()}
  moving = [size for size in sizes.values() if np.isfinite(size) and size > 0]
  if not moving:
    return [path for path, size in sizes.items() if not np.isfinite(size)], []
  middle = float(np.median(moving))
  order = sorted(sizes, key=lambda path: _order(sizes[path]))
  high = [path for path in order if _order(sizes[path]) > factor * middle]
  low = [path for path in order if sizes[path] < middle / factor]
  return high[::-1], low


def _order(size: float) -> float:
  """Puts a NaN above all numbers."""
  return float("inf") if np.isnan(size) else size
