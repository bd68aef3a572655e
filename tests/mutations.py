"""Faults, each of which the default run must find: `python tests/mutations.py`.

A fault is one edit of a copy of the package: a sign, a forgotten `where`, an off-by-one
in a window, a NaN let into a memory. Those tests of the default run that are named
beside it run against the copy, and one of them has to fail. `--only TEXT` tries those
whose description has the text.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent


class Fault(NamedTuple):
  """One edit.

  Attributes:
    text: what is wrong with it.
    file: of the package.
    old: what stands there, once.
    new: the fault.
    tests: files, without `test_` and the ending.
    names: of which tests of these, as for `pytest -k`.
  """

  text: str
  file: str
  old: str
  new: str
  tests: str
  names: str = ""


FAULTS = (
  Fault(
    "NaN does not exceed a limit",
    "_norms/extended.py",
    "return ~(x.value <= limit / x.unit)",
    "return x.value > limit / x.unit",
    "functions edge_cases",
    "nan",
  ),
  Fault(
    "a finite norm becomes inf where it is shown",
    "_norms/extended.py",
    "saturated = jnp.minimum(x.value * x.unit, most)",
    "saturated = x.value * x.unit",
    "contract",
    "Finite",
  ),
  Fault(
    "the exponent of the denominator has the wrong sign",
    "_norms/extended.py",
    "exponent = high - low + more - less",
    "exponent = high + low + more - less",
    "contract",
    "Finite or Limit",
  ),
  Fault(
    "the exponents of a ratio are lost beyond one unit",
    "_norms/extended.py",
    "held = jnp.clip(factor, 1 / most / unit, most / unit)",
    "held = factor",
    "ratios",
  ),
  Fault(
    "a ratio to a weight of 0 is finite",
    "_norms/extended.py",
    "far = (value > most) | (~positive & (x.value > 0))",
    "far = value > most",
    "ratios",
  ),
  Fault(
    "eps is subtracted",
    "_norms/extended.py",
    "return Extended(x.value + jnp.asarray(addend",
    "return Extended(x.value - jnp.asarray(addend",
    "against_optax edge_cases",
    "eps",
  ),
  Fault(
    "what is within the limit is multiplied all the same",
    "actions.py",
    "return jnp.where(value == 1, leaf, new)",
    "return new",
    "contract",
    "PassThrough",
  ),
  Fault(
    "negative elements are clamped to the positive limit",
    "actions.py",
    "signed = jnp.where(leaf < 0, -bound, bound)",
    "signed = jnp.where(leaf < 0, bound, bound)",
    "contract against_optax",
    "clip",
  ),
  Fault(
    "normalize scales a norm of zero",
    "actions.py",
    "stays = (norm.value == 0) | ((limit == jnp.inf)",
    "stays = (norm.value < 0) | ((limit == jnp.inf)",
    "contract learned_vectors",
    "zero or adagn",
  ),
  Fault(
    "a floor for the coefficient is a ceiling",
    "actions.py",
    "enough = ~(_extended.as_float(coefficient) < least)",
    "enough = ~(_extended.as_float(coefficient) > least)",
    "learned_vectors",
    "soft",
  ),
  Fault(
    "the derivative of a norm forgets the sign",
    "_norms/norm.py",
    "    return share\n  modulus = jnp.abs(share)",
    "    return jnp.abs(share)\n  modulus = jnp.abs(share)",
    "derivatives contract functions",
    "deriv or grad",
  ),
  Fault(
    "the derivative of a norm that is 0 is not looked after",
    "_norms/norm.py",
    "usable = jnp.isfinite(norm.value) & (norm.value > 0)",
    "usable = jnp.isfinite(norm.value)",
    "contract",
    "Derivatives",
  ),
  Fault(
    "the parts of a norm are merged without their units",
    "_norms/norm.py",
    "scaled = norms.value * (norms.unit / unit)",
    "scaled = norms.value",
    "layers contract records",
  ),
  Fault(
    "an overflow of a sum of squares is not looked for",
    "_norms/sums_by_backend.py",
    "strayed.append(jnp.any(~jnp.isfinite(moment) | low))",
    "strayed.append(jnp.any(low))",
    "contract",
    "Finite",
  ),
  Fault(
    "an underflow of a sum of squares is not looked for",
    "_norms/sums_by_backend.py",
    "strayed.append(jnp.any(~jnp.isfinite(moment) | low))",
    "strayed.append(jnp.any(~jnp.isfinite(moment)))",
    "functions",
    "global_norm",
  ),
  Fault(
    "a limit of each leaf reaches the leaf after it",
    "_norms/blocks.py",
    "      start = stop\n",
    "      start = stop - 1\n",
    "records stacked learned_state",
  ),
  Fault(
    "a coefficient reaches the leaf before its own",
    "_norms/scalars.py",
    "return [_entries(row) for row in _rows(table)]",
    "return [_entries(row) for row in reversed(_rows(table))]",
    "contract layers",
    "layer",
  ),
  Fault(
    "a NaN is let into a memory",
    "_thresholds/memory.py",
    "return jnp.all(jnp.isfinite(exact)) & (exact > 0)",
    "return jnp.isfinite(exact) | (exact != 0)",
    "contract learned_faults",
    "Memory or nan or finite",
  ),
  Fault(
    "a norm of 0 is learned",
    "_thresholds/memory.py",
    "return jnp.all(jnp.isfinite(exact)) & (exact > 0)",
    "return jnp.all(jnp.isfinite(exact)) & (exact >= 0)",
    "learned_faults learned_state learned_vectors contract",
    "zero",
  ),
  Fault(
    "the bias correction is one step late",
    "_thresholds/memory.py",
    "t = count.astype(jnp.float32) + 1",
    "t = count.astype(jnp.float32) + 2",
    "learned_vectors",
  ),
  Fault(
    "a huge finite norm is learned as it is",
    "_thresholds/memory.py",
    "return jnp.minimum(n, most), (count == 1)",
    "return n, (count == 1)",
    "learned_traces learned_faults",
    "huge",
  ),
  Fault(
    "a window is read one place too far",
    "_thresholds/window.py",
    "[None] == (count % size)[:, None]",
    "[None] == ((count + 1) % size)[:, None]",
    "learned_vectors learned_traces",
  ),
  Fault(
    "a percentile is not interpolated",
    "_thresholds/window.py",
    "return low + fraction * gap",
    "return low",
    "learned_vectors learned_traces",
  ),
  Fault(
    "history has a limit one norm too early",
    "_thresholds/window.py",
    "ready = count >= max(2, size // 2)",
    "ready = count >= max(2, size // 2) - 1",
    "learned_vectors learned_traces learned_state",
  ),
  Fault(
    "a history counts spikes as what they are",
    "_thresholds/window.py",
    "past = jnp.minimum(past, surprise * median[:, None])",
    "past = jnp.minimum(past, 1000 * surprise * median[:, None])",
    "learned_traces",
    "history",
  ),
  Fault(
    "zclip compares with the wrong side of its limit",
    "_methods/zclip.py",
    "spike = (n > level) & ~warm",
    "spike = (n < level) & ~warm",
    "learned_vectors",
    "zclip",
  ),
  Fault(
    "adagc learns norms as they come",
    "_methods/adagc.py",
    "clipped = jnp.maximum(jnp.minimum(n, limits), _TINY)",
    "clipped = jnp.maximum(n, _TINY)",
    "learned_vectors",
    "adagc",
  ),
  Fault(
    "a step that is not taken changes the state",
    "_guards/skipped_step.py",
    "jnp.where(take, x, y)\n      for show, x, y in zip(shown, values, old",
    "x\n      for show, x, y in zip(shown, values, old",
    "skip records",
    "",
  ),
  Fault(
    "derivatives go through a step that was not taken",
    "_trees/leaf.py",
    "jnp.where(take, dot, jnp.zeros_like(dot))",
    "dot",
    "derivatives",
  ),
  Fault(
    "the scale of the loss grows on a step that overflowed",
    "_guards/loss_scale.py",
    "jnp.where(finite, jnp.where(grow, larger, scale), smaller)",
    "jnp.where(finite, jnp.where(grow, larger, scale), larger)",
    "skip loss_scale",
    "scale",
  ),
  Fault(
    "a guard counts steps that were taken as skipped",
    "_guards/record.py",
    'counted(skipped, old["steps_skipped"])',
    'counted(~skipped, old["steps_skipped"])',
    "skip",
    "count or Contract or record",
  ),
  Fault(
    "the first of the leaves that are laid side by side is left out of the norm",
    "_norms/bundles.py",
    "_power_sums.widened(x, dtype).ravel() for x in small]",
    "_power_sums.widened(x, dtype).ravel() for x in small[1:]]",
    "contract functions",
    "oracle or global_norm",
  ),
  Fault(
    "small leaves of several norms are laid side by side as if they had one",
    "_norms/bundles.py",
    "key = (place.block, place.entry, place.cut, jnp.iscomplexobj(x))",
    "key = (place.block, place.cut, jnp.iscomplexobj(x))",
    "contract",
    "oracle",
  ),
  Fault(
    "the last of the norms that are joined is left out of the record",
    "_algebra/record.py",
    "joint.joined(arrays)",
    "joint.joined(arrays)[: -arrays[joint.order[-1]].size]",
    "metrics records",
  ),
  Fault(
    "limits are joined in another order than norms",
    "_algebra/record.py",
    "limits = _side_by_side(whole, together)",
    "limits = _side_by_side(whole[::-1], together)",
    "metrics records",
  ),
  Fault(
    "results of a stack go to its members in another order",
    "_norms/scalars.py",
    "for i, row in zip(members, own, strict=True):",
    "for i, row in zip(members[::-1], own, strict=True):",
    "scalars",
  ),
  Fault(
    "a vector is taken apart in another order than it was joined in",
    "_norms/joint.py",
    "dict(zip(self.order, begins, strict=False))",
    "dict(zip(range(len(self.order)), begins, strict=False))",
    "scalars",
  ),
  Fault(
    "each leaf gets the coefficients of the first",
    "_norms/scalars.py",
    "(table, jnp.int32(starts[i]))",
    "(table, jnp.int32(0))",
    "scalars",
  ),
  Fault(
    "norms are handed to whatever stands inside a guard",
    "_guards/inside.py",
    "return inside.update(updates, state, params, **extra_args)",
    "return inside.update(updates, state, params, norms=known, **extra_args)",
    "handed",
  ),
  Fault(
    "an eager step of a guard compiles a branch again",
    "_guards/skipped_step.py",
    "if not _backend.is_traced(take):",
    "if False:",
    "eager",
  ),
  Fault(
    "a healthy guard's state holds NaN",
    "_guards/record.py",
    "_SLOTS.blank(limit=jnp.inf)",
    "_SLOTS.blank(limit=jnp.inf, skip_rate=jnp.nan)",
    "guard_records",
  ),
  Fault(
    "a guard freezes the scale of the loss in the step in which it should fall",
    "_guards/guard.py",
    "key=lambda i: not self.judges[i].scales",
    "key=lambda i: i",
    "order",
  ),
  Fault(
    "a record of layers has no row where there are no layers",
    "_algebra/layers.py",
    "count = max(sum(map(math.prod, stacks)), 1)",
    "count = sum(map(math.prod, stacks))",
    "leaves",
    "empty or nothing",
  ),
)

# Forms that only accelerators take are tried as CI tries them.
FORMS = {"a step that is not taken changes the state": "gpu"}


def edited(fault: Fault) -> str:
  """Returns the text of the file with the fault; ends if the line is not there."""
  text = (ROOT / "optax_clip" / fault.file).read_text()
  if text.count(fault.old) != 1:
    sys.exit(f"{fault.file} has not, once: {fault.old!r}. Adapt the fault.")
  return text.replace(fault.old, fault.new)


def found(fault: Fault) -> bool:
  """Returns whether the tests fail with the fault."""
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("optax_clip", "tests"):
      shutil.copytree(ROOT / name, root / name, ignore=ignored)
    for name in ("docs", "pyproject.toml"):  # What some tests read.
      (root / name).symlink_to(ROOT / name)
    (root / "optax_clip" / fault.file).write_text(edited(fault))
    environment = os.environ | {"PYTHONPATH": str(root)}
    if fault.text in FORMS:
      environment["OPTAX_CLIP_FORMS"] = FORMS[fault.text]
    files = {path.stem: str(path) for path in (root / "tests").rglob("test_*.py")}
    tests = [files[f"test_{name}"] for name in fault.tests.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"]
    names = ["-k", fault.names] if fault.names else []
    done = subprocess.run(
      [*command, *tests, *names],
      cwd=root,
      env=environment,
      capture_output=True,
      text=True,
    )
    failed = "\nFAILED tests" in done.stdout
    if done.returncode and not failed:
      raise RuntimeError(f"the tests did not run.\n{done.stdout}{done.stderr}")
    return failed


def main() -> None:
  """Tries each fault, two at a time; ends with 1 if one was not found."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", default="", help="faults whose description has this")
  only = parser.parse_args().only
  faults = [fault for fault in FAULTS if only in fault.text]
  for fault in faults:
    edited(fault)
  missed = 0
  with ThreadPoolExecutor(2) as pool:
    for fault, caught in zip(faults, pool.map(found, faults), strict=True):
      print(f"{'found ' if caught else 'MISSED'}  {fault.text}", flush=True)
      missed += not caught
  print(f"{len(faults) - missed} of {len(faults)} found")
  sys.exit(bool(missed))


if __name__ == "__main__":
  main()
