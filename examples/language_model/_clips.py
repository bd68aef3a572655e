"""Which ways to clip are compared, with which optimizers, inside which guard."""

import argparse
import ast
from collections.abc import Callable
import inspect
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_clip


class Method(NamedTuple):
  """Describes a way to clip.

  Attributes:
    build: maps the threshold to the transformation.
    measured: what its norm measures, for the table and the figure.
    flag: the flag, without dashes, that sets the threshold, or the number by which a
      threshold learns; `None` if there is none.
    default: the flag's default.
    after: whether it comes after the optimizer, and compares steps with weights.
    part: for a method that chains several, the one whose record is shown.
  """

  build: Callable[[float], optax.GradientTransformation]
  measured: str
  flag: str | None = None
  default: float = math.inf
  after: bool = False
  part: str = ""


# A new method is one new row.
METHODS = {
  # Nothing is above an infinite limit: this only measures.
  "none": Method(optax_clip.clip_by_global_norm, "global norm"),
  "global": Method(optax_clip.clip_by_global_norm, "global norm", "max-norm", 1.0),
  "layer": Method(
    optax_clip.clip_by_layer_norm, "largest layer norm", "max-layer-norm", 0.3
  ),
  "spectral": Method(
    optax_clip.spectral_clip, "largest singular value", "max-singular", 0.3
  ),
  "spectral-norm": Method(
    optax_clip.clip_by_spectral_norm, "largest spectral norm", "max-spectral", 0.3
  ),
  "rms": Method(optax_clip.clip_by_block_rms, "largest layer RMS", "max-rms", 0.003),
  "agc": Method(optax_clip.adaptive_grad_clip, "largest |g|/|w|", "max-ratio", 0.03),
  "value": Method(
    lambda limit: optax_clip.clip(limit, record=True),
    "largest |g|",
    "max-value",
    0.01,
  ),
  # Those below learn their limits.
  "autoclip": Method(optax_clip.autoclip, "global norm", "percentile", 10.0),
  "layer-percentile": Method(
    optax_clip.clip_by_layer_percentile,
    "largest layer norm",
    "layer-percentile",
    5.0,
  ),
  "history": Method(optax_clip.clip_by_history, "global norm", "sigmas", 3.0),
  "zclip": Method(
    lambda z: optax_clip.zclip(z, max_norm=None), "global norm", "z-threshold", 2.5
  ),
  "adagc": Method(optax_clip.adagc, "largest layer norm", "ratio", 1.05),
  "adaclip": Method(optax_clip.adaclip, "largest |g|", "max-decay", 0.999),
  "adagn": Method(optax_clip.adagn, "largest layer norm", "mean-decay", 0.7),
  "spikes": Method(
    optax_clip.clip_element_spikes, "largest |g|/limit", "theta", 5000.0
  ),
  "stable-spam": Method(
    optax_clip.stable_spam,
    "largest layer norm",
    "max-norm-decay",
    0.999,
    part="stable_spam_adagn",
  ),
  # With the paper's absolute bound, 1e-7, biases would hardly leave zero.
  "clippy": Method(
    lambda share: optax_clip.clippy(share, absolute=0.01),
    "largest |step|/bound",
    "max-share",
    0.1,
    after=True,
  ),
}

# Each: how it is made, how that is written, and its learning rate.
OPTIMIZERS = {
  "sgd": (
    lambda lr: optax.sgd(lr, momentum=0.9),
    "optax.sgd({:g}, momentum=0.9)",
    0.2,
  ),
  "adamw": (optax.adamw, "optax.adamw({:g})", 3e-3),
  "lion": (optax.lion, "optax.lion({:g})", 5e-4),
}

_GUARD = "skip_nonfinite/"


def setting(method: Method, flags: argparse.Namespace) -> float:
  """Returns what the method's flag is set to."""
  return getattr(flags, method.flag.replace("-", "_")) if method.flag else math.inf


def transformation(
  method: Method, flags: argparse.Namespace
) -> optax.GradientTransformation:
  """Clips in the gradients' dtype, optimizes in float32, skips what is not finite."""
  make, _, _ = OPTIMIZERS[flags.optimizer]
  clip, optimizer = method.build(setting(method, flags)), make(flags.lr)
  if flags.dtype != jnp.float32:
    # Adam squares gradients, and must not square float16.
    widen = optax.stateless(lambda updates, _: optax.tree.cast(updates, jnp.float32))
    optimizer = optax.chain(widen, optimizer)
  chain = (optimizer, clip) if method.after else (clip, optimizer)
  return optax_clip.skip_nonfinite(optax.chain(*chain))


def code(name: str, flags: argparse.Namespace) -> str:
  """Writes what `transformation` makes for float32 gradients, to copy it."""
  method = METHODS[name]
  optimizer = OPTIMIZERS[flags.optimizer][1].format(flags.lr)
  if method.flag is None:
    return f"tx = optax_clip.skip_nonfinite({optimizer})"
  clip = f"optax_clip.{_short(method.build(setting(method, flags)))}"
  parts = (optimizer, clip) if method.after else (clip, optimizer)
  chain = f"optax.chain({', '.join(parts)})"
  if len(chain) > 76:
    chain = "optax.chain(\n    " + ",\n    ".join(parts) + ",\n  )"
  return f"tx = optax_clip.skip_nonfinite(\n  {chain}\n)"


def _short(tx: optax.GradientTransformation) -> str:
  """Writes the call that made `tx` without arguments that are the defaults."""
  # They print as calls.
  call = ast.parse(repr(tx), mode="eval").body
  defaults = inspect.signature(getattr(optax_clip, call.func.id)).parameters
  given = ", ".join(
    ast.unparse(keyword)
    for keyword in call.keywords
    if ast.literal_eval(keyword.value) != defaults[keyword.arg].default
  )
  return f"{call.func.id}({given})"


def recorded(method: Method, optimizer_state: Any) -> dict[str, jax.Array]:
  """Returns what method and guard measured and did in the last step, by field."""
  logs = optax_clip.metrics(optimizer_state)
  skipped = logs[f"{_GUARD}steps_skipped"]
  return {
    key.rpartition("/")[2]: value
    for key, value in logs.items()
    if key.startswith(method.part) and not key.startswith(_GUARD)
  } | {"steps_skipped": skipped}
