#!/usr/bin/env bash
# Expected: a run that is resumed with another learning rate trains with it.
# Seen with optax 0.2.8 and jax 0.12.0.1, CPU, Python 3.13, 2026-11-30: with
# `optax.inject_hyperparams` numbers live in the state, and so in the checkpoint. The
# restored state has the old ones, which `update` takes; those of the new call are used by
# `init` alone. Nothing says so. Output: "step -0.100 and set by hand -0.001".
# What to do: set `state.hyperparams["learning_rate"]` after the restore.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.12.0.1 optax==0.2.8
"$work/venv/bin/python" - <<'PYTHON'
import jax.numpy as jnp
import optax

params, grads = {"w": jnp.ones(1)}, {"w": jnp.ones(1)}
saved = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1).init(params)
resumed = optax.inject_hyperparams(optax.sgd)(learning_rate=0.001)
step, _ = resumed.update(grads, saved, params)
saved.hyperparams["learning_rate"] = jnp.float32(0.001)
set_by_hand, _ = resumed.update(grads, saved, params)
print(f"step {step['w'][0]:.3f} and set by hand {set_by_hand['w'][0]:.3f}")
assert abs(step["w"][0] + 0.1) < 1e-6 and abs(set_by_hand["w"][0] + 0.001) < 1e-8
PYTHON
