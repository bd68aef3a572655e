"""What is asked of the GPUs of a process."""

import jax
import pytest

from optax_clip import _backend


class TestSpeedOfFloat64:
  @pytest.mark.parametrize(
    ("capability", "fast"),
    [
      ("9.0", True),
      ("10.0", True),
      ("8.6", False),
      ("8.9", False),
      ("10.3", False),
      ("12.0", False),
      ("gfx90a", True),
      ("gfx942:sramecc+:xnack-", True),
      ("gfx950", True),
      ("gfx1030", False),
      ("gfx1100", False),
      ("gfx1201", False),
      ("", True),
    ],
  )
  def test_is_that_of_the_device(self, monkeypatch, capability, fast):
    class Device:
      compute_capability = capability

    monkeypatch.setattr(jax, "local_devices", lambda backend: [Device()])
    _backend._are_fast.cache_clear()
    try:
      assert _backend.has_fast_float64() is fast
    finally:
      _backend._are_fast.cache_clear()

  @pytest.mark.parametrize("word", ["fast", "slow"])
  def test_is_told_where_there_is_no_device(self, monkeypatch, word):
    monkeypatch.setenv("OPTAX_CLIP_FLOAT64", word)
    assert _backend.has_fast_float64() is (word == "fast")
