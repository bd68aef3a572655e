"""Float16 gradients whose norm passes 256: optax stops learning, we do not."""

from helpers import figures
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
from studies import silent_stall

pytestmark = pytest.mark.programs


@pytest.fixture(scope="module")
def runs():
  return {
    (variant, library): silent_stall.train(library, variant)
    for variant in silent_stall.VARIANTS
    for library in silent_stall.LIBRARIES
  }


@pytest.mark.parametrize("variant", silent_stall.VARIANTS)
def test_with_optax_every_update_is_zero(runs, variant):
  run = runs[variant, "optax"]
  assert run.zero.shape == (silent_stall.SEEDS, silent_stall.STEPS)
  assert run.zero.all()
  assert (run.accuracy == run.accuracy[:, :1]).all()  # 2% to 14%: chance.
  assert run.accuracy.max() < 0.2
  # Silent: nothing but the missing progress tells.
  assert np.isfinite(run.loss).all()


@pytest.mark.parametrize("variant", silent_stall.VARIANTS)
def test_with_an_exact_norm_every_seed_learns(runs, variant):
  run = runs[variant, "optax_clip"]
  assert not run.zero.any()
  # Measured on CPU: 95.8% to 97.2% summed, 96.4% to 97.8% scaled.
  assert run.accuracy[:, -1].min() >= 0.95
  assert run.accuracy[:, -1].mean() >= 0.96


def test_float16_overflows_only_where_norms_are_squared(runs):
  # The gradients that optax zeroes are all finite.
  for (variant, _), run in runs.items():
    assert np.isfinite(run.norm).all()
    scale = silent_stall.VARIANTS[variant].scale
    assert run.norm[:, 0].min() * scale > 256


def test_a_correct_norm_clips_every_summed_step_and_no_scaled_one(runs):
  assert (runs["summed", "optax_clip"].norm > silent_stall.MAX_NORM).mean() > 0.99
  assert (runs["scaled", "optax_clip"].norm < silent_stall.MAX_NORM).all()


def test_the_script_prints_a_table_and_writes_a_figure(
  runs, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(
    silent_stall, "train", lambda library, variant: runs[variant, library]
  )
  silent_stall.main(["--out", str(tmp_path / "new" / "stall.png")])
  printed = capsys.readouterr().out
  assert "optax_clip" in printed
  assert "750" in printed
  assert figures.coloured(tmp_path / "new" / "stall.png") > 0.002
