"""Everything in everything: laws that hold of any two wrappers around any clip.

All ordered pairs of wrappers; kinds of clips and dtypes go round, so that each pair of
a wrapper with one of these is met as well.
"""

from fractions import Fraction
import itertools

from helpers import oracles
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import thresholds

pytestmark = pytest.mark.foreign  # The wrappers of optax mix dtypes.

LIMIT = 0.5
# No power of two, so that unscaling rounds.
SCALE = 3.0
LEAVES = ("a", "b")

CLIPS = {
  "strict": lambda: optax_clip.clip_by_global_norm(LIMIT, strict=True),
  "layers": lambda: optax_clip.clip_by_layer_norm(LIMIT, strict=True),
  "learned": lambda: optax_clip.autoclip(50, window=4, strict=True),
}
DTYPES = ("float32", "bfloat16", "float16")

WRAPPERS = {
  "scale": lambda inner: optax_clip.dynamic_loss_scale(inner, SCALE),
  "skip": lambda inner: optax_clip.skip_spikes(inner, thresholds.history(6, window=8)),
  "observe": lambda inner: optax_clip.observe(inner, window=4),
  "MultiSteps": lambda inner: optax.MultiSteps(inner, 2).gradient_transformation(),
  # These two see one of the two leaves.
  "masked": lambda inner: optax.masked(inner, {"a": True, "b": False}),
  "multi_transform": lambda inner: optax.multi_transform(
    {"clip": inner, "rest": optax.set_to_zero()}, {"a": "clip", "b": "rest"}
  ),
}
PARTIAL = ("masked", "multi_transform")
GUARDS = ("scale", "skip")

# (outer, middle, clip, dtype): a Latin square of the last two.
CASES = [
  (outer, middle, list(CLIPS)[(i + j) % 3], DTYPES[(2 * i + j + i // 3) % 3])
  for (i, outer), (j, middle) in itertools.product(enumerate(WRAPPERS), repeat=2)
  # A mask of what is masked already has another structure.
  if not (outer in PARTIAL and middle in PARTIAL) and outer != middle
]
# What is rounded twice, and has a limit that is exact.
TWICE = [
  ("observe", "scale", "strict", "bfloat16"),
  ("scale", "skip", "strict", "bfloat16"),
]


def test_each_wrapper_meets_each_clip_and_each_dtype():
  for part, options in ((2, CLIPS), (3, DTYPES)):
    for place in (0, 1):
      met = {(case[place], case[part]) for case in CASES}
      assert met == set(itertools.product(WRAPPERS, options))
  assert {case[2:] for case in CASES} == set(itertools.product(CLIPS, DTYPES))


# Steps whose norm is near the limit, one that is broken, and one far above.
STEPS, NEAR, BROKEN, HUGE = 16, 8, 10, 13


def gradients(dtype, scale):
  """Of these steps, times a loss scale."""
  rng = np.random.default_rng(0)
  tree = {
    "a": rng.uniform(-1, 1, (STEPS, 8, 4)),
    "b": rng.uniform(-1, 1, (STEPS, 16)),
  }
  # Within the limit by so little that rounding decides: each leaf, or both.
  for step in range(NEAR):
    for key in tree:
      part = 1 if step % 2 else np.sqrt(0.5)
      tree[key][step] *= part * LIMIT / np.linalg.norm(tree[key][step])
      tree[key][step] *= 1 - 1e-4 * rng.uniform(0, 1)
  return jax.tree.map(lambda x: jnp.asarray(scale * x, dtype), tree)


def described(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


@pytest.mark.parametrize(
  ("outer", "middle", "clip", "dtype"),
  # Each unordered pair once by default.
  [
    *TWICE,
    *(
      pytest.param(*case, marks=() if i % 2 == 0 else pytest.mark.slow)
      for i, case in enumerate(sorted(CASES, key=lambda x: (sorted(x[:2]), x)))
    ),
  ],
)
def test_laws(outer, middle, clip, dtype):
  tx = WRAPPERS[outer](WRAPPERS[middle](CLIPS[clip]()))
  around = (outer, middle)
  grads = gradients(dtype, SCALE if "scale" in around else 1.0)
  params = jax.tree.map(lambda x: x[-1] * 3, grads)
  # A broken step where a guard is to see it: not in an accumulator first.
  guarded = next((i for i, x in enumerate(around) if x in GUARDS), None)
  catches = guarded is not None and "MultiSteps" not in around[:guarded]
  if catches:
    grads["a"] = grads["a"].at[BROKEN, 0, 1].set(np.nan)
  # The square of it is no float.
  grads["a"] = grads["a"].at[HUGE].multiply(1e4 if dtype == "float16" else 1e30)

  start = tx.init(params)

  @jax.jit
  def run(state):
    def step(carry, g):
      state, params = carry
      updates, state = tx.update(g, state, params, loss=jnp.float32(1))
      params = optax.apply_updates(params, updates)
      return (state, params), (updates, params)

    return jax.lax.scan(step, (state, params), grads)

  (last, _), (updates, trajectory) = run(start)

  # Structure and types of the updates and of the state.
  assert described(updates) == described(grads)
  assert described(last) == described(start)
  seen = ["a"] if any(x in PARTIAL for x in around) else list(LEAVES)
  for x in jax.tree.leaves(updates):
    assert np.all(np.isfinite(x))

  # A step that was not taken leaves the parameters as they were, bit for bit.
  if catches:
    for key in seen:
      before, after = (np.asarray(trajectory[key][i]) for i in (BROKEN - 1, BROKEN))
      np.testing.assert_array_equal(before, after)
      assert not np.any(np.float64(updates[key][BROKEN]))

  # No norm exceeds its limit, exactly.
  if clip != "learned":
    groups = [seen] if clip == "strict" else [[key] for key in seen]
    for i, keys in itertools.product(range(STEPS), groups):
      square = oracles.exact_square([updates[key][i] for key in keys])
      assert square <= Fraction(LIMIT) ** 2, (i, keys)
  assert any(np.any(np.float64(x)) for x in jax.tree.leaves(updates))
