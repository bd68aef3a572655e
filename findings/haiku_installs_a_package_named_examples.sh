#!/usr/bin/env bash
# Expected: a wheel installs the packages of its own name.
# Seen with dm-haiku 0.0.17, Python 3.13, 2026-11-30: its wheel holds a top-level
# package `examples` beside `haiku`, which lands in site-packages. A project that runs
# `python -m examples.train` from its own folder `examples` without an `__init__.py`
# gets Haiku's instead, since a regular package wins over a namespace package.
# Output: "['docs', 'examples', 'haiku']".
# What to do: give a folder of one's own that is run as a module an `__init__.py`.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3.13 -m pip download -q --no-deps --dest "$work" dm-haiku==0.0.17
python3.13 - "$work" <<'PYTHON'
import pathlib
import sys
import zipfile

(wheel,) = pathlib.Path(sys.argv[1]).glob("*.whl")
names = zipfile.ZipFile(wheel).namelist()
found = sorted({name.split("/")[0] for name in names if "dist-info" not in name})
print(found)
assert "examples" in found and "haiku" in found
PYTHON
