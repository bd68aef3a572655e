"""The tests that optax ships in its own package, run on our functions.

Nobody here wrote them. The installed optax's test modules are loaded while every
reference to a clipping function or a norm, in every module of optax, points at
the function of the same name in this package. Each test must pass, and must have
called ours: a log of the calls of every replaced function proves that the swap is
real, and the last tests here prove that a wrong function is noticed.

Two kinds of tests run:

* ``swap``: tests of clipping, and of norms of trees.
* ``within``: tests of optax's wrappers (`apply_if_finite`, `masked`, `chain`,
  `MultiSteps`, ...). The plain optimizers that these tests wrap are preceded by
  one of our transformations, with a limit of inf, which must change nothing.

What the installed optax does not have is skipped with a reason that names it. A
test that fails on optax's own functions too (a JAX that is newer than that
optax, say) is skipped with that reason. What differs by design is listed in
`EXPECTED_DIFFERENCES`, and must then indeed fail.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import functools
import importlib.util
import os
import pathlib
import re
import sys
from types import ModuleType
from typing import NamedTuple
import unittest
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_clip

pytestmark = pytest.mark.programs

ROOT = pathlib.Path(optax.__file__).parent

DROP_INS = (
  "adaptive_grad_clip",
  "clip",
  "clip_by_block_rms",
  "clip_by_global_norm",
  "per_example_global_norm_clip",
  "per_example_layer_norm_clip",
  "unitwise_clip",
  "unitwise_norm",
)


class Source(NamedTuple):
  """Tests of one file of optax: those whose id matches a pattern."""

  path: str
  pattern: str
  kind: str


SOURCES = (
  Source("transforms/_clipping_test.py", r".", "swap"),
  Source("transforms/_monitoring_test.py", r"test_(snapshot|monitor)", "swap"),
  Source("schedules/_inject_test.py", r"test_overriding_hyperparam", "swap"),
  Source("contrib/_privacy_test.py", r".", "swap"),
  Source("_src/float64_test.py", r"outputs_clip", "swap"),
  Source("_src/linear_algebra_test.py", r"test_global_norm", "swap"),
  Source("_src/sharding_test.py", r"_adafactor", "swap"),
  Source("tree_utils/_tree_math_test.py", r"test_tree_l\w+_norm", "swap"),
  Source("projections/_projections_test.py", r"_(ball|l1_sphere|l2_sphere)", "swap"),
  Source("transforms/_conditionality_test.py", r"test_apply_if_finite", "within"),
  Source("transforms/_masking_test.py", r"MaskedTest.*(sgd|empty|state)", "within"),
  # The others of this file take a minute.
  Source(
    "transforms/_accumulation_test.py",
    r"test_multi_steps_(scan|skip_not|zero)",
    "within",
  ),
  Source(
    "transforms/_combining_test.py",
    r"ExtraArgsTest.test_extra_args$|PartitionTest.test_(empty|labels_mismatch)",
    "within",
  ),
  Source("transforms/_freezing_test.py", r"test_selective_transform", "within"),
  Source("transforms/_layouts_test.py", r"test_flatten", "within"),
  Source("_src/sharding_test.py", r"(input|update|jit)_(sgd|adamw?)$", "within"),
)

# `path::Class.test` -> why it differs from optax on purpose. Strict: each must
# fail as long as it is listed.
EXPECTED_DIFFERENCES = {
  "transforms/_clipping_test.py::ClippingTest.test_per_example_global_norm_clip": (
    "passes an integer leaf as gradients, which is a TypeError here; see"
    " test_per_example_global_norm_clip_of_floats"
  ),
  "transforms/_masking_test.py::MaskedTest.test_masked_state_structure": (
    "looks for the optimizer's state at the place where that of the clip is"
  ),
  "transforms/_combining_test.py::ExtraArgsTest.test_extra_args": (
    "passes integer leaves as gradients, which is a TypeError here"
  ),
}


# --- The swap -----------------------------------------------------------------


def tree_norm(tree, ord=None, squared=False):
  """Our norm behind the signature of `optax.tree.norm`."""
  order = float("inf") if ord in ("inf", "infinity") else ord
  norm = optax_clip.global_norm(tree, ord=order)
  return norm**2 if squared else norm


def originals() -> dict[str, Callable]:
  found = {name: getattr(optax.transforms, name) for name in DROP_INS}
  found["global_norm"] = optax.global_norm
  found["tree_norm"] = optax.tree_utils.tree_norm
  return found


def replacements() -> dict[str, Callable]:
  ours = {name: getattr(optax_clip, name) for name in DROP_INS}
  return {**ours, "global_norm": optax_clip.global_norm, "tree_norm": tree_norm}


def logged(function: Callable, calls: list[str]) -> Callable:
  """Adds to `calls` at every call of it and of what it returns."""

  @functools.wraps(function)
  def wrapper(*args, **kwargs):
    calls.append(function.__name__)
    result = function(*args, **kwargs)
    if not isinstance(result, optax.GradientTransformation):
      return result

    init, update = (logged(half, calls) for half in result)
    return result._replace(init=init, update=update)

  return wrapper


def preceded(optimizer: Callable, calls: list[str]) -> Callable:
  """The optimizer, after one of our transformations that changes nothing."""
  clip_by_global_norm = logged(optax_clip.clip_by_global_norm, calls)

  @functools.wraps(optimizer)
  def with_clip(*args, **kwargs):
    return optax.chain(clip_by_global_norm(float("inf")), optimizer(*args, **kwargs))

  return with_clip


Swap = list[tuple[Callable, Callable]]


def swap_of(kind: str, calls: list[str]) -> Swap:
  """What to replace, and by what."""
  if kind == "none":
    return []
  if kind == "within":
    inner = (optax.sgd, optax.adam, optax.adamw)
    return [(optimizer, preceded(optimizer, calls)) for optimizer in inner]
  ours = replacements()
  return [(old, logged(ours[name], calls)) for name, old in originals().items()]


@contextlib.contextmanager
def swapped(swap: Swap) -> Iterator[None]:
  """Points every reference in every module of optax at the replacement."""
  undo = []
  replacement = {id(old): new for old, new in swap}
  try:
    for module in [m for n, m in sys.modules.items() if is_optax(n)]:
      for name, value in list(vars(module).items()):
        if id(value) in replacement:
          undo.append((module, name, value))
          setattr(module, name, replacement[id(value)])
    yield
  finally:
    for module, name, value in undo:
      setattr(module, name, value)


def is_optax(name: str) -> bool:
  return name == "optax" or name.startswith("optax.")


@contextlib.contextmanager
def defaults() -> Iterator[None]:
  """JAX as optax's tests expect it, whatever ours are run with."""
  kept = {
    name: getattr(jax.config, name)
    for name in ("jax_enable_x64", "jax_threefry_partitionable")
  }
  flags = os.environ.get("XLA_FLAGS")
  version = jax.__version__
  with (
    warnings.catch_warnings(),
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    warnings.simplefilter("ignore")
    # Not as a context, which would hide what the tests themselves set.
    jax.config.update("jax_enable_x64", False)
    # Some tests of optax compare versions as strings, and skip themselves on
    # JAX 0.10 since "0.10" < "0.7".
    if jax.__version_info__ >= (0, 10):
      jax.__version__ = "0.9.99"
    try:
      yield
    finally:
      jax.__version__ = version
      for name, value in kept.items():
        jax.config.update(name, value)
      if flags is None:
        os.environ.pop("XLA_FLAGS", None)
      else:
        os.environ["XLA_FLAGS"] = flags


# --- Finding and running ------------------------------------------------------


class Loaded(NamedTuple):
  module: ModuleType
  swap: Swap
  calls: list[str]


@functools.cache
def load(path: str, kind: str) -> Loaded:
  """A test module of optax, under a name of its own for each kind."""
  name = f"upstream_{kind}_{path[:-3].replace('/', '_')}"
  spec = importlib.util.spec_from_file_location(name, ROOT / path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  calls: list[str] = []
  swap = swap_of(kind, calls)
  # Under the swap: tables of parameters bind functions at import.
  with defaults(), swapped(swap):
    spec.loader.exec_module(module)
  return Loaded(module, swap, calls)


def upstream_tests(module: ModuleType) -> list[str]:
  return [
    f"{name}.{test}"
    for name, case in vars(module).items()
    if isinstance(case, type) and issubclass(case, unittest.TestCase)
    for test in unittest.defaultTestLoader.getTestCaseNames(case)
  ]


class Outcome(NamedTuple):
  problems: list[str]
  skipped: list[str]
  calls: list[str]


def run(path: str, kind: str, test: str, swap: Swap | None = None) -> Outcome:
  """Runs one test of optax; `swap` overrides what its kind replaces."""
  loaded = load(path, kind)
  case_name, test_name = test.split(".", 1)
  case = getattr(loaded.module, case_name)(test_name)
  result = unittest.TestResult()
  loaded.calls.clear()
  with defaults(), swapped(loaded.swap if swap is None else swap):
    case.run(result)
  problems = [text for _, text in result.failures + result.errors]
  return Outcome(problems, [why for _, why in result.skipped], list(loaded.calls))


def base_name(name: str) -> str:
  """Without the suffix of chex's variants: `test__with_jit`."""
  return re.sub(r"__with(out)?_\w+$", "", name)


def cases() -> Iterator[pytest.param]:
  installed = f"optax {optax.__version__}"
  for source in SOURCES:

    def absent(reason: str, source: Source = source) -> pytest.param:
      mark = pytest.mark.skip(reason=reason)
      return pytest.param(*source, id=f"{source.kind}:{source.path}", marks=mark)

    if not (ROOT / source.path).exists():
      yield absent(f"{installed} ships no {source.path}")
      continue
    try:
      module = load(source.path, source.kind).module
    except ImportError as error:
      yield absent(f"{source.path} of {installed} needs {error.name}: {error}")
      continue
    tests = [t for t in upstream_tests(module) if re.search(source.pattern, t)]
    if not tests:
      yield absent(f"{source.path} of {installed} has no {source.pattern!r}")
    for test in tests:
      name = f"{source.path}::{test}"
      difference = base_name(name)
      marks = []
      if difference in EXPECTED_DIFFERENCES:
        marks = [
          pytest.mark.xfail(
            strict=True,
            raises=AssertionError,
            reason=EXPECTED_DIFFERENCES[difference],
          )
        ]
      yield pytest.param(
        source.path, test, source.kind, id=f"{source.kind}:{name}", marks=marks
      )


@pytest.mark.parametrize(("path", "test", "kind"), list(cases()))
def test_of_optax(path, test, kind):
  outcome = run(path, kind, test)
  if outcome.skipped:
    pytest.skip(f"optax skips it: {outcome.skipped[0]}")
  if outcome.problems:
    if ours := run(path, "none", test).problems:
      pytest.skip(
        "fails on optax's own functions too, here: " + ours[0].strip().splitlines()[-1]
      )
    raise AssertionError("\n".join(outcome.problems))
  assert outcome.calls, "The test called nothing of this package."


# --- The differences, and the swap itself -------------------------------------

CLIPPING = "transforms/_clipping_test.py"


def test_every_expected_difference_is_among_the_cases():
  """A renamed test upstream must not leave a stale entry behind."""
  names = {base_name(param.id.split(":", 1)[1]) for param in cases()}
  assert set(EXPECTED_DIFFERENCES) <= names


def test_per_example_global_norm_clip_of_floats():
  """The test that has an integer leaf, with that leaf as floats."""

  def of_floats(grads, l2_norm_clip):
    floats = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
    return optax_clip.per_example_global_norm_clip(floats, l2_norm_clip)

  calls = []
  swap = [(optax.transforms.per_example_global_norm_clip, logged(of_floats, calls))]
  test = "ClippingTest.test_per_example_global_norm_clip"
  assert run(CLIPPING, "swap", test, swap).problems == []
  assert calls


def nothing(*args, **kwargs):
  """A transformation that does not clip."""
  del args, kwargs
  return optax.identity()


def unclipped_sum(grads, *args, **kwargs):
  del args, kwargs
  return jax.tree.map(lambda x: x.sum(0), grads), jax.tree.map(lambda x: 0, grads)


WRONG = {
  "adaptive_grad_clip": nothing,
  "clip": nothing,
  "clip_by_block_rms": nothing,
  "clip_by_global_norm": nothing,
  "per_example_global_norm_clip": unclipped_sum,
  "per_example_layer_norm_clip": unclipped_sum,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_function_is_noticed(name):
  test = f"ClippingTest.test_{name}"
  if run(CLIPPING, "none", test).problems:
    pytest.skip(f"{test} fails on optax's own functions too, here")
  wrong = [(getattr(optax.transforms, name), WRONG[name])]
  assert run(CLIPPING, "swap", test, wrong).problems


def test_nothing_stays_swapped():
  run(CLIPPING, "swap", "ClippingTest.test_clip")
  assert optax.clip is optax.transforms.clip
  for name, function in originals().items():
    assert function.__module__.startswith("optax."), name
