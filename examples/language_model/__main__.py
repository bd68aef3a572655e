"""Runs the program: `python -m examples.language_model --help`."""

from examples.language_model import train

if __name__ == "__main__":
  try:
    train.main()
  except KeyboardInterrupt:
    raise SystemExit(130) from None
