"""Training that is killed at any moment and resumed ends with the same bits."""

import itertools
import os
import pathlib
import random
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("rich")
import orbax.checkpoint as ocp

from examples.language_model import _flags
from examples.language_model import _text
from examples.language_model import train as language_model
from examples.language_model.checkpoints import Checkpoints

# Flax promotes ranks implicitly.
pytestmark = [pytest.mark.foreign, pytest.mark.programs]

ROOT = pathlib.Path(__file__).parents[2]
EVERY = 5
TINY = ("--width", "16", "--layers", "1", "--checkpoint-every", str(EVERY))


class Runs:
  """Starts the script in a folder, in an environment without this process's flags."""

  def __init__(self, folder, methods, steps):
    self.folder = folder
    self.methods = methods
    self.steps = steps
    # Compiled once, by the run that nobody disturbs.
    self.environment = {
      **{k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))},
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

  def start(self, name, *flags):
    out = self.folder / name
    return subprocess.Popen(
      [
        *(sys.executable, "-m", "examples.language_model", *TINY),
        *("--clip", ",".join(self.methods), "--steps", str(self.steps)),
        *("--out", out, "--checkpoint", out, *flags),
      ],
      cwd=ROOT,
      env=self.environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def finish(self, name, *flags):
    process = self.start(name, *flags)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed

  def kill(self, name, moment, lines, delay):
    """Kills a resumed run; returns how many steps of all runs were recorded.

    The moment is so many seconds after the start, but not after so many steps were
    recorded; or after they were; or after that when a checkpoint is being written.
    """
    left = self.writing(name)
    lines = max(lines, self.recorded(name) + 1)
    process = self.start(name, "--resume")
    try:
      late = time.monotonic() + delay
      while process.poll() is None:
        reached = self.recorded(name) >= lines
        if moment == "start" and (reached or time.monotonic() > late):
          break
        if reached and (moment == "step" or self.writing(name) - left):
          time.sleep(delay)
          break
        time.sleep(0.0005)
    finally:
      process.kill()
      printed, _ = process.communicate()
    assert process.returncode == -9, printed
    return self.recorded(name)

  def recorded(self, name):
    return sum(
      max(path.read_bytes().count(b"\n") - 1, 0)
      for path in (self.folder / name).glob("*/steps.csv")
    )

  def writing(self, name):
    return set((self.folder / name).glob("*/states/*tmp*"))

  def results(self, name):
    """All that a run leaves, as bytes: checkpoints and measurements."""
    folder = self.folder / name
    found = {"csv": (folder / "steps.csv").read_bytes()}
    for method in self.methods:
      found[method, "csv"] = (folder / method / "steps.csv").read_bytes()
      with ocp.CheckpointManager(folder / method / "states") as manager:
        assert manager.latest_step() == self.steps
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        state = manager.restore(self.steps, args=args)["state"]
      for path, x in jax.tree_util.tree_leaves_with_path(state):
        x = np.asarray(x)
        found[method, jax.tree_util.keystr(path)] = (x.dtype, x.shape, x.tobytes())
    return found


def moments(kills, total, duration, rng):
  """Moments that are spread over a run of so many steps and seconds in all.

  Its last third is left for the last of them to come late.
  """
  kinds = list(itertools.islice(itertools.cycle(("start", "step", "write")), kills))
  rng.shuffle(kinds)
  for i, kind in enumerate(kinds):
    first, last = (total * 2 * n // (3 * kills) for n in (i, i + 1))
    lines = rng.randint(first, last)
    # The run that is killed need not compile, and takes half as long or less.
    yield kind, lines, rng.uniform(0, 0.25 * duration if kind == "start" else 0.02)


def check_kills(folder, methods, steps, kills, seed):
  runs, total = Runs(folder, methods, steps), steps * len(methods)
  started = time.perf_counter()
  runs.finish("whole")
  duration = time.perf_counter() - started
  plan = moments(kills, total, duration, random.Random(seed))
  recorded = [runs.kill("killed", *moment) for moment in plan]
  # Not all of them came before the first step or after the last one.
  assert any(0 < n < total for n in recorded)
  printed = runs.finish("killed", "--resume")
  assert "goes on from step" in printed
  whole, killed = runs.results("whole"), runs.results("killed")
  assert whole.keys() == killed.keys()
  assert not [key for key in whole if whole[key] != killed[key]]


def test_three_kills_leave_no_trace(tmp_path):
  check_kills(tmp_path, ["autoclip"], 120, kills=3, seed=0)


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tmp_path):
  check_kills(tmp_path, ["layer-percentile", "stable-spam"], 400, kills=20, seed=1)


def test_a_batch_does_not_depend_on_where_the_run_began():
  text = np.arange(1000) % 256
  whole = list(_text.windows(text, 6, 4, 9, seed=3))
  rest = list(_text.windows(text, 8, 4, 9, seed=3, first=4))
  np.testing.assert_array_equal(whole[4:], rest[:2])
  assert len(rest) == 4


def state_after(step):
  return {"w": jnp.full(3, step, jnp.float32), "count": jnp.int32(step)}


def train(checkpoints, stop, every=2):
  """The loop of the docstring, with a state that counts."""
  step, state = 0, state_after(0)
  if checkpoints.latest is not None:
    step, state, rows = checkpoints.restore(state)
    assert [row["loss"] for row in rows] == [1 / (n + 1) for n in range(step)]
  else:
    checkpoints.begin()
  while step < stop:
    assert state["w"].tolist() == [step] * 3
    checkpoints.record([{"loss": 1 / (step + 1), "seen": step, "limit": np.inf}])
    step += 1
    state = state_after(step)
    if step % every == 0:
      checkpoints.save(step, state)


class TestCheckpoints:
  """The part that readers copy."""

  def test_steps_beyond_the_checkpoint_are_cut_off_and_made_again(self, tmp_path):
    for stop in (3, 7, 8):
      with Checkpoints(tmp_path / "parts", {"seed": 0}) as checkpoints:
        train(checkpoints, stop)
    with Checkpoints(tmp_path / "whole", {"seed": 0}) as checkpoints:
      train(checkpoints, 8)
    parts, whole = (
      (tmp_path / x / "steps.csv").read_text() for x in ("parts", "whole")
    )
    assert parts == whole
    assert whole.splitlines()[:3] == [
      "step,loss,seen,limit",
      "1,1.0,0,inf",
      "2,0.5,1,inf",
    ]

  def test_what_a_killed_process_leaves_half_done_is_passed_over(self, tmp_path):
    with Checkpoints(tmp_path, {}) as checkpoints:
      train(checkpoints, 5)
    states = tmp_path / "states"
    # Of those, the older was being deleted, and the next one written.
    (states / "2" / "_CHECKPOINT_METADATA").unlink()
    (states / "6.orbax-checkpoint-tmp-1" / "state").mkdir(parents=True)
    with Checkpoints(tmp_path, {}) as checkpoints:
      assert (checkpoints.latest, checkpoints.problem) == (4, "")
      train(checkpoints, 8)
    assert Checkpoints(tmp_path, {}).latest == 8
    assert not list(states.glob("*tmp*"))

  def test_looking_changes_nothing(self, tmp_path):
    Checkpoints(tmp_path / "none", {})
    assert not list(tmp_path.iterdir())
    with Checkpoints(tmp_path, {}) as checkpoints:
      train(checkpoints, 3)
    before = sorted((x, x.stat().st_mtime_ns) for x in tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="step 2"):
      Checkpoints(tmp_path, {}).begin()
    assert before == sorted((x, x.stat().st_mtime_ns) for x in tmp_path.rglob("*"))

  def test_another_configuration_is_named(self, tmp_path):
    with Checkpoints(tmp_path, {"seed": 0, "lr": 0.1, "old": 1}) as checkpoints:
      train(checkpoints, 2)
    other = Checkpoints(tmp_path, {"seed": 0, "lr": 0.2, "new": True})
    for part in (
      "lr is 0.1 there and 0.2 here",
      "new is 'not set' there and True here",
      "old is 1 there and 'not set' here",
    ):
      assert part in other.problem
    assert "seed" not in other.problem
    with pytest.raises(ValueError, match=r"lr is 0\.1"):
      other.restore(state_after(0))

  def test_lines_that_are_gone_are_an_error(self, tmp_path):
    with Checkpoints(tmp_path, {}) as checkpoints:
      train(checkpoints, 2)
    (tmp_path / "steps.csv").write_text("step,loss,seen,limit\n")
    assert "lines were removed" in Checkpoints(tmp_path, {}).problem
    (tmp_path / "steps.csv").unlink()
    assert "lines were removed" in Checkpoints(tmp_path, {}).problem

  def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(self, tmp_path):
    with Checkpoints(tmp_path, {}) as checkpoints:
      train(checkpoints, 4)
    damaged = tmp_path / "states" / "4"
    for path in sorted((damaged / "config").iterdir()):
      path.unlink()
    problem = Checkpoints(tmp_path, {}).problem
    assert f"{damaged} is damaged" in problem
    damaged.rename(tmp_path / "aside")
    with Checkpoints(tmp_path, {}) as checkpoints:
      assert (checkpoints.latest, checkpoints.problem) == (2, "")
      train(checkpoints, 4)

  def test_a_step_that_is_not_recorded_is_not_saved(self, tmp_path):
    with Checkpoints(tmp_path, {}) as checkpoints:
      checkpoints.begin()
      with pytest.raises(ValueError, match=r"Step 3.*0 are recorded"):
        checkpoints.save(3, state_after(3))


class TestFlags:
  """What the script says of folders that do not fit."""

  @pytest.fixture
  def error(self, tmp_path, monkeypatch, capsys):
    """The error of a command line; the folder holds step 4 of `global`, seed 0."""
    text = _text.Text(np.arange(1000, dtype=np.uint8), np.arange(99, dtype=np.uint8))
    monkeypatch.setattr(_text, "load", lambda: text)
    command = ["--clip=global", f"--checkpoint={tmp_path}", f"--out={tmp_path}"]
    flags = _flags.parse(command)
    with flags.checkpoints["global"] as checkpoints:
      train(checkpoints, 4)

    def run(*more, command=command):
      with pytest.raises(SystemExit) as caught:
        language_model.main([*command, *more])
      printed = capsys.readouterr().err
      assert caught.value.code == 2
      assert printed.count("\n") == 1
      return printed

    return run

  def test_a_checkpoint_is_not_overwritten(self, error, tmp_path):
    printed = error()
    assert (
      f"--checkpoint: {tmp_path / 'global'} holds a checkpoint of step 4" in printed
    )
    assert "--resume" in printed

  @pytest.mark.parametrize(
    ("flag", "part"),
    [
      ("--seed=1", "seed is 0 there and 1 here"),
      ("--width=32", "width is 64 there and 32 here"),
      ("--max-norm=2", "max-norm is 1.0 there and 2.0 here"),
      ("--optimizer=lion", "optimizer is 'sgd' there and 'lion' here"),
      ("--bf16", "dtype is 'float32' there and 'bfloat16' here"),
    ],
  )
  def test_a_checkpoint_of_another_run_says_what_differs(self, error, flag, part):
    printed = error("--resume", flag)
    assert "argument --resume: " in printed
    assert part in printed

  def test_a_checkpoint_of_another_method_says_so(self, error, tmp_path):
    (tmp_path / "global").rename(tmp_path / "layer")
    printed = error("--resume", "--clip=layer")
    assert "clip is 'global' there and 'layer' here" in printed

  def test_fewer_steps_than_are_done_are_an_error(self, error):
    printed = error("--resume", "--steps=3")
    assert "argument --steps: 3: " in printed
    assert "step 4" in printed

  @pytest.mark.parametrize("flag", ["--resume", "--checkpoint-every=7"])
  def test_flags_that_need_a_folder_say_so(self, error, flag):
    printed = error(flag, command=[])
    assert f"argument {flag.partition('=')[0]}: give --checkpoint DIR" in printed

  def test_a_folder_that_cannot_be_made_is_one_line(self, error, tmp_path):
    (tmp_path / "file").touch()
    printed = error(f"--checkpoint={tmp_path / 'file'}")
    assert f"argument --checkpoint: {tmp_path / 'file' / 'global'}: " in printed
