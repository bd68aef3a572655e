"""Every example is one file: copied into an empty folder, it runs there."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import optax_clip

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("[!_]*.py"))

pytestmark = pytest.mark.programs

# What examples need besides the packages that the tests of the package need.
NEEDED = {"equinox_mlp": "equinox", "bfloat16_resume": "orbax.checkpoint"}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
  """A folder that holds the package alone, and nothing that stands beside it."""
  folder = tmp_path_factory.mktemp("installed")
  source = pathlib.Path(optax_clip.__file__).parent
  (folder / "optax_clip").symlink_to(source, target_is_directory=True)
  return folder


@pytest.mark.parametrize(
  "path",
  [path for path in EXAMPLES if path.suffix == ".py"],
  ids=lambda path: path.stem,
)
def test_a_copy_runs_in_an_empty_folder(path, package, tmp_path):
  pytest.importorskip("sklearn")
  if "flax" in path.stem:
    pytest.importorskip("flax")
  pytest.importorskip(NEEDED.get(path.stem, "jax"))
  shutil.copy(path, tmp_path)
  environment = os.environ | {"PYTHONPATH": str(package), "JAX_PLATFORMS": "cpu"}
  # The devices that the tests simulate are not those of a user.
  environment.pop("XLA_FLAGS", None)
  done = subprocess.run(
    [sys.executable, path.name, "--steps", "5"],
    cwd=tmp_path,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  # No terminal: no bar, no colours, nothing that is written over.
  assert not re.search(r"[\r\x1b]", done.stdout + done.stderr)
  # What was seen is one sentence, with a number, and the last line.
  last = done.stdout.splitlines()[-1]
  assert re.fullmatch(r"[A-Z].*\d.*\.", last)
  assert not re.search(r"\.\s+[A-Z]", last)
  written = {x.name for x in tmp_path.iterdir()} - {path.name, "__pycache__"}
  assert written <= {"out"}
