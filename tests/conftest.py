"""Settings that every test runs under: one device, and nothing implicit.

Users have one device, so the tests do. Tests that need a mesh are marked `mesh`, and
`pytest -m mesh` runs them on eight simulated devices.

XLA compiles most tests with little optimisation, which takes a third of the time.
Tests of what it makes of sums and of whole steps are marked `optimized`, and
`pytest -m optimized` runs them, compiled as users have it. `pytest -m house` runs what
looks at the project itself: prose, pages, messages, tables. `pytest -m every` runs the
methods and dtypes of which the others are examples. `pytest -m programs` runs
what takes long and breaks no law: examples, processes that are killed, the tests of
other libraries.
"""

import gc
import os
import pathlib
import re
import subprocess
import sys

from helpers import short_run
import hypothesis
import jax
import jaxlib
import pytest

# `pytest --hypothesis-profile=slow` for thousands of examples of each property.
hypothesis.settings.register_profile(
  "default",
  max_examples=25,
  derandomize=True,
  deadline=None,
  database=None,
  suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.register_profile(
  "slow", hypothesis.settings.get_profile("default"), max_examples=3000
)
hypothesis.settings.load_profile("default")


# What takes XLA longest on a CPU; and each program is too small to be split in parts
# that are compiled side by side.
_QUICKLY = (
  "--xla_backend_optimization_level=0",
  "--xla_cpu_use_fusion_emitters=false",
  "--xla_cpu_parallel_codegen_split_count=1",
)
_TESTS = pathlib.Path(__file__).parent
_DEVICES = "--xla_force_host_platform_device_count"
# Tests that run only if `-m` says something about them.
_ASKED_FOR = ("slow", "every", "optimized", "house", "programs", "mesh")
_PLACES = ("house", "programs", "mesh")


def accepted(flags):
  """Returns those of `flags` that the installed XLA knows.

  XLA ends a process whose flags it does not know, without a message that pytest would
  show. So each flag is tried in a process of its own, all at the same time.
  """
  tried = {
    flag: subprocess.Popen(
      # What reads the flags, and nothing else: `import jax` takes five times as long.
      [sys.executable, "-c", "import jaxlib.xla_client as c; c.make_cpu_client()"],
      env=os.environ | {"XLA_FLAGS": flag},
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    for flag in flags
  }
  return [flag for flag, process in tried.items() if process.wait() == 0]


def pytest_configure(config):
  # Traced programs are many small objects that stay, which Python would look through
  # again and again: a tenth of the time.
  gc.set_threshold(200_000, 50, 1000)
  # Workers of pytest-xdist inherit the variable, and ask nothing.
  if not hasattr(config, "workerinput"):
    os.environ["XLA_FLAGS"] = _flags(config)
  config.addinivalue_line(
    "markers",
    "foreign: runs code of others, which promotes dtypes and ranks implicitly",
  )
  # The package must not cause a warning, whoever it comes from.
  config.addinivalue_line("filterwarnings", "error")


def _flags(config):
  """Returns what XLA reads when it first compiles. Flags of the user win."""
  flags = os.environ.get("XLA_FLAGS", "").split()
  mark = config.option.markexpr
  if _is_asked("mesh", mark) and not any(x.startswith(_DEVICES) for x in flags):
    flags.append(f"{_DEVICES}=8")
  config.flags_left_out = []
  optimized = any(_is_asked(name, mark) for name in ("slow", "optimized"))
  if not optimized and not any(x.startswith(_QUICKLY[0].split("=")[0]) for x in flags):
    known = accepted(_QUICKLY)
    config.flags_left_out = [flag for flag in _QUICKLY if flag not in known]
    flags += known
  return " ".join(flags)


def _is_asked(name, markexpr):
  """Returns whether an expression of marks asks for one: "not mesh" does not."""
  return bool(re.search(rf"(?<!not )\b{name}\b", markexpr))


def pytest_terminal_summary(terminalreporter, config):
  """Explains a run that is slower than it could be."""
  if left_out := getattr(config, "flags_left_out", []):
    terminalreporter.write_line(
      f"This XLA (jaxlib {jaxlib.__version__}) does not know {', '.join(left_out)}:"
      " the tests ran without, and slower."
    )


def pytest_ignore_collect(collection_path, config):
  """Imports no file of which no test can be asked for, as its marks stand in it.

  Each process imports the files; what they import took a tenth of the default run.
  """
  mark = config.option.markexpr
  if not mark and collection_path.name.startswith("test_"):
    found = re.search(r"^pytestmark = [^\n]*", collection_path.read_text(), re.M)
    whole = found and re.findall(r"mark\.(\w+)", found[0])
    return bool(whole and not set(whole).isdisjoint(_ASKED_FOR)) or None
  # Which cases are left to `every` stands in helpers/short_run.py.
  if (
    mark not in _ASKED_FOR
    or mark == "every"
    or not collection_path.name.startswith("test_")
  ):
    return None
  return f"mark.{mark}" not in collection_path.read_text() or None


def pytest_collection_modifyitems(config, items):
  """Leaves tests out that run only if `-m` says something about them."""
  for item in items:
    file = item.path.relative_to(_TESTS).as_posix()
    test, _, words = item.name.partition("[")
    if not short_run.stays(file, test, words.removesuffix("]")):
      item.add_marker("every")
  mark = config.option.markexpr
  left_out = [name for name in _ASKED_FOR if name not in mark]
  if _is_asked("slow", mark):
    # Large budgets of every kind; those on a mesh need its devices.
    left_out = [name for name in left_out if name == "mesh"]

  def is_left_out(item):
    marks = [name for name in _ASKED_FOR if item.get_closest_marker(name)]
    # Of a page, or on a mesh, and a whole program: the last one says where it runs.
    weaker = [name for name in marks if name in _PLACES][:-1]
    return any(name in left_out and name not in weaker for name in marks)

  config.hook.pytest_deselected(items=list(filter(is_left_out, items)))
  items[:] = [item for item in items if not is_left_out(item)]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Has one process run all tests of a file: they compile the same programs."""
  if config.option.dist != "load":
    return None  # The user asked for another order.
  from xdist.scheduler import LoadFileScheduling

  return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True, scope="session")
def rows_first():
  """Lets small arrays be summed as large ones are, in the forms of a GPU.

  Along an axis a GPU sums some rows each first (`rows`), if there are many: the laws
  have few, and in some forms nothing else differs.
  """
  with pytest.MonkeyPatch.context() as patch:
    if os.environ.get("OPTAX_CLIP_FORMS") in ("gpu", "rocm", "oneapi"):
      patch.setattr("optax_clip._norms.rows._SMALL", 0)
      patch.setattr("optax_clip._norms.rows._ROWS", 2)
    yield


@pytest.fixture(autouse=True)
def no_implicit_promotion(request):
  """Makes a promotion of a dtype or of a rank that nobody wrote an error."""
  if request.node.get_closest_marker("foreign"):
    yield
    return
  with (
    jax.numpy_dtype_promotion("strict"),
    jax.numpy_rank_promotion("raise"),
  ):
    yield


@pytest.fixture
def no_rescue(monkeypatch):
  """Compiles conditionals as the branch that every ordinary step takes.

  XLA's static count of bytes includes all branches. The rescue branch runs only
  after an over- or underflow: it is left out, and nothing else is.
  """

  def common(predicate, rescue, keep, *operands):
    del predicate, rescue
    return keep(*operands)

  monkeypatch.setattr(jax.lax, "cond", common)
  jax.clear_caches()
  yield
  jax.clear_caches()


@pytest.fixture
def one_line_error(capsys):
  """Runs what must end with a bad flag's one line on stderr; returns the line."""

  def run(main, arguments):
    with pytest.raises(SystemExit) as caught:
      main(arguments)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert not out
    assert err.count("\n") == 1
    return err

  return run
