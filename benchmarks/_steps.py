"""Which training step the benchmarks run, and how it is compiled."""

from collections.abc import Callable
import math
import time
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_clip


def transformer_shapes(width: int, blocks: int) -> list[tuple[int, ...]]:
  """Returns four shapes a block (two matrices, two vectors) and an embedding's."""
  shapes: list[tuple[int, ...]] = []
  for _ in range(blocks):
    shapes += [(width,), (width, 4 * width), (4 * width,), (4 * width, width)]
  return [*shapes, (1024, 4 * width)]


def elements(shapes: list[tuple[int, ...]]) -> int:
  """Counts the parameters of a model of these shapes."""
  return sum(math.prod(shape) for shape in shapes)


class Step(NamedTuple):
  """Holds a compiled step, which runs on a state of its own."""

  run: Callable[[], Any]
  lower_s: float
  compile_s: float
  temp_bytes: int
  bytes_accessed: float
  kernels: int


def random_tree(shapes: list[tuple[int, ...]], dtype: Any) -> list[jax.Array]:
  """Draws normal gradients of unit scale."""
  return [
    jax.random.normal(jax.random.key(i), shape, jnp.float32).astype(dtype)
    for i, shape in enumerate(shapes)
  ]


# Steps share arrays of at least this many elements.
_LARGE = 1 << 14


class Trainer:
  """Holds parameters and moments that all steps of a benchmark share.

  Twelve copies of a large model would not fit on a device.
  """

  def __init__(self, optimizer: optax.GradientTransformation, grads: list[jax.Array]):
    """Starts with small weights, so that AGC clips too."""
    self.optimizer = optimizer
    self._grads = grads
    self._large: list[jax.Array] | None = None

  def compiled(
    self, tx: optax.GradientTransformation, whole: bool = False, show: bool = False
  ) -> Step:
    """Compiles a step that donates all but gradients.

    Args:
      tx: the whole optimizer.
      whole: whether `optax_clip.guarded_step` takes the step.
      show: whether the step returns the metrics, too.
    """
    tx = optax.with_extra_args_support(tx)

    def start() -> Any:
      params = [jnp.full(g.shape, 0.01, g.dtype) for g in self._grads]
      return params, tx.init(params)

    shapes, treedef = jax.tree.flatten(jax.eval_shape(start))
    # Parameters and moments. A memory of clipping may be as large, but is not shared.
    alike = {g.shape for g in self._grads}
    large = [x.size >= _LARGE and x.shape in alike for x in shapes]

    def step(large_leaves: Any, small_leaves: Any, grads: Any) -> Any:
      leaves = {True: iter(large_leaves), False: iter(small_leaves)}
      params, state = jax.tree.unflatten(treedef, [next(leaves[k]) for k in large])
      if whole:
        params, state = optax_clip.guarded_step(tx, grads, state, params)
      else:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
      flat = list(zip(large, jax.tree.leaves((params, state)), strict=True))
      logs = optax_clip.metrics(state) if show else {}
      return [x for k, x in flat if k], [x for k, x in flat if not k], logs

    leaves = list(zip(large, jax.tree.leaves(jax.jit(start)()), strict=True))
    if self._large is None:
      self._large = [x for k, x in leaves if k]
    small = [[x for k, x in leaves if not k]]
    begin = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
      self._large, small[0], self._grads
    )
    lower_s = time.perf_counter() - begin
    begin = time.perf_counter()
    compiled = lowered.compile()
    compile_s = time.perf_counter() - begin

    def run() -> None:
      self._large, small[0], logs = compiled(self._large, small[0], self._grads)
      jax.block_until_ready((self._large, small, logs))

    return Step(
      run=run,
      lower_s=lower_s,
      compile_s=compile_s,
      temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
      bytes_accessed=compiled.cost_analysis()["bytes accessed"],
      kernels=compiled.as_text().count(" fusion("),
    )
