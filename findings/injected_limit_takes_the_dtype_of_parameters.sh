#!/usr/bin/env bash
# Expected: a hyperparameter that is injected keeps its value.
# Seen with optax 0.2.8 and jax 0.12.0.1, CPU, Python 3.13, 2026-11-30:
# `optax.inject_hyperparams` casts each number to the dtype of the parameters. With
# float16 parameters a limit of 1e5 is inf, which clips nothing, and one of 1e-8 is 0,
# which makes every update 0. Output: "[inf, 0.0]" and, with `hyperparam_dtype`,
# "[100000.0, 9.99999993922529e-09]".
# What to do: pass hyperparam_dtype=jnp.float32.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.12.0.1 optax==0.2.8
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import jax.numpy as jnp
import optax

params = {"w": jnp.ones(2, jnp.float16)}


def limits(**keywords):
  found = []
  for limit in (1e5, 1e-8):
    make = optax.inject_hyperparams(optax.clip_by_global_norm, **keywords)
    state = make(max_norm=limit).init(params)
    found.append(float(state.hyperparams["max_norm"]))
  return found


print(limits(), limits(hyperparam_dtype=jnp.float32))
assert limits() == [float("inf"), 0.0]
assert abs(limits(hyperparam_dtype=jnp.float32)[0] - 1e5) < 1
PYTHON
