#!/usr/bin/env bash
# Expected: the label of an axis names the value at its place, or there is none.
# Seen with uniplot 0.23.2, Python 3.13, 2026-11-30: labels are rounded until they just
# differ. Points at 0.5, 1.0 and 1.5 stand at labels 0, 1 and 2, so that a norm of 0.5 reads
# as zero. Output: "labels 2 1 0 for points at 1.5 1.0 0.5".
# What to do: pass y_labels=False, and write labels of your own.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q uniplot==0.23.2
"$work/venv/bin/python" - <<'PYTHON'
import uniplot

text = uniplot.plot_to_string(
  ys=[0.5, 1.0, 1.5], xs=[0, 1, 2], y_min=0.4, y_max=1.6, height=9, color=False
)
# In each line that has a point: what stands right of the frame.
points = set("▖▗▘▝")
lines = [line for line in text.splitlines() if points & set(line)]
labels = [line.rpartition("│")[2].strip() for line in lines]
print("labels", *labels, "for points at 1.5 1.0 0.5")
assert labels == ["2", "1", "0"]
PYTHON
