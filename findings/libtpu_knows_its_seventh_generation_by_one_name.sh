#!/usr/bin/env bash
# Expected: as `v5e:2x2` and `v6e:2x2` name a topology to compile for, `v7x:` or `v7:` does.
# Seen with libtpu 0.0.52 and jax 0.12.0.1, Python 3.13, 2026-11-30, without a TPU: the
# name is `tpu7x:2x2x1`, with three dimensions and two devices for each chip; `v7x`, `v7`
# and `ironwood` are refused. Output: "{'v6e:2x2': 4, 'tpu7x:2x2x1': 8, 'v7x:2x2x1':
# 'refused', 'v7:2x2x1': 'refused', 'ironwood:2x2x1': 'refused'}".
# What to do: write `tpu7x:2x2x1` (or `tpu7x:1x1x1`, the smallest).
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.12.0.1 libtpu==0.0.52
TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu "$work/venv/bin/python" - 2>/dev/null <<'PYTHON'
from jax.experimental import topologies

found = {}
for name in ("v6e:2x2", "tpu7x:2x2x1", "v7x:2x2x1", "v7:2x2x1", "ironwood:2x2x1"):
  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    found[name] = len(devices)
  except Exception:
    found[name] = "refused"
print(found)
assert found["v6e:2x2"] == 4 and found["tpu7x:2x2x1"] == 8
assert set(list(found.values())[2:]) == {"refused"}
PYTHON
