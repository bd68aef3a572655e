"""What every timed suite is told: `run(options)` measures it and returns its rows."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

Rows = list[dict[str, Any]]


class Options(NamedTuple):
  """Says how much to measure, and on what.

  Attributes:
    quick: whether to take smaller models and fewer rounds.
    accelerator: whether the device is one, which has room for larger models.
    read_bytes_per_s: what the device reads in a second, as measured in this run.
    note: a function to tell what is measured.
    targets: names in `_targets.TARGETS` to compile for, where a suite compiles; none:
      the device.
  """

  quick: bool
  accelerator: bool
  read_bytes_per_s: float
  note: Callable[[str], None] = lambda text: None
  targets: Sequence[str] = ()

  @property
  def repeats(self) -> int:
    """How many interleaved rounds."""
    return 5 if self.quick else 25
