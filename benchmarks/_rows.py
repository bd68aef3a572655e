"""How rows of results become tables and a JSON file."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import json
import pathlib
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.progress import SpinnerColumn
from rich.progress import TextColumn
from rich.progress import TimeElapsedColumn
from rich.table import Table

# The columns of each suite: key, heading, format.
COLUMNS: dict[str, list[tuple[str, str, str]]] = {
  "overhead": [
    ("optimizer", "step of", "{}"),
    ("method", "clipping", "{}"),
    ("step_ms", "step ms", "{:.2f}"),
    ("step_over_none", "/none", "{:.2f}"),
    ("added_over_norm", "/norm", "{:.2f}"),
    ("added_over_reads", "/read", "{:.2f}"),
    ("temp_copies", "copies", "{:.2f}"),
  ],
  "skip": [
    ("method", "step", "{}"),
    ("step_ms", "step ms", "{:.2f}"),
    ("step_over_clip", "/clip", "{:.2f}"),
    ("temp_copies", "copies", "{:.2f}"),
    ("bytes_over_clip", "bytes/clip", "{:.2f}"),
  ],
  "leaves": [
    ("leaves", "leaves", "{}"),
    ("method", "clipping", "{}"),
    ("lower_s", "trace s", "{:.2f}"),
    ("compile_s", "compile s", "{:.2f}"),
    ("step_ms", "step ms", "{:.2f}"),
    ("added_ms", "added ms", "{:.2f}"),
  ],
  "compiling": [
    ("method", "step", "{}"),
    ("trace_s", "trace s", "{:.2f}"),
    ("lower_s", "lower s", "{:.2f}"),
    ("compile_s", "compile s", "{:.2f}"),
    ("total_s", "total s", "{:.2f}"),
    ("total_over_optax", "/optax", "{:.2f}"),
  ],
  "precision": [
    ("case", "case", "{}"),
    ("method", "norm by", "{}"),
    ("norm", "norm", "{:.7g}"),
    ("relative_error", "error", "{}"),
  ],
  "spectral": [
    ("method", "clipping", "{}"),
    ("excess", "excess", "{:.1e}"),
    ("inside", "within", "{}"),
    ("inside_equal", "equal", "{}"),
    ("below", "below", "{:.1e}"),
    ("tiny", "tiny", "{:.1e}"),
    ("ms", "ms", "{:.2f}"),
    ("over_muon", "/Muon", "{:.2f}"),
  ],
  "scale": [
    ("parameters", "parameters", "{:,}"),
    ("dtype", "dtype", "{}"),
    ("norm_ms", "norm ms", "{:.3f}"),
    ("norm_over_read", "norm / read", "{:.2f}"),
    ("clip_ms", "clip ms", "{:.3f}"),
    ("optax_ms", "optax ms", "{:.3f}"),
    ("torch_clip_grad_norm_ms", "torch ms", "{:.3f}"),
  ],
  "mesh": [
    ("devices", "devices", "{}"),
    ("method", "clipping", "{}"),
    ("step_ms", "step ms", "{:.2f}"),
    ("step_over_none", "/none", "{:.2f}"),
    ("all-reduce", "reduce", "{}"),
    ("all-gather", "gather", "{}"),
  ],
  "compiled": [
    ("method", "clipping", "{}"),
    ("kernels", "kern.", "{}"),
    ("kernels_over_optax", "/opt.", "{:.2f}"),
    ("tiny", "tiny", "{}"),
    ("bytes", "bytes", "{:.2f}"),
    ("temp_copies", "temp", "{:.2f}"),
    ("conditionals", "cond", "{}"),
    ("compile_s", "secs", "{:.1f}"),
    ("compile_over_optax", "/opt.", "{:.2f}"),
  ],
}


@contextlib.contextmanager
def progress(console: Console) -> Iterator[Callable[[str], None]]:
  """Shows what runs, and for how long; yields the function to tell it."""
  with Progress(
    SpinnerColumn(),
    TextColumn("{task.description}"),
    TimeElapsedColumn(),
    console=console,
    transient=True,
  ) as shown:
    task = shown.add_task("")
    yield lambda text: shown.update(task, description=text)


def show(rows: list[dict[str, Any]], console: Console) -> None:
  """Prints a table for each suite, and for each subject of the suite compiled."""
  tables: dict[str, list[dict[str, Any]]] = {}
  for row in rows:
    suite = row["suite"]
    key = _subject(row) if suite in ("compiled", "spectral") else suite
    tables.setdefault(key, []).append(row)
  for of_suite in sorted(
    tables.values(), key=lambda own: list(COLUMNS).index(own[0]["suite"])
  ):
    suite, columns = of_suite[0]["suite"], COLUMNS[of_suite[0]["suite"]]
    table = Table(
      title=f"{suite}: {_subject(of_suite[0])}",
      title_justify="left",
      pad_edge=False,
      box=SIMPLE_HEAD,
      padding=(0, 1, 0, 0),
    )
    present = [c for c in columns if any(c[0] in row for row in of_suite)]
    for key, heading, _ in present:
      text = isinstance(of_suite[0].get(key), str)
      table.add_column(
        heading,
        justify="left" if text else "right",
        overflow="fold",
        # The longest name without a comma.
        min_width=25 if key == "method" else None,
      )
    for row in of_suite:
      table.add_row(*(_cell(row.get(key, ""), form) for key, _, form in present))
    console.print(table)


def write(
  rows: list[dict[str, Any]], about: dict[str, Any], path: pathlib.Path
) -> None:
  """Writes results as JSON, a row a line."""
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
  head = json.dumps(about)
  path.write_text(f'{{\n "about": {head},\n "rows": [\n{lines}\n ]\n}}\n')


def _subject(row: dict[str, Any]) -> str:
  if row["suite"] in ("overhead", "skip", "mesh"):
    return (
      f"{row['parameters'] / 1e6:.0f}M parameters in {row['leaves']} leaves,"
      f" {row.get('dtype', 'float32')}"
    )
  if row["suite"] == "compiled":
    where = f", over {row['devices']} devices" if row["devices"] > 1 else ""
    return (
      f"{row['target']}, a step of {row['optimizer']} on"
      f" {row['parameters'] / 1e6:.0f}M {row['dtype']} parameters in {row['leaves']}"
      f" leaves{where}"
    )
  place = row.get("target", "this device")
  return {
    "leaves": "the same bytes in more leaves, an sgd step",
    "compiling": f"{place}: an adamw step of {row.get('leaves')} leaves, CPU seconds",
    "precision": "the global norm against float64",
    "scale": "norm and clip alone",
    "spectral": row.get("case") or f"matrices of twelve kinds, {row.get('dtype')}",
  }[row["suite"]]


def _cell(value: Any, form: str) -> str:
  if value is None or isinstance(value, str):  # "inf" among numbers.
    return value or ""
  if form == "{}" and isinstance(value, float):
    return f"{value:.1e}"
  return form.format(value)
