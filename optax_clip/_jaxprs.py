"""Runs a traced program, whole or in part: the one home of JAX's inner functions."""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr


def run(program: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
  """Computes all results of a program.

  Args:
    program: of `jax.make_jaxpr`; its constants are replaced.
    consts: its constants.
    inputs: the leaves of its arguments.
  """
  return list(jaxpr_as_fun(program.replace(consts=consts))(*inputs))


def run_only(program: Any, used: list[bool], inputs: Sequence[Any]) -> list[Any]:
  """Computes some results of a program, and nothing else.

  Args:
    program: of `jax.make_jaxpr`.
    used: for each of its results, whether it is computed.
    inputs: the leaves of its arguments.
  """
  if not any(used):
    return []
  needed, _ = dce_jaxpr(program.jaxpr, used, instantiate=True)
  # Of the type that this JAX has for programs with their constants.
  return list(jaxpr_as_fun(type(program)(needed, program.consts))(*inputs))
