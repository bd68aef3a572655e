#!/usr/bin/env bash
# Expected: a checkpoint holds every array of the tree that was saved.
# Seen with orbax-checkpoint 0.12.8 and jax 0.12.0.1, CPU, Python 3.13, 2026-11-30:
# a key with a dot, as PyTorch names parameters, and a nested path of the same words have
# one name on the disk. Orbax reads one of the two values in both places, now this one and now
# that one, and raises nothing.
# Output: "saved 1.0 and 2.0, restored 1.0 and 1.0", or 2.0 and 2.0.
# What to do: give such keys other names before you save the tree.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.12.0.1 orbax-checkpoint==0.12.8
"$work/venv/bin/python" - "$work/saved" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

tree = {"layer.weight": jnp.full(2, 1.0), "layer": {"weight": jnp.full(2, 2.0)}}
with ocp.StandardCheckpointer() as checkpointer:
  checkpointer.save(sys.argv[1], tree)
  checkpointer.wait_until_finished()
  restored = checkpointer.restore(sys.argv[1], jax.eval_shape(lambda: tree))
with_dot = float(restored["layer.weight"][0])
nested = float(restored["layer"]["weight"][0])
print("saved 1.0 and 2.0, restored", with_dot, "and", nested)
assert with_dot == nested
PYTHON
