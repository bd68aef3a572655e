"""The training step that clipping is measured in."""

from collections.abc import Callable
import math
import time
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


def transformer_shapes(width: int, blocks: int) -> list[tuple[int, ...]]:
  """Four leaves a block (two matrices, two vectors) and one embedding."""
  shapes: list[tuple[int, ...]] = []
  for _ in range(blocks):
    shapes += [(width,), (width, 4 * width), (4 * width,), (4 * width, width)]
  return [*shapes, (1024, 4 * width)]


def elements(shapes: list[tuple[int, ...]]) -> int:
  """The parameters of a model of these shapes."""
  return sum(math.prod(shape) for shape in shapes)


class Step(NamedTuple):
  """A compiled step with the state that it is run on."""

  run: Callable[[], Any]
  lower_s: float
  compile_s: float
  temp_bytes: int
  bytes_accessed: float
  kernels: int


def random_tree(shapes: list[tuple[int, ...]], dtype: Any) -> list[jax.Array]:
  """Normal gradients of unit scale."""
  return [
    jax.random.normal(jax.random.key(i), shape, jnp.float32).astype(dtype)
    for i, shape in enumerate(shapes)
  ]


class Trainer:
  """Parameters and optimizer state that all steps of a benchmark share.

  Twelve copies of a large model would not fit on a device.
  """

  def __init__(self, optimizer: optax.GradientTransformation, grads: list[jax.Array]):
    """Starts with small weights, so that AGC clips too."""
    self._optimizer = optimizer
    self._grads = grads
    params = [jnp.full(g.shape, 0.01, g.dtype) for g in grads]
    self._shared = (params, optimizer.init(params))

  def compiled(self, clip: optax.GradientTransformation) -> Step:
    """Compiles clip, update and apply_updates; all but gradients donated."""

    def step(params: Any, state: Any, clip_state: Any, grads: Any) -> Any:
      updates, clip_state = clip.update(grads, clip_state, params)
      updates, state = self._optimizer.update(updates, state, params)
      return (optax.apply_updates(params, updates), state), clip_state

    clip_state = [clip.init(self._shared[0])]
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1, 2)).lower(
      *self._shared, clip_state[0], self._grads
    )
    lower_s = time.perf_counter() - start
    start = time.perf_counter()
    compiled = lowered.compile()
    compile_s = time.perf_counter() - start

    def run() -> None:
      self._shared, clip_state[0] = compiled(*self._shared, clip_state[0], self._grads)
      jax.block_until_ready((self._shared, clip_state))

    return Step(
      run=run,
      lower_s=lower_s,
      compile_s=compile_s,
      temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
      bytes_accessed=compiled.cost_analysis()["bytes accessed"],
      kernels=compiled.as_text().count(" fusion("),
    )
