#!/usr/bin/env bash
# Expected: the versions that pip chooses for a package can be imported together.
# Seen with haliax 1.3 and jax 0.12.0.1, Python 3.13, 2026-11-30: pip installs both, and the
# import fails: haliax takes a name out of JAX's private modules that JAX has removed.
# Output: "ImportError: cannot import name 'BuiltInKeyEntry' from 'jax._src.tree_util'".
# With jax 0.10.2 it fails in the same way.
# What to do: take a pre-release of 1.4, as 1.4.dev453 (`pip install --pre haliax`).
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q haliax==1.3 jax==0.12.0.1
"$work/venv/bin/python" -W ignore - <<'PYTHON'
failed = None
try:
  import haliax
except ImportError as error:
  failed = f"{type(error).__name__}: {error}".partition(" (")[0]
print(failed or haliax.__name__)
assert failed is not None and "BuiltInKeyEntry" in failed
PYTHON
