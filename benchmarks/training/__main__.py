"""Draws all figures and tables again from the results that are kept.

`python -m benchmarks.training`; it trains nothing.
"""

from benchmarks import training
from benchmarks.training import _page

for study in training.STUDIES:
  if training.results(study).exists():
    rows = training.load(study)
    _page.draw(study, rows)
    _page.update(study, rows)
