#!/usr/bin/env bash
# Expected: `max_grad_norm` of an agent limits the norm of the gradient.
# Seen with rejax 0.1.3, gymnax 0.0.9 and jax 0.12.0.1, CPU, Python 3.13, 2026-11-30: it
# limits each element: rejax gives the number to `optax.clip`. Of a gradient of ones, whose
# norm is 67, nothing is clipped with max_grad_norm=1.
# Output: "max_grad_norm 1, norm 67.9, and what reached Adam 67.9".
# What to do: build the chain yourself, with a clip by the global norm.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.12.0.1 optax==0.2.8 rejax==0.1.3 gymnax==0.0.9
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import jax
import jax.numpy as jnp
import optax
from rejax import PPO

agent = PPO.create(env="CartPole-v1", max_grad_norm=1.0)
state = agent.init_state(jax.random.key(0)).actor_ts
ones = jax.tree.map(jnp.ones_like, state.params)
_, after = state.tx.update(ones, state.opt_state, state.params)
# Adam's first moment is 0.1 of what reaches it.
(moment,) = [
  node.mu
  for node in jax.tree.leaves(after, is_leaf=lambda node: hasattr(node, "mu"))
  if hasattr(node, "mu")
]
before, reached = float(optax.tree.norm(ones)), 10 * float(optax.tree.norm(moment))
print(f"max_grad_norm 1, norm {before:.1f}, and what reached Adam {reached:.1f}")
assert before > 10 and abs(reached / before - 1) < 1e-3
PYTHON
