"""Programs compiled for devices that are not here, each once for all tests."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import compiled

ROOT = pathlib.Path(__file__).parent.parent.parent
WORKER = pathlib.Path(__file__).with_name("worker.py")


@pytest.fixture(scope="session")
def figures(tmp_path_factory):
  """Gives `figures(target, method, quick=..., **cell)`: the row of a program."""
  workers = {}

  def worker(target, devices):
    if (target, devices) not in workers:
      environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
      path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
      log = tmp_path_factory.mktemp("worker") / "stderr"
      with log.open("w") as errors:
        workers[target, devices] = (
          log,
          subprocess.Popen(
            [sys.executable, WORKER, target, str(devices)],
            env=environment | {"PYTHONPATH": path.rstrip(os.pathsep)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
          ),
        )
    return workers[target, devices]

  @functools.cache
  def figures(target, method, quick=False, **cell):
    cell = compiled.Cell(method, **cell)
    log, process = worker(target, cell.devices)
    process.stdin.write(json.dumps([*cell, quick]) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
      pytest.fail(f"{cell.text()} does not compile: {log.read_text()[-2000:]}")
    return json.loads(line)

  yield figures
  for _, process in workers.values():
    process.stdin.close()
    process.wait()
    process.stdout.close()
