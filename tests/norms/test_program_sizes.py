"""How many operations each leaf adds to a program: what tracing and compiling take."""

from helpers.programs import equations
from helpers.programs import planned
import jax
import jax.numpy as jnp
import pytest

import optax_clip

SHAPES = [(48, 64), (16, 256), (3, 3, 4, 32), (96,)]
# Since JAX 0.12 what leaves share is one equation for each.
SHARED = hasattr(jax, "Inline")
# The most equations that are traced, and lines of the optimised program, for each leaf.
CASES = {
  "global": (optax_clip.clip_by_global_norm(1.0), 3 if SHARED else 6, 17),
  "rms": (optax_clip.clip_by_block_rms(1.0), 20 if SHARED else 60, 70),
  "units": (
    optax_clip.adaptive_grad_clip(0.1),
    105 if SHARED else 250,
    110 if SHARED else 480,
  ),
  "guard": (
    optax_clip.skip_nonfinite(optax_clip.clip_by_global_norm(1.0)),
    6 if SHARED else 14,
    27,
  ),
}


def sizes(tx, copies):
  leaves = [jax.ShapeDtypeStruct(x, jnp.float32) for x in SHAPES * copies]
  state = jax.eval_shape(tx.init, leaves)
  traced = jax.jit(tx.update).trace(leaves, state, leaves)
  # What leaves of one shape share is traced once.
  count = len({id(equation) for equation in equations(traced.jaxpr.jaxpr)})
  return count, planned(traced.lower()).as_text().count(" = ")


@pytest.mark.optimized
@pytest.mark.parametrize("name", CASES)
def test_a_leaf_adds_few_operations(name):
  tx, *most = CASES[name]
  few, many = sizes(tx, 1), sizes(tx, 3)
  added = [(b - a) / (2 * len(SHAPES)) for a, b in zip(few, many, strict=True)]
  assert all(x <= bound for x, bound in zip(added, most, strict=True)), added
