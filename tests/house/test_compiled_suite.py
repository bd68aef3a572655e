"""What is read from a compiled program, and that committed figures are up to date."""

import ctypes
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys

from helpers import figures
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import _charts
from benchmarks import _compiling
from benchmarks import _programs
from benchmarks import _rows
from benchmarks import _stubs
from benchmarks import _targets
from benchmarks import compiled
from benchmarks import costs
import optax_clip

pytestmark = pytest.mark.house

# Two leaves of 4 kB and 400 kB, the sum of their squares, checked, and one update.
PROGRAM = """HloModule jit_step, is_scheduled=true

%square (p: f32[100000]) -> f32[] {
  %p = f32[100000]{0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %r = f32[] reduce(%p, %zero), dimensions={0}, to_apply=%sum
}

%rows (q: f32[100000], i: s32[], u: f32[100]) -> (f32[100000], f32[10]) {
  %q = f32[100000]{0} parameter(0)
  %i = s32[] parameter(1)
  %u = f32[100]{0} parameter(2)
  %new = f32[100000]{0} dynamic-update-slice(%q, %u, %i)
  %part = f32[10]{0} dynamic-slice(%u, %i), dynamic_slice_sizes={10}
  ROOT %both = (f32[100000]{0}, f32[10]{0}) tuple(%new, %part)
}

%keep (x: (f32[], f32[100000])) -> f32[] {
  %x = (f32[]{:T(128)}, f32[100000]{0:T(1024)}) parameter(0)
  ROOT %value = f32[] get-tuple-element(%x), index=0
}

%rescue (y: (f32[], f32[100000])) -> f32[] {
  %y = (f32[], f32[100000]{0}) parameter(0)
  %again = f32[100000]{0} get-tuple-element(%y), index=1
  %norm = f32[] fusion(%again), kind=kInput, calls=%square
  ROOT %whole = f32[] all-reduce(%norm), to_apply=%sum
}

ENTRY %main (a: f32[100000], b: f32[1000], s: pred[], n: s32[]) -> f32[100000] {
  %a = f32[100000]{0} parameter(0)
  %b = f32[1000]{0} parameter(1)
  %s = pred[] parameter(2)
  %n = s32[] parameter(3)
  %n2 = f32[] fusion(%a), kind=kInput, calls=%square
  %start = f32[] all-reduce-start(%n2), to_apply=%sum
  %done = f32[] all-reduce-done(%start)
  %t = (f32[], /*index=1*/f32[100000]{0}) tuple(%done, %a)
  %c = f32[] conditional(%s, %t, %t), branch_computations={%keep, %rescue}
  %d = f32[100]{0} copy(%b)
  ROOT %e = (f32[100000]{0}, f32[10]{0}) fusion(%a, %n, %d), kind=kLoop, calls=%rows
}
"""


_ABOUT = {"jax": "0.10.2", "date": "2026-01-01"}


class TestPrograms:
  def read(self, text=PROGRAM, gradient_bytes=400_000):
    return _programs.Program(text, gradient_bytes)

  def test_the_ordinary_path_is_counted(self):
    found = self.read().ordinary
    # The norm, its all-reduce, the copy, and the update; not the rescue.
    assert (found.kernels, found.tiny) == (4, 2)
    # Slices count as slices, and what is updated in place as the update: 400 bytes
    # of the update, which is read whole as it is written too, 4 and 40.
    assert found.bytes == 400_004 + 8 + 4400 + (400 + 400 + 4 + 40)

  def test_collectives_of_all_branches_are_counted_once(self):
    row = self.read().row()
    assert row["conditionals"] == 1
    assert row["collectives"] == {"all-reduce": 2}
    assert row["most_collectives"] == {"all-reduce": 2}
    assert self.read().count("all-reduce") == 2

  def test_the_host_waits_for_branches_and_for_loops_of_unknown_length(self):
    assert self.read().waits() == 1
    # Of a loop inside of a loop, each turn of the outer one counts.
    loop = "%c = f32[] while(%t), condition=%keep, body=%rescue"
    known = ', backend_config={"known_trip_count":{"n":"3"}}'
    inner = "%norm = f32[] while(%again), condition=%keep, body=%square"
    choice = re.search(r"%c = .*", PROGRAM)[0]
    fused = re.search(r"%norm = .*", PROGRAM)[0]
    assert self.read(PROGRAM.replace(choice, loop)).waits() == 1
    assert self.read(PROGRAM.replace(choice, loop + known)).waits() == 0
    nested = PROGRAM.replace(choice, loop + known).replace(fused, inner)
    assert self.read(nested).waits() == 3
    assert self.read(PROGRAM.replace(fused, inner)).waits() == 2

  def test_a_large_result_is_of_a_guard(self):
    # To gradients of a few bytes the same result is large.
    found = self.read(gradient_bytes=40).ordinary
    assert found.kernels == 4 + 2

  def test_a_loop_counts_as_often_as_it_runs(self):
    trips = '"known_trip_count":{"n":"5"}'
    loop = f"while(%t), condition=%keep, body=%rescue, backend_config={{{trips}}}"
    call = PROGRAM.replace(
      "conditional(%s, %t, %t), branch_computations={%keep, %rescue}", loop
    )
    found = self.read(call).ordinary
    assert found.kernels == 4 + 5 * 2
    assert found.collectives[0] == 2

  def test_transfers_of_a_tpu_are_no_kernels(self):
    text = """HloModule m
ENTRY %main (a: f32[100,8]) -> f32[100,8] {
  %a = f32[100,8]{1,0:T(8,128)} parameter(0)
  %s = ((f32[100,8]{1,0:T(8,128)}), f32[50,8]CHIP, s32[]{:S(2)}) slice-start(%a)
  %d = f32[50,8]CHIP slice-done(%s)
  %c = f32[50,8]CHIP custom-call(%d), custom_call_target="ConcatBitcast"
  %e = bf16[50,8]CHIP convert(%c)
  ROOT %f = f32[50,8]{1,0:T(8,128)} convert(%e)
}
""".replace("CHIP", "{1,0:T(8,128)S(1)}")
    found = self.read(text).ordinary
    assert (found.kernels, found.tiny) == (2, 2)
    # Half of it is brought to the chip, and half written.
    assert found.bytes == 1600 + 1600

  def test_sizes_of_types(self):
    shape = "(f8e4m3fn[8]{0}, bf16[2,4], pred[8], s4[8]{0:E(4)}, c64[], token[])"
    assert _programs._size(shape) == 8 + 16 + 8 + 4 + 8

  @pytest.mark.foreign  # AdamW of optax mixes dtypes.
  @pytest.mark.parametrize("count", [1, pytest.param(8, marks=pytest.mark.mesh)])
  def test_a_step_of_this_machine(self, count):
    tx = optax.chain(optax_clip.clip_by_global_norm(1.0), optax.adamw(1e-3))
    shapes = [(512, 64), (64,), (64, 512)]
    row = _compiling.step(tx, shapes, jnp.float32, jax.devices()[:count]).row()
    assert row["kernels"] > row["tiny"] > 0
    assert 7 < row["bytes"] < 12
    assert row["collectives"].keys() <= {"all-reduce"}
    assert bool(row["collectives"]) == (count > 1)


class TestSuite:
  def test_every_cell_has_a_method_a_model_and_a_peer(self):
    methods = compiled.methods()
    for cell in compiled.cells():
      assert cell.method in methods
      assert cell.model in compiled.MODELS
      assert (methods[cell.method].peer or "none") in methods
    assert len(set(compiled.cells())) == len(compiled.cells())

  def test_what_does_not_compile_says_so(self, monkeypatch):
    def fails(*arguments):
      raise jax.errors.JaxRuntimeError("too much shared data")

    monkeypatch.setattr(_compiling, "step", fails)
    monkeypatch.setattr(_targets, "devices", lambda *_: jax.devices()[:1])
    rows = list(compiled.counts("h100", True, "1,000 leaves.*layer_norm"))
    assert [row["error"] for row in rows] == ["too much shared data"]
    assert rows[0]["peer"] == "optax.clip_by_block_rms"
    assert rows[0]["kernels_over_optax"] is None

  def test_only_selects_by_a_regular_expression(self):
    found = compiled.selected(quick=True, only="8 devices: .*norm$")
    assert [cell.devices for cell in found] == [8] * len(found)
    assert {cell.method for cell in found} >= {"clip_by_layer_norm"}

  def test_the_transformer_has_61_leaves(self):
    shapes, _ = compiled.MODELS["transformer"]
    assert len(shapes) == 61

  def rows(self):
    keys = ("kernels", "tiny", "conditionals")
    row = {"suite": "compiled", "target": "h100", "parameters": 84_000_000}
    row |= dict.fromkeys(keys, 3) | {"leaves": 61, "collectives": {}}
    row |= {"bytes": 8.0, "temp_copies": 0.0, "compile_s": 1.0, "peer": None}
    row |= {"kernels_over_optax": None, "compile_over_optax": 1.5}
    return [
      row | compiled.Cell(name)._asdict()
      for name in compiled.methods()
      if "bfloat16" not in name
    ]

  def test_rows_compiled_anew_replace_their_like(self):
    rows = self.rows()
    new = [rows[1] | {"kernels": 9}, rows[0] | {"dtype": "bfloat16"}]
    found = compiled.merged(new, json.dumps({"rows": rows}))
    assert found == [rows[0], new[0], *rows[2:], new[1]]
    assert compiled.merged(new, None) == new

  def test_results_are_shown_and_drawn(self, tmp_path):
    from rich.console import Console

    console = Console(width=80, record=True)
    _rows.show(self.rows(), console)
    text = console.export_text()
    assert "h100, a step of adamw on 84M float32 parameters in 61 leaves" in text
    assert re.search(r"kern\. +/opt\. +tiny +bytes +temp +cond +secs +/opt\.", text)
    assert max(map(len, text.splitlines())) <= 80
    about = compiled.about("h100")
    assert "counted, not run" in about["device"]
    (figure,) = _charts.draw(self.rows(), tmp_path / "a.png", about)
    assert figures.coloured(figure) > 0.002

  def test_the_table_of_the_readme(self):
    table = costs.accelerators({"h100": {"rows": self.rows(), "about": _ABOUT}})
    assert "compiled for an NVIDIA H100" in table
    assert "counted, not run" in table
    assert "| `clip_by_layer_norm` | 3 | 8.00 | 0 |" in table

  def test_the_table_of_gpus(self):
    results = {"mi300x": {"rows": self.rows(), "about": _ABOUT}}
    *_, row = costs.gpus(results).splitlines()
    assert row.startswith("| AMD MI300X | 0.10.2 | 8.00 | 8.00 | 8.00 | 8.00 |")
    assert row.endswith("| 3 | 0.00 |")

  def test_the_table_of_versions_has_what_changed(self):
    old = self.rows()
    old += [old[1] | {"devices": 8}, old[1] | {"model": "2,000 leaves"}]
    changed = (1, len(old) - 2, len(old) - 1)
    new = [row | ({"kernels": 9} if i in changed else {}) for i, row in enumerate(old)]
    new[0]["model"] = "one matrix"  # Which the other version was not asked for.
    both = {"rows": old, "about": _ABOUT}, {"rows": new, "about": {"jax": "0.12.0.1"}}
    table = costs.changes({"h100": both, "tpu-v6e": both})
    row = f"`{old[1]['method']}`, float32"
    assert table.splitlines()[2:] == [
      f"| {title}: {row}{where} | 3, 8.00 | 9, 8.00 |"
      for title in ("NVIDIA H100", "TPU v6e")
      for where in ("", ", 8 devices", ", 2,000 leaves")
    ]

  @pytest.mark.parametrize("target", _targets.TARGETS)
  def test_every_target_is_described(self, target):
    topologies = _targets.TARGETS[target].topologies
    assert topologies.keys() == {1, 8}
    for described in topologies.values():
      assert described.keys() & {"target_config", "topology_name"}

  @pytest.mark.parametrize("slow", [False, True])
  def test_programs_are_traced_as_on_the_target(self, slow, monkeypatch):
    monkeypatch.delenv("OPTAX_CLIP_FLOAT64", raising=False)
    with _targets.float64(slow):
      assert os.environ["OPTAX_CLIP_FLOAT64"] == ("slow" if slow else "fast")
    assert "OPTAX_CLIP_FLOAT64" not in os.environ

  @pytest.mark.parametrize(
    ("version", "packages"),
    [("12", ["nvidia-cuda-nvcc-cu12"]), ("13", ["nvidia-cuda-nvcc", "nvidia-nvvm"])],
  )
  def test_either_cuda_will_do(self, version, packages, monkeypatch):
    jax = [f"jax-cuda{version}-plugin", f"jax-cuda{version}-pjrt"]
    whole = {*jax, *packages}
    monkeypatch.setattr(_targets, "_found", whole.__contains__)
    assert _targets.missing("h100") is None
    assert _targets.missing("rtx5090") is None
    for package in whole:
      monkeypatch.setattr(_targets, "_found", (whole - {package}).__contains__)
      text = _targets.missing("b200")
      assert text.startswith(f"The compiler for b200 lacks {package}: pip install")
      assert all(name in text.partition("pip install")[2] for name in whole)

  def test_parts_of_both_cudas_are_not_one(self, monkeypatch):
    found = {"jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm"}
    monkeypatch.setattr(_targets, "_found", found.__contains__)
    assert "lacks nvidia-cuda-nvcc-cu12:" in _targets.missing("h100")

  @pytest.mark.parametrize("target", ["h100,abacus", "abacus"])
  def test_an_unknown_target_is_named(self, target, monkeypatch, environment):
    with pytest.raises(SystemExit, match=r"--target abacus: choose from h100, b200"):
      benchmarks.main(["--suite", "compiled", "--target", target])

  def test_a_missing_compiler_is_named(self, monkeypatch, environment):
    monkeypatch.setattr(_targets, "_found", lambda package: False)
    with pytest.raises(SystemExit, match=r"lacks jax-cuda12-plugin, .*--no-deps jax-"):
      benchmarks.main(["--suite", "compiled", "--target", "h100"])
    with pytest.raises(_targets.MissingError, match=r"pip install libtpu$"):
      _targets.devices("tpu-v5e")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc and readelf")
def test_a_library_that_is_missing_is_stood_in_for(tmp_path):
  def made(name, text, *flags):
    (tmp_path / "a.c").write_text(text)
    command = ["gcc", "-shared", "-fPIC", "-o", tmp_path / name, tmp_path / "a.c"]
    subprocess.run([*command, *flags], check=True)
    return tmp_path / name

  script = tmp_path / "versions"
  script.write_text("GONE_1 { global: gone; };")
  gone = made(
    "libgone.so.1",
    "int gone(void) { return 7; }",
    "-Wl,-soname,libgone.so.1",
    f"-Wl,--version-script={script}",
  )
  user = made("user.so", "int gone(void); int ask(void) { return gone(); }", gone)
  gone.unlink()
  with pytest.raises(OSError, match="libgone"):
    ctypes.CDLL(str(user))
  names = re.compile("libgone.*"), re.compile(".*")
  _stubs._load(user, _stubs._Plugin("", "user.so", "", *names))
  assert ctypes.CDLL(str(user)).ask() == 100


@pytest.fixture
def environment(monkeypatch):
  """Keeps what the suite sets for compilers out of the other tests."""
  for name in _targets._ENVIRONMENT:
    monkeypatch.setenv(name, "")


DIGESTS = """
import json
from benchmarks import _targets
_targets.prepare({devices})
from benchmarks import compiled
wanted = json.loads({wanted!r})
print(json.dumps([
  [target, *cell, compiled.digest(compiled.Cell(*cell), target)]
  for target, *cell in wanted
]))
"""


# The targets that were counted.
COUNTED = [
  target
  for target in _targets.TARGETS
  if (costs.RESULTS / f"compiled-{target}.json").exists()
]


def committed(target):
  """The file of a target and the results in it."""
  path = costs.RESULTS / f"compiled-{target}.json"
  return path, json.loads(path.read_text())


def release(version):
  return version.split(".")[:3]


def is_of_these_versions(results):
  """Whether programs are those of the installed JAX and optax, but for a patch."""
  return all(
    release(results["about"][package]) == release(importlib.metadata.version(package))
    for package in ("jax", "optax")
  )


def by_cell(results):
  return {
    compiled.Cell(*(row[key] for key in compiled.Cell._fields)): row["program"]
    for row in results["rows"]
    if compiled.is_ours(row["method"])
  }


@pytest.fixture(scope="module")
def programs():
  """What our cells compute, traced in processes with as many devices as each."""
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  wanted = [
    (target, *cell)
    for target in COUNTED
    for _, results in [committed(target)]
    if is_of_these_versions(results)
    for cell in by_cell(results)
  ]
  found = {}
  for devices in {cell[-1] for cell in wanted}:
    own = json.dumps([cell for cell in wanted if cell[-1] == devices])
    run = subprocess.run(
      [sys.executable, "-c", DIGESTS.format(devices=devices, wanted=own)],
      env=environment,
      cwd=costs.ROOT,
      capture_output=True,
      text=True,
      check=True,
    )
    rows = json.loads(run.stdout.splitlines()[-1])
    found |= {(row[0], compiled.Cell(*row[1:-1])): row[-1] for row in rows}
  return found


class TestDigests:
  def digest(self, function):
    def update(updates, state, params=None):
      return [function(x) for x in updates], state

    tx = optax.GradientTransformation(lambda params: (), update)
    return _compiling.digest(_compiling.traced(tx, [(3,)], "float32"), "cpu")

  def test_words_do_not_count(self):
    def named(value):
      """Doubles."""
      two = 2.0
      return value * two

    assert self.digest(named) == self.digest(lambda x: x * 2.0)

  def test_what_is_computed_counts(self):
    programs = (
      lambda x: x * 2.0,
      lambda x: x * 3.0,
      lambda x: x + 2.0,
      lambda x: x * np.float32([1, 2, 3]),
      lambda x: x * np.float32([1, 2, 4]),
    )
    assert len({*map(self.digest, programs)}) == len(programs)

  def test_how_often_a_form_is_chosen_does_not_count(self):
    def double(x):
      return x * 2.0

    def chosen(x):
      return jax.lax.platform_dependent(x, default=double, tpu=lambda x: x * 3.0)

    def decided(x):
      return jax.lax.cond(x[0] > 0, double, lambda x: x * 2.0 + 1.0, x)

    assert self.digest(chosen) == self.digest(double) != self.digest(decided)
    found = [self.digest(lambda x, n=n: decided(x) * n) for n in (1.0, 2.0)]
    assert found[0] != found[1]

  @pytest.mark.programs
  @pytest.mark.parametrize("target", COUNTED)
  def test_committed_figures_are_of_these_programs(self, target, programs):
    path, results = committed(target)
    if not is_of_these_versions(results):
      pytest.skip(f"{path.name} is of another JAX or optax, whose programs differ")
    rows = by_cell(results)
    assert rows
    old = [
      cell.text() for cell, digest in rows.items() if programs[target, cell] != digest
    ]
    assert not old, (
      f"{path.name} is of other programs in {len(old)} rows. Compile them again, in an"
      f" environment as CONTRIBUTING.md says: python -m benchmarks --suite compiled"
      f" --target {target} --json {path.relative_to(costs.ROOT)}"
      f" --png {path.relative_to(costs.ROOT).with_suffix('.png')}"
      f" --only {'|'.join(map(re.escape, old[:3]))!r}"
    )
