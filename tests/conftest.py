"""Settings that every test runs under: many devices, and nothing implicit."""

import os

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


def pytest_configure(config):
  config.addinivalue_line(
    "markers",
    "foreign: runs code of others, which promotes dtypes and ranks implicitly",
  )
  # The package must not cause a warning, whoever it comes from.
  config.addinivalue_line("filterwarnings", "error")


def pytest_collection_modifyitems(config, items):
  """Leaves tests marked `slow` out unless `-m` says something about them."""
  if "slow" in config.option.markexpr:
    return
  slow = [item for item in items if item.get_closest_marker("slow")]
  if slow:
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


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
