#!/usr/bin/env bash
# Expected: a sum of float64 squares along an axis reads the float32 matrix once, on every
# GPU: the squares are never written.
# Seen with jax 0.12.0.1 and its CUDA 12 plugin, Python 3.13, 2026-11-30; compiled without a
# GPU, not run: XLA decides by compute capability, with all else equal. For 9.0 and 10.0 it
# sums as it reads. For 8.9 and 12.0, which are consumer cards, it writes all squares to
# memory first: 18.9 MB for a matrix of 9.4 MB. With bfloat16 and fewer columns it does so
# for every one. Output, in MB of temporaries:
# "float32 [768, 3072] {'9.0': 0.0, '10.0': 0.0, '8.9': 18.9, '12.0': 18.9}"
# "bfloat16 [3072, 768] {'9.0': 18.9, '10.0': 18.9, '8.9': 18.9, '12.0': 18.9}".
# What to do: sum blocks of rows first and the blocks after them, behind
# `jax.lax.optimization_barrier`; look at `compiled.memory_analysis()`.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.12.0.1
"$work/venv/bin/pip" install -q --no-deps jax-cuda12-plugin==0.12.0.1 \
  jax-cuda12-pjrt==0.12.0.1 nvidia-cuda-nvcc-cu12==12.9.86
JAX_PLATFORMS=cpu JAX_ENABLE_X64=1 JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 \
  "$work/venv/bin/python" - 2>/dev/null <<'PYTHON'
import jax
import jax.numpy as jnp
from jax.experimental import topologies

DEVICE = """
gpu_device_info {
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000  device_memory_size: 84929347584  l2_cache_size: 52428800
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  threads_per_block_limit: 1024  threads_per_core_limit: 2048  threads_per_warp: 32
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  cuda_compute_capability { major: %s minor: %s }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "a GPU"
"""


def temporaries(capability, dtype, shape):
  """Megabytes that the program holds beside its argument and its result."""
  (device,) = topologies.get_topology_desc(
    platform="cuda", topology="1x1x1", target_config=DEVICE % tuple(capability.split("."))
  ).devices
  x = jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))
  total = jax.jit(lambda x: jnp.sum(jnp.square(x.astype(jnp.float64)), axis=0))
  compiled = total.lower(x).compile()
  return round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1)


def row(dtype, *shape):
  found = {c: temporaries(c, dtype, shape) for c in ("9.0", "10.0", "8.9", "12.0")}
  print(dtype.dtype.name, list(shape), found)
  return list(found.values())


assert row(jnp.float32, 768, 3072) == [0.0, 0.0, 18.9, 18.9]
assert row(jnp.bfloat16, 3072, 768) == [18.9] * 4
PYTHON
