#!/usr/bin/env bash
# Expected: what `jax.export` exports can be written to a file.
# Seen with jax 0.12.0.1, CPU, Python 3.13, 2026-11-30: a step is exported, and
# `serialize` of the result fails: it needs the package flatbuffers, which neither jax nor
# an extra of it that one would look for installs. Output: "exported sin" and
# "Please install 'flatbuffers' in order to use Exported serialization".
# What to do: pip install flatbuffers where steps are exported, and where they are read.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.12.0.1
"$work/venv/bin/python" - <<'PYTHON'
import jax
import jax.export
import jax.numpy as jnp

exported = jax.export.export(jax.jit(jnp.sin))(jnp.ones(3))
print("exported", exported.fun_name)
failed = None
try:
  exported.serialize()
except ImportError as error:
  failed = str(error)
print(failed)
assert failed is not None and "flatbuffers" in failed
PYTHON
