"""Examples in docstrings are run; for those of the pages see `test_docs.py`."""

import doctest
import inspect
import re
import textwrap
import types

import jax
import pytest

import optax_clip

pytestmark = pytest.mark.house


def public(module, prefix=""):
  """Every public name of a module that is no module itself."""
  values = {prefix + name: getattr(module, name) for name in module.__all__}
  return {n: v for n, v in values.items() if not isinstance(v, types.ModuleType)}


NAMESPACES = {
  name: getattr(optax_clip, name)
  for name in optax_clip.__all__
  if isinstance(getattr(optax_clip, name), types.ModuleType)
}
PUBLIC = public(optax_clip)
PARTS = {
  name: value
  for namespace, module in NAMESPACES.items()
  for name, value in public(module, f"{namespace}.").items()
}
EVERY = {**PUBLIC, **PARTS}
FUNCTIONS = {n: f for n, f in PUBLIC.items() if inspect.isfunction(f)}
CLASSES = {n: c for n, c in EVERY.items() if inspect.isclass(c)}


def section(text, title):
  """The block under `title:` in a docstring without its indent; may be empty."""
  match = re.search(rf"^{title}:\n((?:(?:[ ].*)?\n)*)", text + "\n", re.MULTILINE)
  return textwrap.dedent(match[1]).strip() if match else ""


def run_examples(name, value):
  finder = doctest.DocTestFinder(recurse=False)
  runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
  output = []
  count = 0
  for test in finder.find(value, name, globs={}):
    count += len(test.examples)
    runner.run(test, out=output.append)
  assert runner.failures == 0, "".join(output)
  return count


@pytest.fixture(autouse=True)
def as_users_run_it():
  """Users' JAX promotes implicitly, and so do optax and Flax."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


# --- Docstrings ---------------------------------------------------------------


@pytest.mark.programs
@pytest.mark.parametrize("name", EVERY)
def test_examples_of_public_names(name):
  run_examples(name, EVERY[name])


@pytest.mark.parametrize("name", ["optax_clip", *NAMESPACES])
def test_modules_are_described(name):
  module = NAMESPACES.get(name, optax_clip)
  assert inspect.getdoc(module)
  run_examples(name, module)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_are_documented(name):
  text = inspect.getdoc(FUNCTIONS[name])
  for title in ("Args", "Returns", "Example"):
    assert section(text, title), f"The docstring of {name} has no {title}: section."
  assert ">>>" in section(text, "Example")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_show_a_result(name):
  """An example that prints nothing checks nothing."""
  examples = doctest.DocTestParser().get_examples(inspect.getdoc(FUNCTIONS[name]))
  assert any(example.want for example in examples)


@pytest.mark.parametrize("name", EVERY)
def test_every_name_has_a_docstring(name):
  # A NamedTuple without one has that of its fields, "Name(a, b)".
  text = inspect.getdoc(EVERY[name])
  assert text
  assert not text.startswith(f"{name.rsplit('.', 1)[-1]}(")


def parameters_of(function):
  kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
  signature = inspect.signature(function)
  return [n for n, p in signature.parameters.items() if p.kind not in kinds]


def described(value):
  """The text for each argument; several may share one: `eps, strict: as in ...`."""
  heads = re.split(
    r"^(\w+(?:, \w+)*):", section(inspect.getdoc(value), "Args"), flags=re.MULTILINE
  )[1:]
  rows = zip(heads[::2], heads[1::2], strict=True)
  return [(name, text) for names, text in rows for name in names.split(", ")]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_described_once(name):
  names = [argument for argument, _ in described(FUNCTIONS[name])]
  assert sorted(names) == sorted(parameters_of(FUNCTIONS[name]))


def homes(text):
  """What of this package an argument's text refers to: as in `a` and `b`."""
  found = re.findall(r"\bas\s+in\s+(`[\w.]+`(?:\s+and\s+`[\w.]+`)*)", text)
  names = {x.removeprefix("optax_clip.") for y in found for x in y.split("`")[1::2]}
  return sorted(x for x in names if not x.startswith("optax."))


REFERRING = [
  pytest.param(argument, homes(text), id=f"{name}-{argument}")
  for name, value in EVERY.items()
  if inspect.isfunction(value)
  for argument, text in described(value)
  if homes(text)
]


@pytest.mark.parametrize(("argument", "places"), REFERRING)
def test_an_argument_is_described_where_another_docstring_says(argument, places):
  found = set()
  for place in places:
    if place in NAMESPACES:
      found.update(re.findall(r"``(\w+)``", inspect.getdoc(NAMESPACES[place])))
    else:
      found.update(x for x, text in described(EVERY[place]) if not homes(text))
  assert argument in found


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_is_described(name):
  fields = getattr(CLASSES[name], "_fields", ())
  described = section(inspect.getdoc(CLASSES[name]), "Attributes")
  for field in fields:
    assert re.search(rf"^{field}:", described, re.MULTILINE), field
