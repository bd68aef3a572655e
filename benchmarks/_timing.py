"""How compiled programs are timed against each other on a noisy machine."""

from collections.abc import Callable
import datetime
import platform
import random
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_clip

Run = Callable[[], Any]


def interleaved(
  runs: dict[str, Run], repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
  """Times all runs in turn, in seconds, so that drift meets all alike.

  Each round has a new order: a run pays for what the one before it did to caches and
  to the allocator.
  """
  times: dict[str, list[float]] = {name: [] for name in runs}
  shuffled = random.Random(0)
  for repeat in range(repeats + warmup):
    for name, run in shuffled.sample(list(runs.items()), len(runs)):
      start = time.perf_counter()
      run()
      if repeat >= warmup:
        times[name].append(time.perf_counter() - start)
  return times


def ratio(numerator: list[float], denominator: list[float]) -> float:
  """Returns the median over rounds of the ratio within a round."""
  return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def difference(minuend: list[float], subtrahend: list[float]) -> float:
  """Returns the median over rounds of the difference within a round."""
  return statistics.median(a - b for a, b in zip(minuend, subtrahend, strict=True))


def spread(times: list[float]) -> float:
  """Returns half the interquartile range over the median."""
  low, middle, high = statistics.quantiles(times, n=4)
  return (high - low) / 2 / middle


def bandwidth(elements: int, repeats: int) -> dict[str, float]:
  """Measures bytes a second that this device reads, and copies (read plus written)."""
  x = jnp.ones(elements, jnp.float32)
  read = jax.jit(lambda x: jnp.sum(x * x))
  copy = jax.jit(lambda x: x + 1)
  times = interleaved(
    {
      "read": lambda: read(x).block_until_ready(),
      "copy": lambda: copy(x).block_until_ready(),
    },
    repeats,
  )
  return {
    "read_bytes_per_s": x.nbytes / statistics.median(times["read"]),
    "copy_bytes_per_s": 2 * x.nbytes / statistics.median(times["copy"]),
  }


def environment() -> dict[str, str]:
  """Describes what a figure depends on."""
  device = jax.devices()[0]
  return {
    "date": datetime.date.today().isoformat(),
    "device": device.device_kind,
    "platform": device.platform,
    "machine": platform.machine(),
    "cpu_count": str(_cpu_count()),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "optax": optax.__version__,
    "optax_clip": optax_clip.__version__,
  }


def _cpu_count() -> int:
  import os

  return (
    len(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else (os.cpu_count() or 1)
  )
