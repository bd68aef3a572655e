#!/usr/bin/env bash
# Expected: `from orbax.checkpoint import v1` works, and so does `import orbax.checkpoint.v1`.
# Seen with orbax-checkpoint 0.12.8 and jax 0.12.0.1, CPU, Python 3.13, 2026-11-30: the first
# works, and the second says that there is no module of that name: `v1` is an attribute of the
# package, and the module behind it has another name.
# Output: "from orbax.checkpoint import v1: works, import orbax.checkpoint.v1: No module named
# 'orbax.checkpoint.v1'".
# What to do: write `from orbax.checkpoint import v1 as ocp`.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.12.0.1 orbax-checkpoint==0.12.8
"$work/venv/bin/python" - 2>/dev/null <<'PYTHON'
import importlib

from orbax.checkpoint import v1

assert callable(v1.save)
failed = None
try:
  importlib.import_module("orbax.checkpoint.v1")
except ModuleNotFoundError as error:
  failed = str(error)
print("from orbax.checkpoint import v1: works, import orbax.checkpoint.v1:", failed)
assert failed is not None
PYTHON
