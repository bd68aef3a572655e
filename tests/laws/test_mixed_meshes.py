"""Meshes of two kinds of axes, and states made before there was a mesh."""

import contextlib

import jax
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import measures
from optax_clip import thresholds

pytestmark = pytest.mark.mesh

EXPLICIT = jax.sharding.AxisType.Explicit
AUTO = jax.sharding.AxisType.Auto

# The types of axes x and y, of two devices each, and for each leaf its spec.
MESHES = {
  "explicit": ((EXPLICIT, EXPLICIT), {"w": jax.P("x", "y"), "b": jax.P("x")}),
  "explicit, auto": ((EXPLICIT, AUTO), {"w": jax.P("x", "y"), "b": jax.P("x")}),
  "auto, explicit": ((AUTO, EXPLICIT), {"w": jax.P("x", "y"), "b": jax.P()}),
}


def inner():
  return optax.chain(optax_clip.clip_by_global_norm(1.0), optax.sgd(0.5))


GUARDS = {
  "skip_nonfinite": lambda: optax_clip.skip_nonfinite(inner()),
  "skip_spikes": lambda: optax_clip.skip_spikes(inner(), thresholds.history(6, 4)),
  "dynamic_loss_scale": lambda: optax_clip.dynamic_loss_scale(inner(), 4.0),
  "both": lambda: optax_clip.dynamic_loss_scale(optax_clip.skip_spikes(inner()), 4.0),
}
METHODS = {
  **GUARDS,
  "observe": lambda: optax_clip.observe(inner(), window=4),
  "observe layers": lambda: optax_clip.observe(
    optax.sgd(0.5), window=4, measure=measures.layer_norm(), record="layers"
  ),
  "observe a guard": lambda: optax_clip.observe(GUARDS["skip_nonfinite"](), window=4),
  "autoclip": lambda: optax_clip.autoclip(50, window=4, record="layers"),
  "adaptive_grad_clip": lambda: optax_clip.adaptive_grad_clip(0.1),
  "adagc": optax_clip.adagc,
  "stable_spam": optax_clip.stable_spam,
  "clip_element_spikes": lambda: optax_clip.clip_element_spikes(4.0, 0.5),
}

PARAMS = {
  "w": np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4),
  "b": np.full(8, 0.5, np.float32),
}


def gradients(factor):
  return jax.tree.map(lambda x: x * np.float32(factor), PARAMS)


def update(tx):
  return tx.update


def whole(tx):
  return lambda g, state, params: optax_clip.guarded_step(tx, g, state, params)


class OnMesh:
  """A transformation on a mesh, with a state that was made there or elsewhere."""

  def __init__(self, name, kind, where, step):
    types, self.specs = MESHES[kind]
    self.mesh = jax.make_mesh(
      (2, 2), ("x", "y"), axis_types=types, devices=jax.devices()[:4]
    )
    tx = METHODS[name]()
    self.step = jax.jit(step(tx))
    self.params = self.put(PARAMS)
    with self if where == "inside" else contextlib.nullcontext():
      self.state = tx.init(self.params)

  def put(self, tree):
    def put(x, spec):
      return jax.device_put(x, jax.NamedSharding(self.mesh, spec))

    return jax.tree.map(put, tree, self.specs)

  def __enter__(self):
    self.entered = jax.set_mesh(self.mesh)
    self.entered.__enter__()

  def __exit__(self, *error):
    self.entered.__exit__(*error)


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize(
  ("name", "step"),
  [*((name, update) for name in METHODS), *((name, whole) for name in GUARDS)],
  ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_a_step_is_accepted_and_keeps_the_types_of_its_state(name, step, kind, where):
  """Traced only: what is wrong with types shows then."""
  there = OnMesh(name, kind, where, step)
  state = there.state
  with there:
    new, later = there.step.trace(there.put(PARAMS), state, there.params).out_info
  for old, shaped in ((PARAMS, new), (state, later)):
    jax.tree.map(_assert_same_type, old, shaped)


def _assert_same_type(old, shaped):
  assert (old.shape, old.dtype) == (shaped.shape, shaped.dtype)


@pytest.mark.parametrize(
  ("name", "step", "kind"),
  [
    ("skip_nonfinite", update, "auto, explicit"),
    ("both", update, "explicit, auto"),
    ("skip_nonfinite", whole, "explicit, auto"),
    ("observe", update, "explicit"),
  ],
  ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_steps_are_those_of_one_device(name, step, kind):
  tx = METHODS[name]()
  alone, other = jax.jit(step(tx)), tx.init(PARAMS)
  there = OnMesh(name, kind, "outside", step)
  state = there.state
  # Ordinary, broken, and far too large.
  for factor in (1.0, 2.0, np.nan, 1.5, 1e6):
    expected, other = alone(gradients(factor), other, PARAMS)
    with there:
      found, state = there.step(there.put(gradients(factor)), state, there.params)
    for key, x in found.items():
      assert x.sharding.is_equivalent_to(there.params[key].sharding, x.ndim)
    jax.tree.map(_assert_close, (found, state), (expected, other))
  if name == "observe":
    histories = map(optax_clip.norm_history, (state, other))
    np.testing.assert_allclose(*histories, rtol=1e-6)


def _assert_close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
