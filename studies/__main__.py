"""How to run the studies: `python -m studies batch_range --quick`."""

import argparse
import pathlib
from typing import Any

import studies


def arguments() -> argparse.ArgumentParser:
  """Defines the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m studies",
    description="Whether clipping helps: measures a study, and writes its results, its"
    " figure and its tables in docs/evidence.md.",
  )
  parser.add_argument(
    "study",
    choices=(*studies.STUDIES, "all"),
    metavar="STUDY",
    help=f"all (five to six hours), or one of {', '.join(studies.STUDIES)}",
  )
  how = parser.add_mutually_exclusive_group()
  how.add_argument(
    "--quick",
    action="store_true",
    help="measure a small part, and write nothing unless --json says where",
  )
  how.add_argument(
    "--draw",
    action="store_true",
    help="measure nothing, and write figures and tables from the kept results",
  )
  parser.add_argument(
    "--device",
    choices=("cpu", "gpu", "tpu"),
    help="the platform to run on (default: the one JAX prefers)",
  )
  parser.add_argument(
    "--json",
    type=pathlib.Path,
    metavar="FILE",
    help="write the results of one study there, and nothing else",
  )
  return parser


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
  """Runs one study or all, prints and writes the tables; returns the rows."""
  parser = arguments()
  options = parser.parse_args(argv)
  if options.json and options.study == "all":
    parser.error("argument --json: a file is for one study: name it in place of all")
  import jax
  from rich.console import Console

  from studies import _page

  if options.device:
    platform = {"gpu": "cuda"}.get(options.device, options.device)
    jax.config.update("jax_platforms", platform)
  console = Console()
  rows = []
  for study in studies.STUDIES if options.study == "all" else (options.study,):
    if options.draw:
      mine = studies.load(study)
    else:
      path = options.json or (None if options.quick else studies.results(study))
      mine = studies.measure(study, options.quick, path, console.log)
      console.print(_page.tables(study, mine), markup=False, soft_wrap=True)
    if not options.quick and not options.json:
      _page.draw(study, mine)
      _page.update(study, mine)
    rows += mine
  return rows


if __name__ == "__main__":
  main()
