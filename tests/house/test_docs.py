"""The README and the guide: their code runs, prints what they say, links resolve.

The strict build of the guide is a step of `.ci/run`; what is here needs no Sphinx.
"""

import ast
import contextlib
import doctest
import inspect
import io
import operator
import pathlib
import re
import textwrap
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_clip

pytestmark = pytest.mark.house

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = {
  str(path.relative_to(ROOT)): path for path in [README, *sorted(DOCS.rglob("*.md"))]
}

# Whose users migrate, or train. None of it is needed to develop the package.
OTHERS = {
  *("axlearn", "easydel", "haliax", "keras", "levanter", "maxtext", "netket", "praxis"),
  *("rejax", "t5x", "torch"),
}
# "python" is run; a "text" directly below it is what it prints; of a "diff" the state
# afterwards is run. Others are shown. The cells of notebooks are run by the build of
# the guide, which puts what they print and draw below them.
LANGUAGES = {
  "{code-cell} python",
  *("python", "text", "diff", "bash", "bibtex"),
  *("{eval-rst}", "{toctree}", "{include} ../CHANGELOG.md"),
  *("{include} ../CONTRIBUTING.md", "{literalinclude} ../CITATION.cff"),
}


class Block(NamedTuple):
  """A fenced block of a page.

  Attributes:
    page: the name of the page.
    line: of the page at which it begins.
    language: what stands behind the opening fence.
    text: what stands between the fences.
    reason: why it is not run; None if it is run.
    printed: what the page says that it prints; None if it says nothing.
  """

  page: str
  line: int
  language: str
  text: str
  reason: str | None
  printed: str | None

  @property
  def code(self):
    """What is run: of a diff the lines that are there afterwards."""
    return self.side("+") if self.language == "diff" else self.text

  def side(self, sign):
    """A diff's lines before (-) or afterwards (+)."""
    kept = [x[1:] for x in self.text.splitlines() if x[:1] in ("", " ", sign)]
    return textwrap.dedent("\n".join(kept))


FENCE = re.compile(
  r"^(?:<!-- not run:(?P<reason>[^\n]*)-->\n)?"
  r"```(?P<language>[^\n`]*)\n(?P<text>.*?)^```$"
  r"(?:\n*^```text\n(?P<printed>.*?)^```$)?",
  re.DOTALL | re.MULTILINE,
)


def blocks(page):
  text = PAGES[page].read_text()
  return [
    Block(
      page,
      text.count("\n", 0, match.start()) + 1,
      match["language"].strip(),
      match["text"],
      None if match["reason"] is None else match["reason"].strip(),
      match["printed"],
    )
    for match in FENCE.finditer(text)
  ]


BLOCKS = {page: blocks(page) for page in PAGES}
RUN = {
  page: [
    block
    for block in found
    # The README's diff stands before its first import.
    if block.language in ({"python"} if page == "README.md" else {"python", "diff"})
    and block.reason is None
  ]
  for page, found in BLOCKS.items()
}
EVERY = [block for found in BLOCKS.values() for block in found]


def run(block, namespace):
  """Runs a block, as a doctest if it is one, and returns what it prints."""
  if ">>>" in block.code:
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    test = doctest.DocTestParser().get_doctest(
      block.code, namespace, block.page, block.page, block.line
    )
    wrong = []
    runner.run(test, out=wrong.append, clear_globs=False)
    namespace.update(test.globs)
    assert runner.failures == 0, "".join(wrong)
    return ""
  # Blank lines, so that errors name the line of the page.
  code = "\n" * block.line + block.code
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    exec(compile(ast.parse(code), block.page, "exec"), namespace)
  return printed.getvalue()


NUMBER = re.compile(r"(-?\d+\.?\d*(?:e[+-]?\d+)?)")


def assert_printed(expected, printed, where):
  """Words must be equal, numbers up to one unit in the last digit that is shown."""
  words = [NUMBER.split(" ".join(text.split())) for text in (expected, printed)]
  same = len(words[0]) == len(words[1]) and all(
    x == y if i % 2 == 0 else close(x, y)
    for i, (x, y) in enumerate(zip(*words, strict=True))
  )
  assert same, f"{where} prints\n{printed}\nand says\n{expected}"


def close(shown, number):
  digits, _, exponent = shown.partition("e")
  decimals = len(digits.partition(".")[2])
  unit = 10.0 ** (int(exponent or 0) - decimals) if decimals or exponent else 0.0
  return abs(float(shown) - float(number)) <= 1.01 * unit


@pytest.fixture
def as_users_run_it(monkeypatch, tmp_path):
  """Users' JAX promotes implicitly; and they copy the file that is for that."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("COLUMNS", "80")
  monkeypatch.syspath_prepend(str(ROOT / "examples" / "language_model"))
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


@pytest.mark.programs
@pytest.mark.parametrize("page", [page for page, found in RUN.items() if found])
@pytest.mark.usefixtures("as_users_run_it")
def test_a_page_runs(page):
  """The blocks of a page, in order, in one namespace."""
  namespace = {"__name__": "page"}
  for block in RUN[page]:
    printed = run(block, namespace)
    where = f"{page}, line {block.line}"
    if block.printed is not None:
      assert_printed(block.printed, printed, where)
    elif page != "README.md":
      assert not printed, f"{where} prints what the page does not show:\n{printed}"


def imported(code):
  """The top-level modules that code imports."""
  found = set()
  for node in ast.walk(ast.parse(code)):
    if isinstance(node, ast.Import):
      found |= {name.name.partition(".")[0] for name in node.names}
    if isinstance(node, ast.ImportFrom):
      found.add(node.module.partition(".")[0])
  return found


def test_no_block_is_overlooked():
  fences = sum(
    len(re.findall("^ *```", path.read_text(), re.MULTILINE)) for path in PAGES.values()
  )
  assert fences == sum(2 + 2 * (block.printed is not None) for block in EVERY)
  assert {block.language for block in EVERY} <= LANGUAGES


def test_marks_have_a_reason_and_stand_where_they_must():
  """Only what needs the libraries of others is not run, and it says so."""
  marks = sum(path.read_text().count("<!-- not run") for path in PAGES.values())
  marked = [block for block in EVERY if block.reason is not None]
  assert marks == len(marked)
  for block in marked:
    where = f"{block.page}, line {block.line}"
    assert block.language == "python", where
    assert len(block.reason.split()) > 2, f"{where} does not say why it is not run."
    assert imported(block.text) & OTHERS, f"{where} could be run."


@pytest.mark.parametrize(
  "block",
  [block for block in EVERY if block.language == "diff"],
  ids=lambda block: f"{block.page}:{block.line}",
)
def test_both_sides_of_a_diff_are_python(block):
  for sign in "-+":
    ast.parse(block.side(sign))
    assert any(line.startswith(sign) for line in block.text.splitlines())


# --- The table of calls -------------------------------------------------------


def cells(page, column):
  """The cells of a column, of all tables of a page that have it."""
  found, index = [], None
  for line in PAGES[page].read_text().splitlines():
    row = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    if not row:
      index = None
    elif index is not None:
      found.append(row[index])
    elif column in row:
      index = row.index(column)
  return [cell for cell in found if set(cell) - set("-: ")]


def calls(page):
  return [x for cell in cells(page, "call") for x in re.findall(r"`([^`]+)`", cell)]


WHICH = "docs/which.md"


@pytest.fixture(scope="module")
def names_of_the_table():
  """The names of the package, and what the page itself defines."""
  names = {name: getattr(optax_clip, name) for name in dir(optax_clip)}
  with contextlib.redirect_stdout(io.StringIO()):
    for block in RUN[WHICH]:
      if re.search("^(opt|optimizer|max_norms) =", block.code, re.MULTILINE):
        exec(block.code, names)
  return names


@pytest.mark.parametrize("call", sorted(set(calls(WHICH))))
@pytest.mark.usefixtures("as_users_run_it")
def test_calls_of_the_table_are_right(call, names_of_the_table):
  """Each updates gradients, or is a function of them, as it stands there."""

  def use(grads):
    result = eval(call, {**names_of_the_table, "grads": grads})
    if not isinstance(result, optax.GradientTransformation):
      return result
    tx = optax.with_extra_args_support(result)
    return tx.update(grads, tx.init(grads), grads, loss=jnp.ones(()))

  updates, _ = jax.eval_shape(use, names_of_the_table["grads"])
  assert updates.keys() == names_of_the_table["grads"].keys()


@pytest.mark.parametrize("call", [x for x in calls(WHICH) if x.startswith("protect(")])
def test_protect_of_the_table_clips_once(call, names_of_the_table):
  tx = eval(call, dict(names_of_the_table))
  state = tx.init(names_of_the_table["grads"])
  kind = optax_clip.states.Record
  nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
  assert [type(node) for node in nodes].count(kind) == 1


# --- The reference and the links ------------------------------------------------


def public():
  """Every public name, and the modules that hold some, as they are imported."""
  modules = {f"optax_clip.{name}": module for name, module in namespaces().items()}
  own = [n for n in optax_clip.__all__ if n not in namespaces()]
  inside = [f"{home}.{n}" for home, module in modules.items() for n in module.__all__]
  return {*modules, *(f"optax_clip.{n}" for n in own), *inside}


def namespaces():
  return {
    name: getattr(optax_clip, name)
    for name in optax_clip.__all__
    if isinstance(getattr(optax_clip, name), types.ModuleType)
  }


def documented():
  directive = re.compile(r"^\.\. auto(?:function|class|module):: (\S+)$", re.MULTILINE)
  pages = sorted((DOCS / "api").glob("*.md"))
  return [name for page in pages for name in directive.findall(page.read_text())]


def test_every_public_name_is_in_the_reference_once():
  assert sorted(documented()) == sorted(public())


def test_every_documented_name_is_in_a_summary_of_its_page():
  directive = re.compile(r"^\.\. auto(?:function|class):: (\S+)$", re.MULTILINE)
  for page in sorted((DOCS / "api").glob("*.md")):
    text = page.read_text()
    tables = re.findall(r"^\.\. autosummary::\n((?:(?:   .*)?\n)+)", text, re.MULTILINE)
    listed = {name for table in tables for name in table.split()}
    for name in directive.findall(text):
      short = name.removeprefix("optax_clip.")
      assert {short, short.rpartition(".")[2]} & listed, (page.name, name)


def test_the_citation_is_that_of_the_file():
  """BibTeX on the page, for people; CITATION.cff, for programs."""
  file = (ROOT / "CITATION.cff").read_text()
  page = (DOCS / "citing.md").read_text()
  for key in ("title", "version", "license"):
    value = re.search(rf"^{key}: (.*)$", file, re.MULTILINE)[1].strip('"')
    assert f"  {key} = {{{value}}},\n" in page, key


# What the docstrings' formulas are made of; docs/conf.py renders all of it.
COMMANDS = {
  *("alpha", "bar", "begin", "beta", "bmod", "cdot", "delta", "dots", "end"),
  *("epsilon", "frac", "gamma", "ge", "geq", "hat", "in", "kappa", "lambda", "le"),
  *("left", "leftarrow", "leq", "log", "max", "min", "mu", "quad", "right", "sigma"),
  *("sqrt", "sum", "tanh", "tau", "text", "theta"),
}


def formulas(name):
  """The maths of a docstring: blocks that are indented, and roles."""
  text = inspect.getdoc(operator.attrgetter(name.partition(".")[2])(optax_clip)) or ""
  block = re.compile(r"^\.\. math::\n((?:(?: .*)?\n)+)", re.MULTILINE)
  return block.findall(text + "\n") + re.findall(":math:`([^`]*)`", text)


@pytest.mark.parametrize("name", sorted(x for x in public() if formulas(x)))
def test_formulas_are_well_formed(name):
  """Sphinx passes them on as they are; a browser would show the error."""
  for formula in formulas(name):
    plain = re.sub(r"\\[\\{}|,;! _]", "", formula)
    assert plain.count("{") == plain.count("}"), formula
    commands = re.findall(r"\\([a-zA-Z]+)", plain)
    assert set(commands) <= COMMANDS, formula
    assert commands.count("left") == commands.count("right"), formula
    assert commands.count("begin") == commands.count("end"), formula


def slug(title):
  """The anchor of a heading, as GitHub makes it."""
  return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def prose(page):
  """The page without its blocks."""
  return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


LINKS = [
  (page, target)
  for page, path in PAGES.items()
  for target in re.findall(r"\]\(([^)\s]+)\)", prose(path))
  if not target.startswith("https://")
]


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_internal_links_resolve(page, target):
  path, _, anchor = target.partition("#")
  found = (PAGES[page].parent / path).resolve() if path else PAGES[page]
  assert found.exists()
  assert found.is_relative_to(ROOT)
  if anchor:
    titles = re.findall(r"^#+ (.*)$", prose(found), re.MULTILINE)
    assert anchor in {slug(title) for title in titles}


def test_every_page_is_in_the_navigation():
  trees = re.findall(
    r"^```{toctree}\n(.*?)^```$", (DOCS / "index.md").read_text(), re.DOTALL | re.M
  )
  listed = {
    line.strip()
    for tree in trees
    for line in tree.splitlines()
    if line.strip() and not line.startswith(":")
  }
  pages = {str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md")}
  assert listed == pages - {"index"}
