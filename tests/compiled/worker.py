"""Compiles what it is asked for, a line of JSON each: `worker.py TARGET DEVICES`.

In a process of its own, since the number of devices that JAX has is fixed when it
starts.
"""

import json
import sys

from benchmarks import _targets
from benchmarks import compiled

if __name__ == "__main__":
  target, count = sys.argv[1], int(sys.argv[2])
  _targets.prepare(count)
  for line in sys.stdin:
    *cell, quick = json.loads(line)
    devices = _targets.devices(target, count)
    row = compiled.figures(compiled.Cell(*cell), target, devices, quick)
    print(json.dumps(row), flush=True)
