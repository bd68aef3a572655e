"""What clips of singular values promise and cost, next to the published ways."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _matrices
from benchmarks import _spectral_peers as _peers
from benchmarks import _suite
from benchmarks import _timing
import optax_clip

Rows = list[dict[str, Any]]

# Shapes, and how many matrices of each: twelve kinds in turn.
SHAPES = (((64, 64), 1008), ((64, 128), 1008))
PROMISE = {"float32": 1e-3, "float16": 1e-3, "bfloat16": 2.0**-8}
# The cases that are timed: the singular values of [512, 1024], for a limit of 1.
TIMED = (512, 1024)


def run(options: _suite.Options) -> Rows:
  """Returns a row for each method and dtype, and for each timed case."""
  return [*_exactness(options), *_cost(options)]


def ours(**keywords: Any) -> Any:
  """Returns our clip at 1 of a stack of matrices."""

  def clip(stack: Any) -> Any:
    tx = optax_clip.spectral_clip(1.0, stacked={"": 0}, record=False, **keywords)
    return tx.update({"w": stack}, tx.init({"w": stack}))[0]["w"]

  return clip


def _exactness(options: _suite.Options) -> Rows:
  """Compares results with float64 SVDs of what came in."""
  parts = [
    _matrices.many(count // (12 if options.quick else 1), *shape, seed=i)
    for i, (shape, count) in enumerate(SHAPES)
  ]
  rows: Rows = []
  soft = ours(soft=True)
  for dtype in PROMISE:
    methods: dict[str, Any] = {"spectral_clip": ours()}
    methods["spectral_clip, strict"] = ours(strict=True)
    if dtype != "float16":
      methods |= {"spectral_clip, soft": soft}
    if dtype == "float32":
      # One after the other, as a batch of SVDs would be.
      methods |= {
        name: functools.partial(jax.lax.map, f) for name, f in _peers.METHODS.items()
      }
    stacks = [jnp.asarray(x, dtype) for x, _ in parts]
    before = [_matrices.values(x) for x in stacks]
    for name, method in methods.items():
      options.note(f"{name}, {dtype}")
      pairs = zip(stacks, before, [kinds for _, kinds in parts], strict=True)
      rows.append(
        {"suite": "spectral", "method": name, "dtype": dtype}
        | _compared(jax.jit(method), list(pairs), is_soft=name in _peers.SOFT)
      )
  return rows


def _compared(method: Any, parts: Any, *, is_soft: bool) -> dict[str, Any]:
  """Returns the worst of a method over all matrices."""
  found = dict.fromkeys(("matrices", "not_finite", "inside", "inside_equal"), 0)
  worst = {"excess": -np.inf, "below": 0.0, "tiny": 0.0}
  for stack, before, _ in parts:
    new = np.asarray(method(stack).astype(jnp.float32))
    # Some of the published ways return NaNs; they count, and are left out.
    usable = np.all(np.isfinite(new), axis=(1, 2))
    found["not_finite"] += int(np.sum(~usable))
    stack, before, new = stack[usable], before[usable], new[usable]
    after = _matrices.values(new)
    want = before / np.sqrt(1 + before**2) if is_soft else np.minimum(before, 1)
    error = np.abs(after - want)
    worst["excess"] = max(worst["excess"], float(np.max(after[:, 0])) - 1)
    # Of matrices whose largest value is no more than a hundred limits.
    near = (before[:, :1] <= 100) & (before < 0.99)
    worst["below"] = max(worst["below"], float(np.max(error, where=near, initial=0)))
    worst["tiny"] = max(
      worst["tiny"], float(np.max(error, where=before < 1e-3, initial=0))
    )
    inside = before[:, 0] <= 1
    same = np.all(new == np.asarray(stack.astype(jnp.float32)), axis=(1, 2))
    found["matrices"] += len(usable)
    found["inside"] += int(np.sum(inside))
    found["inside_equal"] += int(np.sum(inside & same))
  return found | worst


def _cases() -> dict[str, np.ndarray]:
  """Singular values of the timed matrices, in float64."""
  rows = min(TIMED)
  low = np.linspace(0.01, 0.9, rows)
  spike, half = low.copy(), np.linspace(0.01, 1.5, rows)
  spike[0] = 50.0
  return {
    "decided by the 2-norm": low / np.linalg.norm(low) * 0.9,
    "proven within": low / 0.9 * 0.97,
    "one spike of 50": spike,
    "a third above": half,
  }


def _cost(options: _suite.Options) -> Rows:
  """Times methods on one matrix, in units of Muon's five steps."""
  rows: Rows = []
  shape = (64, 128) if options.quick else TIMED
  rng = np.random.default_rng(0)
  peers = {name: f for name, f in _peers.METHODS.items() if "bfloat16" not in name}
  methods = {"muon": _peers.muon, **peers}
  for case, values in _cases().items():
    options.note(case)
    x = _matrices.with_values(rng, *shape, np.sort(values)[-min(shape) :])
    x = jnp.asarray(x, jnp.float32)
    kept = methods if case == "a third above" else {"muon": _peers.muon}
    runs = {"spectral_clip": jax.jit(_one), **{n: jax.jit(f) for n, f in kept.items()}}
    times = _timing.interleaved(
      {n: functools.partial(_waited, f, x) for n, f in runs.items()},
      3 if options.quick else 7,
    )
    unit = min(times["muon"])
    rows += [
      {
        "suite": "spectral",
        "case": case,
        "method": name,
        "ms": 1e3 * min(spent),
        "over_muon": min(spent) / unit,
      }
      for name, spent in times.items()
      if name != "muon"
    ]
  return rows


def _one(x: Any) -> Any:
  tx = optax_clip.spectral_clip(1.0, record=False)
  return tx.update(x, tx.init(x))[0]


def _waited(f: Any, x: Any) -> Any:
  return jax.block_until_ready(f(x))


def table(rows: Rows) -> str:
  """Writes the exactness of all methods as a table of the guide."""
  lines = [
    "| float32 | largest excess | within, and equal | moved below | moved far below |",
    "|---|---|---|---|---|",
  ]
  for row in rows:
    if "excess" in row and (row["dtype"] == "float32" or "spectral_" in row["method"]):
      name = row["method"]
      name += "" if row["dtype"] == "float32" else f", {row['dtype']}"
      lines.append(
        f"| {name} | {row['excess']:+.1e} | {row['inside_equal']} of {row['inside']}"
        f" | {row['below']:.0e} | {row['tiny']:.0e} |"
      )
  return "\n".join(lines)


def times(rows: Rows) -> str:
  """Writes the times as a table of the guide."""
  lines = ["| over Muon's five steps | time |", "|---|---|"]
  lines += [
    f"| {row['method']}, {row['case']} | {row['over_muon']:.2f} |"
    for row in rows
    if "over_muon" in row
  ]
  return "\n".join(lines)
