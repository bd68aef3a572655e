"""A threshold from the log of a run: `python -m optax_clip --help`."""

import argparse
from collections.abc import Sequence
import sys
from typing import NoReturn

import jax

from optax_clip._report import command as _command
from optax_clip._report.logs import LogError
from optax_clip._report.logs import read


class _Parser(argparse.ArgumentParser):
  """Errors are one line, without the usage before it."""

  def error(self, message: str) -> NoReturn:
    """Exits with the code that argparse uses."""
    self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command.

  Args:
    arguments: as on the command line, without the program; `None`: those of it.

  Raises:
    SystemExit: with code 2 and one line on stderr, if something is wrong with the
      log or the arguments.
  """
  parser = _parser()
  # Methods may stand behind flags, which argparse does not foresee.
  options, more = parser.parse_known_args(arguments)
  if options.command == "replay":
    options.methods += [x for x in more if not x.startswith("-")]
    more = [x for x in more if x.startswith("-")]
  if more:
    parser.error(f"unknown arguments: {' '.join(more)}")
  try:
    log = read(options.log, options.column, skip_empty=options.skip_empty)
    rows = f"{len(log.norms)} steps of {log.column}"
    lines = [f"{options.log}: {rows}", *(f"  ({note})" for note in log.notes)]
    if options.command == "suggest":
      said = _command.suggest(options.log, log, options.clipped_share, options.png)
      print("\n".join([*lines, said]))
    else:
      replayed = _command.replay(log, options.methods or _command.USUAL)
      print("\n".join([*lines, ""]))
      _command.show(replayed)
  except LogError as error:
    parser.error(str(error))


def _share(text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = -1.0
  if not 0 <= value < 1:
    raise argparse.ArgumentTypeError(
      f"{text!r} is no number of at least 0 and below 1; 0.05 is one step in twenty"
    )
  return value


def _parser() -> _Parser:
  parser = _Parser(prog="python -m optax_clip", description=__doc__)
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
  log = _Parser(add_help=False)
  log.add_argument(
    "log",
    help="CSV, TSV, JSON lines, a file of TensorBoard's events, or a folder of such",
  )
  log.add_argument(
    "--column",
    metavar="NAME",
    help="the column, key or tag; by default the only one named as a gradient norm",
  )
  log.add_argument(
    "--skip-empty",
    action="store_true",
    help="leave out rows without a number, as of evaluations; else they are NaN",
  )
  suggest = commands.add_parser(
    "suggest", parents=[log], help="a max_norm that clips spikes and few other steps"
  )
  suggest.add_argument(
    "--clipped-share",
    type=_share,
    default=0.05,
    metavar="SHARE",
    help="the share of ordinary steps to clip (default: %(default)s)",
  )
  suggest.add_argument("--png", metavar="FILE", help="also draw this file")
  replay = commands.add_parser(
    "replay", parents=[log], help="what methods would have allowed at these steps"
  )
  replay.add_argument(
    "methods",
    nargs="*",
    metavar="METHOD",
    help="as autoclip, clip_by_global_norm:1.0 or autoclip:percentile=50,window=200;"
    f" of {', '.join(_command.METHODS)} (default: {' '.join(_command.USUAL)})",
  )
  return parser


if __name__ == "__main__":
  # The accelerator is for the run whose log this is.
  jax.config.update("jax_platforms", "cpu")
  main(sys.argv[1:])
