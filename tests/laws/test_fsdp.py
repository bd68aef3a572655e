"""The training script on many devices: the numbers of one, and errors that help."""

import csv
from pathlib import Path

from helpers import several
import jax
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("rich")
from flax import nnx

from examples.language_model import _flags
from examples.language_model import _text
from examples.language_model import train as language_model

# Flax promotes ranks implicitly.
pytestmark = [pytest.mark.foreign, pytest.mark.programs, pytest.mark.mesh]

ROOT = Path(__file__).parents[2]
# As the fixture below, in a process of its own.
QUICK = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from examples.language_model import train as language_model
language_model.HELD_OUT_BATCHES = 1
language_model.main(sys.argv[1:])
"""
# Learns, and clips each leaf.
TINY = ("--steps=4", "--width=16", "--layers=1", "--clip=adagc", "--optimizer=adamw")


@pytest.fixture(scope="module", autouse=True)
def quick():
  """Compiles fast, not well."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(language_model, "HELD_OUT_BATCHES", 1)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def measured(folder):
  with (folder / "steps.csv").open() as file:
    rows = list(csv.DictReader(file))
  return np.array(
    [[float(x) for key, x in row.items() if key != "run"] for row in rows]
  )


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
  folder = tmp_path_factory.mktemp("one")
  language_model.main([*TINY, f"--out={folder}"])
  return measured(folder)


def test_devices_of_one_process_train_as_one_does(tmp_path, expected, monkeypatch):
  seen = []
  held_out = language_model.held_out
  monkeypatch.setattr(
    language_model,
    "held_out",
    lambda model, *args: seen.append(model) or held_out(model, *args),
  )
  language_model.main([*TINY, "--fsdp", f"--out={tmp_path}"])
  np.testing.assert_allclose(measured(tmp_path), expected, rtol=2e-6)
  # After the last step, each device has a part of every weight: all can be cut.
  for x in jax.tree.leaves(nnx.state(seen[0])):
    assert jax.device_count() * x.addressable_shards[0].data.size == x.size


def test_several_processes_train_as_one_does_and_one_of_them_writes(tmp_path, expected):
  def command(address, index):
    where = (f"--coordinator={address}", "--processes=2", f"--process={index}")
    out = f"--out={tmp_path / str(index)}"
    return ["-c", QUICK, *TINY, "--fsdp", *where, out]

  quickly = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  with several.processes(command, 2, 1, **quickly) as started:
    printed = [p.communicate(timeout=several.LIMIT)[0] for p in started]
    assert [p.returncode for p in started] == [0, 0], printed
  np.testing.assert_allclose(measured(tmp_path / "0"), expected, rtol=2e-6)
  assert "held-out" in printed[0]
  assert "held-out" not in printed[1]
  assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_processes_with_different_flags_end_with_an_error(tmp_path):
  def command(address, index):
    where = (f"--coordinator={address}", "--processes=2", f"--process={index}")
    return [
      *("-m", "examples.language_model", "--fsdp", *where),
      *(f"--seed={index}", f"--out={tmp_path}"),
    ]

  with several.processes(command, 2, 1) as started:
    for process in started:
      printed, _ = process.communicate(timeout=several.LIMIT)
      assert "the processes have different flags or texts" in printed
      assert process.returncode == 2


AT = "--coordinator=localhost:1"


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ([AT], "argument --coordinator: localhost:1: give --fsdp as well"),
    (["--processes=2"], "argument --processes: 2: give --fsdp as well"),
    (["--process=0"], "argument --process: 0: give --fsdp as well"),
    (
      ["--fsdp", "--coordinator=host"],
      "argument --coordinator: 'host' is neither HOST:PORT",
    ),
    (["--fsdp", "--coordinator=host:99999"], "'host:99999' is neither HOST:PORT"),
    (["--fsdp", AT], "argument --coordinator: localhost:1: give --processes as well"),
    (["--fsdp", AT, "--processes=2"], "localhost:1: give --process as well"),
    (["--fsdp", "--process=1"], "argument --process: 1: give --coordinator HOST:PORT"),
    (
      ["--fsdp", AT, "--processes=2", "--process=2"],
      "argument --process: 2: must be below --processes, which is 2",
    ),
    (["--fsdp", "--processes=0"], "argument --processes: '0' is not a whole number"),
    (["--fsdp", "--process=-1"], "argument --process: '-1' is not a whole number"),
    (["--fsdp", "--checkpoint=x"], "argument --checkpoint: x: checkpoints are of runs"),
  ],
)
def test_flags_that_do_not_go_together_are_one_line(flags, words, one_line_error):
  assert words in one_line_error(language_model.main, flags)


def test_a_batch_that_cannot_be_divided_is_one_line(monkeypatch, capsys):
  monkeypatch.setattr(_flags, "BATCH", jax.device_count() + 1)
  with pytest.raises(SystemExit):
    language_model.main(["--fsdp"])
  err = capsys.readouterr().err
  assert err.count("\n") == 1
  assert "argument --fsdp: 8 devices do not divide the batch of 9" in err


def test_a_batch_is_the_same_however_it_is_placed(tmp_path):
  flags = _flags.parse(["--fsdp", f"--out={tmp_path}"])
  (batch,) = _text.windows(flags.text.train, 1, 16, 9, seed=0)
  placed = flags.devices.batch(batch)
  assert placed.addressable_shards[0].data.shape == (16 // jax.device_count(), 9)
  np.testing.assert_array_equal(placed, batch)
