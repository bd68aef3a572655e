"""What JAX knows of the mesh: manual axes, and whether arrays share a device.

The only file that depends on how a JAX version spells these things.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def varying_axes(x: Any) -> tuple[str, ...]:
  """The manual mesh axes over which `x` holds different values, sorted.

  Empty outside of `shard_map`, and inside of it where types are not checked.
  """
  aval = jax.typeof(x)
  manual = getattr(aval, "mat", None)
  varying = manual.varying if manual is not None else getattr(aval, "vma", ())
  return tuple(sorted(varying))


def collected_axes(x: Any, axis_name: Any) -> tuple[str, ...]:
  """The axes over which the norm of `x` is collected."""
  if axis_name == "auto":
    return varying_axes(x)
  return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def collect(
  values: Sequence[Array],
  axes: Sequence[tuple[str, ...]],
  collective: Callable[..., Array],
) -> Array:
  """Stacks scalars, after one collective for each distinct set of axes."""
  distinct = sorted(set(axes))
  stacks = []
  for names in distinct:
    stack = jnp.stack([v for v, a in zip(values, axes, strict=True) if a == names])
    stacks.append(collective(stack, names) if names else stack)
  if len(stacks) == 1:
    return stacks[0]
  # Back into the order in which they came.
  order = sorted(range(len(axes)), key=lambda i: (axes[i], i))
  place = sorted(range(len(order)), key=order.__getitem__)
  return jnp.concatenate(stacks)[jnp.asarray(place)]


def collect_each(
  values: Sequence[Array],
  axes: Sequence[tuple[str, ...]],
  collective: Callable[..., Array],
) -> list[Array]:
  """As `collect`, for scalars that stay apart (or arrays, if no axes)."""
  if not any(axes):
    return list(values)
  return list(collect(values, axes, collective))


def is_explicitly_sharded(x: Any) -> bool:
  """Whether the type of `x` says that a dimension of it is sharded."""
  sharding = getattr(jax.typeof(x), "sharding", None)
  return any(axis is not None for axis in getattr(sharding, "spec", None) or ())


def on_one_device(arrays: Sequence[Any]) -> bool:
  """Whether it is known that concatenating the arrays moves no data.

  True when there is only one device, inside a fully manual `shard_map` or
  `pmap` (arrays are local there), and for concrete arrays on one device.
  """
  if jax.device_count() == 1:
    return True
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:
    manual = jax.sharding.AxisType.Manual
    return all(kind == manual for kind in mesh.axis_types)
  if any(isinstance(x, jax.core.Tracer) for x in arrays):
    return False
  return len({d for x in arrays for d in x.devices()}) == 1


def devices(names: tuple[str, ...]) -> int:
  """How many devices' parts a collective over these axes covers."""
  return jax.lax.psum(1, names) if names else 1


def require_unsharded(arrays: Sequence[Any], what: str) -> None:
  """Raises where a leaf is one device's part and its cut is not known."""
  for x in arrays:
    if names := varying_axes(x):
      raise ValueError(
        f"{what} cannot be taken of a leaf that varies over the mesh axes"
        f" {names}: its type does not say which dimension is sharded. Clip"
        " outside of shard_map, or sum the gradients over these axes first."
      )
