"""Several processes that find each other over localhost, by `jax.distributed`."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
# In seconds, for a machine that is very busy.
LIMIT = 180


@contextlib.contextmanager
def processes(command, count, devices, **environment):
  """Starts all, each with so many devices; none outlives the block.

  Args:
    command: from the address of process 0 and a process's index to the arguments of
      Python, which starts in the root of the repository.
    count: of processes.
    devices: of each.
    **environment: variables, besides those of this process that are not JAX's.
  """
  own = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
  environment = {
    **own,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    **environment,
  }
  with socket.socket() as found:
    found.bind(("localhost", 0))
    address = f"localhost:{found.getsockname()[1]}"
  started = [
    subprocess.Popen(
      [sys.executable, *command(address, index)],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(count)
  ]
  try:
    yield started
  finally:
    for process in started:
      process.kill()
      process.communicate()
