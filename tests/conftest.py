"""Settings that every test runs under: many devices, and nothing implicit.

XLA compiles most tests with little optimisation, which takes a third of the time.
Tests of what it makes of sums and of whole steps are marked `optimized`, and
`pytest -m optimized` runs them, compiled as users have it. `pytest -m programs` runs
what takes long and breaks no law: examples, processes that are killed, the tests of
other libraries, tables of the guide.
"""

import gc
import os
import subprocess
import sys

# Before jax is imported: meshes need devices. The flag of the user wins.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = " ".join(
    [
      os.environ.get("XLA_FLAGS", ""),
      "--xla_force_host_platform_device_count=8",
    ]
  ).strip()

import hypothesis
import jax
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
# Tests that run only if `-m` says something about them.
_ASKED_FOR = ("slow", "optimized", "programs")


def accepted(flags):
  """Returns those of `flags` that the installed XLA knows.

  XLA ends a process whose flags it does not know, without a message that pytest would
  show. So each flag is tried in a process of its own, all at the same time.
  """
  tried = {
    flag: subprocess.Popen(
      [sys.executable, "-c", "import jax; jax.devices()"],
      env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag},
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    for flag in flags
  }
  return [flag for flag, process in tried.items() if process.wait() == 0]


def pytest_report_header(config):
  """Says which flags are left out, so that a slower run is explained."""
  left_out = getattr(config, "flags_left_out", ())
  return [f"XLA of jaxlib {jax.lib.__version__} does not know {x}" for x in left_out]


def pytest_configure(config):
  # Traced programs are many small objects that stay, which Python would look through
  # again and again: a tenth of the time.
  gc.set_threshold(200_000, 50, 1000)
  # XLA reads them when it first compiles.
  flags = os.environ["XLA_FLAGS"]
  asked = any(name in config.option.markexpr for name in ("slow", "optimized"))
  if not asked and "xla_backend_optimization_level" not in flags:
    known = accepted(_QUICKLY)
    config.flags_left_out = [flag for flag in _QUICKLY if flag not in known]
    # Workers of pytest-xdist inherit it, and ask nothing.
    os.environ["XLA_FLAGS"] = " ".join([flags, *known])
  config.addinivalue_line(
    "markers",
    "foreign: runs code of others, which promotes dtypes and ranks implicitly",
  )
  # The package must not cause a warning, whoever it comes from.
  config.addinivalue_line("filterwarnings", "error")


def pytest_ignore_collect(collection_path, config):
  """Imports no file without a test that is asked for by its mark alone."""
  mark = config.option.markexpr
  if mark not in _ASKED_FOR or not collection_path.name.startswith("test_"):
    return None
  return f"mark.{mark}" not in collection_path.read_text() or None


def pytest_collection_modifyitems(config, items):
  """Leaves tests out that run only if `-m` says something about them."""
  asked = [name for name in _ASKED_FOR if name in config.option.markexpr]
  left_out = [name for name in _ASKED_FOR if name not in asked]
  if "slow" in asked:
    left_out = []

  def is_left_out(item):
    return any(map(item.get_closest_marker, left_out))

  config.hook.pytest_deselected(items=list(filter(is_left_out, items)))
  items[:] = [item for item in items if not is_left_out(item)]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Has one process run all tests of a file: they compile the same programs."""
  if config.option.dist != "load":
    return None  # The user asked for another order.
  from xdist.scheduler import LoadFileScheduling

  return LoadFileScheduling(config, log)


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
