"""Keeps docs/evidence.md and its figures in step with the kept results."""

import pathlib

from benchmarks import _marked
from studies import _tables
from studies._summary import Row

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "evidence.md"
FIGURES = ROOT / "docs" / "figures"


def tables(study: str, rows: list[Row]) -> str:
  """Makes a study's tables, in Markdown."""
  return getattr(_tables, study)(rows)


def draw(study: str, rows: list[Row]) -> None:
  """Draws a study's figure."""
  from studies import _figures

  _figures.draw(study, rows, FIGURES / f"{study}.png")


def update(study: str, rows: list[Row]) -> None:
  """Writes a study's tables into the page, between its two marks."""
  PAGE.write_text(_marked.replaced(PAGE.read_text(), study, tables(study, rows)))
