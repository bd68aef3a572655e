"""Types for command-line flags, whose one-line errors say what to do."""

import argparse
from collections.abc import Callable
import math
from typing import Any
from typing import NoReturn

from examples.language_model import _model
from examples.language_model._methods import METHODS


class Parser(argparse.ArgumentParser):
  """Writes errors on one line, without the usage before it."""

  def error(self, message: str) -> NoReturn:
    """Exits with argparse's code."""
    self.exit(2, f"{self.prog}: error: {message}\n")


def methods(value: str) -> list[str]:
  """Parses a comma-separated list of names in `METHODS`."""
  names = [name.strip() for name in value.split(",")]
  for name in names:
    if name not in METHODS:
      raise argparse.ArgumentTypeError(
        f"unknown method {name!r}, choose from {', '.join(METHODS)}"
      )
    if names.count(name) > 1:
      raise argparse.ArgumentTypeError(f"{name!r} is named twice in {value!r}")
  return names


def _checked(
  convert: Callable[[str], Any], accept: Callable[[Any], bool], wanted: str
) -> Callable[[str], Any]:
  """Makes a type for argparse, whose error names the value and what is wanted."""

  def parse_value(text: str) -> Any:
    try:
      value = convert(text)
    except ValueError:
      value = None
    if value is None or not accept(value):
      raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value

  return parse_value


threshold = _checked(float, lambda x: x >= 0, "a number of at least 0")
rate = _checked(float, lambda x: 0 < x < math.inf, "a positive number")
positive = _checked(int, lambda x: x >= 1, "a whole number of at least 1")
natural = _checked(int, lambda x: 0 <= x < 2**32, "a whole number of at least 0")
width = _checked(
  int,
  lambda x: x >= 1 and x % _model.HEAD == 0,
  f"a positive multiple of {_model.HEAD}",
)
