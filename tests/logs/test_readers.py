"""Every layout that trainers write is read, or refused in one line that is right."""

import layouts
import numpy as np
import pytest

from optax_clip._logs import log
from optax_clip._logs import records

READ = layouts.KNOWN | layouts.FURTHER


def written(folder, name, text, encoding="utf-8"):
  path = folder / name
  path.write_text(text, encoding=encoding, newline="")
  return str(path)


@pytest.mark.parametrize("layout", READ)
def test_a_layout_is_read(layout, tmp_path):
  name, text, column = READ[layout]
  read = log.read(written(tmp_path, name, text))
  assert read.column == column
  np.testing.assert_array_equal(read.norms, layouts.NORMS)


@pytest.mark.parametrize("layout", layouts.REFUSED)
def test_a_layout_is_refused_in_one_line(layout, tmp_path):
  name, text, part = layouts.REFUSED[layout]
  with pytest.raises(records.LogError) as caught:
    log.read(written(tmp_path, name, text))
  said = str(caught.value)
  assert part in said
  assert len(said) <= 300
  assert "\n" not in said


def test_a_quotation_mark_in_a_text_closes_nothing(tmp_path):
  text = '"start of a long run\n' + layouts.lines("step {i}, grad_norm: {x}")
  text += "no number, but a word\n" * 10_000
  read = log.read(written(tmp_path, "run.log", text))
  np.testing.assert_array_equal(read.norms, layouts.NORMS)
