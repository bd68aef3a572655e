#!/usr/bin/env bash
# Expected: TensorBoard's reader returns the scalars that were written.
# Seen with tensorboard 2.21.0, Python 3.13, 2026-11-30: `EventAccumulator` keeps 10,000
# scalars of a tag by default, drawn at random, and says nothing about the others. Of a
# longer run most rows are gone, and spikes of a norm with them. Output:
# "by default (10000, 108) with size_guidance (40000, 400) (rows, spikes)".
# What to do: pass size_guidance={"scalars": 0}, which keeps all.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q tensorboard==2.21.0
"$work/venv/bin/python" - "$work/run" 2>/dev/null <<'PYTHON'
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

steps, spikes = 40_000, range(50, 40_000, 100)
writer = EventFileWriter(sys.argv[1], max_queue_size=steps)
for step in range(steps):
  norm = 100.0 if step in spikes else 1.0
  value = Summary.Value(tag="grad_norm", simple_value=norm)
  writer.add_event(Event(step=step, wall_time=step, summary=Summary(value=[value])))
writer.close()


def read(**keywords):
  reader = EventAccumulator(sys.argv[1], **keywords)
  reader.Reload()
  values = [x.value for x in reader.Scalars("grad_norm")]
  return len(values), sum(value > 10 for value in values)


default, everything = read(), read(size_guidance={"scalars": 0})
print("by default", default, "with size_guidance", everything, "(rows, spikes)")
assert default[0] == 10_000 and default[1] < 200
assert everything == (steps, len(spikes))
PYTHON
