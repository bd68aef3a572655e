"""Which leaves the norms are of that a threshold is asked about.

A threshold sees norms alone, as one array. One that goes by shapes asks here. The
answer is known only while `clip_with` traces the threshold: a keyword instead would
reach thresholds that know no such keyword.
"""

from collections.abc import Iterator
import contextlib
import contextvars

from optax_clip._norms.layout import Layout

_known: contextvars.ContextVar[Layout | None] = contextvars.ContextVar(
  "layout", default=None
)


@contextlib.contextmanager
def of(layout: Layout) -> Iterator[None]:
  """Makes the layout known inside."""
  token = _known.set(layout)
  try:
    yield
  finally:
    _known.reset(token)


def layout() -> Layout | None:
  """Returns the layout of the norms that a threshold is asked about, if any."""
  return _known.get()
