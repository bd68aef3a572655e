#!/usr/bin/env bash
# Expected: a reduction with several results reads its operand once and writes the results,
# however many there are.
# Seen with jax 0.12.0.1 and its CUDA 12 plugin, Python 3.13, 2026-11-30; compiled for an
# H100 without one, not run: a table of n rows is taken apart by one reduction, whose i-th
# result is the sum of all rows but for zeros in place of the others. With up to eleven rows
# that is one kernel and no temporary. With twelve XLA first writes the whole table for each
# result, zeros included: twelve tables. Output, temporaries in tables:
# "{4: 0.0, 8: 0.0, 11: 0.0, 12: 12.0, 16: 16.0}".
# What to do: take eight at a time, and look at `compiled.memory_analysis()`.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.12.0.1
"$work/venv/bin/pip" install -q --no-deps jax-cuda12-plugin==0.12.0.1 \
  jax-cuda12-pjrt==0.12.0.1 nvidia-cuda-nvcc-cu12==12.9.86
JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 "$work/venv/bin/python" - 2>/dev/null <<'PYTHON'
import jax
from jax import lax
import jax.numpy as jnp
from jax.experimental import topologies

H100 = """
gpu_device_info {
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000  device_memory_size: 84929347584  l2_cache_size: 52428800
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  threads_per_block_limit: 1024  threads_per_core_limit: 2048  threads_per_warp: 32
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "a GPU"
"""
(device,) = topologies.get_topology_desc(
  platform="cuda", topology="1x1x1", target_config=H100
).devices
where = jax.sharding.SingleDeviceSharding(device)


def apart(table):
  rows = table.shape[0]
  place = lax.broadcasted_iota(jnp.int32, table.shape, 0)
  one = [jnp.where(place == i, table + 1, 0) for i in range(rows)]
  zeros = [jnp.zeros((), table.dtype)] * rows
  return lax.reduce(one, zeros, lambda a, b: [x | y for x, y in zip(a, b)], (0,))


found = {}
for rows in (4, 8, 11, 12, 16):
  table = jax.ShapeDtypeStruct((rows, 2, 3072), jnp.uint32, sharding=where)
  held = jax.jit(apart).lower(table).compile().memory_analysis().temp_size_in_bytes
  found[rows] = round(held / (rows * 2 * 3072 * 4), 1)
print(found)
assert found == {4: 0.0, 8: 0.0, 11: 0.0, 12: 12.0, 16: 16.0}
PYTHON
