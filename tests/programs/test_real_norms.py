"""The study of logged norms: what it counts, and that its page has its results."""

import json
import math

import numpy as np
import pytest

from benchmarks import _marked
import studies
from studies import real_norms

# Optax promotes dtypes and ranks implicitly.
pytestmark = [pytest.mark.foreign, pytest.mark.programs]


def write(folder, name, steps, norms):
  rows = "".join(f"{s},{x}\n" for s, x in zip(steps, norms, strict=True))
  (folder / name).write_text(f"step,grad_norm\n{rows}")


def test_the_page_has_the_tables_of_the_results():
  rows = json.loads(studies.results("real_norms").read_text())["rows"]
  page = real_norms.PAGE.read_text()
  for name, table in real_norms.TABLES.items():
    assert _marked.between(page, name) == table(rows), name


def test_a_change_of_the_interval_is_evened():
  steps = np.array([*range(100), *range(100, 2000, 100)])
  np.testing.assert_array_equal(
    real_norms.evened(steps, steps.astype(float)), range(0, 2000, 100)
  )


def test_spikes_drift_and_what_is_not_finite_are_counted():
  norms = np.ones(400)
  norms[300:] = 2.0
  norms[[50, 200]] = 3.5  # Of three levels and more.
  norms[350] = 5.0  # Of two and a half.
  norms[10] = math.nan
  found = real_norms.described(norms)
  assert (found["spikes"], found["nonfinite"], found["rows"]) == (2, 1, 400)
  assert found["drift"] == 2.0
  assert found["largest"] == 3.5


def test_a_folder_is_measured_and_what_it_cannot_say_left_out(
  tmp_path, monkeypatch, capsys
):
  one = "`clip_by_global_norm(1.0)`"
  monkeypatch.setattr(real_norms, "METHODS", {one: real_norms.METHODS[one]})
  norms = np.full(300, 0.5)
  norms[[100, 200]] = 5.0
  write(tmp_path, "a.csv", range(300), norms)
  write(tmp_path, "short.csv", range(50), norms[:50])
  write(tmp_path, "clipped.csv", range(300), norms)
  (tmp_path / "MANIFEST.tsv").write_text(
    "file\tsource_repo\twriter\tnote\na.csv\towner/name\tCSV\t\n"
    "clipped.csv\towner/name\tCSV\tnorms after the clip: not in the statistics\n"
  )
  rows = real_norms.measure(real_norms.load(tmp_path))
  assert {row["run"] for row in rows} == {"a"}
  (found,) = rows[0]["methods"]
  assert (found["spikes"], found["missed"], found["kept"]) == (2, 0, 2.0)
  assert found["clipped"] == pytest.approx(2 / 300)
  assert found["false_alarms"] == found["clipped_last"] == 0
  real_norms.main([str(tmp_path), "--print"])
  assert "| a | 300 | owner/name | CSV | yes |" in capsys.readouterr().out
