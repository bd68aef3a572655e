#!/usr/bin/env bash
# Expected: each extra of a release of JAX can be installed.
# Seen with jax 0.12.0.1, Python 3.13, Linux, 2026-11-30: `jax[rocm7-local]` and
# `jax[oneapi]` ask for plugins of the same version, which were not released: the newest of
# them are those of jax 0.12.0 and 0.11.2. Nothing is installed here (`--dry-run`).
# Output: "jax: found", "rocm7-local: ERROR: No matching distribution found for
# jax-rocm7-plugin==0.12.0.1.*; extra == "rocm7-local"" and the like for oneapi.
# What to do: install jax and jax-rocm7-plugin 0.12.0, or jax and jax-oneapi-plugin 0.11.2.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --dry-run jax==0.12.0.1
echo "jax: found"
for extra in rocm7-local oneapi; do
  said=$("$work/venv/bin/pip" install -q --dry-run "jax[$extra]==0.12.0.1" 2>&1) && exit 1
  printf '%s: ' "$extra"
  grep -m 1 "No matching distribution found for jax-" <<<"$said"
done
