#!/usr/bin/env bash
# Expected: a differential equation that could not be solved gives NaN, or raises.
# Seen with diffrax 0.7.2 and jax 0.12.0.1, CPU, Python 3.13, 2026-11-30: with
# `throw=False`, as a training loop under vmap needs, a solve that runs out of steps returns
# where it stopped as the value at the end, with a finite gradient. y' = y from 1 should be
# 2.718 at 1. (With `saveat=SaveAt(ts=...)` the value is inf, and the gradient 0.)
# Output: "successful False value 1.174 gradient 0.188, with enough steps 2.718 2.718".
# What to do: multiply the loss by NaN where `solution.result` is no success, so that the
# gradient is NaN, too, and a guard skips the step.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.12.0.1 equinox==0.13.8 diffrax==0.7.2
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import diffrax
import jax
import jax.numpy as jnp


def loss(rate, max_steps):
  solution = diffrax.diffeqsolve(
    diffrax.ODETerm(lambda t, y, args: rate * y),
    diffrax.Tsit5(),
    t0=0.0,
    t1=1.0,
    dt0=0.01,
    y0=jnp.float32(1.0),
    max_steps=max_steps,
    throw=False,
  )
  return jnp.sum(solution.ys), solution.result == diffrax.RESULTS.successful


def solved(max_steps):
  (value, ok), gradient = jax.value_and_grad(loss, has_aux=True)(1.0, max_steps)
  return bool(ok), float(value), float(gradient)


failed, done = solved(16), solved(256)
print(
  f"successful {failed[0]} value {failed[1]:.3f} gradient {failed[2]:.3f},"
  f" with enough steps {done[1]:.3f} {done[2]:.3f}"
)
assert done[0] and abs(done[1] - 2.71828) < 1e-4
assert not failed[0] and failed[1] < 1.5 and failed[2] < 1.0
PYTHON
