"""What clipping costs, read from the compiled program: no timing."""

import re

from helpers.programs import adamw
from helpers.programs import bytes_accessed
from helpers.programs import compiled_step
from helpers.programs import computations
from helpers.programs import equations
from helpers.programs import kernels
from helpers.programs import planned
from helpers.programs import reductions_by_size
from helpers.programs import size
from helpers.programs import temporary
from helpers.registry import FIXED
from helpers.registry import ROWS
from helpers.registry import names
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip

pytestmark = pytest.mark.optimized

WIDTH, LAYERS = 512, 2
OF_LAYERS = [row for row in ROWS if row.layers]


@pytest.fixture(scope="module")
def params():
  """Two million parameters in 10 leaves."""
  shapes = {"in": (WIDTH, WIDTH), "out": (WIDTH, WIDTH), "bias": (WIDTH,), "gain": ()}
  shapes["up"] = (WIDTH, 2 * WIDTH)
  return [
    {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    for _ in range(LAYERS)
  ]


@pytest.fixture(scope="module")
def without(params):
  """The compiled step without clipping."""
  return compiled_step(adamw(), params)


@pytest.mark.foreign  # AdamW of optax mixes dtypes.
class TestMemory:
  @pytest.mark.parametrize(
    "keywords", [{"nonfinite": "zero"}, {"strict": True}, {"record": False}]
  )
  def test_clipping_makes_no_copy_of_the_updates(self, params, without, keywords):
    without = temporary(without)
    clip = optax_clip.clip_by_global_norm(1.0, **keywords)
    assert temporary(compiled_step(adamw(clip), params)) <= without + 2**20

  @pytest.mark.parametrize("row", FIXED, ids=names(FIXED))
  def test_no_transformation_makes_a_copy_of_the_updates(self, params, without, row):
    more = temporary(compiled_step(adamw(row.make()), params)) - temporary(without)
    if row.copies:
      # XLA's CPU backend fuses no selection into a maximum, so that Clippy writes
      # its ratios, and those in larger units.
      assert 1.5 * size(params) <= more <= 2 * size(params) + 2**20
    else:
      assert more <= 2**20

  def test_optax_makes_a_whole_copy(self, params, without):
    without = temporary(without)
    clip = optax.clip_by_global_norm(1.0)
    with_clip = temporary(compiled_step(adamw(clip), params))
    assert with_clip - without >= 0.9 * size(params)


@pytest.mark.foreign
class TestReads:
  def test_each_leaf_is_reduced_once_outside_the_rescue_branch(self, params):
    compiled = compiled_step(adamw(optax_clip.clip_by_global_norm(1.0)), params)
    large = [n for n in reductions_by_size(compiled) if n >= WIDTH * WIDTH]
    expected = [x.size for x in jax.tree.leaves(params) if x.size >= WIDTH * WIDTH]
    assert sorted(large) == sorted(expected)

  def test_the_rescue_branch_is_the_only_conditional(self, params):
    compiled = compiled_step(adamw(optax_clip.clip_by_global_norm(1.0)), params)
    blocks = computations(compiled).values()
    assert sum(len(b.instructions("conditional")) for b in blocks) == 1

  @pytest.mark.parametrize("name", ["clip_by_global_norm", "clip_by_layer_norm"])
  @pytest.mark.usefixtures("no_rescue")
  def test_clipping_touches_one_read_of_the_updates_more(self, params, without, name):
    clip = getattr(optax_clip, name)(1.0, nonfinite="zero")
    more = bytes_accessed(compiled_step(adamw(clip), params))
    more -= bytes_accessed(without)
    assert 0.95 * size(params) <= more <= 1.05 * size(params), more / size(params)

  def test_optax_touches_more(self, params, without):
    clip = optax.clip_by_global_norm(1.0)
    more = bytes_accessed(compiled_step(adamw(clip), params))
    more -= bytes_accessed(without)
    assert more >= 2.5 * size(params)


@pytest.mark.foreign
@pytest.mark.parametrize("record", [True, False, "layers"])
def test_the_coefficient_of_a_unit_is_finished_before_its_elements_are_scaled(record):
  shape = (192, 320)
  params = [jax.ShapeDtypeStruct(shape, jnp.float32) for _ in range(3)]
  clip = optax_clip.adaptive_grad_clip(0.01, record=record)
  entry = compiled_step(adamw(clip), params).as_text().partition("\nENTRY")[2]
  # Rows of an operand with an entry for each unit: of one, or of two side by side.
  units, whole = {"1,320": 1, "2,320": 2}, "192,320"
  of = dict(re.findall(r"%([\w.-]+) = \w+\[([\d,]*)\]", entry))
  # From the kernels that see all elements, the operands that are of units.
  kernels = re.findall(rf"= f32\[{whole}\]\S* fusion\(([^)]*)\)", entry)
  operands = [re.findall(r"%([\w.-]+)", text) for text in kernels]
  seen = [sum(units.get(of.get(x), 0) for x in names) for names in operands]
  assert len(seen) == 3 * len(params)  # Both moments, and the parameter.
  # A value and a unit; all else would be done for each element.
  assert max(seen) == 2


class TestTracing:
  @pytest.mark.parametrize("row", FIXED, ids=names(FIXED))
  def test_one_trace_serves_all_steps_and_thresholds(self, row):
    traces = []
    params = {"w": jnp.ones((3, 4)), "s": jnp.ones(())}

    @jax.jit
    def step(params, state, limit):
      traces.append(1)
      tx = row.make(limit)
      updates, state = tx.update(params, state, params)
      return optax.apply_updates(params, updates), state

    state = row.make(1.0).init(params)
    for limit in (1.0, 0.5, 2.0, 0.0, 1e9):
      params, state = step(params, state, np.float32(limit))
    assert len(traces) == 1

  @pytest.mark.parametrize("row", FIXED, ids=names(FIXED))
  def test_the_program_grows_linearly_with_the_number_of_leaves(self, row):
    def size_of(count):
      tx = row.make()
      leaves = [jax.ShapeDtypeStruct((3,), jnp.float32)] * count
      state = jax.eval_shape(tx.init, leaves)
      jaxpr = jax.make_jaxpr(tx.update)(leaves, state, leaves)
      return len(list(equations(jaxpr.jaxpr)))

    one, two, three = (size_of(n) for n in (50, 100, 150))
    # A jump at a bucket's end aside, equal steps cost equal numbers.
    assert abs((three - two) - (two - one)) <= 0.05 * (two - one) + 20


class TestCompilation:
  @pytest.mark.parametrize("row", OF_LAYERS, ids=names(OF_LAYERS))
  def test_leaves_of_one_shape_share_their_kernels(self, row):
    tx = row.make()

    def number(count):
      leaves = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in [(40,), (300, 200)] * count
      ]
      state = jax.eval_shape(tx.init, leaves)
      return len(kernels(planned(jax.jit(tx.update).lower(leaves, state, leaves))))

    assert number(50) <= number(25) + 5
