#!/usr/bin/env bash
# Expected: outside jax.jit, an optimizer step that ran before compiles nothing.
# Seen with optax 0.2.8 and jax 0.12.0.1, CPU, Python 3.13, 2026-11-30:
# `optax.apply_if_finite` compiles a program in each eager update, and JAX keeps it:
# its `lax.cond` gets new branch functions each time. The same chain without it compiles
# nothing after the first update. Output: "wrapped [1, 1, 1] bare [0, 0, 0]".
# What to do: update inside jax.jit.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.12.0.1 optax==0.2.8
"$work/venv/bin/python" - <<'PYTHON'
import jax
import jax.monitoring
import jax.numpy as jnp
import optax

compiled = []


def note(event, duration, **keywords):
  if event == "/jax/core/compile/backend_compile_duration":
    compiled.append(event)


jax.monitoring.register_event_duration_secs_listener(note)


def counts(tx):
  params = {"w": jnp.ones(3)}
  state, found = tx.init(params), []
  for step in range(5):
    before = len(compiled)
    _, state = tx.update({"w": jnp.full(3, 0.1 * step)}, state, params)
    found.append(len(compiled) - before)
  return found[2:]


wrapped = counts(optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 3))
bare = counts(optax.sgd(0.1, momentum=0.9))
print("wrapped", wrapped, "bare", bare)
assert min(wrapped) > 0 and bare == [0, 0, 0]
PYTHON
