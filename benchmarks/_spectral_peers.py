"""How others clip singular values, written from their papers.

They take stacks ``[..., m, n]`` with m <= n. Matmuls are in float32 unless a dtype says
otherwise, as theirs do by default: bfloat16.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

Array = jax.Array
Coefficients = Sequence[tuple[float, float, float]]

# Jordan et al. 2024: the same quintic five times.
MUON: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5
# Amsel et al. 2025, arXiv:2505.16932, for singular values from 1e-3 up, without the
# safety factor that they take in bfloat16.
POLAR_EXPRESS: Coefficients = (
  (8.28721201814563, -23.595886519098837, 17.300387312530933),
  (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
  (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
  (3.3184196573706015, -2.488488024314874, 0.51004894012372),
  (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
  (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
  (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
  (1.875, -1.25, 0.375),
)


def dot(a: Array, b: Array) -> Array:
  """Multiplies matrices in their own precision."""
  return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def turned(x: Array) -> Array:
  """Transposes the matrices of a stack."""
  return jnp.swapaxes(x, -1, -2)


def size(x: Array) -> Array:
  """Returns the 2-norms of matrices."""
  return jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))


def sign(x: Array, coefficients: Coefficients, dtype: Any) -> Array:
  """Returns the polar factor by quintics."""
  x = (x / (size(x) * 1.01 + 1e-7)).astype(dtype)
  for a, b, c in coefficients:
    square = dot(x, turned(x))
    inner = jnp.asarray(b, dtype) * square + jnp.asarray(c, dtype) * dot(square, square)
    x = jnp.asarray(a, dtype) * x + dot(inner, x)
  return x.astype(jnp.float32)


def hardcap(coefficients: Coefficients, dtype: Any) -> Callable[[Array], Array]:
  """Cesista's hardcap at 1: ``(Q + W - (Q - W) sign(Q - W)' Q) / 2``, Q = sign(W)."""

  def clip(w: Array) -> Array:
    polar = sign(w, coefficients, dtype)
    rest = polar - w
    product = dot(turned(sign(rest, coefficients, dtype)), polar)
    return (polar + w - dot(rest, product)) / 2

  return clip


def spectra(dtype: Any, steps: int = 10) -> Callable[[Array], Array]:
  """SPECTRA's soft clip at 1: ``(I + W W')^(-1/2) W`` by Newton and Schulz."""

  def clip(w: Array) -> Array:
    identity = jnp.eye(w.shape[-2], dtype=dtype)
    square = identity.astype(jnp.float32) + dot(w, turned(w))
    most = size(square)
    y = (square / most).astype(dtype)
    z = jnp.broadcast_to(identity, y.shape)
    for _ in range(steps):
      factor = (3 * identity - dot(z, y)) / 2
      y, z = dot(y, factor), dot(factor, z)
    return dot(z.astype(jnp.float32), w) / jnp.sqrt(most)

  return clip


def by_svd(w: Array) -> Array:
  """Clips at 1 by an SVD in float32."""
  left, s, right = jnp.linalg.svd(w, full_matrices=False)
  return dot(left * jnp.minimum(s, 1)[..., None, :], right)


def by_eigh(w: Array) -> Array:
  """Clips at 1 by the eigenvalues of ``W W'`` in float32."""
  values, vectors = jnp.linalg.eigh(dot(w, turned(w)))
  s = jnp.sqrt(jnp.maximum(values, 1e-30))
  share = jnp.maximum(0, 1 - 1 / s)
  return w - dot(vectors * share[..., None, :], dot(turned(vectors), w))


def muon(w: Array) -> Array:
  """Muon's five steps in float32: the unit of time."""
  return sign(w, MUON, jnp.float32)


METHODS: dict[str, Callable[[Array], Array]] = {
  "hardcap, Muon, bfloat16": hardcap(MUON, jnp.bfloat16),
  "hardcap, Polar Express, float32": hardcap(POLAR_EXPRESS, jnp.float32),
  "SPECTRA, soft, bfloat16": spectra(jnp.bfloat16),
  "SPECTRA, soft, float32": spectra(jnp.float32),
  "SVD": by_svd,
  "eigh": by_eigh,
}
# Their results are compared with the soft form.
SOFT = ("SPECTRA, soft, bfloat16", "SPECTRA, soft, float32", "spectral_clip, soft")
