#!/usr/bin/env bash
# Expected: an array without elements is saved like any other: it has a shape and a dtype.
# Seen with orbax-checkpoint 0.12.8 and jax 0.12.0.1, CPU, Python 3.13, 2026-11-30:
# Orbax refuses the whole tree. An optimizer that keeps an empty array, for a group without
# leaves say, trains well and fails at its first checkpoint.
# Output:
# "Cannot save arrays with zero size: ParamInfo: [name=empty,value_typestr=jax.Array]".
# What to do: keep no such array in a state, or save `None` in its place.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.12.0.1 orbax-checkpoint==0.12.8
"$work/venv/bin/python" - "$work/saved" 2>/dev/null <<'PYTHON'
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp

checkpointer, refused = ocp.StandardCheckpointer(), None
try:
  checkpointer.save(sys.argv[1], {"weights": jnp.ones(2), "empty": jnp.zeros((0, 3))})
  checkpointer.wait_until_finished()
except ValueError as error:
  refused = str(error)
finally:
  checkpointer.close()
print(refused)
assert refused is not None and "zero size" in refused
PYTHON
