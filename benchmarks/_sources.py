"""Which sources a result was measured with."""

import ast
import hashlib
import pathlib
from typing import Any

LIBRARY = pathlib.Path(__file__).parent.parent / "optax_clip"

# Runs on the host only: no compiled step has anything from there.
_ON_THE_HOST = (
  *("__init__", "__main__", "_repr", "states", "command", "convert", "drawing"),
  *("events", "layer_report", "logs", "metrics", "parts", "suggest"),
)


def digest(library: pathlib.Path = LIBRARY) -> str:
  """Hashes what the library's modules do, whatever they say.

  Comments, docstrings and `raise` statements do not change the hash, nor do reports,
  which read states on the host, nor the version of Python.
  """
  found = hashlib.sha256()
  for path in sorted(library.rglob("*.py")):
    is_report = path.parent in (library, library / "_report")
    if is_report and path.stem in _ON_THE_HOST:
      continue
    found.update(path.relative_to(library).as_posix().encode())
    found.update(repr(_meaning(ast.parse(path.read_text()))).encode())
  return found.hexdigest()[:16]


def _meaning(node: Any) -> Any:
  """Converts a node to names and values, without empty fields."""
  if isinstance(node, list):
    return [_meaning(x) for x in node if not _is_silent(x)]
  if not isinstance(node, ast.AST):
    return node
  fields = [(k, _meaning(v)) for k, v in ast.iter_fields(node) if v not in (None, [])]
  return type(node).__name__, fields


def _is_silent(node: Any) -> bool:
  """Returns whether a node is text for people: a string alone, or an error."""
  if isinstance(node, ast.Raise):
    return True
  text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
  return text and isinstance(node.value.value, str)
