"""What each guard makes of each plan, and what `optax.apply_if_finite` does.

`python tests/faults/table.py` prints the table of docs/skipping.md.
"""

import functools

import harness
import numpy as np
import optax

import optax_clip

# Of what happens to the steps of a fault: a plan, and the steps that are faulty.
PLANS = {**harness.NONFINITE, **harness.SPIKES, **harness.LEVELS}


def inner():
  """The optimizer that is guarded."""
  return optax.chain(optax_clip.clip_by_global_norm(1.0), optax.adam(3e-3))


# For each guard: how it is made, and the arguments of `harness.runner`.
GUARDS = {
  "skip_nonfinite": (lambda: optax_clip.skip_nonfinite(inner()), {}),
  "skip_spikes": (lambda: optax_clip.skip_spikes(inner()), {}),
  "skip_spikes, norm and loss": (
    lambda: optax_clip.skip_spikes(inner(), signals=("norm", "loss")),
    {},
  ),
  "dynamic_loss_scale": (
    lambda: optax_clip.dynamic_loss_scale(inner()),
    {"scaled": True},
  ),
  "dynamic_loss_scale of skip_spikes": (
    lambda: optax_clip.dynamic_loss_scale(optax_clip.skip_spikes(inner())),
    {"scaled": True},
  ),
}
PEER = "optax.apply_if_finite"


@functools.cache
def runner(name):
  """The compiled run of a guard."""
  if name == PEER:
    return harness.runner(optax.apply_if_finite(inner(), 5), whole=False)
  make, keywords = GUARDS[name]
  return harness.runner(make(), **keywords)


def expected(name, plan):
  """The steps that a guard skips."""
  skipped = PLANS[plan][1].copy()
  judges = "skip_spikes" in name
  if plan in harness.SPIKES and not judges:
    skipped[:] = False
  if plan in harness.LEVELS:
    # A level that stays up is followed after 20 steps; the others are none.
    up = judges and plan in ("200 steps x 1e3", "level x 30 from here on")
    skipped[:] = False
    if up:
      skipped[np.flatnonzero(PLANS[plan][1])[:20]] = True
  return skipped


def outcome(name, plan):
  """In words."""
  arrays, faulty = PLANS[plan]
  run = runner(name)(arrays)
  broken = ~np.isfinite(run.params[0]["w"]).all(axis=(1, 2))
  if broken.any():
    return f"**NaN from step {np.argmax(broken)} on**"
  some = f"{faulty.sum()} skipped" if faulty.any() else "taken"
  # Against the same optimizer under no fault; optax's own, as programs that are
  # compiled otherwise round otherwise.
  reference = runner(PEER if name == PEER else "skip_nonfinite")
  for skipped, words in (
    (faulty, some),
    (np.zeros_like(faulty), "taken"),
    (expected(name, plan), f"{expected(name, plan).sum()} skipped, then taken"),
  ):
    if harness.same_trajectory(run, reference(arrays.without(skipped)), skipped):
      return words
  return "differs"


def table():
  """The rows in Markdown."""
  names = [PEER, "skip_nonfinite", "skip_spikes", "dynamic_loss_scale"]
  lines = [
    f"| fault | {' | '.join(f'`{name}`' for name in names)} |",
    "|---|" + "---|" * len(names),
  ]
  for plan in PLANS:
    cells = [outcome(name, plan) for name in names]
    lines.append(f"| {plan} | {' | '.join(cells)} |")
  return "\n".join(lines)


if __name__ == "__main__":
  print(table())
