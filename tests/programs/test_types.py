"""What type checkers say of a user's script."""

import ast
import json
import pathlib
import re
import subprocess
import sys

import pytest

import optax_clip

TYPED = pathlib.Path(__file__).parents[1] / "house" / "typed"
MISTAKES = (TYPED / "mistakes.py").read_text().splitlines()
LINES = {i for i, line in enumerate(MISTAKES, 1) if line.startswith("optax_clip.")}

pytestmark = pytest.mark.programs


def with_mypy(path):
  """The lines in which mypy finds an error."""
  pytest.importorskip("mypy")
  command = [sys.executable, "-m", "mypy", "--strict", "--follow-untyped-imports"]
  done = subprocess.run(
    [*command, str(path)], capture_output=True, text=True, check=False
  )
  assert done.returncode < 2, done.stderr + done.stdout
  return {int(line) for line in re.findall(rf"{path.name}:(\d+): error", done.stdout)}


def with_pyright(path):
  pytest.importorskip("pyright")
  command = [sys.executable, "-m", "pyright", "--outputjson", "-p", str(TYPED)]
  done = subprocess.run(
    [*command, "--pythonpath", sys.executable, str(path)],
    capture_output=True,
    text=True,
    check=False,
  )
  found = json.loads(done.stdout)["generalDiagnostics"]
  errors = [x for x in found if x["severity"] == "error"]
  return {x["range"]["start"]["line"] + 1 for x in errors}


@pytest.mark.parametrize("checked", [with_mypy, with_pyright])
def test_a_users_script_passes(checked):
  assert checked(TYPED / "user.py") == set()


@pytest.mark.parametrize("checked", [with_mypy, with_pyright])
def test_mistakes_are_found(checked):
  assert checked(TYPED / "mistakes.py") == LINES


def test_the_script_uses_every_public_name():
  tree = ast.parse((TYPED / "user.py").read_text())
  names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
  names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
  assert set(optax_clip.__all__) <= names
