#!/usr/bin/env bash
# Expected: a check that an optimizer's state is the same on all devices compares its bits.
# Seen with brax 0.14.2 and jax 0.12.0.1, CPU as two devices, Python 3.13, 2026-11-30:
# `brax.training.pmap.assert_is_replicated` adds all numbers of a state up and compares the
# sums with ==. NaN is not equal to itself: one NaN anywhere, the same on all devices, as
# "no loss was seen yet", ends training. Two states whose sums are equal pass.
# Output: "equal passes, equal with a NaN refused, different passes".
# What to do: keep no NaN in an optimizer's state: 0 or inf say "none" as well.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.12.0.1 brax==0.14.2
XLA_FLAGS=--xla_force_host_platform_device_count=2 \
  "$work/venv/bin/python" -W ignore - <<'PYTHON'
import jax.numpy as jnp
from brax.training import pmap


def checked(first, second):
  """Each device has one of the two."""
  try:
    pmap.assert_is_replicated({"state": jnp.array([first, second])})
  except AssertionError:
    return "refused"
  return "passes"


found = {
  "equal": checked([1.0, 2.0], [1.0, 2.0]),
  "equal with a NaN": checked([1.0, jnp.nan], [1.0, jnp.nan]),
  "different": checked([1.0, 2.0], [2.0, 1.0]),
}
print(", ".join(f"{name} {what}" for name, what in found.items()))
assert list(found.values()) == ["passes", "refused", "passes"]
PYTHON
