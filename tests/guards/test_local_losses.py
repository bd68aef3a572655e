"""A loss that each device has of its own batch: copies of the weights decide alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import measures
from optax_clip import thresholds

pytestmark = pytest.mark.mesh

SPEC = jax.P("d")
DEVICES, STEPS = 4, 3


def guard(signals, **keywords):
  return optax_clip.skip_spikes(
    optax.sgd(1.0), thresholds.constant(4.0), signals=signals, **keywords
  )


def trained(tx, losses, grads):
  """Weights and states of one device after steps with these losses and gradients."""
  params = {"w": jnp.zeros(2)}

  def step(carry, now):
    params, state = carry
    loss, grad = now
    updates, state = tx.update({"w": grad}, state, params, loss=loss)
    return (optax.apply_updates(params, updates), state), None

  (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), (losses, grads))
  return params["w"], state


def by_pmap(tx, losses, grads):
  devices = jax.devices()[:DEVICES]
  return jax.pmap(functools.partial(trained, tx), "d", devices=devices)(losses, grads)


def by_shard_map(tx, losses, grads):
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh(
    (DEVICES,), ("d",), axis_types=auto, devices=jax.devices()[:DEVICES]
  )

  def local(losses, grads):
    found = trained(tx, losses[0], grads[0])
    return jax.tree.map(lambda x: x[None], found)

  return jax.jit(
    jax.shard_map(
      local, mesh=mesh, in_specs=(SPEC, SPEC), out_specs=SPEC, check_vma=False
    )
  )(losses, grads)


ways = pytest.mark.parametrize("way", [by_pmap, by_shard_map])

# At the second step one device has a bad batch: 12 above its level, but 3 on the mean
# over the devices. At the third all have one.
LOSSES = np.ones((DEVICES, STEPS), np.float32)
LOSSES[1, 1], LOSSES[:, 2] = 13.0, 100.0
GRADS = np.ones((DEVICES, STEPS, 2), np.float32)


@ways
@pytest.mark.parametrize("signals", [("loss",), ("norm", "loss")])
def test_copies_with_the_same_gradients_stay_copies(way, signals):
  weights, state = way(guard(signals), LOSSES, GRADS)
  # By the mean loss the second step is taken, and the third is not.
  np.testing.assert_array_equal(weights, np.full((DEVICES, 2), -2.0))
  for leaf in jax.tree.leaves(state):
    np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
  found = optax_clip.metrics(state)
  np.testing.assert_array_equal(found["skip_spikes/spike_loss"], [100.0] * DEVICES)


@ways
def test_models_of_their_own_judge_their_own_loss(way):
  """An ensemble with a member on each device: their gradients differ."""
  grads = GRADS * np.linspace(0.5, 1, DEVICES, dtype=np.float32)[:, None, None]
  weights, state = way(guard(("loss",)), LOSSES, grads)
  skipped = optax_clip.metrics(state)["skip_spikes/steps_skipped"]
  np.testing.assert_array_equal(skipped, [1, 2, 1, 1])
  taken = np.float32([2, 1, 2, 2])[:, None]
  np.testing.assert_allclose(weights, -taken * grads[:, 0], rtol=1e-6)


@ways
def test_the_record_of_a_guard_without_a_signal_is_that_of_all_copies(way):
  grads = GRADS.copy()
  grads[:, 1] = np.nan
  _, state = way(optax_clip.skip_nonfinite(optax.sgd(1.0)), LOSSES, grads)
  loss = optax_clip.metrics(state)["skip_nonfinite/nonfinite_step_loss"]
  np.testing.assert_array_equal(loss, [4.0] * DEVICES)


@pytest.mark.parametrize("own", [False, True])
def test_where_types_tell(own):
  """With types the loss is averaged over axes over which the norms are the same."""
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh(
    (DEVICES,), ("d",), axis_types=auto, devices=jax.devices()[:DEVICES]
  )
  measure = measures.global_norm(axis_name=()) if own else None
  tx = guard(("loss",), measure=measure)

  def local(losses, grads):
    grads = grads[0] if own else jax.lax.pmean(grads[0], "d")
    params = {"w": jnp.zeros_like(grads[0])}
    state = tx.init(params)
    skips = []
    for loss, grad in zip(losses[0], grads, strict=True):
      _, state = tx.update({"w": grad}, state, params, loss=loss)
      skips.append(optax_clip.metrics(state)["skip_spikes/skipped"])
    skips = jnp.stack(skips)[None]
    return skips if own else jax.lax.pcast(skips, "d", to="varying")

  skips = jax.jit(
    jax.shard_map(local, mesh=mesh, in_specs=(SPEC, SPEC), out_specs=SPEC)
  )(LOSSES, GRADS)
  wanted = np.zeros((DEVICES, STEPS))
  wanted[:, 2], wanted[1, 1] = 1, own
  np.testing.assert_array_equal(skips, wanted)
