#!/usr/bin/env bash
# Expected: after an accumulation has ended, the next one starts from zeros.
# Seen with optax 0.2.8 and jax 0.12.0.1, CPU, Python 3.13, 2026-11-30:
# `optax.MultiSteps` empties its accumulator by multiplying it with 0, and 0 times NaN is
# NaN. One microbatch with a NaN makes every later update NaN, though all gradients are
# finite again; an optimizer inside that skips what is not finite skips for good.
# Output: "finite updates after the NaN: 0 of 8".
# What to do: skip microbatches before they are accumulated: a guard around MultiSteps,
# or its own `should_skip_update_fn`.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.12.0.1 optax==0.2.8
"$work/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import optax

tx = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2)
params = {"w": jnp.ones(2)}
state, update, finite = tx.init(params), jax.jit(tx.update), []
for step in range(18):
  gradient = jnp.nan if step == 1 else 1.0
  updates, state = update({"w": jnp.full(2, gradient)}, state, params)
  if step > 1 and tx.has_updated(state):
    finite.append(bool(jnp.all(jnp.isfinite(updates["w"]))))
print(f"finite updates after the NaN: {sum(finite)} of {len(finite)}")
assert len(finite) == 8 and not any(finite)
PYTHON
