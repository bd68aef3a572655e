"""The script that observes, suggests and trains with it, as its user meets it."""

import jax
import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
import _text
import suggest
import train_lm

# Flax promotes ranks implicitly.
pytestmark = [pytest.mark.foreign, pytest.mark.programs]

load_text = _text.load


@pytest.fixture(scope="module", autouse=True)
def quick():
  """A tiny model that compiles fast; reads the text once."""
  text = load_text()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(_text, "load", lambda: text)
    patch.setattr(train_lm, "HELD_OUT_BATCHES", 1)
    for name, value in {"WIDTH": 16, "LAYERS": 1, "LENGTH": 16, "BATCH": 2}.items():
      patch.setattr(suggest, name, value)
    patch.setattr(train_lm, "LENGTH", 16)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_it_suggests_compares_and_draws(tmp_path, capsys):
  suggest.main(["--steps", "100", "--clipped-share", "0.1", "--out", str(tmp_path)])
  printed = capsys.readouterr().out
  assert printed.startswith("max_norm ")
  assert "held-out loss: " in printed
  assert (tmp_path / "suggest.png").read_bytes().startswith(b"\x89PNG")
  assert max(map(len, printed.partition("Wrote")[0].splitlines())) <= 80


def test_a_run_that_is_too_short_says_so(tmp_path, capsys):
  with pytest.raises(SystemExit) as caught:
    suggest.main(["--steps", "3", "--out", str(tmp_path)])
  assert caught.value.code == 1
  assert "No suggestion: norms has 3 " in capsys.readouterr().out


@pytest.mark.parametrize(
  ("flag", "value", "part"),
  [
    ("--clipped-share", "1", "1 is not below 1"),
    ("--clipped-share", "x", "'x' is not a number of at least 0"),
    ("--steps", "0", "'0' is not a whole number of at least 1"),
  ],
)
def test_a_bad_flag_is_one_line(flag, value, part, one_line_error):
  err = one_line_error(suggest.main, [f"{flag}={value}"])
  assert f"argument {flag}: " in err
  assert part in err


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, one_line_error):
  (tmp_path / "file").touch()
  err = one_line_error(suggest.main, ["--out", str(tmp_path / "file")])
  assert "--out" in err
  assert str(tmp_path / "file") in err
