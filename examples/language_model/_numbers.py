"""Types for command-line flags, whose one-line errors say what to do."""

import argparse
from collections.abc import Callable
import math
from typing import Any


def checked(
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


threshold = checked(float, lambda x: x >= 0, "a number of at least 0")
rate = checked(float, lambda x: 0 < x < math.inf, "a positive number")
positive = checked(int, lambda x: x >= 1, "a whole number of at least 1")
natural = checked(int, lambda x: 0 <= x < 2**32, "a whole number of at least 0")
