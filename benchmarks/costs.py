"""How docs/costs.md gets its tables: `python -m benchmarks.costs`."""

import json
import pathlib
from typing import Any

from benchmarks import _clips
from benchmarks import _marked
from benchmarks import _targets
from benchmarks import compiled

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "costs.md"
RESULTS = ROOT / "benchmarks" / "results"
# Those of an earlier version of JAX.
OLD = RESULTS / "jax-0.10.2"

# The rows of the first table: their names there, and their methods.
ROWS = _clips.lines()
# The rows of the second table.
COMPILED = {
  "none": ("none",),
  **ROWS,
  "`optax.apply_if_finite`": ("update, optax.apply_if_finite",),
  "`skip_nonfinite`, `skip_spikes`, `dynamic_loss_scale`": (
    "update, skip_nonfinite",
    "update, skip_spikes",
    "update, dynamic_loss_scale",
  ),
  "... by `guarded_step`": (
    "guarded_step, skip_nonfinite",
    "guarded_step, skip_spikes",
    "guarded_step, dynamic_loss_scale",
  ),
}
# The targets of the second table, one for each compiler.
ACCELERATORS = ("h100", "tpu-v5e")
# The targets of the fourth table, which were counted with both versions.
TWICE = (*ACCELERATORS, "tpu-v6e")
# The targets of the third table, and its methods with their peers in optax.
GPUS = ("h100", "b200", "rtx4090", "rtx5090", "mi300x", "intel-max")
OF_GPUS = {
  "clip_by_global_norm": "optax.clip_by_global_norm",
  "adaptive_grad_clip": "optax.adaptive_grad_clip",
  "update, skip_nonfinite": "update, optax.apply_if_finite",
}


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
  """Writes the first table: what an AdamW step costs, measured."""
  found = {row["method"]: row for row in rows if row["optimizer"] == "adamw"}
  first = found["none"]
  lines = [
    f"An AdamW step on {first['parameters'] / 1e6:.0f}M float32 parameters in"
    f" {first['leaves']} leaves,",
    f"{about['cpu_count']} CPU cores, JAX {about['jax']}, all in one run on"
    f" {about['date']}:",
    "",
    "| clipping | step / none | added / norm | added / read | copies |",
    "|---|---|---|---|---|",
  ]
  for name, methods in ROWS.items():
    own = [found[method] for method in methods]
    cells = [
      _range([row[key] for row in own])
      for key in ("step_over_none", "added_over_norm", "added_over_reads")
    ]
    copies = _range([row["temp_copies"] for row in own], 0)
    lines.append(f"| {name} | {' | '.join(cells)} | {copies} |")
  return "\n".join(lines)


def accelerators(results: dict[str, dict[str, Any]]) -> str:
  """Writes the second table: what a step compiles to for each target."""
  if not results:
    return "Not counted yet: `python -m benchmarks --suite compiled`."
  found = {
    target: {row["method"]: row for row in result["rows"] if _is_shown(row)}
    for target, result in results.items()
  }
  first = next(iter(found.values()))["none"]
  titles = [_targets.TARGETS[target].title for target in results]
  versions = [(x["about"]["jax"], x["about"]["date"]) for x in results.values()]
  made = [
    f"{'an ' * title.startswith('NVIDIA')}{title} with JAX {jax} on {date}"
    for title, (jax, date) in zip(titles, versions, strict=True)
  ]
  head = "".join(f" {title}: kernels | bytes | copies |" for title in titles)
  lines = [
    f"An AdamW step on {first['parameters'] / 1e6:.0f}M float32 parameters in"
    f" {first['leaves']} leaves,",
    f"compiled for {' and '.join(made)}; counted, not run:",
    "",
    f"| clipping |{head}",
    "|---" + "|---" * 3 * len(found) + "|",
  ]
  for name, methods in COMPILED.items():
    cells = []
    for rows in found.values():
      own = [rows[method] for method in methods if method in rows]
      cells += [
        _range([row["kernels"] for row in own], 0),
        _range([row["bytes"] for row in own]),
        _range([row["temp_copies"] for row in own], 2).replace("0.00", "0"),
      ]
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return "\n".join(lines)


def gpus(results: dict[str, dict[str, Any]]) -> str:
  """Writes the third table: what each GPU gets, in float32 and in bfloat16."""
  lines = [
    "Bytes of an AdamW step on 84M parameters in 61 leaves, in float32 and in bfloat16,"
    " and of the same",
    "step with optax's; the most conditionals and copies of all rows of ours that were"
    " counted:",
    "",
    "| compiled for | JAX | global norm | optax | AGC | optax | `skip_nonfinite` |"
    " optax | conditionals | copies |",
    "|---|---|---|---|---|---|---|---|---|---|",
  ]
  for target, result in results.items():
    rows = {(row["method"], row["dtype"]): row for row in result["rows"] if _is_of(row)}
    cells = [_targets.TARGETS[target].title, result["about"]["jax"]]
    for methods in OF_GPUS.items():
      cells += [
        " and ".join(
          f"{rows[method, dtype]['bytes']:.2f}"
          for dtype in ("float32", "bfloat16")
          if (method, dtype) in rows
        )
        for method in methods
      ]
    ours = [row for (method, _), row in rows.items() if compiled.is_ours(method)]
    cells.append(f"{max((row['conditionals'] for row in ours), default=0)}")
    cells.append(f"{max((row['temp_copies'] for row in ours), default=0):.2f}")
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def changes(results: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> str:
  """Writes the fourth table: what another version of JAX makes of the same steps.

  Args:
    results: for each target those of both versions.
  """
  old, new = next(iter(results.values()))
  versions = [result["about"]["jax"] for result in (old, new)]
  lines = [
    f"| kernels, bytes | JAX {versions[0]} | JAX {versions[1]} |",
    "|---|---|---|",
  ]
  for target, both in results.items():
    title = _targets.TARGETS[target].title
    before, after = (
      {compiled.Cell(*(row[key] for key in compiled.Cell._fields)): row for row in rows}
      for rows in (result["rows"] for result in both)
    )
    for cell in before:
      if cell in after:
        texts = [
          f"{x['kernels']}, {x['bytes']:.2f}" for x in (before[cell], after[cell])
        ]
        if texts[0] != texts[1]:
          lines.append(f"| {title}: {_named(cell)} | {texts[0]} | {texts[1]} |")
  return "\n".join(lines)


# Where it was measured how long compiling takes, by the names of files.
COMPILING = {"cpu": "CPU", "h100": "NVIDIA H100", "tpu-v5e": "TPU v5e"}


def compiling(results: dict[str, dict[str, Any]]) -> str:
  """Returns the table of what it takes until a step runs: a row for each device."""
  about = results["cpu"]["about"]
  methods = [
    x["method"] for x in results["cpu"]["rows"] if not x["method"].startswith("optax.")
  ]
  titles = " | ".join(f"`{name}`" for name in methods)
  lines = [
    f"JAX {about['jax']}, {about['date']}: CPU seconds to trace, lower and compile, and"
    " their sum over that of optax's:",
    "",
    f"| compiled for | {titles} |",
    "|---|" + "---|" * len(methods),
  ]
  for place, found in results.items():
    rows = {x["method"]: x for x in found["rows"]}
    form = "{trace_s:.1f} + {lower_s:.1f} + {compile_s:.1f}: {total_over_optax:.2f}"
    cells = [form.format(**rows[name]) for name in methods]
    lines.append(f"| {COMPILING[place]} | {' | '.join(cells)} |")
  return "\n".join(lines)


def _named(cell: compiled.Cell) -> str:
  """Names a program, by what it has in common with few others."""
  plain = compiled.Cell(cell.method)
  model = cell.model if cell.model != plain.model else ""
  optimizer = cell.optimizer if cell.optimizer != plain.optimizer else ""
  devices = f"{cell.devices} devices" if cell.devices > 1 else ""
  return ", ".join(
    filter(None, (f"`{cell.method}`", cell.dtype, optimizer, model, devices))
  )


def _is_of(row: dict[str, Any]) -> bool:
  """Returns whether a row belongs to the step that the tables show."""
  cell = tuple(row[key] for key in ("model", "optimizer", "devices"))
  return cell == ("transformer", "adamw", 1)


def _is_shown(row: dict[str, Any]) -> bool:
  return _is_of(row) and bool(row["dtype"] == "float32")


def _range(values: list[float], digits: int = 2) -> str:
  if not values:
    return ""
  low, high = (
    f"{abs(x) if round(x, digits) == 0 else x:.{digits}f}"
    for x in (min(values), max(values))
  )
  return low if low == high else f"{low} to {high}"


def updated(text: str) -> str:
  """Puts the tables of the committed results into the page."""
  results = json.loads((RESULTS / "cpu-overhead.json").read_text())
  text = _marked.replaced(text, "costs", table(results["rows"], results["about"]))
  found = {name: counted(name) for name in dict.fromkeys((*ACCELERATORS, *GPUS))}
  some = {name: found[name] for name in ACCELERATORS if found[name]}
  text = _marked.replaced(text, "costs on accelerators", accelerators(some))
  some = {name: found[name] for name in GPUS if found[name]}
  text = _marked.replaced(text, "costs on each GPU", gpus(some))
  both = {name: (counted(name, OLD), counted(name)) for name in TWICE}
  text = _marked.replaced(text, "costs by version", changes(both))
  files = {place: RESULTS / f"{place}-compiling.json" for place in COMPILING}
  times = {x: json.loads(y.read_text()) for x, y in files.items() if y.exists()}
  return _marked.replaced(text, "costs of compiling", compiling(times))


def counted(target: str, folder: pathlib.Path = RESULTS) -> dict[str, Any]:
  """Reads the results of a target; empty if it was not counted."""
  path = folder / f"compiled-{target}.json"
  return dict(json.loads(path.read_text())) if path.exists() else {}


if __name__ == "__main__":
  PAGE.write_text(updated(PAGE.read_text()))
