"""Every list of methods is checked against the one table, `helpers.registry`.

A transformation that is new fails here until each list has it, or says why not.
"""

import inspect
import pathlib
import re

from helpers import learned
from helpers import registry
from helpers import shifts
import optax
import pytest

from benchmarks import compiled
from examples.language_model import _clips as examples
import optax_clip
from optax_clip import thresholds
from studies import _compared as studies

pytestmark = pytest.mark.house

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROWS = {row.name for row in registry.ROWS}
LEARN = {row.name for row in registry.ROWS if row.stateful}
# Takes gradients of each example, and is no transformation.
PER_EXAMPLE = {name for name in optax_clip.__all__ if name.startswith("per_example_")}


def made(build):
  """The names of the functions of this package that `build` calls for its chain."""
  parts = []

  def chain(*transformations):
    parts.extend(transformations)
    return optax.identity()

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(optax, "chain", chain)
    parts.append(build())
  # They print as the calls that made them.
  return set(re.findall(r"\b([a-z_]\w*)\(", repr(parts)))


def table(header):
  """The names in the first column of the one table with this header."""
  (page,) = [page for page in PAGES if header in page.read_text()]
  rows = page.read_text().partition(header)[2].partition("\n\n")[0]
  cells = re.findall(r"^\| (`.*?) \|", rows, flags=re.M)
  return re.findall(r"`(\w+)[(`]", " ".join(cells))


def test_the_table_of_methods_has_every_method():
  names = table("| transformation | limits | source |")
  assert len(names) == len(set(names))
  assert set(names) >= ROWS | PER_EXAMPLE | {"observe"}
  assert set(names) <= set(optax_clip.__all__)
  guards = table("| guard | does not take |\n")
  others = {"guarded_step", "protect"}
  assert set(guards) == set(registry.AROUND) - {"observe"} | others


def test_the_table_of_defaults_has_every_default():
  """Of what learns: each number in a signature stands in its row."""
  header = "| call | a constant in units of gradients | free of units | first limit |"
  text = (
    (ROOT / "docs" / "learned.md").read_text().partition(header)[2].partition("\n\n")[0]
  )
  lines = [line for line in text.splitlines() if line.startswith("| `")]
  calls = {
    name: line
    for line in lines
    for name in re.findall(r"`(?:thresholds\.)?(\w+)\(", line.split("|")[1])
  }
  assert set(calls) >= LEARN | {"geometric", "skip_spikes", "clippy"}
  for name in sorted(LEARN | {"geometric", "clippy"}):
    made = getattr(optax_clip, name, None) or getattr(thresholds, name)
    numbers = re.findall(r"[\d.,]*\d(?:e-\d+)?", calls[name])
    known = {float(x.replace(",", "")) for x in numbers}
    for parameter in inspect.signature(made).parameters.values():
      value = parameter.default
      # 0 and 1 are how an argument says that it does nothing.
      if type(value) in (int, float) and value not in (0, 1):
        assert value in known, (name, parameter)


def test_the_compiled_suite_has_every_transformation():
  methods = compiled.methods()
  assert set(methods) >= ROWS
  for name in ROWS:
    assert name in made(lambda name=name: methods[name].make(optax.identity())), name
  # A guard's method is named by how its step is taken: "update, skip_spikes".
  around = {part for name in methods for part in name.split(", ")}
  assert around >= set(registry.AROUND)


def test_what_learns_is_tested_as_such():
  """`learned.METHODS`: variants of the stateful rows, with short warm-ups."""
  made = {factory.__name__ for factory, *_ in learned.METHODS.values()}
  assert made == LEARN
  for name, (factory, keywords, _) in learned.METHODS.items():
    assert name.startswith(factory.__name__)
    assert keywords.keys() <= inspect.signature(factory).parameters.keys()


def test_every_threshold_is_tried_with_every_measure():
  """`learned.THRESHOLDS`, by the names of `optax_clip.thresholds`."""
  # `by_shape` needs the shapes of matrices: tests/matrices.
  fixed = {"constant", "scheduled", "of", "per_group", "by_shape"}
  assert set(learned.THRESHOLDS) == set(thresholds.__all__) - fixed


def test_the_measured_shifts_are_of_all_that_learn_norms():
  # AdaGN normalizes, stable_spam is two others, and elements have no norm.
  others = {"adagn", "stable_spam", "clip_element_spikes"}
  named = {n.split(",")[0] for n in shifts.METHODS if not n.startswith("thresholds.")}
  assert named == LEARN - others


def test_the_training_script_offers_every_method():
  # Its labels are those of a model.
  others = {"clip_by_group_norm"}
  found = [
    made(lambda m=m: m.build(min(m.default, 1e9))) for m in examples.METHODS.values()
  ]
  assert set().union(*found) & ROWS == ROWS - others


def test_the_studies_compare_every_method_or_it_is_named_here():
  # Not those that bound elements or single weights, need labels of a model, or are
  # one more limit of each layer.
  others = {"clip", "clip_by_group_norm", "clip_by_block_rms", "clippy"}
  others |= {"adaclip", "adagn", "stable_spam", "clip_element_spikes"}
  # Those of singular values have a study of their own.
  others |= {"spectral_clip", "clip_by_spectral_norm"}
  found = [
    made(lambda m=m: m.around(optax.identity())) for m in studies.METHODS.values()
  ]
  assert set().union(*found) & ROWS == ROWS - others
