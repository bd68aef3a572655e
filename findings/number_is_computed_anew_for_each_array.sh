#!/usr/bin/env bash
# Expected: a number that multiplies fifty arrays is computed once, and its arithmetic
# stands once in the program.
# Seen with jax 0.12.0.1, Python 3.13, 2026-11-30, on a CPU: XLA puts all that makes the
# number into the kernel of every array, unless there is a division or a root in it. Of 20
# maxima that make one number, the optimised program has 20 for one array and 1,000 for
# fifty, and all of it is compiled: a clip by the global norm of 300 arrays took 1.5 times
# as long to compile as optax's, and 1.1 times once its coefficient was made once. Output:
# "{1: 20, 50: 1000} behind a barrier: 20".
# What to do: put `jax.lax.optimization_barrier` around the number. With jax 0.10.2 it
# changes nothing there; a number that a reduction returns is made once in both.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.12.0.1
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp


def maxima(count, hide=lambda x: x):
  """Counts the maxima in the program that multiplies arrays by one number."""

  def scaled(x, arrays):
    for _ in range(20):
      x = jnp.maximum(x * 1.5, 2)
    number = hide(x)
    return [number * y for y in arrays]

  arrays = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * count
  program = jax.jit(scaled).lower(jnp.float32(1), arrays).compile().as_text()
  return program.count(" maximum(")


found = {count: maxima(count) for count in (1, 50)}
behind = maxima(50, jax.lax.optimization_barrier)
print(found, "behind a barrier:", behind)
assert found == {1: 20, 50: 1000}
assert behind == 20
PYTHON
