"""Draws all figures and tables again from the kept results, and trains nothing.

Run it as `python -m benchmarks.training`.
"""

from benchmarks import training
from benchmarks.training import _page

for study in training.STUDIES:
  if training.results(study).exists():
    rows = training.load(study)
    _page.draw(study, rows)
    _page.update(study, rows)
