"""How records name the entries of their vectors: once, here, for all who read them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
# How much of a rate is of the last step.
RATE_WEIGHT = 0.01


class Slots:
  """Names the entries of a record's vectors, in their order.

  Vectors called ``counts`` are i32, all others f32.
  """

  def __init__(self, **vectors: tuple[str, ...]) -> None:
    """Takes the names by vector."""
    self._vectors = vectors

  def entries(self, record: tuple[Array, ...]) -> dict[str, Array]:
    """Takes a record apart; of a stack of records, the stacks."""
    return {
      name: vector[..., i]
      for names, vector in zip(self._vectors.values(), record, strict=True)
      for i, name in enumerate(names)
    }

  def joined(self, entries: dict[str, Array]) -> dict[str, Array]:
    """Inverts `entries`: makes the vectors of scalars."""
    return {
      vector: jnp.stack([entries[name] for name in names])
      for vector, names in self._vectors.items()
    }

  def blank(self, **others: float) -> dict[str, Array]:
    """Makes vectors of zeros, but for the entries that are given."""
    return {
      vector: jnp.asarray(
        np.asarray([others.get(name, 0) for name in names]),
        jnp.int32 if vector == "counts" else jnp.float32,
      )
      for vector, names in self._vectors.items()
    }

  def span(self, first: str, last: str) -> slice:
    """Locates neighbours in their vector, from the first to the last one."""
    (names,) = (names for names in self._vectors.values() if first in names)
    return slice(names.index(first), names.index(last) + 1)


def reported(record: Any) -> dict[str, Array]:
  """Names the entries of a record for users, with rates that know when they began."""
  found = {name: jnp.asarray(x) for name, x in record.entries().items()}
  steps = jnp.maximum(found["steps"], 1).astype(jnp.float32)
  # The sum of all weights: 1 - 0.99^steps.
  weights = -jnp.expm1(steps * math.log1p(-RATE_WEIGHT))
  return {
    name: jnp.minimum(x / weights, 1) if name.endswith("_rate") else x
    for name, x in found.items()
  }
