#!/usr/bin/env bash
# Expected: the norm of 1000 leaves of 1000 ones is 1000, to the precision of bfloat16.
# Seen with optax 0.2.8 and jax 0.12.0.1, CPU, Python 3.13, 2026-11-30: it is 512. The
# squares of each leaf are summed well; the 1000 sums are then added one by one in bfloat16,
# and a sum of 256 times the next term does not change any more. A clip to 1 leaves 1.95.
# Output: "bfloat16 512.0 cast to float32 1000.0".
# What to do: take norms in float32: `optax.tree.norm(optax.tree.cast(grads, jnp.float32))`.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.12.0.1 optax==0.2.8
"$work/venv/bin/python" - <<'PYTHON'
import jax.numpy as jnp
import optax

leaves = [jnp.ones(1000, jnp.bfloat16)] * 1000
low = float(optax.tree.norm(leaves))
right = float(optax.tree.norm(optax.tree.cast(leaves, jnp.float32)))
print("bfloat16", low, "cast to float32", right)
assert low == 512.0 and abs(right - 1000.0) < 1e-2
PYTHON
