"""The command of the package: what it prints, what it notes, what it refuses."""

import json
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

pytest.importorskip("uniplot")
pytest.importorskip("tabulate")
import optax_clip
from optax_clip.__main__ import main
from optax_clip._logs import command
from optax_clip._logs import log as logs

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
  path.write_text(text, encoding=encoding, newline="")
  return str(path)


def write_csv(path, norms=NORMS, *, name="grad_norm", steps=None, separator=","):
  steps = range(len(norms)) if steps is None else steps
  rows = [separator.join(("step", name, "loss"))]
  pairs = zip(steps, norms, strict=True)
  rows += [separator.join((str(i), f"{x}", "0.5")) for i, x in pairs]
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
  "of a shell of Windows": lambda p: again(p / "a.csv", "utf-16", "\r\n"),
  "quoted": lambda p: write(
    p / "a.csv", 'note,"grad_norm"\n' + "".join(f'"a, b","{x}"\n' for x in NORMS)
  ),
}


@pytest.mark.parametrize("form", FORMATS)
def test_it_reads_what_was_written(form, tmp_path):
  read = logs.read(FORMATS[form](tmp_path))
  np.testing.assert_array_equal(read.norms, NORMS)
  assert read.column in ("grad_norm", "grad/norm", "1")


class TestEvents:
  """TensorBoard's files, by its own reader."""

  @pytest.fixture(autouse=True)
  def installed(self):
    # It imports what warns of its own age, once.
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

  @pytest.mark.parametrize("folder", [True, False])
  def test_scalars_of_a_writer(self, tmp_path, folder):
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

  def test_tensors_of_tensorflow(self, tmp_path):
    path = write_events(
      tmp_path / "events.out.tfevents.1",
      [
        event(0, norm=(FLOAT, "float_val", 1.5)),
        event(1, norm=(FLOAT, "tensor_content", np.float32(2.5).tobytes())),
        event(2, norm=(DOUBLE, "double_val", 3.1)),
        event(3, norm=(DOUBLE, "tensor_content", np.float64(4.1).tobytes())),
        event(4, vector=(FLOAT, "float_val", [1.0, 2.0])),
        event(5, note=(STRING, "tensor_content", b"norm")),
      ],
    )
    read = logs.read(str(path))
    np.testing.assert_array_equal(read.norms, [1.5, 2.5, 3.1, 4.1])
    np.testing.assert_array_equal(read.steps, [0, 1, 2, 3])

  def test_a_run_that_was_resumed_is_one_history(self, tmp_path):
    for number, (first, last, value) in enumerate([(0, 6, 1.0), (4, 8, 2.0)]):
      write_events(
        tmp_path / f"events.out.tfevents.{number}",
        [event(i, norm=(FLOAT, "float_val", value)) for i in range(first, last)],
      )
    read = logs.read(str(tmp_path))
    np.testing.assert_array_equal(read.norms, [1, 1, 1, 1, 2, 2, 2, 2])

  def test_a_file_that_is_being_written_ends_anywhere(self, tmp_path):
    made = [event(i, norm=(FLOAT, "float_val", float(i + 1))) for i in range(4)]
    path = write_events(tmp_path / "events.out.tfevents.1", made)
    whole = path.read_bytes()
    for cut in (1, 5, len(made[-1]), 15 + len(made[-1])):
      path.write_bytes(whole[:-cut])
      np.testing.assert_array_equal(logs.read(str(path)).norms, [1, 2, 3])

  def test_a_folder_without_events_names_the_runs_in_it(self, tmp_path):
    for run in ("a", "b"):
      (tmp_path / "logs" / run).mkdir(parents=True)
      (tmp_path / "logs" / run / "events.out.tfevents.1").touch()
    with pytest.raises(logs.LogError, match=r"has no file .* Runs in it: 'a', 'b'"):
      logs.read(str(tmp_path / "logs"))


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


def test_a_cell_that_says_nan_is_nan_and_an_empty_one_is_no_step(tmp_path):
  cells = ["1.5", "", "nan", "NaN", " None ", "n/a", "inf", "0", "2"]
  path = write(tmp_path / "a.csv", "x,grad_norm\n" + "".join(f"0,{c}\n" for c in cells))
  read = logs.read(path)
  np.testing.assert_array_equal(read.norms, [1.5, *[math.nan] * 2, math.inf, 0, 2])
  assert "3 of 9 rows have no grad_norm: left out" in read.notes


def test_literals_of_json_that_are_not_finite_are_read(tmp_path):
  rows = '[{"grad_norm": 1.5}, {"grad_norm": NaN}, {"grad_norm": Infinity}, {}]'
  read = logs.read(write(tmp_path / "trainer_state.json", rows))
  np.testing.assert_array_equal(read.norms, [1.5, math.nan, math.inf])


def test_json_lines_without_the_key_are_no_steps(tmp_path):
  rows = [{"norm": 1.0}, {"eval_loss": 2.0}, {"norm": None}, {"norm": "NaN"}]
  path = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, rows)))
  read = logs.read(path, "norm")
  np.testing.assert_array_equal(read.norms, [1.0, math.nan])
  assert "2 of 4 rows have no norm: left out" in read.notes


@pytest.mark.parametrize(
  ("name", "text", "part"),
  [
    ("a.csv", "step,norm\n0,1\n1,2\n2", "1 of 3 rows of another length"),
    ("a.jsonl", '{"norm": 1}\n{"norm": 2}\n{"nor', "1 lines that are not JSON"),
  ],
)
def test_a_line_that_is_being_written_is_left_out(tmp_path, name, text, part):
  read = logs.read(write(tmp_path / name, text), "norm")
  np.testing.assert_array_equal(read.norms, [1, 2])
  assert any(part in note for note in read.notes)


@pytest.mark.parametrize(
  ("cell", "value"),
  [
    ("tensor(3.07, device='cuda:0')", 3.07),
    ("tensor([1.5], grad_fn=<MulBackward0>)", 1.5),
    ("np.float64(0.40)", 0.4),
    ("Array(1.25e-3, dtype=float32)", 1.25e-3),
    ("<tf.Tensor: shape=(), dtype=float32, numpy=2.5>", 2.5),
    ("1,234.5", 1234.5),
    ("[0.5]", 0.5),
  ],
)
def test_a_number_may_be_wrapped(tmp_path, cell, value):
  read = logs.read(write(tmp_path / "a.tsv", f"step\tgrad_norm\n1\t{cell}\n2\t7\n"))
  np.testing.assert_array_equal(read.norms, [value, 7])


# --- The column -----------------------------------------------------------------


@pytest.mark.parametrize(
  "name",
  [
    *("grad_norm", "gradient_norm", "grad/norm", "norm", "global_norm", "gnorm"),
    *("Train/Grad Norm", "clip_by_global_norm/norm", "observe/norm"),
    *("grads-global-norm", "optim/total_grad_norm", "global_grad_norm"),
    *("grad_norm_total", "grad_2.0_norm", "GradNorm", "grad_norm (pre-clip)"),
    *("unclipped_grad_norm", "grad_norm_before_clip", "l2_norm/grad/global"),
    *("train/grad_norm_step", "grad_norm/mean"),
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
    *("grad_norm/layer1", "norm_of_grad", "abnorm", "gradual", "var_gnorm"),
    *("clip_grad_norm", "min_grad_norm", "target_grad_norm", "log_grad_norm"),
    *("prev_grad_norm", "ema_grad_norm", "args/max_grad_norm", "max_grad_norm"),
    *("grad_norm_clip", "gradient_clip_norm", "grad_clip"),
    *("train_cfg.algorithm.max_grad_norm", "grad_norm_threshold", "grad_norm__MAX"),
  ],
)
def test_names_of_others_are_not(tmp_path, name, one_line_error):
  err = one_line_error(main, ["suggest", write_csv(tmp_path / "a.csv", name=name)])
  assert "no column looks like the norm of the gradients" in err
  assert repr(name)[-10:] in err
  assert "--column" in err


@pytest.mark.parametrize(
  ("names", "taken"),
  [
    (("args/max_grad_norm", "train/grad_norm_step"), "train/grad_norm_step"),
    (("grad_norm", "grad_norm_clipped"), "grad_norm"),
    (("learning/grad_norm", "learning/raw_grad_norm"), "learning/raw_grad_norm"),
    (("train/grad_norm_epoch", "train/grad_norm_step"), "train/grad_norm_step"),
    (("grad_norm_avg", "grad_norm"), "grad_norm"),
    (("norm", "grad_norm"), "grad_norm"),
    (("grad_gnorm", "var_gnorm"), "grad_gnorm"),
  ],
)
def test_of_several_the_norm_of_a_step_before_the_clip_is_taken(tmp_path, names, taken):
  rows = "".join(f"{x},{2 * x}\n" for x in (1.0, 2.0, 3.0))
  read = logs.read(write(tmp_path / "a.csv", ",".join(names) + "\n" + rows))
  assert read.column == taken


def test_a_part_of_a_name_names_one_run_of_a_chart(tmp_path, one_line_error):
  names = [f"{run} - train/grad_norm" for run in ("warm-1", "cold-2")]
  names += [f"{name}__MAX" for name in names]
  rows = "".join(f"{i},{1 + i},{2 + i},9,9\n" for i in range(9))
  path = write(tmp_path / "a.csv", ",".join(["Step", *names]) + "\n" + rows)
  assert "2 columns look like" in one_line_error(main, ["suggest", path])
  read = logs.read(path, "cold-2")
  assert read.column == names[1]
  np.testing.assert_array_equal(read.norms, np.arange(9) + 2)


def test_a_constant_is_never_taken_by_itself(tmp_path, one_line_error):
  rows = "".join(f"{i},1.0,{1 + i}\n" for i in range(9))
  path = write(tmp_path / "a.csv", "step,train/grad_norm,b/grad_norm\n" + rows)
  assert logs.read(path).column == "b/grad_norm"
  constant = write_csv(tmp_path / "b.csv", [3.0] * 200)
  assert "'grad_norm' is constant" in one_line_error(main, ["suggest", constant])
  assert len(logs.read(constant, "grad_norm").norms) == 200


# --- Steps and runs -------------------------------------------------------------


def test_the_repeated_steps_of_a_resumed_run_count_once(tmp_path):
  steps = [*range(100), *range(60, 150)]
  norms = [1.0 + i / 1000 for i in range(len(steps))]
  read = logs.read(write_csv(tmp_path / "a.csv", norms, steps=steps))
  np.testing.assert_array_equal(read.steps, range(150))
  np.testing.assert_array_equal(read.norms, [*norms[:60], *norms[100:]])
  assert "40 rows are of steps that come again later: left out" in read.notes


def test_rows_that_are_not_in_order_are_sorted(tmp_path):
  steps = list(range(50, 0, -1))
  read = logs.read(
    write_csv(tmp_path / "a.csv", [float(x) for x in steps], steps=steps)
  )
  np.testing.assert_array_equal(read.norms, range(1, 51))


def test_of_several_runs_in_a_file_one_is_asked_for(tmp_path, one_line_error):
  steps = [*range(120), *range(110), *range(130)]
  path = write_csv(tmp_path / "a.csv", NORMS[np.arange(360) % 300], steps=steps)
  err = one_line_error(main, ["suggest", path])
  assert "has 3 runs, of 120, 110, 130 rows. Name one by --run" in err
  assert len(logs.read(path, run="2").norms) == 110
  err = one_line_error(main, ["suggest", path, "--run", "4"])
  assert "has 3 runs" in err


def test_of_named_runs_one_is_asked_for(tmp_path, one_line_error):
  rows = "".join(
    f"{i},{run},{x + i}\n" for i in range(9) for run, x in (("a", 1), ("b", 5))
  )
  path = write(tmp_path / "a.csv", "step,run,grad_norm\n" + rows)
  assert "has 2 runs" in one_line_error(main, ["replay", path])
  np.testing.assert_array_equal(logs.read(path, run="b").norms, np.arange(9) + 5)
  table = write(tmp_path / "b.csv", "run_id,grad_norm\na,1\nb,2\nc,3\n")
  assert "a table of 3 runs, with one row for each" in one_line_error(
    main, ["suggest", table]
  )


def test_steps_that_begin_again_in_each_epoch_are_one_run(tmp_path):
  rows = "".join(f"{i // 10},{i % 10},{1 + i}\n" for i in range(40))
  read = logs.read(write(tmp_path / "a.csv", "epoch,iter,grad_norm\n" + rows))
  np.testing.assert_array_equal(read.norms, np.arange(40) + 1)
  assert np.all(np.diff(read.steps) > 0)


def test_rounded_steps_are_no_repetitions(tmp_path):
  rows = "".join(f"step: {i // 10}K grad_norm: {1 + i}\n" for i in range(60))
  read = logs.read(write(tmp_path / "a.log", rows))
  np.testing.assert_array_equal(read.norms, np.arange(60) + 1)
  assert any("the step of the row before: kept" in note for note in read.notes)


def test_lines_that_every_process_wrote_count_once(tmp_path):
  rows = "".join(
    f"[rank{r}] step {i} grad_norm {1 + i}\n" for i in range(9) for r in (0, 1)
  )
  read = logs.read(write(tmp_path / "a.log", rows))
  np.testing.assert_array_equal(read.norms, np.arange(9) + 1)


def test_a_change_of_the_interval_is_said_and_evened(tmp_path):
  steps = [*range(100), *range(100, 20_000, 100)]
  norms = NORMS[: len(steps)]
  read = logs.read(write_csv(tmp_path / "a.csv", norms, steps=steps))
  np.testing.assert_array_equal(read.steps, range(0, 20_000, 100))
  assert any("100 rows are closer than 100 steps" in note for note in read.notes)
  assert any("every 100th step is logged" in note for note in read.notes)
  # A method that learns from rows met a jump there, which was none of the run.
  limits = optax_clip.replay_limits(optax_clip.zclip(), read.norms)
  assert np.mean(read.norms > limits) < 0.1


# --- Units ----------------------------------------------------------------------


def test_means_and_units_of_a_loss_scale_are_noted(tmp_path):
  rows = "".join(f"{i},{x * 2e5},65536\n" for i, x in enumerate(NORMS))
  path = write(tmp_path / "a.csv", "step,grad_norm,loss_scale\n" + rows)
  assert any("units of the loss scale, 65536" in x for x in logs.read(path).notes)
  path = write_csv(tmp_path / "b.csv", NORMS * 2e5)
  assert any("units of the loss scale:" in x for x in logs.read(path).notes)
  path = write_csv(tmp_path / "c.csv", name="grad_norm_avg")
  assert any("means over several steps" in x for x in logs.read(path).notes)
  assert len(logs.read(write_csv(tmp_path / "d.csv")).notes) == 1


# --- Suggest --------------------------------------------------------------------


def test_it_prints_what_suggest_max_norm_finds(log, capsys):
  main(["suggest", log, "--clipped-share", "0.1"])
  out = capsys.readouterr().out
  assert str(optax_clip.suggest_max_norm(NORMS, 0.1)) in out
  assert out.startswith(f"{log}: 300 rows of grad_norm, steps 0 to 299\n")
  assert max(map(len, out.splitlines()[1:])) <= 80


@pytest.mark.parametrize("norms", [NORMS, np.full(300, 2.5), np.r_[NORMS, 1e30, 1e-30]])
@pytest.mark.parametrize("width", ["40", "80", "200"])
def test_the_plot_fits_the_terminal(tmp_path, capsys, monkeypatch, norms, width):
  monkeypatch.setenv("COLUMNS", width)
  main(["suggest", write_csv(tmp_path / "a.csv", norms), "--column", "grad_norm"])
  plot = capsys.readouterr().out.rpartition("\n\n")[2].splitlines()
  assert len(plot) in (17, 18)
  assert max(map(len, plot)) <= min(int(width), 80)


def test_the_labels_of_the_plot_are_the_norms_of_their_lines(tmp_path, capsys):
  steps = np.arange(300)
  norms = 0.5 * 3 ** (steps / 299)
  main(["suggest", write_csv(tmp_path / "a.csv", norms.round(4))])
  plot = capsys.readouterr().out.rpartition("\n\n")[2].splitlines()
  labels = [line.rpartition("│")[2] for line in plot[1:15]]
  assert [bool(x) for x in labels] == [i % 3 == 0 for i in range(14)]
  for label, line in zip(labels, plot[1:15], strict=True):
    body = line.partition("│")[2].rpartition("│")[0].replace("─", " ")
    inked = [i for i, x in enumerate(body.replace("▔", " ")) if x != " "]
    if label and inked:
      there = norms[int(np.mean(inked) / len(body) * 299)]
      assert float(label) == pytest.approx(there, rel=0.08)


def test_a_run_without_a_level_gets_no_constant(tmp_path, capsys):
  norms = NORMS * np.geomspace(1, 0.01, 300)
  main(["suggest", write_csv(tmp_path / "a.csv", norms)])
  out = capsys.readouterr().out
  assert "no max_norm fits these norms" in out
  assert "clip_by_history()" in out


CLIPPED = {
  "often": np.minimum(NORMS, 1.2),
  "always": np.full(300, 3.0),
  "always, but for rounding": 40 + 2e-5 * np.random.default_rng(0).normal(size=936),
}


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("verb", ["suggest", "replay"])
def test_norms_after_a_clip_are_noticed(tmp_path, capsys, name, verb):
  norms = CLIPPED[name]
  path = write_csv(tmp_path / "a.csv", norms)
  main([verb, path, "--column", "grad_norm", *["zclip"] * (verb == "replay")])
  share = np.mean(norms >= norms.max() * 0.999)
  assert f"{100 * share:.0f}% of the norms equal the largest" in capsys.readouterr().out


def test_norms_before_a_clip_are_not(log, capsys):
  main(["suggest", log])
  assert "equal the largest" not in capsys.readouterr().out


def test_from_a_clip_a_threshold_is_known_below_it_only(
  tmp_path, capsys, one_line_error
):
  path = write_csv(tmp_path / "a.csv", np.minimum(NORMS, 2.0))
  main(["suggest", path, "--from-clip", "2"])
  out = capsys.readouterr().out
  assert "of the norms were clipped at 2" in out
  assert f"max_norm {np.quantile(np.minimum(NORMS, 2.0), 0.95):.3g}" in out
  path = write_csv(tmp_path / "a.csv", np.minimum(NORMS, 1.2))
  err = one_line_error(main, ["suggest", path, "--from-clip", "1.2"])
  assert "log the norm before the clip" in err
  main(["suggest", write_csv(tmp_path / "a.csv"), "--from-clip", "1.2"])
  assert "from before the clip" in capsys.readouterr().out


# --- Replay ---------------------------------------------------------------------


def table(out):
  """The rows of the plain table, by method."""
  body = out.partition("---\n")[2].splitlines()
  return {row.split()[0]: row.split()[1:] for row in body if "%  " in row}


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
  assert "none yet       0.0%              75" in capsys.readouterr().out


def test_of_methods_by_layer_it_says_so(log, capsys):
  main(["replay", log, "adagc:ratio=2,warmup=10,warmup_norm=none"])
  assert "right for the norms of one" in capsys.readouterr().out
  main(["replay", log, "zclip"])
  assert "right for the norms of one" not in capsys.readouterr().out


def test_steps_that_are_not_finite_are_no_clipped_ones_and_few_are_too_few(
  tmp_path, capsys
):
  path = write_csv(tmp_path / "a.csv", [1.0, 4.0, math.nan, math.inf, 2.0])
  main(["replay", path, "clip_by_global_norm:3"])
  out = capsys.readouterr().out
  assert table(out) == {"clip_by_global_norm:3": ["3", "33.3%", "3"]}
  assert "Too few to judge by: 3 norms" in out


def test_a_long_method_fits(log, capsys):
  text = "zclip:z_threshold=2.5,decay=0.97,warmup=25,max_norm=1,mode=mean"
  main(["replay", log, text])
  assert max(map(len, capsys.readouterr().out.splitlines()[1:])) <= 80


@pytest.mark.parametrize("name", command.METHODS)
def test_every_method_can_be_replayed(name, log, capsys):
  main(["replay", log, f"{name}:1.5"])
  assert f"{name}:1.5" in table(capsys.readouterr().out)


# --- Errors ---------------------------------------------------------------------

JSON = '{"grad_norm": 1}\n'
ERRORS = {
  "no file": (None, [], ["there is no such file or folder"]),
  "empty": ("", [], ["is empty"]),
  "no rows": ("step,grad_norm\n", [], ["no column looks like"]),
  "no column": (
    "step,grad_norm\n0,1\n",
    ["--column", "grad_nrom"],
    ["has no column 'grad_nrom'. Did you mean 'grad_norm'?", "'grad_norm', 'step'"],
  ),
  "two columns": (
    "a/norm,b/norm,loss\n1,2,3\n2,3,4\n",
    [],
    ["2 columns look like", "--column", "'a/norm', 'b/norm'"],
  ),
  "a word": ("step,grad_norm\n0,1\n1,oops\n", [], ["row 2", "'oops' is not a number"]),
  "a word in JSON": (
    f'{JSON}\n{{"grad_norm": 2}}\n{{"grad_norm": [1, 2]}}\n',
    [],
    ["row 3", "'[1, 2]' is not a number"],
  ),
  "a negative one": ("step,grad_norm\n0,-1\n1,2\n", [], ["row 1", "-1 is negative"]),
  "no log": ("once upon a time\n", [], ["seems to be text", "there are none"]),
  "too few": (
    "step,norm\n" + "".join(f"{i},{i}\n" for i in range(1, 21)),
    [],
    ["norms has 20", "100 are needed"],
  ),
  "zeros": (
    "step,norm\n" + "".join(f"{i},0\n" for i in range(200)),
    ["--column", "norm"],
    ["norms is zero at all 200 steps"],
  ),
  "NaNs": (
    "step,norm\n" + "".join(f"{i},{'nan' if i > 50 else i}\n" for i in range(200)),
    [],
    ["149 of 200", "NaN"],
  ),
  "NumPy's bytes": ("\x93NUMPY", [], ["numpy.savetxt"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_bad_log_is_one_line(case, tmp_path, one_line_error):
  text, flags, parts = ERRORS[case]
  path = tmp_path / ("run" * 30) / "run.log"
  path.parent.mkdir()
  if text is not None:
    path.write_text(text, encoding="latin-1")
  err = one_line_error(main, ["suggest", str(path), *flags])
  assert len(err) <= 300
  for part in parts:
    assert part in err


@pytest.mark.parametrize(
  ("method", "parts"),
  [
    ("clip", ["unknown method 'clip'", *command.METHODS]),
    ("autoclip:percentil=5", ["unexpected keyword argument 'percentil'"]),
    ("autoclip:percentile=x", ["percentile must be a number, got 'x'"]),
    ("autoclip:percentile=101", ["percentile", "101"]),
    ("autoclip:window=1.5", ["window must be a Python integer", "1.5"]),
    ("autoclip:5,percentile=5", ["multiple values for argument 'percentile'"]),
    ("clip_by_global_norm", ["missing 1 required positional argument: 'max_norm'"]),
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
    (["--clipped-share", "1"], "clipped_share must be at least 0 and below 1, got 1.0"),
    (["--clipped-share", "x"], "invalid float value: 'x'"),
    (["--clipped-share", "0.001"], "1000 are needed for clipped_share=0.001"),
    (["--from-clip", "0"], "--from-clip 0 is not a number above 0"),
    (["--colour", "norm"], "--colour"),
    (["autoclip"], "suggest takes no method: autoclip"),
  ],
)
def test_a_bad_flag_is_one_line(flags, part, log, one_line_error):
  assert part in one_line_error(main, ["suggest", log, *flags])


def test_flags_of_the_other_command_are_refused(log, one_line_error):
  for flag in ("--clipped-share", "--from-clip"):
    assert "are for suggest" in one_line_error(main, ["replay", log, flag, "0.5"])


def test_the_log_alone_is_required(one_line_error):
  err = one_line_error(main, ["replay"])
  assert err.endswith("required: log\n")


def test_methods_may_stand_behind_flags(log, capsys):
  main(["replay", log, "zclip", "--column", "grad_norm", "autoclip"])
  assert tuple(table(capsys.readouterr().out)) == ("zclip", "autoclip")


@pytest.mark.parametrize("name", ["uniplot", "tabulate"])
def test_without_its_libraries_it_says_what_to_install(
  log, one_line_error, monkeypatch, name
):
  for module in [x for x in sys.modules if x.startswith("optax_clip._logs.")]:
    monkeypatch.delitem(sys.modules, module)
  monkeypatch.delattr(optax_clip, "_logs")
  monkeypatch.delitem(sys.modules, "optax_clip._logs")
  monkeypatch.setitem(sys.modules, name, None)
  err = one_line_error(main, ["replay", log, "clip_by_global_norm:1"])
  assert f"{name} is missing: pip install 'optax-clip[logs]'" in err


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


@pytest.mark.programs
def test_who_reads_may_stop(log):
  """As `head` does, after the first line."""
  made = subprocess.Popen(
    [sys.executable, "-m", "optax_clip", "suggest", log],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  made.stdout.close()
  assert made.wait(timeout=300) == 0
  assert made.stderr.read() == b""
  made.stderr.close()
