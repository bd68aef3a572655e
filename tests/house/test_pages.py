"""What README, guide and examples say, against what is measured and what they do."""

import ast
import pathlib
import re
import sys
import tomllib

import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.house

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def page(name):
  return (ROOT / "docs" / f"{name}.md").read_text()


def section(text, title):
  """From a heading to the next one of its level or above."""
  level = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
  rest = text[level.end() :]
  end = re.search(rf"^#{{1,{len(level[1])}}} ", rest, re.MULTILINE)
  return rest[: end.start()] if end else rest


def rows(text):
  """The cells of every row of every table."""
  return [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in text.splitlines()
    if line.startswith("|")
  ]


# --- Precision and metrics ----------------------------------------------------


def test_a_share_of_no_steps_is_a_number():
  """Between two accumulations of `optax.MultiSteps` there are none."""
  (code,) = re.findall(
    r"^def clipped_share.*?\n(?=\n\n|```)", page("metrics"), re.DOTALL | re.MULTILINE
  )
  names = {"jnp": jnp, "np": np}
  exec(code, names)

  def record(steps, clipped):
    return {
      "clip_by_global_norm/steps": jnp.int32(steps),
      "clip_by_global_norm/steps_clipped": jnp.int32(clipped),
    }

  share = names["clipped_share"]
  assert share(record(5, 2), record(5, 2)) == 0
  assert share(record(9, 4), record(5, 2)) == 0.5


# --- Which clip ---------------------------------------------------------------


def evidence(study):
  """Rows of a study's first table, by method: from column to number."""
  text = page("evidence")
  body = text.split(f"<!-- {study} -->")[1].split(f"<!-- {study}: end -->")[0]
  table = rows(body.strip().split("\n\n")[0])
  header = table[0][1:]
  return {
    row[0]: dict(zip(header, (cell.split(" ")[0] for cell in row[1:]), strict=True))
    for row in table[2:]
  }


def test_what_is_advised_for_a_moving_level_is_what_did_best_on_one():
  (row,) = [row for row in rows(page("which")) if "level of the norm moves" in row[0]]
  (name,) = re.findall(r"^`(\w+)\(", row[1])
  # The level may move both ways: the worse of both counts.
  least = {
    method: min(float(found[column]) for column in ("rising", "falling"))
    for method, found in evidence("shifting_scale").items()
  }
  # Studies call it "history", or "geometric" for what `protect` clips by.
  studied = name.removeprefix("clip_by_").replace("_", " ")
  studied = studied.replace("protect", "geometric")
  assert least[studied] >= max(least.values()) - 1
  assert "evidence.md" in row[2]


def test_a_guard_around_a_clip_is_said_to_be_what_was_measured():
  table = page("evidence").split("<!-- untuned -->")[1]
  means = {row[0]: row[1] for row in rows(table.split("\n\n")[0])}
  said = section(page("which"), "Do I need a guard and a clip?")
  assert f"lost {means['pair']}% with `skip_spikes` around it" in " ".join(said.split())
  assert f"and {means['geometric']}% without" in " ".join(said.split())


# --- Cost ---------------------------------------------------------------------


def test_nothing_is_said_to_cost_one_read_that_costs_more():
  """Of the library, as long as one row of its own table says more."""
  table = rows(page("costs").split("<!-- costs -->")[1].split("<!-- costs: end -->")[0])
  column = table[0].index("added / read")
  reads = {
    row[0]: max(float(x) for x in re.findall(r"[\d.]+", row[column]))
    for row in table[2:]
    if "optax." not in row[0]
  }
  assert max(reads.values()) > 1.2
  said = re.compile(r"(costs?|adds?|price of) (about )?(one|a) read")
  for text in (README, page("index"), page("costs")):
    assert not said.search(" ".join(text.split()))


def test_the_costs_of_the_readme_are_those_of_their_page():
  """So that a figure that is measured anew is changed in both."""
  said = {row[0]: row for row in rows(section(README, "What does it cost?"))}

  def table(mark):
    text = page("costs").split(f"<!-- {mark} -->")[1].split(f"<!-- {mark}: end -->")[0]
    return {row[0]: row for row in rows(text)}

  timed, counted = table("costs"), table("costs on accelerators")
  names = ("`clip_by_global_norm`", "`optax.clip_by_global_norm`")
  for column, name in enumerate(names, 1):
    assert said["CPU, 2 cores"][column].startswith(f"{timed[name][1]} times")
    for row, first in (("NVIDIA H100", 1), ("TPU v5e", 4)):
      kernels, read = counted[name][first : first + 2]
      assert re.match(rf"{re.escape(read)}\b.* {kernels}\b", said[row][column])


def test_the_package_says_so_neither():
  tree = ast.parse((ROOT / "optax_clip" / "__init__.py").read_text())
  assert "one read" not in ast.get_docstring(tree)
  assert "one read" not in (ROOT / "pyproject.toml").read_text()


# --- Where a line belongs -----------------------------------------------------


def test_no_module_is_named_that_is_gone():
  """In CONTRIBUTING and in the notes of the benchmarks."""
  text = (ROOT / "CONTRIBUTING.md").read_text()
  text += (ROOT / "benchmarks" / "NOTES.md").read_text()
  named = set(re.findall(r"`(?:optax_clip/)?(_[a-z]\w+/(?:\w+\.py)?)`", text))
  assert len(named) > 6
  assert not [name for name in named if not (ROOT / "optax_clip" / name).exists()]


# --- Examples -----------------------------------------------------------------


EXAMPLES = sorted((ROOT / "examples").glob("[!_]*.py"))


def distributions(extra=""):
  """What pyproject.toml declares, of itself or of one of its extras."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  names = project["optional-dependencies"][extra] if extra else project["dependencies"]
  return {re.match(r"[\w-]+", name)[0] for name in names}


def imported(path):
  """The packages that a script imports, wherever it does."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name.partition(".")[0] for alias in node.names)
    if isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path.name} imports from beside it"
      yield node.module.partition(".")[0]


# Those whose modules have another name.
DISTRIBUTIONS = {"orbax": "orbax-checkpoint", "sklearn": "scikit-learn"}


def test_all_that_is_called_an_example_is_a_script_of_its_own():
  assert len(EXAMPLES) > 9
  others = {path.name for path in (ROOT / "examples").iterdir()}
  others -= {path.name for path in EXAMPLES} | {"__pycache__"}
  assert others == {"__init__.py", "language_model"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_imports_what_pip_installs_and_nothing_else(path):
  """So that one file is all that has to be copied."""
  installed = distributions() | distributions("examples") | {"numpy", "optax_clip"}
  for name in imported(path):
    known = name in sys.stdlib_module_names
    assert known or DISTRIBUTIONS.get(name, name) in installed, name


def test_all_examples_are_in_the_table_of_their_page():
  named = re.findall(
    r"^\| \[(\w+\.py)\]\(\.\./examples/\1\)", page("examples"), re.MULTILINE
  )
  assert sorted(named) == [path.name for path in EXAMPLES]


def test_a_script_that_is_tried_writes_into_no_page(monkeypatch, tmp_path):
  pytest.importorskip("sklearn")
  pytest.importorskip("matplotlib")
  from studies import silent_stall

  written = []
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(silent_stall, "train", lambda *args: None)
  monkeypatch.setattr(silent_stall, "table", lambda runs: "")
  monkeypatch.setattr(silent_stall, "draw", lambda runs, path: written.append(path))
  silent_stall.main([])
  (path,) = written
  assert not path.resolve().is_relative_to(ROOT)
