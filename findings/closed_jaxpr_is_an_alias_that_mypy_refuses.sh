#!/usr/bin/env bash
# Expected: a class of JAX's public modules can stand in an annotation.
# Seen with jax 0.12.0.1 and mypy 2.4.1, Python 3.13, 2026-11-30: there
# `jax.extend.core.ClosedJaxpr` is `Jaxpr`, imported under a second name. That works when it
# runs, and a checker of types does not count it as exported.
# Output: 'error: Name "jax.extend.core.ClosedJaxpr" is not defined  [name-defined]'.
# What to do: annotate with `jax.extend.core.Jaxpr`, which is the same class there.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.12.0.1 mypy==2.4.1
cat >"$work/user.py" <<'PYTHON'
import jax.extend.core


def count(jaxpr: jax.extend.core.ClosedJaxpr) -> int:
  return len(jaxpr.eqns)
PYTHON
cd "$work"
said=$("$work/venv/bin/mypy" --strict user.py) && exit 1
printf '%s\n' "$said"
grep -q 'Name "jax.extend.core.ClosedJaxpr" is not defined' <<<"$said"
"$work/venv/bin/python" -c "import user; assert user.count.__annotations__"
sed -i 's/ClosedJaxpr/Jaxpr/' user.py
"$work/venv/bin/mypy" --strict user.py
