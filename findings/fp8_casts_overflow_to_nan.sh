#!/usr/bin/env bash
# Expected: a cast to a smaller dtype saturates, or overflows to inf.
# Seen with jax 0.12.0.1 and ml_dtypes 0.6.0, CPU, Python 3.13, 2026-11-30: float8_e4m3fn
# has no inf. Casts of 464 and less give 448, the largest number; of anything larger, NaN.
# A gradient that is too large by a few percent makes its whole step NaN. float8_e5m2 has an
# inf and gives it. Output:
# {"float8_e4m3fn": [448, 448, nan, nan, nan], "float8_e5m2": [448, 448, 448, inf, inf]}.
# What to do: `jnp.clip` to `jnp.finfo(dtype).max` before the cast.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.12.0.1 ml_dtypes==0.6.0
"$work/venv/bin/python" - <<'PYTHON'
import jax.numpy as jnp

x = jnp.array([448.0, 464.0, 465.0, 1e5, jnp.inf])
found = {
  dtype.dtype.name: x.astype(dtype).astype(jnp.float32).tolist()
  for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2)
}
print(found)
assert found["float8_e4m3fn"][:2] == [448.0, 448.0]
assert all(y != y for y in found["float8_e4m3fn"][2:])
assert found["float8_e5m2"][3] == float("inf")
PYTHON
