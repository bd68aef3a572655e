#!/usr/bin/env bash
# Expected: XLA fuses a chain of arithmetic into one kernel, and the smaller the array the
# sooner.
# Seen with libtpu 0.0.52 and jax 0.12.0.1, Python 3.13, 2026-11-30, compiled for a TPU
# v5e, without a TPU: 50 operations on an array of shape (2,) are one fusion; of shape ()
# or (1,) each of them is a kernel of its own. Output: "{(): 50, (1,): 50, (2,): 1}".
# What to do: where many operations work on one number, as in a schedule or a running
# mean, put numbers side by side, or an idle one beside it.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.12.0.1 libtpu==0.0.52
TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu "$work/venv/bin/python" - 2>/dev/null <<'PYTHON'
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

name = {"platform": "tpu", "topology_name": "v5e:2x2"}
where = SingleDeviceSharding(topologies.get_topology_desc(**name).devices[0])


def chain(x):
  for _ in range(10):
    x = jnp.sqrt(x * 1.5 + 2) / (x + 3)
  return x


found = {}
for shape in ((), (1,), (2,)):
  x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
  program = jax.jit(chain).lower(x).compile().as_text()
  steps = re.findall(r" = \S+ ([a-z\-]+)\(", program[program.index("ENTRY") :])
  kernels = ("fusion", "add", "multiply", "divide", "sqrt")
  found[shape] = sum(step in kernels for step in steps)
print(found)
assert found == {(): 50, (1,): 50, (2,): 1}
PYTHON
