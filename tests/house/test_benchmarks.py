"""The benchmarks run, and the page says what their committed results say."""

import json

from helpers import figures
import jax.numpy as jnp
import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import _charts
from benchmarks import _programs
from benchmarks import costs
from benchmarks import mesh
from benchmarks import overhead
from benchmarks import precision
from benchmarks import spectral

pytestmark = pytest.mark.house


def test_the_tables_of_the_page_are_that_of_the_results():
  text = costs.PAGE.read_text()
  assert costs.updated(text) == text


def test_the_tables_of_singular_values_are_those_of_the_results():
  results = json.loads((costs.RESULTS / "cpu-spectral.json").read_text())
  page = (costs.ROOT / "docs" / "spectral.md").read_text()
  assert spectral.table(results["rows"]) in page
  assert spectral.times(results["rows"]) in page


@pytest.mark.programs
@pytest.mark.foreign  # optax mixes dtypes.
def test_overhead_of_a_small_model():
  rows = overhead.measured(
    16, 1, jnp.float32, repeats=2, optimizers=("sgd",), read_bytes_per_s=1e10
  )
  assert [row["method"] for row in rows] == list(overhead.FEW)
  by = {row["method"]: row for row in rows}
  assert by["none"]["step_over_none"] == 1
  assert by["optax.clip_by_global_norm"]["step_over_optax"] == 1
  for row in rows:
    read = row["gradient_bytes"] / 1e10
    assert row["added_over_reads"] == pytest.approx(row["added_ms"] / 1e3 / read)


@pytest.mark.mesh
@pytest.mark.programs
@pytest.mark.foreign
def test_collectives_of_a_mesh(monkeypatch):
  kept = ("none", "clip_by_global_norm", "adaptive_grad_clip")
  monkeypatch.setattr(mesh, "METHODS", {name: mesh.METHODS[name] for name in kept})
  monkeypatch.setattr(mesh, "COUNTS", (1, 4, 1024))
  rows = mesh.measured(16, 1, 2)
  assert [row["devices"] for row in rows] == [1] * 3 + [4] * 3
  for row in rows:
    ours = row["method"] not in ("none", "optax.clip_by_global_norm")
    if ours and row["devices"] > 1:
      assert row["all-reduce"] == 1, row
    if ours:
      assert not any(row[k] for k in _programs.COLLECTIVES if k != "all-reduce"), row


def test_collectives_in_a_branch_are_not_counted():
  text = """HloModule m
%rescue (x: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %a = f32[] all-reduce(%x), to_apply=%sum
}

%keep (x: f32[]) -> f32[] {
  ROOT %x = f32[] parameter(0)
}

ENTRY %main (p: pred[], x: f32[]) -> f32[] {
  %b = f32[] all-reduce-start(%x), to_apply=%sum
  ROOT %c = f32[] conditional(%p, %b, %b), branch_computations={%keep, %rescue}
}
"""
  assert mesh._count(text, "all-reduce") == 1
  assert mesh._count(text.replace("conditional", "call"), "all-reduce") == 2


@pytest.mark.programs
def test_results_are_drawn_and_written(tmp_path, monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  few = dict(list(precision.CASES.items())[:1] + list(precision.CASES.items())[-2:])
  monkeypatch.setattr(precision, "CASES", few)
  out, png = tmp_path / "out.json", tmp_path / "out.png"
  arguments = ["--suite", "precision", "--quick", "--json", str(out), "--png", str(png)]
  rows = benchmarks.main(arguments)
  assert json.loads(out.read_text())["rows"] == rows
  assert figures.coloured(png) > 0.002
  ours = [row for row in rows if row["method"] == "optax_clip.global_norm"]
  assert max(row["relative_error"] for row in ours) <= 1e-6


@pytest.mark.parametrize(
  "suite", ["overhead", "skip", "leaves", "scale", "mesh", "spectral"]
)
def test_committed_results_can_be_drawn(suite, tmp_path):
  path = costs.RESULTS / f"cpu-{suite}.json"
  results = json.loads(path.read_text())
  (figure,) = _charts.draw(results["rows"], tmp_path / "a.png", results["about"])
  assert figures.coloured(figure) > 0.002
