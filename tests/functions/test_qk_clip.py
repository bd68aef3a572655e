"""QK-Clip against float64, and against fractions: no logit is above tau any more."""

from fractions import Fraction

from helpers import oracles
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import optax_clip

TAU = 10.0
# What float32 weights may lose, and by how much tau is undershot.
MARGIN = 2.5e-6
DTYPES = ("float32", "bfloat16", "float16")
HEADS, EMBED, DIM, TOKENS = 8, 5, 3, 6


compiled = jax.jit(optax_clip.qk_clip, static_argnames=("head_axis", "fused"))


def random_weights(seed, key_heads, dtype="float32", heads=HEADS):
  """Query and key, ``[embed, heads, dim]``; each head of another size."""
  rng = np.random.default_rng(seed)

  def weights(count):
    x = rng.normal(size=(EMBED, count, DIM)) * 3.0 ** rng.normal(size=(count, 1))
    return jnp.asarray(x, dtype)

  return weights(heads), weights(key_heads)


def tokens(seed):
  return np.random.default_rng([seed, 1]).normal(size=(TOKENS, EMBED))


def logits_of(query, key, x):
  """f64[heads, tokens, tokens]; the key head of each group side by side."""
  group = query.shape[1] // key.shape[1]
  q = np.einsum("te,ehd->htd", x, oracles.wide(query))
  k = np.einsum("te,ehd->htd", x, oracles.wide(key)).repeat(group, axis=0)
  return q @ k.transpose(0, 2, 1)


def largest_of(query, key, x):
  return logits_of(query, key, x).max(axis=(1, 2))


def expected(query, key, most, tau, alpha):
  """The factors, transcribed in float64."""
  heads, key_heads = query.shape[1], key.shape[1]
  group = heads // key_heads
  gamma = np.minimum(1, tau / np.where(most > 0, most, tau))
  kappa = gamma.reshape(key_heads, group).min(axis=1) ** (1 - alpha)
  return np.minimum(1, gamma / kappa.repeat(group)), kappa


# --- The bound -----------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("key_heads", [8, 4, 2, 1])
@pytest.mark.parametrize("seed", range(4))
def test_no_logit_is_above_tau(seed, key_heads, alpha):
  query, key = random_weights(seed, key_heads)
  x = tokens(seed)
  most = largest_of(query, key, x)
  new = compiled(query, key, np.float32(most), TAU, alpha=alpha)
  after = largest_of(*new, x)
  assert (most > TAU).any()
  assert (after <= TAU * (1 + 1e-9)).all(), after
  # Who was the worst of its group ends at tau, and not below it.
  worst = most.reshape(key_heads, -1).max(axis=1)
  ends = after.reshape(key_heads, -1)[
    np.arange(key_heads), most.reshape(key_heads, -1).argmax(axis=1)
  ]
  np.testing.assert_allclose(ends, np.minimum(worst, TAU), rtol=MARGIN)
  own, shared = expected(query, key, most, TAU, alpha)
  np.testing.assert_allclose(new[0], oracles.wide(query) * own[:, None], rtol=MARGIN)
  np.testing.assert_allclose(new[1], oracles.wide(key) * shared[:, None], rtol=MARGIN)


def exact_logits(query, key, x, y):
  """The logit of each head as a fraction, and the sum of its negative terms."""
  query, key, x, y = map(oracles.wide, (query, key, x, y))
  found = []
  group = query.shape[1] // key.shape[1]
  for h in range(query.shape[1]):
    terms = [
      Fraction(float(query[i, h, d]))
      * Fraction(float(x[i]))
      * Fraction(float(key[j, h // group, d]))
      * Fraction(float(y[j]))
      for d in range(query.shape[2])
      for i in range(len(x))
      for j in range(len(y))
    ]
    found.append((sum(terms), -sum(min(t, Fraction(0)) for t in terms)))
  return found


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key_heads", [4, 2])
def test_exact_logits_exceed_tau_by_the_documented_rounding_at_most(
  dtype, key_heads, alpha
):
  rounding, scaled = 2 * Fraction(oracles.epsilon(dtype)), 0
  for seed in range(6):
    query, key = random_weights(seed, key_heads, dtype, heads=4)
    rng = np.random.default_rng([seed, 2])
    x, y = (rng.normal(size=EMBED).astype(np.float32) for _ in range(2))
    before = exact_logits(query, key, x, y)
    most = np.float32([float(s) for s, _ in before])
    tau = np.float32(0.05) * np.abs(most).max()
    scaled += int((most > tau).sum())
    new = compiled(query, key, most, tau, alpha=alpha)
    pairs = zip(before, exact_logits(*new, x, y), strict=True)
    for (old, negative), (logit, _) in pairs:
      # Also a head within tau, whose key shrank: that was rounded, too.
      assert logit <= Fraction(float(tau)) + rounding * negative, float(old)
  assert scaled > 6


@pytest.mark.parametrize("dtype", [*DTYPES, "float8_e4m3fn", "float64"])
def test_a_logit_without_negative_terms_never_exceeds_tau_at_all(dtype):
  with jax.enable_x64(dtype == "float64"):
    for seed in range(10):
      query, key = random_weights(seed, 2, dtype, heads=4)
      query, key = abs(query) + query.dtype.type(0.5), abs(key) + key.dtype.type(0.5)
      x = np.random.default_rng(seed).uniform(0.1, 1, EMBED).astype(np.float32)
      before = [s for s, _ in exact_logits(query, key, x, x)]
      most = jnp.asarray(
        [float(s) for s in before], query.dtype if dtype == "float64" else "float32"
      )
      tau = float(np.float32(float(min(before)) * 1.3))
      new = compiled(query, key, most, tau)
      after = [s for s, _ in exact_logits(*new, x, x)]
      assert max(before) > Fraction(tau)
      assert max(after) <= Fraction(tau)
      # The price: a unit in the last place of each of the two.
      worst = int(np.argmax(np.asarray(most)))
      assert after[worst] >= Fraction(tau) * (
        1 - 3 * Fraction(oracles.epsilon(dtype)) - Fraction(MARGIN)
      )


# --- Who is touched ------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_within_tau_stay_bit_for_bit(dtype):
  query, key = random_weights(0, 2, dtype, heads=4)
  # What a multiplication by 1 would lose.
  tiny = oracles.finfo(dtype).smallest_subnormal
  query = query.at[0, 2].set(jnp.asarray([-0.0, tiny, jnp.nan], dtype))
  key = key.at[0, 1].set(jnp.asarray([-0.0, -tiny, jnp.inf], dtype))
  most = jnp.asarray([50.0, 3.0, 10.0, -4.0])
  new_query, new_key = compiled(query, key, most, TAU)
  oracles.assert_identical(query[:, 1:], new_query[:, 1:])
  oracles.assert_identical(key[:, 1], new_key[:, 1])
  assert (new_query[:, 0] != query[:, 0]).all()
  assert (new_key[:, 0] != key[:, 0]).all()


def test_neighbours_in_a_group_shrink_with_their_key_and_keep_their_weights():
  query, key = random_weights(0, 1, heads=4)
  x = tokens(0)
  most = jnp.asarray([40.0, 20.0, 8.0, -1.0])
  new_query, new_key = compiled(query, key, most, TAU)
  # The key by 1/2; the second head has nothing left to do, the third neither.
  np.testing.assert_allclose(new_key, key / 2, rtol=MARGIN)
  np.testing.assert_allclose(new_query[:, 0], query[:, 0] / 2, rtol=MARGIN)
  oracles.assert_identical(query[:, 2:], new_query[:, 2:])
  ratio = logits_of(new_query, new_key, x) / logits_of(query, key, x)
  for head, by in enumerate([1 / 4, 1 / 2, 1 / 2, 1 / 2]):
    np.testing.assert_allclose(ratio[head], by, rtol=2 * MARGIN)


def test_with_an_alpha_of_1_neighbours_keep_their_logits():
  query, key = random_weights(0, 1, heads=4)
  most = jnp.asarray([40.0, 20.0, 8.0, -1.0])
  new_query, new_key = compiled(query, key, most, TAU, alpha=1)
  oracles.assert_identical(key, new_key)
  oracles.assert_identical(query[:, 2:], new_query[:, 2:])
  np.testing.assert_allclose(new_query[:, 0], query[:, 0] / 4, rtol=MARGIN)
  np.testing.assert_allclose(new_query[:, 1], query[:, 1] / 2, rtol=MARGIN)


def test_with_an_alpha_of_0_queries_stay():
  query, key = random_weights(0, 4, heads=4)
  most = jnp.asarray([40.0, 20.0, 8.0, -1.0])
  new_query, new_key = compiled(query, key, most, TAU, alpha=0)
  oracles.assert_identical(query, new_query)
  oracles.assert_identical(key[:, 2:], new_key[:, 2:])
  np.testing.assert_allclose(new_key[:, 0], key[:, 0] / 4, rtol=MARGIN)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_no_weight_ever_grows(alpha):
  rng = np.random.default_rng(0)
  for _ in range(20):
    query, key = jnp.ones((8, 1)), jnp.ones((2, 1))
    most = jnp.asarray(TAU * 10 ** rng.normal(size=8), jnp.float32)
    new = compiled(query, key, most, TAU, alpha=alpha)
    assert all((x <= 1).all() for x in new)


def test_a_second_time_changes_nothing():
  query, key = random_weights(3, 2)
  x = tokens(3)
  new = compiled(query, key, np.float32(largest_of(query, key, x)), TAU)
  again = compiled(*new, np.float32(largest_of(*new, x)), TAU)
  oracles.assert_identical(new, again)


# --- Numbers that say little ---------------------------------------------------


@pytest.mark.parametrize("size", [np.nan, np.inf, -np.inf, 0.0, -0.0, -1e30, 1e-40])
@pytest.mark.parametrize("tau", [1.0, 1e-30, 3e38, np.inf])
def test_what_never_scales(size, tau):
  if tau < size < np.inf:
    return
  query, key = random_weights(0, 2, heads=4)
  most = jnp.full(4, size, jnp.float32)
  oracles.assert_identical((query, key), optax_clip.qk_clip(query, key, most, tau))


def test_what_is_not_finite_hides_no_neighbour():
  query, key = jnp.ones((4, 1)), jnp.ones((2, 1))
  most = jnp.asarray([np.nan, 40.0, np.inf, 40.0])
  new_query, new_key = compiled(query, key, most, TAU)
  np.testing.assert_allclose(new_key[:, 0], [0.5, 0.5], rtol=MARGIN)
  np.testing.assert_allclose(new_query[:, 0], [1, 0.5, 1, 0.5], rtol=MARGIN)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
  ("size", "tau"), [(3.4e38, 1e-3), (3.4e38, 1e-25), (1e30, 1e-30), (1e-30, 1e-37)]
)
def test_the_whole_range_of_floats(size, tau, alpha):
  """Tau over S is no float, and the weights are not lost."""
  query, key = jnp.full((1, 1), 1e30), jnp.full((1, 1), 1e30)
  new = compiled(query, key, jnp.full(1, size), tau, alpha=alpha)
  gamma = np.float64(np.float32(tau)) / np.float64(np.float32(size))
  for x, share in zip(new, (alpha, 1 - alpha), strict=True):
    # The exponents are in the hundreds: so is the error of a power, in epsilons.
    np.testing.assert_allclose(x, np.float32(1e30) * gamma**share, rtol=5e-5)
  product = oracles.wide(new[0]) * oracles.wide(new[1])
  bound = np.float64(np.float32(1e30)) ** 2 * gamma
  assert (product <= bound).all()
  np.testing.assert_allclose(product, bound, rtol=MARGIN)


@pytest.mark.parametrize("tau", [np.nan, 0.0, -1.0])
def test_a_traced_tau_that_is_none_never_scales(tau):
  query, key = random_weights(0, 2, heads=4)
  new = jax.jit(lambda t: optax_clip.qk_clip(query, key, jnp.full(4, 30.0), t))(tau)
  oracles.assert_identical((query, key), new)


def test_tau_and_alpha_may_be_traced():
  query, key = random_weights(0, 2, heads=4)
  most = jnp.full(4, 40.0)
  clip = jax.jit(
    lambda tau, alpha: optax_clip.qk_clip(query, key, most, tau, alpha=alpha)
  )
  for tau, alpha in ((10.0, 0.5), (2.0, 1.0), (5.0, 0.0)):
    got = clip(tau, alpha)
    want = compiled(query, key, most, tau, alpha=alpha)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=MARGIN), got, want)


# --- Layouts -------------------------------------------------------------------


def spread(x, layout):
  """``[embed, heads, dim]`` in another layout; and its axis of heads, fused or not."""
  embed, heads, dim = x.shape
  return {
    "heads in the middle": (x, -2, False),
    "heads first": (jnp.transpose(x, (1, 0, 2)), 0, False),
    "heads last": (jnp.transpose(x, (2, 0, 1)), 2, False),
    "fused": (x.reshape(embed, heads * dim), -1, True),
    "fused first": (x.reshape(embed, heads * dim).T, 0, True),
  }[layout]


LAYOUTS = ["heads first", "heads last", "fused", "fused first"]


@pytest.mark.parametrize("key_heads", [8, 2, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, key_heads):
  query, key = random_weights(1, key_heads)
  most = np.float32(largest_of(query, key, tokens(1)))
  want = compiled(query, key, most, TAU)
  laid = [spread(x, layout) for x in (query, key)]
  got = compiled(
    laid[0][0], laid[1][0], most, TAU, head_axis=laid[0][1], fused=laid[0][2]
  )
  for x, y in zip(want, got, strict=True):
    oracles.assert_identical(spread(x, layout)[0], y)


def test_a_bias_is_scaled_with_its_kernel():
  query, key = random_weights(1, 4)
  most = np.float32(largest_of(query, key, tokens(1)))
  want = compiled(query, key, most, TAU)
  trees = [{"kernel": x, "bias": x[0]} for x in (query, key)]
  got = compiled(*trees, most, TAU)
  for new, alone in zip(got, want, strict=True):
    oracles.assert_identical(new, {"kernel": alone, "bias": alone[0]})


def test_axes_by_path():
  query, key = random_weights(1, 4)
  most = np.float32(largest_of(query, key, tokens(1)))
  want = compiled(query, key, most, TAU)
  turned = jnp.transpose(key, (1, 0, 2))
  for axis in (
    {"^query": 1, "^key": 0},
    lambda path, leaf: 1 if path == "query" else 0,
  ):
    new_query, new_key = optax_clip.qk_clip(query, turned, most, TAU, head_axis=axis)
    oracles.assert_identical(want[0], new_query)
    oracles.assert_identical(want[1], jnp.transpose(new_key, (1, 0, 2)))


def layers():
  stacks = [random_weights(seed, 2) for seed in range(3)]
  most = np.float32([largest_of(*w, tokens(i)) for i, w in enumerate(stacks)])
  want = [compiled(*w, m, TAU) for w, m in zip(stacks, most, strict=True)]
  query, key = (jnp.stack(side) for side in zip(*stacks, strict=True))
  return query, key, most, [jnp.stack(side) for side in zip(*want, strict=True)]


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_layers_that_are_stacked(place):
  query, key, most, want = layers()
  query, key = (jnp.moveaxis(x, 0, place) for x in (query, key))
  heads = 1 if place > 1 else 2
  got = compiled(query, key, most, TAU, head_axis=(place, heads))
  for x, y in zip(want, got, strict=True):
    oracles.assert_identical(jnp.moveaxis(x, 0, place), y)


def test_layers_that_are_stacked_and_fused():
  query, key, most, want = layers()
  flat = [x.reshape(*x.shape[:2], -1) for x in (query, key)]
  got = compiled(*flat, most, TAU, head_axis=(0, -1), fused=True)
  for x, y in zip(want, got, strict=True):
    oracles.assert_identical(x.reshape(*x.shape[:2], -1), y)


def test_layers_by_vmap_and_by_scan():
  query, key, most, want = layers()

  def clip(query, key, most):
    return optax_clip.qk_clip(query, key, most, TAU)

  by_vmap = jax.jit(jax.vmap(clip))(query, key, most)
  _, by_scan = jax.lax.scan(
    lambda carry, layer: (carry, clip(*layer)), 0, (query, key, jnp.asarray(most))
  )
  for got in (by_vmap, by_scan):
    for x, y in zip(want, got, strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-6)
    within = (most <= TAU) & np.repeat((most.reshape(3, 2, 4) <= TAU).all(2), 4, axis=1)
    assert within.any()
    same = np.asarray(got[0] == query).all(axis=(1, 3))
    assert same[within].all()


def test_multi_head_latent_attention():
  """Content by the root each, the rotary query by gamma, the rotary key not at all."""
  rng = np.random.default_rng(0)
  shapes = [(EMBED, 4, DIM), (EMBED, 4, DIM), (EMBED, 4, 2), (EMBED, 1, 2)]
  content_query, content_key, rotary_query, rotary_key = (
    jnp.asarray(rng.normal(size=shape) * 2, jnp.float32) for shape in shapes
  )
  x = tokens(0)

  def largest(*parts):
    content, rotary = logits_of(*parts[:2], x), logits_of(*parts[2:], x)
    return (content + rotary).max(axis=(1, 2))

  most = largest(content_query, content_key, rotary_query, rotary_key)
  tau = float(np.median(most))
  new_query, new_key = compiled(content_query, content_key, np.float32(most), tau)
  new_rotary, nothing = compiled(rotary_query, None, np.float32(most), tau)
  assert nothing is None
  gamma = np.minimum(1, tau / most)[:, None]
  np.testing.assert_allclose(
    new_query, oracles.wide(content_query) * gamma**0.5, rtol=MARGIN
  )
  np.testing.assert_allclose(
    new_key, oracles.wide(content_key) * gamma**0.5, rtol=MARGIN
  )
  np.testing.assert_allclose(
    new_rotary, oracles.wide(rotary_query) * gamma, rtol=MARGIN
  )
  after = largest(new_query, new_key, new_rotary, rotary_key)
  assert (after <= tau * (1 + 1e-9)).all()
  np.testing.assert_allclose(after, np.minimum(most, tau), rtol=MARGIN)
  oracles.assert_identical(new_query[:, most < tau], content_query[:, most < tau])


# --- Meshes --------------------------------------------------------------------


@pytest.mark.mesh
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("key_heads", [8, 4])
def test_sharded_weights(kind, fused, key_heads):
  query, key = random_weights(1, key_heads)
  most = np.float32(largest_of(query, key, tokens(1)))
  want = compiled(query, key, most, TAU)
  axis, spec = (-1, P(None, "model")) if fused else (-2, P(None, "model", None))
  if fused:
    query, key = (x.reshape(EMBED, -1) for x in (query, key))
    want = [x.reshape(EMBED, -1) for x in want]
  mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
  with jax.set_mesh(mesh):
    query, key = (jax.device_put(x, NamedSharding(mesh, spec)) for x in (query, key))
    for logits in (P(), P("model")):
      got = jax.jit(
        lambda q, k, s: optax_clip.qk_clip(q, k, s, TAU, head_axis=axis, fused=fused)
      )(query, key, jax.device_put(most, NamedSharding(mesh, logits)))
      for x, y in zip(want, got, strict=True):
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, spec), y.ndim)
        np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.mesh
def test_shard_map_with_heads_on_eight_devices():
  query, key = random_weights(1, 8)
  batch = np.stack([tokens(seed) for seed in range(2)]).astype(np.float32)
  auto = (AxisType.Auto, AxisType.Auto)
  mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=auto)
  heads = P(None, "model", None)

  def local(query, key, batch):
    q, k = (jnp.einsum("bte,ehd->bthd", batch, w) for w in (query, key))
    most = optax_clip.max_attention_logits(q, k, scale=1.0)
    most = jax.lax.pmax(most, "data")
    return (*optax_clip.qk_clip(query, key, most, TAU), most)

  *got, most = jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(heads, heads, P("data")),
      out_specs=(heads, heads, P("model")),
    )
  )(query, key, batch)
  exact = np.max([largest_of(query, key, x) for x in batch], axis=0)
  np.testing.assert_allclose(most, exact, rtol=1e-5)
  want = compiled(query, key, most, TAU)
  for x, y in zip(want, got, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-6)
  assert (largest_of(*got, batch.reshape(-1, EMBED)[:TOKENS]) <= TAU * 1.00001).all()


# --- The measurement -----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key_heads", [6, 2, 1])
@pytest.mark.parametrize("masked", ["nothing", "causal", "padding", "both"])
def test_the_largest_logits(masked, key_heads, dtype):
  rng = np.random.default_rng(0)
  query = jnp.asarray(rng.normal(size=(2, 5, 6, 4)), dtype)
  key = jnp.asarray(rng.normal(size=(2, 5, key_heads, 4)), dtype)
  seen = np.ones((2, 6, 5, 5), bool)
  mask = None
  if masked in ("padding", "both"):
    mask = rng.uniform(size=(2, 1, 1, 5)) < 0.7
    seen &= mask
  if masked in ("causal", "both"):
    seen &= np.tril(np.ones((5, 5), bool))
  k = oracles.wide(key).repeat(6 // key_heads, axis=2)
  logits = np.einsum("bthd,bshd->bhts", oracles.wide(query), k) / 2
  want = np.where(seen, logits, -np.inf).max(axis=(0, 2, 3))
  got = jax.jit(
    lambda q, k: optax_clip.max_attention_logits(
      q, k, mask, is_causal=masked in ("causal", "both")
    )
  )(query, key)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=2e-6)


def test_the_logits_of_float16_do_not_overflow():
  query = jnp.full((1, 1, 4), 300.0, jnp.float16)
  got = optax_clip.max_attention_logits(query, query, scale=1.0)
  np.testing.assert_array_equal(got, [4 * 300.0**2])


def test_a_nan_is_seen_where_it_is_seen():
  query = jnp.ones((3, 2, 4)).at[0, 0, 0].set(jnp.nan)
  got = optax_clip.max_attention_logits(query, jnp.ones((3, 2, 4)))
  np.testing.assert_array_equal(got, [np.nan, 2.0])
  hidden = jnp.ones((3, 3), bool).at[0].set(False)
  got = optax_clip.max_attention_logits(query, jnp.ones((3, 2, 4)), hidden)
  np.testing.assert_array_equal(got, [2.0, 2.0])


def test_of_nothing_there_is_no_largest():
  query = jnp.ones((3, 2, 4))
  got = optax_clip.max_attention_logits(query, query, jnp.zeros((), bool))
  np.testing.assert_array_equal(got, [-np.inf, -np.inf])
  oracles.assert_identical((query, query), optax_clip.qk_clip(query, query, got, TAU))


def test_the_log_sum_exp_bounds_the_largest_logit():
  """What the guide says of what kernels return."""
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.normal(size=(1, 7, 2, 4)) * 4, jnp.float32) for _ in range(2))
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    _, residual = jax.nn.dot_product_attention(q, k, k, return_residual=True)
  residual = np.asarray(residual).max(axis=(0, 1))
  most = optax_clip.max_attention_logits(q, k)
  assert residual.shape == most.shape
  assert (residual >= most).all()
  assert (residual <= most + np.log(7)).all()


# --- Errors --------------------------------------------------------------------

ONES = jnp.ones((5, 4, 3))


@pytest.mark.parametrize(
  ("call", "error", "words"),
  [
    (lambda f: f(ONES, ONES, jnp.ones(4), 0), ValueError, ["tau", "positive", "0"]),
    (lambda f: f(ONES, ONES, jnp.ones(4), jnp.nan), ValueError, ["tau", "nan"]),
    (lambda f: f(ONES, ONES, jnp.ones(4), alpha=1.5), ValueError, ["alpha", "1.5"]),
    (lambda f: f(ONES, ONES, 3.0), ValueError, ["max_logits", "each query head"]),
    (lambda f: f(ONES, ONES, [1, 2, 3, 4]), ValueError, ["max_logits", "int32[4]"]),
    (
      lambda f: f(ONES, ONES, jnp.ones(4), head_axis=-1),
      ValueError,
      ["head_axis", "query", "[3]", "[4]"],
    ),
    (
      lambda f: f(ONES, ONES, jnp.ones(4), head_axis=3),
      ValueError,
      ["head_axis=3", "(5, 4, 3)"],
    ),
    (
      lambda f: f(ONES, ONES, jnp.ones((5, 4)), head_axis=(1, 1)),
      ValueError,
      ["twice"],
    ),
    (
      lambda f: f(ONES, ONES, jnp.ones((5, 4))),
      ValueError,
      ["head_axis", "(0, -2)"],
    ),
    (
      lambda f: f(ONES, ONES[:, :3], jnp.ones(4)),
      ValueError,
      ["3 heads", "4 query heads"],
    ),
    (
      lambda f: f(ONES, ONES[..., :2], jnp.ones(2), head_axis=-1, fused=True),
      ValueError,
      ["query", "[3]", "fused"],
    ),
    (
      lambda f: f(jnp.ones((5, 4), jnp.int32), None, jnp.ones(4), head_axis=1),
      TypeError,
      ["query", "int32"],
    ),
    (
      lambda f: f(ONES, {"kernel": ONES, "bias": ONES[:, :2]}, jnp.ones(4)),
      ValueError,
      ["key", "[2, 4]"],
    ),
    (
      lambda f: f(ONES, ONES, jnp.ones(4), head_axis={"^q": -2, "keys": -2}),
      ValueError,
      ["head_axis", "'keys'", "query"],
    ),
  ],
)
def test_errors_name_the_argument(call, error, words):
  with pytest.raises(error) as caught:
    call(optax_clip.qk_clip)
  for word in words:
    assert word in str(caught.value), (word, str(caught.value))


# How heads of queries and of keys lie on a mesh whose types say it: sizes of the mesh,
# and which of its axes divide them.
HEADS_ON_MESHES = {
  "all devices": ((8,), "a", None),
  "both axes, keys one": ((2, 4), ("a", "b"), "a"),
  "both axes, keys the other": ((4, 2), ("a", "b"), "b"),
}


@pytest.mark.mesh
@pytest.mark.parametrize("kind", HEADS_ON_MESHES)
def test_fewer_key_heads_than_devices(kind):
  """Explicit axes, as `jax.make_mesh` makes them: there is nothing to do."""
  sizes, heads, key_heads = HEADS_ON_MESHES[kind]
  mesh = jax.make_mesh(sizes, ("a", "b")[: len(sizes)])
  query, key = random_weights(1, 2)
  most = np.float32(largest_of(query, key, tokens(1)))

  def placed(x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))

  def clipped(query, key, most):
    flat = [x.reshape(EMBED, -1) for x in (query, key)]
    return [
      *optax_clip.qk_clip(query, key, most, TAU),
      *optax_clip.qk_clip(*flat, most, TAU, head_axis=-1, fused=True),
      *optax_clip.qk_clip(query[None], key[None], most[None], TAU, head_axis=(0, -2)),
    ]

  arguments = (
    placed(query, None, heads),
    placed(key, None, key_heads),
    placed(most, heads),
  )
  want = jax.jit(clipped)(query, key, most)
  got = jax.jit(clipped)(*arguments)
  for x, y in zip(want, got, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-6)
  for old, new in zip(arguments, got[:2], strict=False):
    assert new.sharding.is_equivalent_to(old.sharding, new.ndim)


# Where queries and keys are divided: batch, positions, heads, dimensions.
LOGITS_ON_MESHES = {
  "heads": ((8,), (None, None, "a"), ()),
  "batch and heads": ((2, 4), ("a", None, "b"), ("a",)),
  "heads of both": ((2, 4), (None, None, ("a", "b")), (None, None, "a")),
  "batch of the query": ((2, 4), ("a", None, "b"), ()),
  "dimensions": ((2, 4), (None, None, "a", "b"), (None, None, "a", "b")),
  "positions of the key": ((2, 4), (None, None, "b"), (None, "b")),
  "only the key": ((2, 4), (), (None, None, "a")),
}


@pytest.mark.mesh
@pytest.mark.parametrize("kind", LOGITS_ON_MESHES)
def test_logits_of_heads_on_meshes(kind):
  sizes, query_spec, key_spec = LOGITS_ON_MESHES[kind]
  mesh = jax.make_mesh(sizes, ("a", "b")[: len(sizes)])
  rng = np.random.default_rng(0)
  query = rng.normal(size=(2, 4, 8, 4)).astype(np.float32)
  key = rng.normal(size=(2, 4, 2, 4)).astype(np.float32)

  def largest(query, key):
    return optax_clip.max_attention_logits(query, key, is_causal=True)

  got = jax.jit(largest)(
    jax.device_put(query, NamedSharding(mesh, P(*query_spec))),
    jax.device_put(key, NamedSharding(mesh, P(*key_spec))),
  )
  np.testing.assert_allclose(got, jax.jit(largest)(query, key), rtol=1e-6)
