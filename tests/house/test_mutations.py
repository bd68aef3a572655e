"""The hand-made faults are edits of the package as it is; CONTRIBUTING runs them."""

import pathlib

import mutations
import pytest

import optax_clip

pytestmark = pytest.mark.house

PACKAGE = pathlib.Path(optax_clip.__file__).parent


@pytest.mark.parametrize("fault", mutations.FAULTS, ids=lambda fault: fault.text)
def test_what_a_fault_replaces_stands_there_once(fault):
  assert (PACKAGE / fault.file).read_text().count(fault.old) == 1
