#!/usr/bin/env bash
# Expected: `jax.jit(f, inline=True)` leaves no call behind in the jaxpr around it.
# Seen with jax 0.12.0.1 beside 0.10.2, CPU, Python 3.13, 2026-11-30: with 0.10.2 the
# jaxpr has the operations of f. With 0.12.0.1 `True` means `jax.Inline.JAX_LATE`: the
# call stays in the jaxpr, and is inlined when the program is lowered. Whoever counts or
# rewrites operations of a jaxpr, and does not look into calls, finds none of them.
# Output: "0.10.2 ['mul', 'add'] calls once lowered: 0" and
# "0.12.0.1 ['jit'] calls once lowered: 0 early: ['mul', 'add']".
# What to do: look into `eqn.params["jaxpr"]`, or say `inline=jax.Inline.JAX_EARLY`.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
cat >"$work/look.py" <<'PYTHON'
import jax


def primitives(inline):
  f = jax.jit(lambda x: x * 2 + 1, inline=inline)
  calls = jax.jit(lambda x: f(x)).lower(1.0).as_text().count("call @")
  return [str(e.primitive) for e in jax.make_jaxpr(lambda x: f(x))(1.0).eqns], calls


found, calls = primitives(True)
line = [jax.__version__, found, "calls once lowered:", calls]
if hasattr(jax, "Inline"):
  line += ["early:", primitives(jax.Inline.JAX_EARLY)[0]]
print(*line)
PYTHON
for version in 0.10.2 0.12.0.1; do
  python3.13 -m venv "$work/$version"
  "$work/$version/bin/pip" install -q "jax==$version"
  "$work/$version/bin/python" "$work/look.py" | tee -a "$work/seen"
done
flat="\['mul', 'add'\]"
grep -q "^0.10.2 $flat calls once lowered: 0\$" "$work/seen"
grep -q "^0.12.0.1 \['jit'\] calls once lowered: 0 early: $flat\$" "$work/seen"
