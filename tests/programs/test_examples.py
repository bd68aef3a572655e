"""The language model as its user meets it: flags, files, table, words, errors."""

import csv
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
import qk_clip
from rich.console import Console

from examples.language_model import _clips
from examples.language_model import _flags
from examples.language_model import _outcome
from examples.language_model import _text
from examples.language_model import train as language_model
import optax_clip

# Flax promotes ranks implicitly.
pytestmark = [pytest.mark.foreign, pytest.mark.programs]

TINY = ("--steps", "3", "--width", "16", "--layers", "1")


load_text = _text.load


@pytest.fixture(scope="module", autouse=True)
def quick():
  """Compiles fast, not well; reads the text once."""
  text = load_text()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(_text, "load", lambda: text)
    patch.setattr(language_model, "HELD_OUT_BATCHES", 1)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def run(out, *flags):
  """Runs the script; returns the rows of its CSV."""
  language_model.main([*TINY, "--out", str(out), *flags])
  assert (out / "steps.png").read_bytes().startswith(b"\x89PNG")
  with (out / "steps.csv").open() as file:
    return list(csv.DictReader(file))


def test_each_run_leaves_a_row_a_step_and_is_in_the_table(tmp_path, capsys):
  names = ["none", "global", "layer", "agc", "value", "layer-percentile"]
  rows = run(tmp_path, "--clip", ",".join(names))
  assert [row["run"] for row in rows] == [name for name in names for _ in range(3)]
  assert list(rows[0]) == ["run", "step", *_outcome.FIELDS]
  for number, row in enumerate(rows):
    assert row["step"] == str(number % 3 + 1)
    assert all(math.isfinite(float(row[f])) for f in _outcome.FIELDS if f != "limit")
    assert math.isinf(float(row["limit"])) == (row["run"] == "none")
  # The same weights, the same first batch.
  assert len({row["loss"] for row in rows if row["step"] == "1"}) == 1

  printed = capsys.readouterr().out
  table = printed[printed.index("method") :].partition("Wrote")[0]
  for name in names:
    assert re.search(rf"^ *{name} +\d", table, re.MULTILINE)
  assert max(map(len, printed.partition("Wrote")[0].splitlines())) <= 80


@pytest.mark.parametrize("name", _clips.METHODS)
def test_every_method_clips_and_records_what_the_script_reads(name, tmp_path):
  # Without the model, which takes seconds to compile for each method.
  method = _clips.METHODS[name]
  flags = _flags.parse([f"--clip={name}", f"--out={tmp_path}"])
  tx = _clips.transformation(method, flags)
  params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
  state = tx.init(params)
  update = jax.jit(tx.update)
  # All have learned by now, when the spike comes.
  for size in (*(1 + step % 7 for step in range(130)), 10_000):
    grads = jax.tree.map(lambda p, size=size: 0.01 * size * p, params)
    updates, state = update(grads, state, params)
  seen = _clips.recorded(method, state)
  assert set(_outcome.FIELDS) - {"loss"} <= set(seen)
  assert seen["norm"] > 1
  # The figure shows both.
  assert jnp.isfinite(seen["limit"]) or name == "none"
  assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))


def test_a_table_of_the_widest_numbers_fits_80_columns(capsys):
  step = dict.fromkeys(_outcome.FIELDS, 1.0) | {"loss": math.nan, "norm": 2.76e10}
  step["limit"] = 0.000123
  step["coefficient"] = 1.2e-10
  step["steps_skipped"] = 0
  wide = _outcome.Run("layer-percentile", "norm", [step], math.nan)
  Console().print(_outcome.table([wide]))
  printed = capsys.readouterr().out
  assert max(map(len, printed.splitlines())) <= 80
  for cell in ("layer-percentile", "diverged", "2.8e+10", "0.00012"):
    assert cell in printed


def test_broken_batches_are_skipped_and_the_words_say_so(tmp_path, capsys):
  rows = run(tmp_path, "--clip=global", "--steps=5", "--broken-every=2")
  assert [row["steps_skipped"] for row in rows] == ["0", "1", "1", "2", "2"]
  assert [math.isfinite(float(row["loss"])) for row in rows] == [
    *(True, False, True, False, True)
  ]
  # What is broken changes nothing: the step after it goes on from the same weights.
  assert float(rows[4]["loss"]) < float(rows[0]["loss"])
  said = " ".join(capsys.readouterr().out.split())
  assert "'global' ended at " in said
  assert "2 batches were broken on purpose" in said
  assert "tx = optax_clip.skip_nonfinite( optax.chain( optax_clip.clip_by_" in said


@pytest.mark.parametrize("name", [name for name in _clips.METHODS if name != "none"])
def test_the_call_to_copy_makes_the_clip_that_was_used(name, tmp_path):
  flags = _flags.parse([f"--clip={name}", "--optimizer=adamw", f"--out={tmp_path}"])
  code = _clips.code(name, flags)
  assert max(map(len, code.splitlines())) <= 80
  parts = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(optax, "chain", lambda *own: parts.extend(own) or optax.identity())
    exec(code, {"optax": optax, "optax_clip": optax_clip})
  method = _clips.METHODS[name]
  # The chain that `optax.adamw` is of is among the parts, too.
  clip = repr(method.build(_clips.setting(method, flags)))
  assert [repr(tx) for tx in parts].count(clip) == 1


def test_the_call_to_copy_is_that_of_the_best_run():
  step = dict.fromkeys(_outcome.FIELDS, 1.0)
  worse, best, dead = (
    _outcome.Run(name, "norm", [step], loss)
    for name, loss in (("a", 2.0), ("b", 1.0), ("c", math.nan))
  )
  assert _outcome.best([worse, best, dead]) is best
  assert _outcome.best([dead]) is None
  assert "'b' ended at 1.000" in _outcome.seen([worse, best, dead], 0)
  assert "'c' diverged" in _outcome.seen([worse, best, dead], 0)
  assert "Every run diverged" in _outcome.seen([dead], 0)


def test_thresholds_reach_their_methods(tmp_path):
  rows = run(
    tmp_path,
    *("--clip", "none,layer,global"),
    *("--max-layer-norm", "inf", "--max-norm", "0.001"),
  )
  none, layer, clipped = rows[:3], rows[3:6], rows[6:]
  for row, same in zip(none, layer, strict=True):  # Nothing exceeds inf.
    assert float(row["loss"]) == pytest.approx(float(same["loss"]), rel=1e-5)
  for row in clipped:
    assert float(row["clipped_fraction"]) == 1
    expected = 0.001 / float(row["norm"])
    assert float(row["coefficient"]) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def full_precision(tmp_path_factory):
  return run(tmp_path_factory.mktemp("full"), "--clip", "global", "--lr", "1e-3")


@pytest.mark.parametrize(
  ("precision", "optimizer"), [("--bf16", "adamw"), ("--fp16", "lion")]
)
def test_low_precision_gradients_train_float32_weights(
  tmp_path, full_precision, precision, optimizer
):
  rows = run(
    tmp_path,
    precision,
    "--optimizer",
    optimizer,
    "--clip",
    "global",
    *("--lr", "1e-3"),
  )
  # The first norm is of the same weights; bfloat16 has 8 bits.
  low, exact = (float(run[0]["norm"]) for run in (rows, full_precision))
  assert low != exact
  assert low == pytest.approx(exact, rel=0.02)
  assert all(math.isfinite(float(row["norm"])) for row in rows)
  assert float(rows[2]["loss"]) < float(rows[0]["loss"])


def test_a_run_that_diverges_is_reported(tmp_path, capsys):
  rows = run(tmp_path, "--clip", "none", "--lr", "1e30")
  assert not math.isfinite(float(rows[2]["loss"]))
  assert "diverged" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("flag", "value", "part"),
  [
    ("--clip", "none,globl", "unknown method 'globl'"),
    ("--clip", "", "unknown method ''"),
    ("--clip", "global,global", "'global' is named twice"),
    ("--max-norm", "-1", "'-1' is not a number of at least 0"),
    ("--max-norm", "nan", "'nan' is not a number of at least 0"),
    ("--max-norm", "one", "'one' is not a number of at least 0"),
    ("--max-layer-norm", "-0.5", "'-0.5' is not a number"),
    ("--max-rms", "x", "'x' is not a number"),
    ("--max-ratio", "-2", "'-2' is not a number"),
    ("--max-value", "", "'' is not a number"),
    ("--percentile", "101", "between 0 and 100, got 101.0"),
    ("--max-norm-decay", "1", "decay_max must be at least 0 and below 1, got 1.0"),
    ("--lr", "0", "'0' is not a positive number"),
    ("--lr", "inf", "'inf' is not a positive number"),
    ("--steps", "0", "'0' is not a whole number of at least 1"),
    ("--steps", "2.5", "'2.5' is not a whole number"),
    ("--width", "50", "'50' is not a positive multiple of 16"),
    ("--layers", "0", "'0' is not a whole number"),
    ("--seed", "-1", "'-1' is not a whole number of at least 0"),
    ("--optimizer", "adam", "'adam'"),
  ],
)
def test_a_bad_flag_is_one_line(one_line_error, flag, value, part):
  err = one_line_error(language_model.main, [f"{flag}={value}"])
  assert f"argument {flag}: " in err
  assert part in err


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, one_line_error):
  (tmp_path / "file").touch()
  err = one_line_error(language_model.main, ["--out", str(tmp_path / "file")])
  assert "--out" in err
  assert str(tmp_path / "file") in err


def test_the_two_precisions_exclude_each_other(capsys):
  with pytest.raises(SystemExit):
    language_model.main(["--bf16", "--fp16"])
  assert capsys.readouterr().err.count("\n") == 1


def test_text_is_split_within_each_file(tmp_path):
  for name in "ab":
    (tmp_path / f"{name}.py").write_text(name * 1_000_000)
  text = load_text(tmp_path)
  assert (np.bincount(text.train)[[97, 98]] == 900_000).all()
  assert (np.bincount(text.held_out)[[97, 98]] == 100_000).all()


def test_no_text_is_an_error_that_names_the_place(tmp_path):
  with pytest.raises(FileNotFoundError, match=str(tmp_path)):
    load_text(tmp_path)


def test_qk_clip_bounds_the_logits_that_it_prints(capsys):
  seen = qk_clip.main(["--steps", "40", "--lr", "0.1", "--tau", "8"])
  free, bound = seen["free"], seen["bound"]
  assert len(free) == len(bound) == 40
  assert free[0] == bound[0]
  # Measured: 138 and 13.
  assert max(free) > 40
  assert max(bound) < 16
  assert all(2 < loss < 5 for loss in seen["losses"])
  printed = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in printed[2:-1]] == [
    *("1", "7", "14", "20", "27", "33", "40")
  ]
  assert f"came to {max(free):.0f} without a bound" in printed[-1]
  assert f"to {max(bound):.0f} with tau = 8," in printed[-1]


def test_qk_clip_runs_where_it_was_copied_to(tmp_path):
  shutil.copy(qk_clip.__file__, tmp_path)
  package = pathlib.Path(optax_clip.__file__).parents[1]
  done = subprocess.run(
    [sys.executable, "qk_clip.py", "--steps", "2"],
    cwd=tmp_path,
    env={**os.environ, "PYTHONPATH": str(package)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert "In 2 steps of Adam" in done.stdout
  assert [path.name for path in tmp_path.iterdir()] == ["qk_clip.py"]


@pytest.mark.parametrize(
  ("flag", "value", "part"),
  [
    ("--tau", "0", "0.0 is not positive"),
    ("--lr", "nan", "nan is not positive"),
    ("--steps", "-1", "-1 is not positive"),
    ("--seed", "-1", "-1 is negative"),
  ],
)
def test_a_bad_flag_of_qk_clip_is_named(flag, value, part, capsys):
  with pytest.raises(SystemExit):
    qk_clip.main([f"{flag}={value}"])
  assert f"argument {flag}: {part}" in capsys.readouterr().err
