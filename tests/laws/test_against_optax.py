"""Where optax is wrong, what both answer; where it is right, that we agree.

Of each input on which optax errs, both libraries' answers are pinned. Should a
later optax answer rightly, its half of the test is skipped with a message: then
the table of docs/precision.md wants an update.
"""

import functools
import inspect

from helpers.registry import ZERO_IS_MEANT
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip

DROP_INS = (
  "adaptive_grad_clip",
  "clip",
  "clip_by_block_rms",
  "clip_by_global_norm",
  "per_example_global_norm_clip",
  "per_example_layer_norm_clip",
  "unitwise_clip",
  "unitwise_norm",
)

TRANSFORMATIONS = (
  "clip",
  "clip_by_global_norm",
  "clip_by_block_rms",
  "adaptive_grad_clip",
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def implicit_promotion():
  """Optax promotes dtypes and ranks implicitly."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def clipped(library, name, updates, *args, params=None, **kwargs):
  """What one transformation of one library makes of some updates."""
  tx = getattr(library, name)(*args, **kwargs)
  state = tx.init(updates if params is None else params)
  return tx.update(updates, state, params)[0]


def float64_norm(tree):
  leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
  return float(np.linalg.norm(np.concatenate(leaves)))


def is_wrong(condition):
  """Skips the rest of the test if this optax does not err."""
  if not condition:
    pytest.skip(
      f"optax {optax.__version__} is right here, as ours is: if it is new, the"
      " table of docs/precision.md wants an update."
    )


# --- Where optax is wrong -----------------------------------------------------


def test_float16_whose_square_overflows():
  g = jnp.array([300.0], jnp.float16)
  assert clipped(optax_clip, "clip_by_global_norm", g, 1.0) == 1
  is_wrong(clipped(optax, "clip_by_global_norm", g, 1.0) == 0)


def test_bfloat16_sum_over_many_leaves():
  tree = [jnp.ones(1000, jnp.bfloat16)] * 1000
  assert optax_clip.global_norm(tree) == 1000
  is_wrong(optax.tree_utils.tree_norm(tree) == 512)


def test_bfloat16_result_above_its_limit():
  rng = np.random.default_rng(0)
  tree = [jnp.asarray(rng.normal(size=8), jnp.bfloat16) for _ in range(2000)]
  ours = clipped(optax_clip, "clip_by_global_norm", tree, 1.0)
  # Two units in the last place of bfloat16.
  assert float64_norm(ours) <= 1.008
  theirs = clipped(optax, "clip_by_global_norm", tree, 1.0)
  is_wrong(float64_norm(theirs) > 1.5)


def test_float16_whose_squares_underflow():
  g = jnp.full(10**6, 1e-4, jnp.float16)
  exact = float64_norm(g)
  np.testing.assert_allclose(optax_clip.global_norm(g), exact, rtol=1e-6)
  ours = clipped(optax_clip, "clip_by_global_norm", g, 1e-3)
  # 1e-6 is subnormal in float16: spaced by 6e-8.
  assert abs(float64_norm(ours) - 1e-3) <= 1000 * 2.0**-25
  is_wrong(optax.tree_utils.tree_norm(g) == 0)
  np.testing.assert_array_equal(clipped(optax, "clip_by_global_norm", g, 1e-3), g)


@pytest.mark.parametrize("values", [[1e20, 1e20], [3e38] * 4, [1e30, -2e38, 0.0]])
def test_float32_whose_squares_overflow(values):
  g = jnp.array(values, jnp.float32)
  direction = np.asarray(g, np.float64) / float64_norm(g)
  ours = clipped(optax_clip, "clip_by_global_norm", g, 1.0)
  np.testing.assert_allclose(ours, direction, rtol=5e-7)
  is_wrong((clipped(optax, "clip_by_global_norm", g, 1.0) == 0).all())


def test_float32_whose_squares_underflow():
  g = jnp.full(4, 1e-23, jnp.float32)
  ours = clipped(optax_clip, "clip_by_global_norm", g, 1e-24)
  np.testing.assert_allclose(float64_norm(ours), 1e-24, rtol=5e-7)
  theirs = clipped(optax, "clip_by_global_norm", g, 1e-24)
  is_wrong((theirs == g).all())


@ZERO_IS_MEANT
def test_zeros_with_a_limit_of_zero():
  g = jnp.zeros(3)
  np.testing.assert_array_equal(clipped(optax_clip, "clip_by_global_norm", g, 0.0), g)
  is_wrong(jnp.isnan(clipped(optax, "clip_by_global_norm", g, 0.0)).all())


@pytest.mark.parametrize(
  "name", ["clip_by_global_norm", "clip_by_block_rms", "adaptive_grad_clip"]
)
def test_derivative_at_zero(name):
  params = jnp.array([3.0, 4.0])

  def through(library):
    def total(g):
      return clipped(library, name, g, 1.0, params=params).sum()

    return jax.jit(jax.grad(total))(jnp.zeros(2))

  np.testing.assert_array_equal(through(optax_clip), [1, 1])
  is_wrong(jnp.isnan(through(optax)).any())


def test_negative_limit():
  with pytest.raises(ValueError, match=r"max_norm .*-1"):
    optax_clip.clip_by_global_norm(-1.0)
  g = jnp.array([3.0, 4.0])
  try:
    theirs = clipped(optax, "clip_by_global_norm", g, -1.0)
  except ValueError:
    theirs = None
  is_wrong(theirs is not None and (theirs * g < 0).all())


def test_array_limit_of_another_dtype():
  g = jnp.array([3.0, 4.0], jnp.bfloat16)
  limit = jnp.float32(1.0)
  ours = clipped(optax_clip, "clip_by_global_norm", g, limit)
  assert ours.dtype == jnp.bfloat16
  np.testing.assert_allclose(float64_norm(ours), 1.0, rtol=2.0**-8)
  is_wrong(raises(lambda: clipped(optax, "clip_by_global_norm", g, limit)))


def test_injected_limit_with_mixed_dtypes():
  g = {"a": jnp.array([3.0], jnp.bfloat16), "b": jnp.array([4.0], jnp.float32)}

  def injected(library):
    factory = optax.inject_hyperparams(library.clip_by_global_norm)
    tx = factory(max_norm=1.0)
    return jax.jit(tx.update)(g, tx.init(g))[0]

  ours = injected(optax_clip)
  assert jax.tree.map(lambda x: x.dtype, ours) == jax.tree.map(lambda x: x.dtype, g)
  np.testing.assert_allclose(ours["b"], [0.8], rtol=5e-7)
  np.testing.assert_allclose(np.float32(ours["a"]), [0.6], rtol=2.0**-8)
  is_wrong(raises(lambda: injected(optax)))


@pytest.mark.mesh
def test_agc_on_a_mesh_with_explicit_axes():
  count = min(jax.device_count(), 2)
  mesh = jax.make_mesh((count,), ("x",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  values = np.arange(12, dtype=np.float32).reshape(4, 3)
  expected = clipped(
    optax, "adaptive_grad_clip", jnp.asarray(values), 0.1, params=jnp.ones((4, 3))
  )

  def on_mesh(library):
    g, params = (jax.device_put(x, sharding) for x in (values, np.ones_like(values)))
    tx = library.adaptive_grad_clip(0.1)
    return jax.jit(tx.update)(g, tx.init(params), params)[0]

  with jax.set_mesh(mesh):
    ours = on_mesh(optax_clip)
    assert ours.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_allclose(ours, expected, rtol=5e-7)
    explicit = jax.sharding.AxisType.Explicit
    if explicit not in mesh.axis_types:
      pytest.skip("This JAX makes meshes with automatic axes, which optax takes.")
    is_wrong(raises(lambda: on_mesh(optax), Exception))


def test_agc_of_float16():
  g = jnp.array([300.0, 400.0], jnp.float16)
  params = jnp.array([3.0, 4.0], jnp.float16)
  ours = clipped(optax_clip, "adaptive_grad_clip", g, 0.5, params=params)
  np.testing.assert_allclose(np.float32(ours), [1.5, 2.0], rtol=2.0**-10)
  theirs = clipped(optax, "adaptive_grad_clip", g, 0.5, params=params)
  is_wrong((theirs == 0).all())


def raises(function, error=TypeError):
  try:
    function()
  except error:
    return True
  return False


# --- Where optax is right -----------------------------------------------------

SHAPES = [(), (7,), (5, 4), (3, 4, 5), (3, 3, 2, 4), (1, 6), (2, 2, 2, 3, 4)]


def random_tree(seed, scale=1.0, shapes=tuple(SHAPES)):
  rng = np.random.default_rng(seed)
  return {
    f"leaf{i}": jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
    for i, shape in enumerate(shapes)
  }


def assert_ulps(actual, expected, ulps):
  """Equal to a few units in the last place of each element."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_max_ulp(np.asarray(a), np.asarray(b), ulps),
    actual,
    expected,
  )


# Both libraries round the norm, the quotient and each product once; sums of
# different order differ by about as much again.
ULPS = 4


@functools.cache
def both(name, *args):
  """From updates, parameters and a limit to what each library makes of them."""

  @jax.jit
  def run(g, params, limit):
    return [
      clipped(library, name, g, limit, *args, params=params)
      for library in (optax_clip, optax)
    ]

  return run


@ZERO_IS_MEANT
@pytest.mark.parametrize("limit", [0.0, 0.01, 1.0, 100.0, float("inf")])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformations_agree(name, limit):
  # Of rank 5 and more, optax 0.2.6 wants to be told the axes.
  shapes = SHAPES[:-1]
  g, params = random_tree(0, 3.0, shapes), random_tree(10, 1.0, shapes)
  assert_ulps(*both(name)(g, params, limit), ULPS)


@pytest.mark.parametrize("axis", [0, -1, (0, 1)])
def test_agc_agrees_for_given_axes(axis):
  shapes = [(5, 4), (3, 4, 5), (2, 2, 2, 3, 4)]
  g, params = random_tree(0, 3.0, shapes), random_tree(1, 1.0, shapes)
  found = both("adaptive_grad_clip", 1e-2, axis)(g, params, 0.3)
  assert_ulps(*found, ULPS)


def test_agc_agrees_for_small_weights():
  """Below eps, weights count as eps."""
  g, params = random_tree(0, 1.0, SHAPES[:-1]), random_tree(1, 1e-5, SHAPES[:-1])
  assert_ulps(*both("adaptive_grad_clip")(g, params, 0.01), ULPS)


@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_unitwise_norm_agrees(shape):
  x = random_tree(3, 2.0, [shape])["leaf0"]
  assert_ulps(optax_clip.unitwise_norm(x), optax.transforms.unitwise_norm(x), 2)


@pytest.mark.parametrize("axis", [0, -1, (0, 2), (0, 1, 2)])
def test_unitwise_norm_agrees_for_given_axes(axis):
  x = random_tree(4, 2.0, [(3, 4, 5)])["leaf0"]
  ours = optax_clip.unitwise_norm(x, axis)
  assert_ulps(ours, optax.transforms.unitwise_norm(x, axis), 2)


@pytest.mark.parametrize("shape", [(), (7,), (5, 4)])
def test_unitwise_clip_agrees(shape):
  g = random_tree(5, 2.0, [shape])["leaf0"]
  norm = optax.transforms.unitwise_norm(g)
  limit = jnp.asarray(np.random.default_rng(6).uniform(0, 4, shape), jnp.float32)
  ours = optax_clip.unitwise_clip(norm, limit, g)
  assert_ulps(ours, optax.transforms.unitwise_clip(norm, limit, g), ULPS)


def test_unitwise_clip_agrees_below_div_eps():
  g = jnp.array([1e-3, 2e-3])
  norm, limit = jnp.full(2, 2e-3), jnp.full(2, 1e-3)
  args = (norm, limit, g, 0.5)
  ours = optax_clip.unitwise_clip(*args)
  assert_ulps(ours, optax.transforms.unitwise_clip(*args), ULPS)


@jax.jit
def per_example(grads, limit):
  """What each library makes of gradients of several examples."""
  return [
    library.per_example_global_norm_clip(grads, limit)
    for library in (optax_clip, optax)
  ]


@functools.partial(jax.jit, static_argnames="uniform")
def per_example_layers(grads, limit, uniform):
  """The same, clipped by layer."""
  return [
    library.per_example_layer_norm_clip(grads, limit, uniform)
    for library in (optax_clip, optax)
  ]


@pytest.mark.parametrize("limit", [0.0, 0.5, 3.0, float("inf")])
def test_per_example_global_norm_clip_agrees(limit):
  grads = random_tree(7, 1.0, [(6, 3), (6, 2, 4), (6,)])
  (ours, our_count), (theirs, their_count) = per_example(grads, limit)
  assert our_count == their_count
  # Sums over examples may cancel: a bound on the sum, not on each element.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), ours, theirs
  )


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("limit", [0.0, 0.5, 3.0, float("inf")])
def test_per_example_layer_norm_clip_agrees(limit, uniform):
  grads = list(random_tree(8, 1.0, [(6, 3), (6, 2, 4), (6,)]).values())
  found = per_example_layers(grads, limit, uniform)
  (ours, our_counts), (theirs, their_counts) = found
  assert jax.tree.map(int, our_counts) == jax.tree.map(int, their_counts)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), ours, theirs
  )


def test_global_norm_agrees():
  tree = random_tree(9)
  ours, theirs = optax_clip.global_norm(tree), optax.tree_utils.tree_norm(tree)
  assert_ulps(ours, theirs, 2)


# --- The same calls, the same states ------------------------------------------


@pytest.mark.parametrize("name", DROP_INS)
def test_positional_arguments_are_those_of_optax(name):
  def positional(library):
    parameters = inspect.signature(getattr(library, name)).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [(p.name, p.default) for p in parameters if p.kind in kinds]

  # The unitwise functions are public in optax.transforms only.
  assert positional(optax_clip) == positional(optax.transforms)


@pytest.mark.parametrize("name", DROP_INS)
def test_what_is_ours_alone_is_keyword_only(name):
  ours, theirs = (
    inspect.signature(getattr(library, name)).parameters
    for library in (optax_clip, optax.transforms)
  )
  for extra in set(ours) - set(theirs):
    assert ours[extra].kind == inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_unrecorded_states_are_those_of_optax(name):
  params = random_tree(0)

  def chain(clip):
    return optax.chain(clip, optax.adamw(1e-3))

  ours = chain(getattr(optax_clip, name)(1.0, record=False))
  theirs = chain(getattr(optax, name)(1.0))
  state = ours.init(params)
  assert isinstance(state[0], optax.EmptyState)
  assert jax.tree.structure(state) == jax.tree.structure(theirs.init(params))
  _, state = jax.jit(ours.update)(params, state, params)
  assert isinstance(state[0], optax.EmptyState)
  assert jax.tree.structure(state) == jax.tree.structure(theirs.init(params))


def test_run_of_optax_goes_on_with_ours():
  """A state that optax wrote, midway, gives the same trajectory."""
  params = random_tree(0, 1.0, [(4, 3), (3,)])
  grads = [random_tree(seed, 2.0, [(4, 3), (3,)]) for seed in range(1, 7)]
  theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
  ours = optax.chain(
    optax_clip.clip_by_global_norm(1.0, record=False), optax.adam(1e-2)
  )

  updates_of = {tx: jax.jit(tx.update) for tx in (theirs, ours)}

  def after(steps):
    state = theirs.init(params)
    values = params
    for tx, g in steps:
      updates, state = updates_of[tx](g, state, values)
      values = optax.apply_updates(values, updates)
    return values

  switched = after(zip([theirs] * 3 + [ours] * 3, grads, strict=True))
  stayed = after(zip([theirs] * 6, grads, strict=True))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
    switched,
    stayed,
  )


# --- Published numbers --------------------------------------------------------


@pytest.mark.parametrize(
  ("params", "updates", "clipping", "expected"),
  [
    ([3.0, 4.0], [7.0, 24.0], 0.5, [0.7, 2.4]),
    ([3.0, 4.0], [30.0, 40.0], 0.3, [0.9, 1.2]),
    # Weights of zeros count as eps.
    ([0.0, 0.0], [3.0, 4.0], 0.5, [3e-4, 4e-4]),
  ],
)
def test_agc_by_hand(params, updates, clipping, expected):
  ours = clipped(
    optax_clip,
    "adaptive_grad_clip",
    jnp.array(updates),
    clipping,
    params=jnp.array(params),
  )
  np.testing.assert_array_max_ulp(np.asarray(ours), np.float32(expected), 2)


def test_block_rms_by_hand():
  """rms([1, 7]) is 5."""
  ours = clipped(optax_clip, "clip_by_block_rms", jnp.array([1.0, 7.0]), 0.5)
  np.testing.assert_array_max_ulp(np.asarray(ours), np.float32([0.1, 0.7]), 2)


@pytest.mark.parametrize(("eps", "expected"), [(0.0, [0.6, 0.8]), (5.0, [0.3, 0.4])])
def test_global_norm_by_hand(eps, expected):
  g = jnp.array([3.0, 4.0])
  ours = clipped(optax_clip, "clip_by_global_norm", g, 1.0, eps=eps)
  np.testing.assert_array_max_ulp(np.asarray(ours), np.float32(expected), 2)
