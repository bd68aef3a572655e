"""A threshold from the log of a run: `python -m optax_clip --help`."""

import argparse
from collections.abc import Sequence
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
  """Runs the command; what is wrong ends it with code 2 and one line on stderr."""
  parser = _Parser(prog="python -m optax_clip", description=__doc__)
  add = parser.add_argument
  verbs = "a max_norm that clips spikes and few other steps; or what METHODs would do"
  add("command", choices=("suggest", "replay"), help=verbs)
  add("log", help="what a trainer wrote: CSV, TSV, JSON, text, TensorBoard's events")
  methods = "for replay, as autoclip, clip_by_global_norm:1.0 or zclip:2.5,decay=.9"
  add("methods", nargs="*", default=[], metavar="METHOD", help=methods)
  add("--column", help="the column or key; else the only one named as a gradient norm")
  add("--run", help="the name, or the number from 1, of one of several runs in it")
  share = "for suggest: the share of ordinary steps to clip (default: 0.05, 1 in 20)"
  add("--clipped-share", type=float, metavar="SHARE", help=share)
  clip = "for suggest: the norms were logged after a clip at this limit"
  add("--from-clip", type=float, metavar="LIMIT", help=clip)
  # Methods may stand behind flags.
  options = parser.parse_intermixed_args(arguments)
  try:
    from optax_clip._logs import command

    said = command.answer(options)
  except ModuleNotFoundError as error:
    parser.error(f"{error.name} is missing: pip install 'optax-clip[logs]'")
  except ValueError as error:
    parser.error(str(error))
  try:
    print(said, flush=True)
  except BrokenPipeError:
    # Who reads needs no more, as `head`. Python would flush once more at the end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
  # The accelerator is for the run whose log this is.
  jax.config.update("jax_platforms", "cpu")
  main(sys.argv[1:])
