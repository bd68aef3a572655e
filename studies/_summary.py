"""Turns rows into means, intervals and each method's best rates."""

from collections.abc import Iterable
import math
from typing import Any
from typing import NamedTuple

Row = dict[str, Any]


# The loss of a uniform guess, in nats per byte.
GUESS = math.log(256)


class Mean(NamedTuple):
  """Holds a mean over seeds.

  Attributes:
    value: the mean.
    error: its standard error, from the deviation among seeds.
  """

  value: float
  error: float


def mean(values: Iterable[float]) -> Mean:
  """Averages one value for each seed."""
  known = list(values)
  # Not `sum`, whose last digit depends on the version of Python (3.12 compensates).
  center = math.fsum(known) / len(known)
  squares = math.fsum((v - center) ** 2 for v in known)
  return Mean(center, math.sqrt(squares / max(len(known) - 1, 1) / len(known)))


def losses(row: Row) -> list[float]:
  """Returns each seed's loss, at most `GUESS`: so much a diverged run is worth.

  Without this a single seed would decide a mean, or leave none.
  """
  return [GUESS if x is None else min(x, GUESS) for x in row["loss"]]


def diverged(row: Row) -> int:
  """Counts the seeds that ended at or above the loss of a guess, or not finite."""
  return sum(x >= GUESS for x in losses(row))


def wilson(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
  """Computes a share's 95% interval (Wilson 1927), which holds near 0 and 1, too."""
  share = successes / count
  middle = share + z * z / (2 * count)
  half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
  whole = 1 + z * z / count
  return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


def select(rows: list[Row], **wanted: Any) -> list[Row]:
  """Selects the rows in which all these fields have these values."""
  return [row for row in rows if all(row[k] == v for k, v in wanted.items())]


def values(rows: list[Row], field: str) -> list[Any]:
  """Lists a field's different values, in the order in which they come."""
  return list(dict.fromkeys(row[field] for row in rows))


def failed(row: Row, points: float = 5.0) -> int:
  """How many seeds of `update_clipping` fell by more than so many points."""
  pairs = zip(row["before"], row["worst"], strict=True)
  return sum(before - worst > points for before, worst in pairs)


def errors(row: Row, field: str) -> list[float]:
  """Squared errors for each seed, none above 1: that of whoever knows nothing."""
  return [1.0 if x is None else min(x, 1.0) for x in row[field]]


def solved(row: Row) -> int:
  """Counts the seeds that solved the problem, in a row of `temporal_order`."""
  return sum(end is not None for end in row["solved_at"])


def peaks(row: Row) -> list[float | None]:
  """The largest finite logit of each seed of a row of `qk_clip`."""
  finite = [[x for x in sizes if x is not None] for sizes in row["largest"]]
  return [max(sizes, default=None) for sizes in finite]


def most_solved(rows: list[Row]) -> Row:
  """Finds the row with most seeds solved, the smallest rate among equals."""
  return max(rows, key=lambda row: (solved(row), -row["rate"]))


def most_accurate(rows: list[Row]) -> Row:
  """Finds the row with the best mean accuracy."""
  return max(rows, key=lambda row: mean(row["accuracy"]).value)


def least_loss(rows: list[Row]) -> Row:
  """Finds the row with the least mean loss."""
  return min(rows, key=lambda row: mean(losses(row)).value)


def gain(row: Row, base: Row) -> Mean:
  """Computes the mean difference in loss to another row, seed by seed."""
  pairs = zip(losses(row), losses(base), strict=True)
  return mean(a - b for a, b in pairs)
