"""The command of the package: what it reads, what it prints, what it refuses."""

import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import optax_clip
from optax_clip.__main__ import main
from optax_clip._report import command
from optax_clip._report import drawing
from optax_clip._report import events
from optax_clip._report import logs

# Optax promotes dtypes and ranks implicitly.
pytestmark = pytest.mark.foreign


def history(steps=300):
  """Log-normal norms with two spikes; exact in float32, as logs have few digits."""
  random = np.random.default_rng(0)
  norms = np.exp(0.3 * random.normal(size=steps)).round(3)
  norms[[steps // 3, steps // 2]] = 40.0, 75.0
  return norms


NORMS = history()


def write(path, text, encoding="utf-8"):
  path.write_text(text, encoding=encoding)
  return str(path)


def write_csv(path, norms=NORMS, *, name="grad_norm", separator=","):
  rows = [separator.join(("step", name, "loss"))]
  rows += [separator.join((str(i), f"{x}", "0.5")) for i, x in enumerate(norms)]
  return write(path, "\n".join(rows) + "\n")


@pytest.fixture
def log(tmp_path):
  return write_csv(tmp_path / "run.csv")


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")


# --- Reading --------------------------------------------------------------------


def json_lines(path):
  return write(
    path,
    "".join(
      json.dumps({"grad": {"norm": x}, "step": i}) + "\n" for i, x in enumerate(NORMS)
    ),
  )


def one_column(path):
  np.savetxt(path, NORMS, fmt="%.3f")
  return str(path)


def again(path, encoding="utf-8", newline="\n"):
  """The same file with other bytes."""
  write_csv(path)
  path.write_text(path.read_text(), encoding=encoding, newline=newline)
  return str(path)


FORMATS = {
  "csv": lambda p: write_csv(p / "a.csv"),
  "tsv": lambda p: write_csv(p / "a.tsv", separator="\t"),
  "semicolons": lambda p: write_csv(p / "a.txt", separator=";"),
  "json lines": lambda p: json_lines(p / "a.jsonl"),
  "one bare column": lambda p: one_column(p / "a.txt"),
  "with a mark of the byte order": lambda p: again(p / "a.csv", encoding="utf-8-sig"),
  "of Windows": lambda p: again(p / "a.csv", newline="\r\n"),
  "quoted": lambda p: write(
    p / "a.csv", 'note,"grad_norm"\n' + "".join(f'"a, b","{x}"\n' for x in NORMS)
  ),
}


@pytest.mark.parametrize("form", FORMATS)
def test_it_reads_what_was_written(form, tmp_path):
  read = logs.read(FORMATS[form](tmp_path))
  np.testing.assert_array_equal(read.norms, NORMS)
  assert read.column in ("grad_norm", "grad/norm", "1")


@pytest.mark.parametrize("folder", [True, False])
def test_it_reads_what_tensorboard_reads(tmp_path, folder):
  from tensorboardX import SummaryWriter

  with SummaryWriter(str(tmp_path)) as writer:
    writer.add_histogram("weights", NORMS, 0)
    writer.add_text("note", "no scalar")
    for i, norm in enumerate(NORMS):
      writer.add_scalar("train/grad_norm", norm, i)
      writer.add_scalar("loss", 0.5, i)
  (file,) = tmp_path.iterdir()
  read = logs.read(str(tmp_path if folder else file))
  assert read.column == "train/grad_norm"
  np.testing.assert_array_equal(read.norms, NORMS.astype(np.float32))
  assert events.tags(file) == ["train/grad_norm", "loss"]


def event(step, **scalars):
  """An event as TensorFlow 2 writes it: scalars are tensors."""
  from tensorboardX.proto import event_pb2

  made = event_pb2.Event(step=step)
  for tag, (dtype, field, value) in scalars.items():
    entry = made.summary.value.add(tag=tag)
    entry.tensor.dtype = dtype
    if field == "tensor_content":
      entry.tensor.tensor_content = value
    else:
      getattr(entry.tensor, field).extend(np.atleast_1d(value).tolist())
    if np.size(value) > 1:
      entry.tensor.tensor_shape.dim.add(size=np.size(value))
  return made.SerializeToString()


def write_events(path, made):
  from tensorboardX.record_writer import RecordWriter

  writer = RecordWriter(str(path))
  for data in made:
    writer.write(data)
  writer.close()
  return path


FLOAT, DOUBLE, STRING = 1, 2, 7


def test_it_reads_the_tensors_of_tensorflow(tmp_path):
  path = write_events(
    tmp_path / "events.out.tfevents.1",
    [
      event(0, norm=(FLOAT, "float_val", 1.5)),
      event(1, norm=(FLOAT, "tensor_content", np.float32(2.5).tobytes())),
      event(2, norm=(DOUBLE, "double_val", 3.1)),
      event(3, norm=(DOUBLE, "tensor_content", np.float64(4.1).tobytes())),
      event(4, vector=(FLOAT, "float_val", [1.0, 2.0])),
      event(5, note=(STRING, "tensor_content", b"norm")),
      event(-1, norm=(FLOAT, "float_val", 0.5)),
    ],
  )
  found = [(-1, 0.5), (0, 1.5), (1, 2.5), (2, 3.1), (3, 4.1)]
  assert events.history(path, "norm") == found
  assert events.tags(path) == ["norm"]


def test_a_run_that_was_resumed_is_one_history(tmp_path):
  for number, (first, last, value) in enumerate([(0, 6, 1.0), (4, 8, 2.0)]):
    write_events(
      tmp_path / f"events.out.tfevents.{number}",
      [event(i, norm=(FLOAT, "float_val", value)) for i in range(first, last)],
    )
  read = logs.read(str(tmp_path))
  np.testing.assert_array_equal(read.norms, [1, 1, 1, 1, 2, 2, 2, 2])


def test_a_file_that_is_being_written_ends_anywhere(tmp_path):
  made = [event(i, norm=(FLOAT, "float_val", float(i))) for i in range(4)]
  path = write_events(tmp_path / "events.out.tfevents.1", made)
  whole = path.read_bytes()
  last = 16 + len(made[-1])
  for cut in range(1, last + 1):
    path.write_bytes(whole[:-cut])
    assert events.history(path, "norm") == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_no_damaged_byte_changes_a_number(tmp_path):
  made = [event(i, norm=(FLOAT, "float_val", i + 1.5)) for i in range(2)]
  path = write_events(tmp_path / "events.out.tfevents.1", made)
  whole = path.read_bytes()
  missed = []
  for place in range(16 + len(made[0])):
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :])
    try:
      missed.append(events.history(path, "norm"))
    except events.Corrupt as error:
      said = str(error)
    else:
      continue
    assert "at byte 0" in said
  # What is no scalar any more is not looked at: the other event is still there.
  assert len(missed) < 10
  assert all(found == [(1, 2.5)] for found in missed)


def test_what_is_no_number_is_a_step_that_is_nan(tmp_path):
  cells = ["1.5", "", "nan", "NaN", " None ", "n/a", "inf", "0", "2"]
  path = write(tmp_path / "a.csv", "x,grad_norm\n" + "".join(f"0,{c}\n" for c in cells))
  nan = math.nan
  read = logs.read(path)
  np.testing.assert_array_equal(read.norms, [1.5, *[nan] * 5, math.inf, 0, 2])
  assert "3 of 9 cells empty: NaN here" in read.notes[-1]
  read = logs.read(path, skip_empty=True)
  np.testing.assert_array_equal(read.norms, [1.5, nan, nan, math.inf, 0, 2])
  assert "3 of 9 cells empty: left out" in read.notes[-1]


def test_json_lines_without_the_key_are_no_steps(tmp_path):
  rows = [{"norm": 1.0}, {"eval_loss": 2.0}, {"norm": None}, {"norm": "NaN"}]
  path = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, rows)))
  read = logs.read(path, "norm")
  np.testing.assert_array_equal(read.norms, [1.0, math.nan, math.nan])
  assert "left out 1 lines without this key" in read.notes


@pytest.mark.parametrize(
  ("name", "text"),
  [("a.csv", "step,norm\n0,1\n1,2\n2"), ("a.jsonl", '{"norm": 1}\n{"norm": 2}\n{"nor')],
)
def test_a_line_that_is_being_written_is_left_out(tmp_path, name, text):
  read = logs.read(write(tmp_path / name, text), "norm")
  np.testing.assert_array_equal(read.norms, [1, 2])
  assert "the last line" in read.notes[-1]


# --- The column -----------------------------------------------------------------


@pytest.mark.parametrize(
  "name",
  [
    *("grad_norm", "gradient_norm", "grad/norm", "norm", "global_norm", "gnorm"),
    *(
      "Train/Grad Norm",
      "clip_by_global_norm/norm",
      "observe/norm",
      "grads-global-norm",
    ),
    *("optim/total_grad_norm", "global_grad_norm", "grad_norm_total", "grad_2.0_norm"),
  ],
)
def test_names_of_gradient_norms_are_taken(tmp_path, name):
  read = logs.read(write_csv(tmp_path / "a.csv", [1.0, 2.0], name=name))
  assert read.column == name
  assert repr(name) in read.notes[0]


@pytest.mark.parametrize(
  "name",
  [
    *("weight_norm", "param/norm", "batch_norm", "layernorm", "update_norm", "normal"),
    *("grad_norm/layer1", "norm_of_grad", "abnorm", "gradual"),
  ],
)
def test_names_of_others_are_not(tmp_path, name, one_line_error):
  err = one_line_error(main, ["suggest", write_csv(tmp_path / "a.csv", name=name)])
  assert "no column looks like the norm of the gradients" in err
  assert repr(name) in err
  assert "--column" in err


# --- Suggest --------------------------------------------------------------------


def test_it_prints_what_suggest_max_norm_finds(log, capsys):
  main(["suggest", log, "--clipped-share", "0.1"])
  out = capsys.readouterr().out
  assert str(optax_clip.suggest_max_norm(NORMS, 0.1)) in out
  assert out.startswith(f"{log}: 300 steps of grad_norm\n")
  assert max(map(len, out.splitlines()[1:])) <= 80


@pytest.mark.parametrize("width", [30, 40, 79, 80])
def test_the_plot_has_every_norm_in_its_place(width):
  norms = np.array([1.0, 10.0, 100.0, 1000.0, np.nan, 0.0, 1000.0, 1.0])
  plot = drawing.in_terminal(norms, 10.0, width=width, height=7).splitlines()
  assert max(map(len, plot)) <= width
  columns = width - 11
  place = [11 + i * columns // 8 for i in range(8)]
  grid = [line.ljust(width) for line in plot]
  # Seven lines for three decades: one every second line.
  for step, line in ((0, 6), (1, 4), (2, 2), (3, 0), (6, 0), (7, 6)):
    assert grid[line][place[step]] == "."
  assert grid[4][:11] == "       10 +"
  assert set(grid[4][11:]) == {"-", "."}
  assert grid[8].split() == ["not", "finite", "x"]
  assert grid[8][place[4]] == "x"
  assert grid[9].split() == ["zero", "0"]
  assert grid[9][place[5]] == "0"
  assert sum(line.count(".") for line in grid[:7]) == 6
  assert plot[-1].split() == ["0", "step", "7"]


def test_the_plot_shows_how_many_norms_are_in_a_place():
  norms = np.repeat([1.0, 2.0, 4.0, 8.0], [1, 2, 3, 94])
  plot = drawing.in_terminal(norms, 8.0, width=30, height=4).splitlines()
  # 19 columns of 5 or 6 steps: the first has the 1, both 2s and two of the 4s.
  assert [line[11:12] for line in plot[:4]] == ["-", ":", ":", "."]
  assert plot[0][12:] == "#" * 18


def test_a_spike_far_away_does_not_flatten_the_plot():
  norms = np.concatenate([NORMS, [1e30]])
  plot = drawing.in_terminal(norms, 1.5).splitlines()
  assert plot[0].endswith("^")
  used = [i for i, line in enumerate(plot[:14]) if set(line[11:]) & set(".:#")]
  assert len(used) >= 3


@pytest.mark.parametrize("norms", [np.full(100, 3.0), np.full(100, 1e-30)])
def test_equal_norms_have_a_plot(norms):
  plot = drawing.in_terminal(norms, norms[0])
  ink = "".join(line[11:] for line in plot.splitlines())
  assert ink.count(".") + 2 * ink.count(":") == 100
  assert f"{norms[0]:.3g} +" in plot


def test_it_draws_a_png(log, tmp_path, capsys):
  path = tmp_path / "norms.png"
  main(["suggest", log, "--png", str(path)])
  assert path.read_bytes().startswith(b"\x89PNG")
  assert f"wrote {path}" in capsys.readouterr().out


def test_norms_after_a_clip_are_noticed(tmp_path, capsys):
  main(["suggest", write_csv(tmp_path / "a.csv", np.minimum(NORMS, 1.2))])
  share = np.mean(NORMS >= 1.2)
  assert f"{100 * share:.0f}% of the norms equal the largest, 1.2" in (
    capsys.readouterr().out
  )
  for norms in (NORMS, np.full(300, 2.0)):
    main(["suggest", write_csv(tmp_path / "a.csv", norms)])
    assert "equal the largest" not in capsys.readouterr().out


# --- Replay ---------------------------------------------------------------------


def table(out):
  """The rows of the plain table, by method."""
  body = out.partition("---\n")[2].splitlines()
  return {row.split()[0]: row.split()[1:] for row in body if row.count("%")}


def test_it_prints_what_methods_would_have_done(log, capsys):
  methods = ["autoclip:percentile=50,window=200", "clip_by_global_norm:1.25"]
  main(["replay", log, "--column", "grad_norm", *methods])
  out = capsys.readouterr().out
  assert max(map(len, out.splitlines()[1:])) <= 80
  # From the definition: the median of the last 200 norms, this one included.
  medians = [np.median(NORMS[max(0, t - 199) : t + 1]) for t in range(len(NORMS))]
  wanted = {methods[0]: np.array(medians), methods[1]: np.full(len(NORMS), 1.25)}
  assert table(out) == {
    name: [
      f"{limits[-1]:.3g}",
      f"{100 * np.mean(limits < NORMS):.1f}%",
      f"{np.minimum(NORMS, limits).max():.3g}",
    ]
    for name, limits in wanted.items()
  }


def test_without_a_word_it_replays_the_usual_ones(log, capsys):
  main(["replay", log])
  assert tuple(table(capsys.readouterr().out)) == command.USUAL


def test_a_method_in_its_warm_up_has_no_limit(log, capsys):
  main(["replay", log, "zclip:warmup=1000,early_factor=none"])
  assert "none yet     0.0%            75" in capsys.readouterr().out


def test_of_methods_by_layer_it_says_so(log, capsys):
  main(["replay", log, "adagc:ratio=2,warmup=10,warmup_norm=none"])
  assert "right for the norms of one" in capsys.readouterr().out
  main(["replay", log, "zclip"])
  assert "right for the norms of one" not in capsys.readouterr().out


def test_steps_that_are_not_finite_are_no_clipped_ones(tmp_path, capsys):
  path = write_csv(tmp_path / "a.csv", [1.0, 4.0, math.nan, math.inf, 2.0])
  main(["replay", path, "clip_by_global_norm:3"])
  assert table(capsys.readouterr().out) == {
    "clip_by_global_norm:3": ["3", "33.3%", "3"]
  }


def test_a_long_method_has_a_line_of_its_own(log, capsys):
  text = "zclip:z_threshold=2.5,decay=0.97,warmup=25,max_norm=1,mode=mean"
  main(["replay", log, text])
  lines = capsys.readouterr().out.splitlines()
  assert text in lines
  assert max(map(len, lines[1:])) <= 80


@pytest.mark.parametrize("name", command.METHODS)
def test_every_method_can_be_replayed(name, log, capsys):
  main(["replay", log, f"{name}:1.5"])
  assert f"{name}:1.5" in table(capsys.readouterr().out)


def test_in_a_terminal_rich_draws_the_table(log, capsys, monkeypatch):
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
  main(["replay", log, "autoclip"])
  fancy = capsys.readouterr().out
  assert "───" in fancy
  monkeypatch.setitem(sys.modules, "rich", None)
  main(["replay", log, "autoclip"])
  plain = capsys.readouterr().out
  assert "-----" in plain
  assert "───" not in plain
  for out in (re.sub("\x1b[^m]*m", "", fancy), plain):
    assert max(map(len, out.splitlines()[1:])) <= 80


# --- Errors ---------------------------------------------------------------------

JSON = '{"grad_norm": 1}\n'
ERRORS = {
  "no file": (None, [], ["there is no such file or folder"]),
  "empty": ("", [], ["is empty"]),
  "no rows": ("step,grad_norm\n", [], ["'grad_norm' has no number"]),
  "no column": (
    "step,grad_norm\n0,1\n",
    ["--column", "grad_nrom"],
    ["has no column 'grad_nrom'. Did you mean 'grad_norm'?", "'grad_norm', 'step'"],
  ),
  "two columns": (
    "a/norm,b/norm,loss\n1,2,3\n",
    [],
    ["2 columns look like", "--column", "'a/norm', 'b/norm'."],
  ),
  "a name twice": ("norm,norm\n1,2\n", ["--column", "norm"], ["2 columns of the name"]),
  "a word": (
    "step,grad_norm\n0,1\n1,oops\n",
    [],
    ["line 3, column 'grad_norm': 'oops' is no number"],
  ),
  "a word in JSON": (
    f'{JSON}\n{{"grad_norm": [1]}}\n',
    [],
    ["line 3", "[1] is no num"],
  ),
  "a truth": (f'{JSON}{{"grad_norm": true}}\n', [], ["line 2", "True is no number"]),
  "a negative one": ("step,grad_norm\n0,-1\n", [], ["line 2", "-1 is negative"]),
  "a long row": ("step,norm\n0,1\n0,1,2\n", [], ["line 3 has 3 cells", "has 2"]),
  "a short row": ("step,norm\n0,1\n0\n0,1\n", [], ["line 3 has 1 cells", "has 2"]),
  "no JSON": (f"{JSON}{{oops\n{JSON}", [], ["line 2 is no JSON"]),
  "a list": (f"{JSON}[1, 2]\n", [], ["line 2 is no JSON object"]),
  "too few": ("step,norm\n" + "0,1\n" * 20, [], ["norms has 20", "100 are needed"]),
  "zeros": ("step,norm\n" + "0,0\n" * 200, [], ["'norm' as norms is zero"]),
  "NaNs": ("step,norm\n" + "0,\n" * 200, [], ["200 of 200", "NaN"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_bad_log_is_one_line(case, tmp_path, one_line_error):
  text, flags, parts = ERRORS[case]
  path = tmp_path / "run.log"
  if text is not None:
    path.write_text(text)
  err = one_line_error(main, ["suggest", str(path), *flags])
  assert f"{path}: " in err
  for part in parts:
    assert part in err


@pytest.mark.parametrize(
  ("method", "parts"),
  [
    ("clip", ["unknown method 'clip'", *command.METHODS]),
    ("autoclip:percentil=5", ["no 'percentil'", "percentile, window"]),
    ("autoclip:nonfinite=zero", ["no 'nonfinite'"]),
    ("autoclip:percentile=x", ["percentile must be a number, got 'x'"]),
    ("autoclip:percentile=101", ["percentile", "101"]),
    ("autoclip:window=1.5", ["window must be a Python integer", "1.5"]),
    ("autoclip:5,7", ["'7' has no '='"]),
    ("autoclip:5,percentile=5", ["'percentile' is given twice"]),
    ("clip_by_global_norm", ["write clip_by_global_norm:max_norm=1.0"]),
    ("zclip:mode=no", ["mode must be one of", "'no'"]),
  ],
)
def test_a_bad_method_is_one_line(method, parts, log, one_line_error):
  err = one_line_error(main, ["replay", log, "autoclip", method])
  for part in parts:
    assert part in err


@pytest.mark.parametrize(
  ("flags", "part"),
  [
    (["--clipped-share", "1"], "'1' is no number of at least 0 and below 1"),
    (["--clipped-share", "x"], "'x' is no number"),
    (["--clipped-share", "0.001"], "1000 are needed for clipped_share=0.001"),
    (["--colour", "norm"], "--colour"),
    (["autoclip"], "autoclip"),
    (["--png", "missing/folder.png"], "--png missing/folder.png: cannot be written"),
  ],
)
def test_a_bad_flag_is_one_line(
  flags, part, log, one_line_error, monkeypatch, tmp_path
):
  monkeypatch.chdir(tmp_path)
  assert part in one_line_error(main, ["suggest", log, *flags])


def test_without_matplotlib_it_says_what_to_install(log, one_line_error, monkeypatch):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  err = one_line_error(main, ["suggest", log, "--png", "a.png"])
  assert "pip install matplotlib" in err


def test_a_file_that_is_no_log_is_one_line(tmp_path, one_line_error):
  np.save(tmp_path / "a.npy", np.linspace(0, 1, 300))
  err = one_line_error(main, ["suggest", str(tmp_path / "a.npy")])
  assert "neither text in UTF-8 nor a file of TensorBoard's events" in err


def test_a_folder_without_events_names_the_runs_in_it(tmp_path, one_line_error):
  for run in ("a", "b"):
    (tmp_path / "logs" / run).mkdir(parents=True)
    (tmp_path / "logs" / run / "events.out.tfevents.1").touch()
  err = one_line_error(main, ["suggest", str(tmp_path / "logs")])
  assert "has no file of TensorBoard's events. Runs in it: 'a', 'b'." in err


@pytest.mark.programs
def test_it_is_a_program(log):
  """On the CPU, whatever JAX would take, and without a warning."""
  environment = {**os.environ, "JAX_PLATFORMS": "there_is_none", "COLUMNS": "80"}
  run = [sys.executable, "-W", "error", "-m", "optax_clip"]
  done = subprocess.run(
    [*run, "suggest", log], capture_output=True, text=True, env=environment, timeout=300
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert str(optax_clip.suggest_max_norm(NORMS)) in done.stdout
  done = subprocess.run(
    [*run, "replay", log, "no"],
    capture_output=True,
    text=True,
    env=environment,
    timeout=300,
  )
  assert done.returncode == 2
  assert not done.stdout
  assert done.stderr.count("\n") == 1
