"""An XLA flag that is not known here: the tests run without it, and say so."""

import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.programs

CONFTEST = pathlib.Path(__file__).parents[1] / "conftest.py"
UNKNOWN = "--xla_a_flag_that_is_gone=true"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_flag_that_xla_does_not_know_is_left_out(tmp_path, workers):
  text = CONFTEST.read_text()
  known = '  "--xla_backend_optimization_level=0",\n'
  assert known in text
  (tmp_path / "conftest.py").write_text(text.replace(known, f'{known}  "{UNKNOWN}",\n'))
  (tmp_path / "test_it.py").write_text(
    "import os\n\nimport jax\n\n\n"
    "def test_it():\n"
    "  assert jax.device_count() == 1\n"
    '  assert "xla_backend_optimization_level=0" in os.environ["XLA_FLAGS"]\n'
    f'  assert "{UNKNOWN}" not in os.environ["XLA_FLAGS"]\n'
  )
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "-q", "-n", str(workers), "."],
    cwd=tmp_path,
    env={key: x for key, x in os.environ.items() if key != "XLA_FLAGS"}
    | {"PYTHONPATH": str(CONFTEST.parent)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert f"does not know {UNKNOWN}" in " ".join(done.stdout.split())
  assert "ran without" in done.stdout
