#!/usr/bin/env bash
# Expected: a checkpoint that does not fit the state to restore into is an error.
# Seen with flax 0.12.12, optax 0.2.8 and jax 0.12.0.1, CPU, Python 3.13, 2026-11-30:
# `checkpoints.restore_checkpoint(folder, target)` of a state whose optimizer has got a wrapper
# restores without an error, and Adam's moments are zeros: it keeps what the target has where
# nothing matches. Output: "moment saved 0.10, restored 0.00".
# What to do: restore with target=None, and look at what is there before it is used.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q \
  jax==0.12.0.1 optax==0.2.8 flax==0.12.12 orbax-checkpoint==0.12.8
"$work/venv/bin/python" -W ignore - "$work/saved" 2>/dev/null <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import optax
from flax.training import checkpoints
from flax.training.train_state import TrainState

params = {"w": jnp.ones(2)}
old = TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-3))
old = old.apply_gradients(grads={"w": jnp.ones(2)})
checkpoints.save_checkpoint(sys.argv[1], old, step=1)

tx = optax.chain(optax.apply_if_finite(optax.adam(1e-3), 3))
new = TrainState.create(apply_fn=None, params=params, tx=tx)
restored = checkpoints.restore_checkpoint(sys.argv[1], new)


def moment(state):
  (adam,) = [
    x
    for x in jax.tree.leaves(
      state.opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)
    )
    if isinstance(x, optax.ScaleByAdamState)
  ]
  return float(adam.mu["w"][0])


print(f"moment saved {moment(old):.2f}, restored {moment(restored):.2f}")
assert moment(old) > 0 and moment(restored) == 0
PYTHON
