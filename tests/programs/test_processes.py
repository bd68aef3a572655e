"""Several processes, as on several machines: what comes out is what one device gives.

What each of them does is in `process_worker.py`.
"""

import re

from helpers import several
import numpy as np
import process_worker as worker
import pytest

pytestmark = pytest.mark.programs

PROCESSES, DEVICES = 2, 2

# In seconds, for a machine that is very busy.
PATIENCE = 40


def processes(folder):
  def command(address, index):
    return [worker.__file__, address, str(PROCESSES), str(index), str(folder)]

  return several.processes(command, PROCESSES, DEVICES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A folder with what each process ended with."""
  folder = tmp_path_factory.mktemp("trained")
  with processes(folder) as started:
    for process in started:
      printed, _ = process.communicate(timeout=several.LIMIT)
      assert process.returncode == 0, printed
  return folder


@pytest.fixture(scope="module")
def expected():
  """What one device ends with, for each method once."""
  return {name: worker.on_one_device(name) for name in worker.METHODS}


@pytest.mark.parametrize(
  ("how", "method"),
  [
    *(("whole", method) for method in worker.WHOLE),
    *(("parts", method) for method in worker.PARTS),
  ],
)
def test_two_processes_train_as_one_device_does(how, method, trained, expected):
  params, logs = expected[method]
  (clipped,) = (x[-1] for key, x in logs.items() if key.endswith("/steps_clipped"))
  assert 5 <= clipped < worker.STEPS
  found = [
    dict(np.load(trained / f"{how}-{method}-{index}.npz")) for index in range(PROCESSES)
  ]
  assert found[0].keys() == params.keys() | logs.keys()
  for key, x in found[0].items():
    # Every process knows the same, bit for bit.
    assert x.tobytes() == found[1][key].tobytes()
  for key, x in params.items():
    # Elements near zero are sums of larger terms that cancel.
    np.testing.assert_allclose(found[0][key], x, rtol=0, atol=1e-6 * np.abs(x).max())
  for key, x in logs.items():
    np.testing.assert_allclose(found[0][key], x, rtol=1e-6, err_msg=key)


@pytest.mark.parametrize("victim", range(PROCESSES))
def test_when_a_process_dies_the_other_ends_with_an_error(victim):
  with processes("forever") as started:
    for process in started:
      # What Gloo says comes before.
      assert "20\n" in process.stdout
    started[victim].kill()
    survivor = started[1 - victim]
    # It is told that the connection broke, or misses the heartbeats.
    printed, _ = survivor.communicate(timeout=worker.HEARTBEAT + PATIENCE)
  assert survivor.returncode != 0
  assert re.search(r"Gloo \w+ failed|heartbeat|coordination service", printed), printed
