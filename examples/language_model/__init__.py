"""A small language model, trained with a clip: `python -m examples.language_model`.

`train` is the program, and `checkpoints` a file to copy into programs of your own.
"""
