"""The table of the default run names tests that there are."""

import pathlib
import re

from helpers import short_run
import pytest

pytestmark = pytest.mark.house

TESTS = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("file", short_run.STAYS)
def test_each_test_of_the_table_exists(file):
  text = (TESTS / file).read_text()
  found = set(re.findall(r"def (test_\w+)\(", text))
  assert short_run.STAYS[file].keys() <= found


def test_a_case_stays_by_one_of_its_words():
  cases = ["float32-True", "float16-True", "1e-30-2", "-1"]
  table = {"f": {"t": ("float32", "2"), "whole": ()}}
  found = [x for x in cases if short_run.stays("f", "t", x, table)]
  assert found == ["float32-True", "1e-30-2"]
  assert not short_run.stays("f", "whole", "", table)
  assert short_run.stays("f", "another", "float16", table)
  assert short_run.stays("another", "t", "float16", table)
