"""Keeps docs/evidence.md and its figures in step with the results that are kept."""

import pathlib

from benchmarks import _marked
from benchmarks.training import _tables
from benchmarks.training._summary import Row

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "evidence.md"
FIGURES = ROOT / "docs" / "figures"


def tables(study: str, rows: list[Row]) -> str:
  """The tables of a study, in Markdown."""
  return getattr(_tables, study)(rows)


def draw(study: str, rows: list[Row]) -> None:
  """Draws the figure of a study."""
  from benchmarks.training import _figures

  _figures.draw(study, rows, FIGURES / f"{study}.png")


def update(study: str, rows: list[Row]) -> None:
  """Writes the tables of a study into the page, between its two marks."""
  PAGE.write_text(_marked.replaced(PAGE.read_text(), study, tables(study, rows)))
