"""What the compilers of GPUs and TPUs make of a clipped step: compiled, not run.

`python -m benchmarks --suite compiled --target h100,tpu-v5e,tpu-v6e` counts kernels,
bytes, temporaries, conditionals and collectives in the programs that a device would
run (`_programs` says how), on a machine that has none (`_targets` says with what).
`--only adaptive_grad_clip` compiles the cells whose description matches, and with
`--json FILE` replaces their rows in a file that exists.

Each method compiles after its peer in optax, in the same process, and its seconds are
divided by the peer's. A peer that takes longer than `LONG` compiles once for all its
methods. Seconds depend on the machine, counts do not.

Cells over 8 devices compile in a process that has 8: the library asks JAX whether
arrays may be sharded before it concatenates small ones.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
import datetime
import functools
import json
import math
import pathlib
import re
import subprocess
import sys
from typing import Any
from typing import NamedTuple

from benchmarks import _targets

Rows = list[dict[str, Any]]

LONG = 20.0


def transformer(blocks: int = 12) -> list[tuple[int, ...]]:
  """Returns a small GPT-2's shapes: 12 blocks have 84M parameters in 61 leaves."""
  block = [(768,), (768, 2304), (3072,), (768, 3072), (3072, 768)]
  return [*block * blocks, (8192, 768)]


# The shapes of each model, and with --quick.
MODELS: dict[str, tuple[list[tuple[int, ...]], list[tuple[int, ...]]]] = {
  "transformer": (transformer(), transformer(2)),
  "one matrix": ([(768, 3072)], [(96, 128)]),
  "300 mixed leaves": (
    [(256, 1024), (1024,), (256,)] * 100,
    [(256, 1024), (1024,), (256,)] * 10,
  ),
  "1,000 leaves": ([(1000,)] * 1000, [(1000,)] * 100),
  "2,000 leaves": ([(1000,)] * 2000, [(1000,)] * 200),
}


class Cell(NamedTuple):
  """Names one program.

  Attributes:
    method: a name in `methods`.
    model: a name in `MODELS`.
    optimizer: a name in `overhead.OPTIMIZERS`.
    dtype: the dtype of parameters, gradients and moments.
    devices: how many devices shard the matrices, along their first axis.
  """

  method: str
  model: str = "transformer"
  optimizer: str = "adamw"
  dtype: str = "float32"
  devices: int = 1

  def text(self) -> str:
    """Returns the description that `--only` searches."""
    where = f", {self.devices} devices" if self.devices > 1 else ""
    return f"{self.model}, {self.optimizer}, {self.dtype}{where}: {self.method}"


class Method(NamedTuple):
  """Describes a way to take a step.

  Attributes:
    make: from the optimizer to the one with the clip or the guard.
    peer: the method of optax to compare with, or `None`.
    whole: whether `optax_clip.guarded_step` takes the step.
  """

  make: Callable[[Any], Any]
  peer: str | None = None
  whole: bool = False


_GLOBAL = "optax.clip_by_global_norm"
_LAYER = "optax.clip_by_block_rms"
_UNIT = "optax.adaptive_grad_clip"
_GUARD = "update, optax.apply_if_finite"

# Compiled in every dtype, and with every optimizer.
_FEW = ("none", _GLOBAL, "clip_by_global_norm")
_BFLOAT16 = (
  *_FEW,
  _LAYER,
  "clip_by_layer_norm",
  "clip_by_block_rms",
  _UNIT,
  "adaptive_grad_clip",
  "adagc",
  "guarded_step, skip_nonfinite",
  "update, skip_nonfinite",
  "guarded_step, everything",
)
_SHARDED = (
  *_FEW,
  _LAYER,
  "clip_by_layer_norm",
  _UNIT,
  "adaptive_grad_clip",
)


@functools.cache
def methods() -> dict[str, Method]:
  """Returns all methods by name, each peer in optax before its methods."""
  import optax

  from benchmarks import _clips
  from benchmarks import skip
  import optax_clip

  found = {
    name: Method(lambda tx, clip=clip: optax.chain(clip.make(), tx), clip.peer)
    for name, clip in _clips.CLIPS.items()
  }
  found["observe"] = Method(optax_clip.observe, _GLOBAL)
  clip = optax_clip.clip_by_global_norm(1.0)
  everything = skip.METHODS["guarded_step, everything"][0]
  guards: dict[str, tuple[Callable[[Any], Any], bool]] = skip.METHODS | {
    "update, dynamic_loss_scale": (
      lambda tx: optax_clip.dynamic_loss_scale(optax.chain(clip, tx)),
      False,
    ),
    "update, everything": (everything, False),
    "update, skip_nonfinite, record=layers": (
      lambda tx: optax_clip.skip_nonfinite(optax.chain(clip, tx), record="layers"),
      False,
    ),
  }
  for name, (guard, whole) in guards.items():
    if name != skip.BASE:
      found[name] = Method(guard, None if name == _GUARD else _GUARD, whole)
  return found


def is_ours(method: str) -> bool:
  """Returns whether a method has a clip or a guard of this library."""
  return method != "none" and "optax." not in method


def cells() -> list[Cell]:
  """Lists all programs, with those to compare in a row."""
  layers = (_LAYER, "clip_by_layer_norm")
  # A matrix is a program of its own: these compile for minutes with more of them.
  single = [name for name in methods() if "spectral" in name]
  found = [Cell(name) for name in methods() if name not in single]
  found += [Cell(name, "one matrix") for name in (_GLOBAL, *single)]
  found += [Cell(name, dtype="bfloat16") for name in _BFLOAT16]
  for optimizer in ("sgd", "lion", "muon"):
    found += [Cell(name, optimizer=optimizer) for name in _FEW]
  found += [Cell(name, devices=8) for name in _SHARDED]
  for model in ("300 mixed leaves", "1,000 leaves"):
    found += [Cell(name, model) for name in (*_FEW, *layers)]
  # Minutes each.
  return found + [Cell(name, "2,000 leaves") for name in _FEW[1:]]


def digest(cell: Cell, target: str) -> str:
  """Hashes what a cell computes on a target: what its figures are of.

  The process has to have as many devices as the cell.
  """
  from benchmarks import _compiling

  about = _targets.TARGETS[target]
  return _compiling.digest(_traced(cell, about.slow_float64), about.platform)


@functools.cache
def _traced(cell: Cell, slow_float64: bool) -> Any:
  from benchmarks import _compiling

  with _targets.float64(slow_float64):
    whole = methods()[cell.method].whole
    shapes = MODELS[cell.model][0]
    return _compiling.traced(_optimizer(cell), shapes, cell.dtype, whole)


def _optimizer(cell: Cell) -> Any:
  """Makes the optimizer with the clip or the guard of a cell."""
  from benchmarks import overhead

  return methods()[cell.method].make(overhead.OPTIMIZERS[cell.optimizer](1e-3))


def figures(
  cell: Cell, target: str, devices: list[Any], quick: bool = False
) -> dict[str, Any]:
  """Compiles a cell; returns its figures, or the `error` of a compiler that failed."""
  import jax

  from benchmarks import _compiling

  tx, whole = _optimizer(cell), methods()[cell.method].whole
  shapes = MODELS[cell.model][quick]
  try:
    with _targets.float64(_targets.TARGETS[target].slow_float64):
      return _compiling.step(tx, shapes, cell.dtype, devices, whole).row()
  except jax.errors.JaxRuntimeError as error:
    return {"error": str(error)}


def counts(
  target: str,
  quick: bool = False,
  only: str = "",
  devices: int = 1,
  note: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
  """Yields a row for each cell over this number of devices.

  Args:
    target: a name in `_targets.TARGETS`.
    quick: whether to take the smaller models, and float32 only.
    only: a regular expression for the descriptions of cells.
    devices: 1 or 8; JAX has to have as many.
    note: a function to tell what compiles.
  """
  compile_for = _targets.devices(target, devices)
  peers: dict[Cell, dict[str, Any]] = {}

  def found(cell: Cell) -> dict[str, Any]:
    note(f"{target}: {cell.text()}")
    return figures(cell, target, compile_for, quick)

  for cell in selected(quick, only):
    if cell.devices != devices:
      continue
    name = methods()[cell.method].peer
    peer = cell._replace(method=name) if name else None
    if peer and (peer not in peers or peers[peer].get("compile_s", LONG) < LONG):
      peers[peer] = found(peer)
    own = peers[cell] = found(cell)
    shapes = MODELS[cell.model][quick]
    yield {
      "suite": "compiled",
      "target": target,
      **cell._asdict(),
      "parameters": sum(map(math.prod, shapes)),
      "leaves": len(shapes),
      **own,
      "peer": name,
      **{
        f"{key.removesuffix('_s')}_over_optax": own[key] / peers[peer][key]
        if peer and key in own and key in peers[peer]
        else None
        for key in ("kernels", "bytes", "lower_s", "compile_s")
      },
      **({} if quick else {"program": digest(cell, target)}),
    }


def selected(quick: bool, only: str) -> list[Cell]:
  """Selects the cells whose description matches."""
  return [
    cell
    for cell in cells()
    if re.search(only, cell.text()) and not (quick and cell.dtype != "float32")
  ]


def measured(
  target: str, quick: bool, only: str, note: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
  """Yields the rows of one target, also over 8 devices."""
  if any(cell.devices == 1 for cell in selected(quick, only)):
    yield from counts(target, quick, only, note=note)
  if any(cell.devices > 1 for cell in selected(quick, only)):
    note(f"{target}: 8 devices, in a process of their own")
    arguments = [target, "--only", only, *(["--quick"] if quick else [])]
    output = subprocess.run(
      [sys.executable, "-m", "benchmarks.compiled", *arguments],
      stdout=subprocess.PIPE,
      check=True,
      text=True,
    ).stdout
    yield from json.loads(output.splitlines()[-1])


def about(target: str) -> dict[str, str]:
  """Describes what the figures of a target depend on."""
  import importlib.metadata
  import platform

  compilers = _targets.TARGETS[target].compilers
  made_by = [package for compiler in compilers for package in compiler.packages]
  packages = ("jax", "jaxlib", "optax", *made_by)
  installed = {
    x.metadata["Name"]: x.version for x in importlib.metadata.distributions()
  }
  return {
    "date": datetime.date.today().isoformat(),
    "device": f"compiled for {_targets.TARGETS[target].title} and counted, not run",
    "target": target,
    "python": platform.python_version(),
    **{name: installed[name] for name in packages if name in installed},
  }


def merged(rows: Rows, file: str | None) -> Rows:
  """Merges the rows of a file with the newly compiled ones, which win."""
  if file is None:
    return rows

  def cell(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("target", "parameters", *Cell._fields))

  new = {cell(row): row for row in rows}
  kept = [new.pop(cell(row), row) for row in json.loads(file)["rows"]]
  return [*kept, *new.values()]


def run(options: argparse.Namespace) -> Rows:
  """Compiles, shows and writes; returns the rows."""
  from rich.console import Console

  from benchmarks import _rows

  console = Console()
  try:
    targets = _targets.named(options.target)
    for target in targets:
      if text := _targets.missing(target):
        raise _targets.MissingError(text)
  except (ValueError, _targets.MissingError) as error:
    raise SystemExit(str(error)) from None
  every = []
  for target in targets:
    path = options.json and _of_target(options.json, target, targets)
    old = path.read_text() if path and path.exists() and options.only else None
    rows, notes = [], about(target)
    with _rows.progress(console) as note:
      for row in measured(target, options.quick, options.only, note):
        rows.append(row)
        if path:  # As they come: a run that stops leaves some.
          _rows.write(merged(rows, old), notes, path)
    every += rows
    _rows.show(rows, console)
    for row in rows:
      if "error" in row:
        text = Cell(*(row[key] for key in Cell._fields)).text()
        console.print(f"{text}: {row['error']}", markup=False, highlight=False)
    console.print(
      f"{notes['device']}. Bytes and temporaries are in units of the gradients,"
      " seconds to compile are of this machine, /opt. is over optax's equivalent."
    )
    if options.png:
      from benchmarks import _charts

      path = _of_target(options.png, target, targets)
      for drawn in _charts.draw(merged(rows, old), path, notes):
        console.print(f"wrote {drawn}", soft_wrap=True, highlight=False)
  return every


def _of_target(path: pathlib.Path, target: str, targets: list[str]) -> pathlib.Path:
  """Names the file of a target: if there are several, by it before the ending."""
  return path.with_stem(f"{path.stem}-{target}") if len(targets) > 1 else path


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("target")
  parser.add_argument("--only", default="")
  parser.add_argument("--quick", action="store_true")
  arguments = parser.parse_args()
  _targets.prepare(8)
  print(json.dumps(list(counts(arguments.target, arguments.quick, arguments.only, 8))))
