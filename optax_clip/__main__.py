"""A threshold from the log of a run: `python -m optax_clip --help`."""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import math
import os
import sys
from typing import NoReturn

import jax


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
      log or the arguments, or a library is missing.
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
    from optax_clip._logs import command
    from optax_clip._logs import log as _log

    log = _log.read(options.log, options.column, options.run)
    if options.command == "suggest":
      share, clip = options.clipped_share, options.from_clip
      said = command.suggest(log, share, clip=clip, png=options.png)
    else:
      said = f"\n{command.replay(log, options.methods or command.USUAL)}"
  except ModuleNotFoundError as error:
    parser.error(f"{error.name} is missing: pip install 'optax-clip[logs]'")
  except ValueError as error:
    parser.error(str(error))
  try:
    print(f"{command.about(options.log, log)}\n{said}", flush=True)
  except BrokenPipeError:
    # Who reads needs no more, as `head`. Python would flush once more at the end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _number(words: str, is_allowed: Callable[[float], bool]) -> Callable[[str], float]:
  def convert(text: str) -> float:
    try:
      value = float(text)
    except ValueError:
      value = math.nan
    if not is_allowed(value):
      raise argparse.ArgumentTypeError(f"{text!r} is no number {words}")
    return value

  return convert


def _parser() -> _Parser:
  parser = _Parser(prog="python -m optax_clip", description=__doc__)
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
  log = _Parser(add_help=False)
  add = log.add_argument
  add("log", help="what a trainer wrote: CSV, TSV, JSON, text, TensorBoard's events")
  add("--column", help="the column or key; else the only one named as a gradient norm")
  add("--run", help="the name, or the number from 1, of one of several runs in it")
  suggest = commands.add_parser(
    "suggest", parents=[log], help="a max_norm that clips spikes and few other steps"
  )
  suggest.add_argument(
    "--clipped-share",
    type=_number("of at least 0 and below 1: 0.05 is 1 in 20", lambda x: 0 <= x < 1),
    default=0.05,
    metavar="SHARE",
    help="the share of ordinary steps to clip (default: %(default)s)",
  )
  suggest.add_argument(
    "--from-clip",
    type=_number("above 0", lambda x: 0 < x < math.inf),
    metavar="LIMIT",
    help="the norms were logged after a clip at this limit",
  )
  suggest.add_argument("--png", metavar="FILE", help="also draw this file")
  replay = commands.add_parser(
    "replay", parents=[log], help="what methods would have allowed at these steps"
  )
  replay.add_argument(
    "methods",
    nargs="*",
    metavar="METHOD",
    help="as autoclip, clip_by_global_norm:1.0 or autoclip:percentile=50,window=200",
  )
  return parser


if __name__ == "__main__":
  # The accelerator is for the run whose log this is.
  jax.config.update("jax_platforms", "cpu")
  main(sys.argv[1:])
