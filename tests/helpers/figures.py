"""What a figure shows: its data are coloured, its frame and its text are not."""

import matplotlib.image
import numpy as np


def coloured(path):
  """Returns the share of a PNG's pixels that have a colour."""
  pixels = np.asarray(matplotlib.image.imread(path), np.float64)[..., :3]
  return np.mean(np.ptp(pixels, axis=-1) > 0.2)
