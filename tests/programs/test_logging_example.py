"""The script that logs: what its files hold is what the metrics were."""

import csv
import importlib.util
import json
from pathlib import Path
import re
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn")
import logging_metrics

# AdamW promotes dtypes implicitly.
pytestmark = [pytest.mark.foreign, pytest.mark.programs]

STEPS = 23


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
  """A run with every logger that is installed; its folder, and what it was given."""
  out = tmp_path_factory.mktemp("logged")
  names = [
    name
    for name in logging_metrics.WRITERS
    if importlib.util.find_spec(logging_metrics.PACKAGES[name])
  ]
  given = []
  write = logging_metrics.Late.write

  def noting(self, step, row):
    given.append((step, row))
    write(self, step, row)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(logging_metrics.Late, "write", noting)
    for variable in ("CACHE", "CONFIG", "DATA"):
      patch.setenv(f"WANDB_{variable}_DIR", str(out / "home"))
    logging_metrics.main(
      ["--to", ",".join(names), f"--steps={STEPS}", "--portion=5", f"--out={out}"]
    )
  rows = {
    step: {name: value.item() for name, value in row.items()}
    for step, row in jax.device_get(given)
  }
  assert list(rows) == list(range(1, STEPS + 1))
  assert rows[STEPS]["clip_by_global_norm/steps"] == STEPS
  assert rows[1]["clip_by_global_norm/limit"] == 0.5
  assert rows[STEPS]["loss"] < rows[1]["loss"]
  return out, rows


def test_csv(logged):
  out, rows = logged
  with (out / "metrics.csv").open(newline="") as file:
    read = list(csv.DictReader(file))
  assert {
    int(row.pop("step")): {name: float(value) for name, value in row.items()}
    for row in read
  } == rows


def test_tensorboard(logged):
  pytest.importorskip("tensorboardX")
  from tensorboardX.proto import event_pb2

  out, rows = logged
  (path,) = (out / "tensorboard").iterdir()
  data, read = path.read_bytes(), {}
  while data:
    # A length, its checksum, the event, its checksum.
    (length,) = struct.unpack_from("<Q", data)
    event = event_pb2.Event.FromString(data[12 : 12 + length])
    data = data[16 + length :]
    for value in event.summary.value:
      read.setdefault(event.step, {})[value.tag] = value.simple_value
  assert read == rows


def test_wandb(logged):
  pytest.importorskip("wandb")
  from wandb.proto import wandb_internal_pb2

  out, rows = logged
  (path,) = out.glob("wandb/offline-run-*/run-*.wandb")
  read = {}
  for record in wandb_records(path.read_bytes()):
    message = wandb_internal_pb2.Record.FromString(record)
    items = {
      "/".join(item.nested_key) or item.key: json.loads(item.value_json)
      for item in message.history.item
    }
    if items:
      kept = {k: v for k, v in items.items() if not k.startswith("_")}
      read[items["_step"]] = kept
  assert read == rows


def wandb_records(data):
  """The records of a file in the log format of LevelDB, after a header of 7 bytes."""
  whole, at = b"", 7
  while at < len(data):
    left = -at % 32768
    # Less than a record's header is left of the block.
    if left and left < 7:
      at += left
      continue
    _, length, kind = struct.unpack_from("<IHB", data, at)
    whole += data[at + 7 : at + 7 + length]
    at += 7 + length
    # 1 is a whole record, 2 a first part, 3 a middle, 4 a last.
    if kind in (1, 4):
      yield whole
      whole = b""


def test_what_is_not_done_yet_is_not_fetched():
  rows = []
  late = logging_metrics.Late([lambda *row: rows.append(row)], portion=3)
  written = []
  for step in range(8):
    late.write(step, {"step": jnp.asarray(step)})
    written.append(len(rows))
  # Nothing that is younger than a portion.
  assert written == [0, 0, 0, 0, 0, 3, 3, 3]
  late.close()
  assert rows == [(step, {"step": step}) for step in range(8)]
  assert type(rows[0][1]["step"]) is int


def test_a_run_that_is_interrupted_leaves_all_steps(tmp_path, monkeypatch):
  def interrupted(steps, title):
    yield from steps[:7]
    raise KeyboardInterrupt

  monkeypatch.setattr(logging_metrics, "progress", interrupted)
  with pytest.raises(KeyboardInterrupt):
    logging_metrics.main(["--portion=3", f"--out={tmp_path}"])
  with (tmp_path / "metrics.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
  assert [row["step"] for row in rows] == list("1234567")
  assert np.isfinite([float(row["loss"]) for row in rows]).all()


@pytest.fixture
def error(capsys):
  """Runs what must end at a bad flag; returns the last line of stderr."""

  def run(*arguments):
    with pytest.raises(SystemExit) as caught:
      logging_metrics.main(arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    return err.splitlines()[-1]

  return run


@pytest.mark.parametrize(
  ("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")]
)
def test_a_package_that_is_missing_is_named(name, package, monkeypatch, error):
  monkeypatch.setitem(logging_metrics.PACKAGES, name, f"no_{package}")
  last = error("--to", f"csv,{name}")
  assert f"--to: {name} needs `pip install no_{package}`" in last


def test_packages_are_what_is_imported():
  source = Path(logging_metrics.__file__).read_text()
  for package in logging_metrics.PACKAGES.values():
    assert re.search(rf"^ *import {package}$", source, re.MULTILINE)


@pytest.mark.parametrize(
  ("flag", "value", "part"),
  [
    ("--to", "csv,excel", "unknown 'excel', choose from csv, tensorboard, wandb"),
    ("--portion", "0", "0 is not at least 1"),
    ("--max-norm", "nan", "nan is not at least 0"),
  ],
)
def test_a_bad_flag_is_named_with_its_value(flag, value, part, error):
  assert f"{flag}: {part}" in error(f"{flag}={value}")


def test_a_folder_that_cannot_be_made_is_named(tmp_path, error):
  (tmp_path / "file").touch()
  assert f"--out: {tmp_path / 'file'}: " in error("--out", str(tmp_path / "file"))
