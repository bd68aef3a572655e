"""What norms of real runs are like, and what methods with their defaults do to them.

`python -m studies.real_norms FOLDER` reads a folder of CSV files, each the norms of one
run in the columns `step` and `grad_norm`, in the order of the steps. A file
`MANIFEST.tsv` in it may say of each `file` what is the `source_repo` and the `writer`,
and in `note` why it is "not in the statistics". It writes
`studies/results/real_norms.json` and the tables in `docs/real_norms.md`; with `--print`
it prints the tables and writes nothing.

Nothing is trained. A method meets the norms that were logged, and a run that it had
clipped may have taken another course.
"""

import argparse
import csv
import json
import math
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from benchmarks import _marked
import optax_clip
import studies

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "real_norms.md"

METHODS = {
  "`clip_by_global_norm(1.0)`": lambda: optax_clip.clip_by_global_norm(1.0),
  "`clip_by_history()`": optax_clip.clip_by_history,
  "`clip_by_history(surprise=None)`": lambda: optax_clip.clip_by_history(surprise=None),
  "`zclip()`": optax_clip.zclip,
  '`zclip(mode="percentile")`': lambda: optax_clip.zclip(mode="percentile"),
  "`autoclip()`": optax_clip.autoclip,
}
# A spike is so many times as large as the median of the rows around it.
SPIKE, AROUND = 3.0, 50
# Shorter runs say little about methods that learn from dozens of steps.
FEWEST = 200
# What the gate allows: a share of all steps, and of the last quarter.
CLIPPED, LOCKED = 0.25, 0.5


def load(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Loads the runs of a folder, with what its manifest says of them."""
  manifest = folder / "MANIFEST.tsv"
  about = {}
  if manifest.exists():
    with manifest.open(newline="") as file:
      about = {row["file"]: row for row in csv.DictReader(file, delimiter="\t")}
  runs = []
  for path in sorted(folder.glob("*.csv")):
    with path.open(newline="") as file:
      rows = [(row["step"], row["grad_norm"]) for row in csv.DictReader(file)]
    steps, norms = np.array(rows, float).T
    said = about.get(path.name, {})
    runs.append(
      {
        "run": path.stem,
        "source": said.get("source_repo", ""),
        "writer": said.get("writer", ""),
        "note": said.get("note", ""),
        "steps": steps,
        "norms": norms,
      }
    )
  return runs


def evened(steps: np.ndarray, norms: np.ndarray) -> np.ndarray:
  """The norms at the interval of most steps, where a log changes its own."""
  apart, counts = np.unique(np.diff(steps), return_counts=True)
  usual = apart[np.argmax(apart * counts)]
  return norms[(steps - steps[-1]) % usual == 0]


def around(norms: np.ndarray) -> np.ndarray:
  """The median of the finite norms around each row."""
  places = range(len(norms))
  near = [norms[max(0, i - AROUND) : i + AROUND + 1] for i in places]
  return np.array([np.median(x[np.isfinite(x)]) for x in near])


def described(norms: np.ndarray) -> dict[str, Any]:
  """What one run's norms are like."""
  finite = norms[np.isfinite(norms) & (norms > 0)]
  logs = np.log(finite)
  level = np.log(around(finite))
  quarter = len(finite) // 4
  rest = logs - level
  return {
    "rows": len(norms),
    "median": float(np.median(finite)),
    "tail": float(np.quantile(finite / np.exp(level), 0.99)),
    "largest": float((finite / np.exp(level)).max()),
    "autocorrelation": float(np.corrcoef(logs[1:], logs[:-1])[0, 1]),
    "autocorrelation_of_the_rest": float(np.corrcoef(rest[1:], rest[:-1])[0, 1]),
    "spikes": int((rest > np.log(SPIKE)).sum()),
    "drift": float(
      np.median(finite[-quarter:]) / np.median(finite[quarter : 2 * quarter])
    ),
    "start": float(np.median(finite[:quarter]) / np.median(finite[quarter:])),
    "nonfinite": int((~np.isfinite(norms)).sum()),
    "misfit": optax_clip.suggest_max_norm(norms).misfit,
  }


def clipped(name: str, norms: np.ndarray) -> dict[str, Any]:
  """What a method does to one run."""
  # Of one length many runs share a program. What comes later changes no limit.
  longer = np.full(2 ** math.ceil(math.log2(len(norms))), 1.0)
  longer[: len(norms)] = norms
  limits = optax_clip.replay_limits(METHODS[name](), longer)[: len(norms)]
  finite = np.isfinite(norms)
  level = around(norms)
  over = finite & (norms.astype(np.float32) > limits)
  spikes = finite & (norms > SPIKE * level)
  kept = np.minimum(norms, limits) / level
  last = over[-(len(norms) // 4) :]
  return {
    "method": name,
    "clipped": float(over[finite].mean()),
    "clipped_last": float(last.mean()),
    "spikes": int(spikes.sum()),
    "missed": int((spikes & ~over).sum()),
    "kept": float(np.median(kept[spikes])) if spikes.any() else None,
    "false_alarms": float(over[finite & ~spikes].mean()),
  }


def measure(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """One row for each run of enough rows before a clip, and each way to read its log."""
  rows = []
  for run in runs:
    for reading in ("as logged", "evened"):
      norms = (
        run["norms"] if reading == "as logged" else evened(run["steps"], run["norms"])
      )
      if len(run["norms"]) < FEWEST or "after the clip" in run["note"]:
        continue
      rows.append(
        {
          **{key: run[key] for key in ("run", "source", "writer", "note")},
          "reading": reading,
          **described(norms),
          "methods": [clipped(name, norms) for name in METHODS],
        }
      )
  return rows


# --- Tables ---------------------------------------------------------------------


def counted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Those in the statistics: runs that were not chosen for what they are."""
  return [row for row in rows if "not in the statistics" not in row["note"]]


def distribution(rows: list[dict[str, Any]]) -> str:
  """What norms are like: quartiles over runs."""
  mine = [row for row in counted(rows) if row["reading"] == "evened"]
  shares = [{**row, "share": 100 * row["spikes"] / row["rows"]} for row in mine]
  fields = {
    "correlation of a norm with the one before, of logarithms": "autocorrelation",
    "the same without the level, a median of 101 rows": "autocorrelation_of_the_rest",
    "99% quantile, in levels": "tail",
    "largest norm, in levels": "largest",
    f"spikes, above {SPIKE:g} levels, % of the rows": "share",
    "median of the first quarter, over that of the rest": "start",
    "median of the last quarter, over that of the second": "drift",
  }
  lines = [f"| of {len(mine)} runs | smallest | 25% | median | 75% | largest |"]
  lines.append("|---|---|---|---|---|---|")
  for words, field in fields.items():
    values = [row[field] for row in shares]
    cells = [f"{x:.3g}" for x in np.quantile(values, (0, 0.25, 0.5, 0.75, 1))]
    lines.append(f"| {words} | {' | '.join(cells)} |")
  odd = sum(row["nonfinite"] > 0 for row in mine)
  bad = sum(bool(row["misfit"]) for row in mine)
  lines += [
    "",
    f"{odd} of {len(mine)} runs have norms that are not finite. For {bad} of"
    f" {len(mine)} `suggest_max_norm` finds that no constant fits.",
  ]
  return "\n".join(lines)


def by_method(rows: list[dict[str, Any]]) -> str:
  """What methods do: medians and extremes over the runs in the statistics."""
  lines = [
    "| method | log | clipped: median | largest | above 25% | locked | spikes missed"
    " | spikes kept at | false alarms |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for name in METHODS:
    for reading in ("as logged", "evened"):
      mine = [row for row in counted(rows) if row["reading"] == reading]
      cells = [x for row in mine for x in row["methods"] if x["method"] == name]
      share = [x["clipped"] for x in cells]
      spikes, missed = (sum(x[key] for x in cells) for key in ("spikes", "missed"))
      kept = np.median([x["kept"] for x in cells if x["kept"] is not None])
      often = sum(x > CLIPPED for x in share)
      lines.append(
        f"| {name} | {reading} | {100 * np.median(share):.1f}% |"
        f" {100 * max(share):.0f}% | {often} of {len(cells)} |"
        f" {sum(x['clipped_last'] > LOCKED for x in cells)} | {missed} of {spikes} |"
        f" {kept:.2g} levels |"
        f" {100 * np.median([x['false_alarms'] for x in cells]):.1f}% |"
      )
  return "\n".join(lines)


# Spikes that each method missed when the gate was written, over the same runs.
BEFORE = {
  "`clip_by_global_norm(1.0)`": 15,
  "`clip_by_history()`": 314,
  "`clip_by_history(surprise=None)`": 314,
  "`zclip()`": 51,
  '`zclip(mode="percentile")`': 100,
  "`autoclip()`": 22,
}


def gate(rows: list[dict[str, Any]]) -> str:
  """What keeps each method from the gate, over all runs, extremes included."""
  mine = [row for row in rows if row["reading"] == "evened"]
  lines = [
    f"| method | runs of {len(mine)} clipped above 25% | locked | spikes missed |"
    " allowed | passes |",
    "|---|---|---|---|---|---|",
  ]
  for name in METHODS:
    done = [(row["run"], x) for row in mine for x in row["methods"]]
    done = [(run, x) for run, x in done if x["method"] == name]
    often = [run for run, x in done if x["clipped"] > CLIPPED]
    locked = [run for run, x in done if x["clipped_last"] > LOCKED]
    spikes, missed = (sum(x[key] for _, x in done) for key in ("spikes", "missed"))
    allowed = BEFORE[name] // 2
    passes = "no" if often or locked or missed > allowed else "yes"
    cells = (
      name,
      named(often),
      named(locked),
      f"{missed} of {spikes}",
      allowed,
      passes,
    )
    lines.append(f"| {' | '.join(map(str, cells))} |")
  return "\n".join(lines)


def named(runs: list[str]) -> str:
  """A number of runs, and who they are if they are few."""
  return f"{len(runs)}: {', '.join(runs)}" if 0 < len(runs) <= 6 else str(len(runs))


def sources(rows: list[dict[str, Any]]) -> str:
  """Where the runs come from."""
  lines = ["| run | rows | source | written by | in the statistics |"]
  lines.append("|---|---|---|---|---|")
  for row in rows:
    if row["reading"] == "as logged":
      said = "no: an extreme" if row not in counted(rows) else "yes"
      lines.append(
        f"| {row['run']} | {row['rows']} | {row['source']} | {row['writer']} | {said} |"
      )
  return "\n".join(lines)


TABLES = {
  "norms": distribution,
  "norms-methods": by_method,
  "norms-gate": gate,
  "norms-sources": sources,
}


def main(argv: list[str] | None = None) -> None:
  """Measures a folder; writes results and tables, or prints these."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("folder", type=pathlib.Path, help="of CSV files of norms")
  parser.add_argument(
    "--print", action="store_true", help="print tables, write nothing"
  )
  options = parser.parse_args(argv)
  rows = measure(load(options.folder))
  if not rows:
    parser.error(f"{options.folder}: no run of {FEWEST} rows before a clip")
  if options.print:
    for table in TABLES.values():
      print(table(rows), end="\n\n")
    return
  about = {"study": "real_norms", "jax": jax.__version__, "backend": "cpu"}
  text = json.dumps({"about": about, "rows": rows}, indent=1)
  studies.results("real_norms").write_text(f"{text}\n")
  page = PAGE.read_text()
  for name, table in TABLES.items():
    page = _marked.replaced(page, name, table(rows))
  PAGE.write_text(page)


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  # Runs of one length share their programs, for this process alone: whoever calls
  # `main` keeps the settings that they have.
  with tempfile.TemporaryDirectory() as programs:
    jax.config.update("jax_compilation_cache_dir", programs)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    main()
