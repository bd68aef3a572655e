"""What the scripts in `findings/` say of themselves, and the page that lists them."""

import pathlib
import re

import pytest

pytestmark = pytest.mark.house

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "findings").glob("*.sh"))
PAGE = (ROOT / "docs" / "surprises.md").read_text()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_says_what_was_seen_and_pins_what_it_installs(path):
  text = path.read_text()
  head = " ".join(re.match(r"#!.*\n((?:#.*\n)+)", text)[1].replace("#", " ").split())
  parts = [head.find(part) for part in ("Expected:", "Seen with", "What to do:")]
  assert 0 == parts[0] < parts[1] < parts[2], parts
  assert re.search(r"20\d\d-\d\d-\d\d", head)
  assert "Output" in head
  assert "set -euo pipefail" in text
  assert "mktemp -d" in text
  assert "trap 'rm -rf" in text
  assert not re.search("optax[-_]clip", text)
  code = text.partition("set -euo pipefail")[2].replace("\\\n", " ")
  code = code.replace("2>&1", "")
  installs = re.findall(r"pip\"? (?:install|download) ([^\n;|&)]*)", code)
  assert installs
  for line in installs:
    words = re.sub(r"--\w[\w-]*(=\S+)?|-\w\b|\"\$work\"", " ", line).split()
    assert words
    assert all("==" in word for word in words), line


def test_the_page_lists_every_script_once():
  named = re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+){3,})`", PAGE)
  assert sorted(named) == [path.stem for path in SCRIPTS]
