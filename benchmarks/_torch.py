"""What PyTorch's clip costs in the same run, where PyTorch is installed."""

from collections.abc import Callable
import importlib.util
from typing import Any

import jax.numpy as jnp


def installed() -> bool:
  """Returns whether there is a PyTorch to compare with."""
  return importlib.util.find_spec("torch") is not None


def _parameters(shapes: list[tuple[int, ...]], dtype: Any) -> tuple[list[Any], str]:
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  kind = getattr(torch, str(jnp.dtype(dtype)))
  parameters = []
  for shape in shapes:
    parameter = torch.nn.Parameter(torch.full(shape, 0.01, dtype=kind, device=device))
    parameter.grad = torch.randn(shape, device=device).to(kind)
    parameters.append(parameter)
  return parameters, device


def _waited(run: Callable[[], Any], device: str) -> Callable[[], None]:
  import torch

  def waited() -> None:
    run()
    if device == "cuda":
      torch.cuda.synchronize()

  return waited


def clip(shapes: list[tuple[int, ...]], dtype: Any) -> Callable[[], None]:
  """Makes a run of `torch.nn.utils.clip_grad_norm_` alone, on these shapes."""
  import torch

  parameters, device = _parameters(shapes, dtype)
  return _waited(
    lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True), device
  )


def steps(shapes: list[tuple[int, ...]], dtype: Any) -> dict[str, Callable[[], None]]:
  """Makes runs of a fused AdamW step, without and with the clip, on one model."""
  import torch

  parameters, device = _parameters(shapes, dtype)
  optimizer = torch.optim.AdamW(parameters, 1e-3, fused=True)

  def clipped() -> None:
    # It always multiplies, by 1 where the norm is within the limit.
    torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
    optimizer.step()

  return {
    "none": _waited(optimizer.step, device),
    "torch.nn.utils.clip_grad_norm_": _waited(clipped, device),
  }
