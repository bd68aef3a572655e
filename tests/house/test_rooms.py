"""The package keeps to its own rules: rooms, sizes, names."""

import ast
import inspect
import pathlib
import re

import helpers.registry as registry
import optax
import pytest

import optax_clip

pytestmark = pytest.mark.house

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "optax_clip"
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the ground up: a module imports from its own floor and from those below.
FLOORS = (
  ("_types", "_validate", "_backend", "_repr", "_jaxprs"),
  ("_trees",),
  ("_norms",),
  ("_algebra",),
  ("_matrices",),
  ("actions", "measures", "_thresholds"),
  ("_methods", "_functions"),
  ("thresholds",),
  ("_guards",),
  ("_protect",),
  ("_report",),
  ("states",),
  ("__init__",),
  ("_logs",),
  ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def imported(path):
  """The modules of the package that a file imports, as "optax_clip.room.module"."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
      "optax_clip"
    ):
      for alias in node.names:
        yield f"{node.module}.{alias.name}"
    elif isinstance(node, ast.Import):
      yield from (x.name for x in node.names if x.name.startswith("optax_clip"))


def room(dotted):
  return [*dotted.split("."), "__init__"][1]


@pytest.mark.parametrize(
  "path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix()
)
def test_no_module_imports_upstairs(path):
  own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
  for name in imported(path):
    assert LEVEL[room(name)] <= LEVEL[own], f"{own} imports {name}"


def test_only_the_command_imports_the_logs():
  for path in MODULES:
    if any(room(name) == "_logs" for name in imported(path)):
      assert path.parent.name == "_logs" or path.name == "__main__.py"


def test_every_room_has_a_floor():
  rooms = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in MODULES}
  assert rooms == set(LEVEL)


def test_no_module_is_long():
  lengths = {p.name: len(p.read_text().splitlines()) for p in MODULES}
  assert {name: n for name, n in lengths.items() if n > 400} == {}


def test_no_comment_silences_a_tool():
  silencer = re.compile(r"#\s*(noqa|type:\s*ignore|pyright:\s*ignore|pragma|fmt:)")
  found = [
    f"{path.relative_to(ROOT)}: {line.strip()}"
    for folder in ("optax_clip", "tests", "benchmarks", "studies", "examples")
    for path in (ROOT / folder).rglob("*.py")
    for line in path.read_text().splitlines()
    if silencer.search(line)
  ]
  assert found == []


def test_only_tests_of_a_room_look_into_it():
  for folder in ("tests", "benchmarks", "studies", "examples"):
    for path in (ROOT / folder).rglob("*.py"):
      for name in imported(path):
        inside = room(name)
        if inside.startswith("_") and not inside.startswith("__"):
          assert path.parent.name == inside.lstrip("_"), f"{path} imports {name}"


def transformations():
  """The public functions that return a transformation, but for those around one."""
  for name in optax_clip.__all__:
    made = getattr(optax_clip, name)
    if not callable(made) or not inspect.isfunction(made):
      continue
    signature = inspect.signature(made)
    returns = signature.return_annotation
    if returns is optax.GradientTransformationExtraArgs:
      yield name, signature


def test_every_transformation_is_in_the_table():
  """All contract tests run over that table: who is missing from it is not tested."""
  around = {name for name, s in transformations() if "inner" in s.parameters}
  # It stands for a chain of others, which its own test compares it with.
  around -= {"protect"}
  assert around == set(registry.AROUND)
  found = {name for name, _ in transformations()} - around - {"clip_with", "protect"}
  assert found == {row.name for row in registry.ROWS}


def test_public_names_are_listed():
  for module in (optax_clip, optax_clip.states, optax_clip.thresholds):
    public = {name for name in vars(module) if not name.startswith("_")}
    assert public == set(module.__all__), module
