#!/usr/bin/env bash
# Expected: x / 2**127 is exact for x = 2**127: it is 1.
# Seen with jax 0.12.0.1, CPU, Python 3.13, 2026-11-30: under jit with a constant divisor
# XLA multiplies with the inverse, 2**-127. That number is subnormal, CPUs flush it to 0, and
# the quotient is 0. A norm that is kept in range by powers of two meets this.
# Output: "NumPy 1.0 jit 0.0 in two steps 1.0".
# What to do: divide in two steps of 2**64 and 2**63, or use `jnp.ldexp`.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.12.0.1
"$work/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

x = np.full(4, 2.0**127, np.float32)
exact = (x / np.float32(2.0**127))[0]
one = jax.jit(lambda x: x / 2.0**127)(x)[0]
two = jax.jit(lambda x: x / 2.0**64 / 2.0**63)(x)[0]
print("NumPy", exact, "jit", one, "in two steps", two)
assert exact == 1.0 and one == 0.0
PYTHON
