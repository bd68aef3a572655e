"""The versions that the project names, everywhere as in pyproject.toml."""

import pathlib
import re
import tomllib

import pytest

pytestmark = pytest.mark.house

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TESTED = PROJECT["tool"]["optax-clip"]["tested"]
NAMES = {"python": "Python", "jax": "JAX", "optax": "optax"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/faq.md"])
def test_pages_name_the_versions_that_are_tested(page, name):
  text = " ".join((ROOT / page).read_text().split())
  assert "{} {} to {}".format(NAMES[name], *TESTED[name]) in text


def test_the_oldest_versions_are_those_that_pip_takes():
  assert PROJECT["project"]["requires-python"] == f">={TESTED['python'][0]}"
  for name in ("jax", "optax"):
    assert f"{name}>={TESTED[name][0]}" in PROJECT["project"]["dependencies"]


def test_classifiers_and_the_workflow_name_each_python():
  first, last = (int(x.split(".")[1]) for x in TESTED["python"])
  wanted = [f"3.{minor}" for minor in range(first, last + 1)]
  classifiers = " ".join(PROJECT["project"]["classifiers"])
  assert re.findall(r"Python :: (3\.\d+)", classifiers) == wanted
  workflow = (ROOT / ".github/workflows/ci.yml").read_text()
  matrix = re.search(r"python: \[(.*)\]\n\s+dependencies: \[oldest, newest\]", workflow)
  assert re.findall(r"3\.\d+", matrix[1]) == wanted
