#!/usr/bin/env bash
# Expected: a NaN in an adversarial step, whose parameters the loop restores, is forgotten:
# the outer optimizer does not act in that step.
# Seen with optax 0.2.8 and jax 0.12.0.1, CPU, Python 3.13, 2026-11-30:
# `optax.contrib.sam` updates both optimizers in every step and chooses between two states by
# multiplying them with 0 and 1. 0 times NaN is NaN: the momentum of the outer optimizer is
# NaN for good, and so is every later update, though all gradients are finite.
# Output: "finite updates after the NaN: 0 of 17, without momentum 17 of 17".
# What to do: put a guard that skips what is not finite around `sam`, not inside it.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.12.0.1 optax==0.2.8
"$work/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import optax
from optax import contrib


def finite_updates(momentum):
  adversarial = optax.chain(contrib.normalize(), optax.sgd(0.05))
  tx = contrib.sam(optax.sgd(0.1, momentum=momentum), adversarial, sync_period=2)
  params = {"w": jnp.ones(2)}
  state, update, found = tx.init(params), jax.jit(tx.update), []
  for step in range(20):
    gradient = jnp.nan if step == 2 else 1.0
    updates, state = update({"w": jnp.full(2, gradient)}, state, params)
    is_finite = bool(jnp.all(jnp.isfinite(updates["w"])))
    if is_finite:  # Else the loop keeps its parameters.
      params = optax.apply_updates(params, updates)
    if step > 2:
      found.append(is_finite)
  return sum(found), len(found)


kept, plain = finite_updates(0.9), finite_updates(None)
print(
  f"finite updates after the NaN: {kept[0]} of {kept[1]},"
  f" without momentum {plain[0]} of {plain[1]}"
)
assert kept[0] == 0 and plain[0] == plain[1]
PYTHON
