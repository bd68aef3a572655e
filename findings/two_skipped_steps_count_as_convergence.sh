#!/usr/bin/env bash
# Expected: a minimiser that has not moved from its start does not report success.
# Seen with optimistix 0.1.0, optax 0.2.8 and jax 0.10.2, CPU, Python 3.11, 2026-11-30:
# `optimistix.OptaxMinimiser` compares one step with the step before it. An optimizer
# that skips two steps in a row, as any guard does, returns the starting point as
# `RESULTS.successful`. Output: "successful True steps 2 at start True".
# What to do: count skipped steps, and look at the value beside the result.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 optax==0.2.8 optimistix==0.1.0
"$work/venv/bin/python" - <<'PYTHON'
import jax.numpy as jnp
import optax
import optimistix as optx

# Skips its first steps, as after gradients that are not finite.
waits = optax.chain(
  optax.sgd(0.1), optax.scale_by_schedule(lambda step: jnp.where(step < 3, 0.0, 1.0))
)
start = jnp.array([10.0, 10.0, 10.0])
solver = optx.OptaxMinimiser(waits, rtol=1e-6, atol=1e-6)
found = optx.minimise(
  lambda x, args: jnp.sum(x**2), solver, start, max_steps=100, throw=False
)
successful = bool(found.result == optx.RESULTS.successful)
at_start = bool(jnp.all(found.value == start))
print("successful", successful, "steps", int(found.stats["num_steps"]), "at start", at_start)
assert successful and at_start
PYTHON
