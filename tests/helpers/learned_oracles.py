"""The papers' thresholds in float64 NumPy, step by step, as their authors wrote them.

Independent of the package: nothing here is vectorized over time or groups, keeps
roots instead of squares, or forgets anything.
"""

import numpy as np


def autoclip(norms, q=10.0, window=None):
  """One limit for each step: the percentile of all norms so far."""
  limits = []
  for t in range(len(norms)):
    start = 0 if window is None else max(0, t + 1 - window)
    limits.append(np.percentile(norms[start : t + 1], q))
  return np.array(limits)


def history(norms, sigmas=3.0, window=128, surprise=None):
  """Mean and deviations of the norms before each step, at most so many medians."""
  limits = []
  for t in range(len(norms)):
    past = norms[max(0, t - window) : t]
    ready = len(past) >= max(2, window // 2)
    if ready and surprise is not None:
      past = np.minimum(past, surprise * np.median(past))
    limits.append(np.mean(past) + sigmas * np.std(past) if ready else np.inf)
  return np.array(limits)


class ZClip:
  """The official code's buffer, moments and decision."""

  def __init__(
    self,
    z=2.5,
    alpha=0.97,
    warmup=25,
    mode="adaptive_scaling",
    factor=1.0,
    skip=False,
    eps=1e-6,
  ):
    self.z, self.alpha, self.warmup, self.mode = z, alpha, warmup, mode
    self.factor, self.skip, self.eps = factor, skip, eps
    self.buffer, self.mean, self.var = [], None, None

  def step(self, n):
    """The limit of a spike; else the norm from which it would be one."""
    if self.mean is None:
      self.buffer.append(n)
      if len(self.buffer) == self.warmup:
        self.mean = sum(self.buffer) / len(self.buffer)
        self.var = sum((x - self.mean) ** 2 for x in self.buffer) / len(self.buffer)
      return np.inf
    std = self.var**0.5
    if self.mode == "percentile":
      level = self.mean + self.z * std
      limit = level if n > level else None
    else:
      level = self.mean + self.z * (std + self.eps)
      score = (n - self.mean) / (std + self.eps)
      limit = None
      if score > self.z:
        limit = self.mean
        if self.mode == "adaptive_scaling":
          limit = self.mean + self.z * std / (score / self.z)
    if limit is not None:
      limit *= self.factor
    if limit is None or not self.skip:
      x = n if limit is None else limit
      self.mean = self.alpha * self.mean + (1 - self.alpha) * x
      self.var = self.alpha * self.var + (1 - self.alpha) * (x - self.mean) ** 2
    return level if limit is None else limit


def zclip(norms, **keywords):
  """One limit for each step."""
  clipper = ZClip(**keywords)
  return np.array([clipper.step(n) for n in norms])


def adagc(norms, relative=1.05, beta=0.98, start=101, absolute=1.0):
  """Scales for each step and layer, and the last bounds; steps count from 1."""
  layers = norms.shape[1]
  gamma = np.full(layers, np.inf)
  scales = np.zeros(norms.shape)
  for t, n in enumerate(norms, start=1):
    if t < start:
      h = np.full(layers, min(absolute / np.sqrt(np.sum(n**2)), 1.0))
      gamma = np.minimum(gamma, h * n)
    else:
      h = np.minimum(relative * gamma / n, 1.0)
      gamma = beta * gamma + (1 - beta) * h * n
    scales[t - 1] = h
  return scales, gamma


def adaclip(grads, decay=0.999):
  """The updates of one leaf, step by step."""
  total, updates = 0.0, []
  for t, g in enumerate(grads, start=1):
    largest = np.max(np.abs(g))
    total = decay * total + (1 - decay) * largest
    limit = total / (1 - decay**t)
    updates.append(np.where(np.abs(g) > limit, g / largest * limit, g))
  return np.array(updates)


def adagn(grads, first=0.7, second=0.9, eps=1e-8):
  """The updates of one leaf, step by step."""
  a = b = 0.0
  updates = []
  for t, g in enumerate(grads, start=1):
    n = np.sqrt(np.sum(g**2))
    a = first * a + (1 - first) * n
    b = second * b + (1 - second) * n**2
    mean, square = a / (1 - first**t), b / (1 - second**t)
    updates.append(g / n * mean / (np.sqrt(square) + eps))
  return np.array(updates)


def spam(grads, theta=5000.0, decay=0.999, warmup=1):
  """The updates of one leaf and the last second moment."""
  v, updates = np.zeros(grads.shape[1:]), []
  for t, g in enumerate(grads):
    spike = (g**2 > theta * v) & (v > 0) & (t >= warmup)
    g = np.where(spike, np.sign(g) * np.sqrt(theta * v), g)
    v = decay * v + (1 - decay) * g**2
    updates.append(g)
  return np.array(updates), v


def clippy(u, p, r, a, s=0.0, v=None):
  """The scale of one leaf."""
  bound = r * np.abs(p) + a
  if v is not None:
    bound = bound + s / np.sqrt(v)
  ratios = [b / abs(x) if x != 0 else 1.0 for x, b in zip(u, bound, strict=True)]
  return min(1.0, *ratios)


def geometric(norms, factor=2.0, surprise=3.0, decay=0.98):
  """A multiple of the running mean of logarithms, of the norms before each step."""
  level, limits = None, []
  for t, n in enumerate(norms):
    limits.append(np.inf if level is None else factor * np.exp(level))
    if level is None:
      level = np.log(n)
    else:
      weight = max(1 - decay, 1 / (t + 1))
      level += weight * (min(np.log(n), level + np.log(surprise)) - level)
  return np.array(limits)
