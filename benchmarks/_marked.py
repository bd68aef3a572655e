"""Where results go in a Markdown page: between two marks.

The marks are ``<!-- name -->`` and ``<!-- name: end -->``, each on a line of its own.
"""


def between(page: str, name: str) -> str:
  """Returns what stands between the marks."""
  start, stop = _span(page, name)
  return page[start:stop]


def replaced(page: str, name: str, new: str) -> str:
  """Puts a new text between the marks."""
  start, stop = _span(page, name)
  return page[:start] + new + page[stop:]


def _span(page: str, name: str) -> tuple[int, int]:
  first, last = f"<!-- {name} -->\n", f"\n<!-- {name}: end -->"
  start = page.index(first) + len(first)
  return start, page.index(last, start)
