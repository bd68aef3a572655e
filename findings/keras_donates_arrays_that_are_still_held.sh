#!/usr/bin/env bash
# Expected: an array that was read from a model stays valid.
# Seen with keras 3.15.1 and jax 0.12.0.1, CPU, Python 3.13, 2026-11-30: on the JAX backend
# `fit` donates the values of variables to its compiled step. An array that `variable.value`
# gave before is deleted by the first step, and an optimizer that keeps the parameters
# themselves in its state fails. Output:
# "deleted True copy deleted False".
# What to do: copy what is to be kept: `jnp.copy(variable.value)`.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.12.0.1 keras==3.15.1
KERAS_BACKEND=jax KERAS_HOME="$work" "$work/venv/bin/python" - 2>/dev/null <<'PYTHON'
import jax.numpy as jnp
import keras
import numpy as np

model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(2)])
model.compile(optimizer="adam", loss="mse")
held = model.trainable_variables[0].value
copy = jnp.copy(held)
model.fit(np.ones((8, 4)), np.zeros((8, 2)), batch_size=8, verbose=0)
failed = None
try:
  held + 1
except RuntimeError as error:
  failed = str(error)
print("deleted", held.is_deleted(), "copy deleted", copy.is_deleted())
assert held.is_deleted() and failed and not copy.is_deleted()
PYTHON
