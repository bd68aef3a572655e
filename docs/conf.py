"""How the guide is built: ``python -m sphinx -W --keep-going docs build/docs``.

With Sphinx, as the docstrings are reStructuredText: it reads their maths, tables and
roles as they are, where a generator for Markdown would need a translation of each. And
``-W`` makes an error of every formula, table and link that it cannot read.

Pages are Markdown. Their ``python`` blocks are run by ``tests/house/test_docs.py``.
"""

from pathlib import Path
import re

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import optax_clip

project = "optax_clip"
author = copyright = "The optax_clip authors"
release = version = optax_clip.__version__

extensions = [
  "myst_parser",
  "sphinx.ext.autodoc",
  "sphinx.ext.mathjax",
  "sphinx.ext.napoleon",
]
# No sphinx.ext.intersphinx: a build must not need, nor depend on, the sites of others.

myst_enable_extensions = ["dollarmath"]
# The anchors of GitHub, where the same files are read.
myst_heading_anchors = 3

# `name` in a docstring is a link where it is a name of this package, else code.
default_role = "py:obj"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
napoleon_attr_annotations = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"optax_clip {version}"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["wide_tables.css"]


class LinkNames(SphinxTransform):
  """Makes links of the public names that pages write as code, as in docstrings.

  Markdown has no role for this that GitHub would show as code as well.
  """

  default_priority = 400
  _call = re.compile(r"(?:optax_clip\.)?([\w.]+)(?:\(.*\))?", re.DOTALL)

  def apply(self, **unused: object) -> None:
    """Wraps each literal that is a public name, or a call of one."""
    if Path(self.env.doc2path(self.env.docname)).suffix != ".md":
      return
    for literal in list(self.document.findall(nodes.literal)):
      match = self._call.fullmatch(literal.astext())
      if not match or isinstance(literal.parent, (nodes.reference, nodes.title)):
        continue
      if isinstance(literal.parent, addnodes.pending_xref) or not _public(match[1]):
        continue
      link = addnodes.pending_xref(
        "",
        refdomain="py",
        reftype="obj",
        reftarget=f"optax_clip.{match[1]}",
        refexplicit=True,
        refdoc=self.env.docname,
        refwarn=True,
      )
      literal.replace_self(link)
      link += literal


def _public(name: str) -> bool:
  """Whether the package has it, directly or in one of its namespaces."""
  value: object = optax_clip
  for part in name.split("."):
    value = None if part.startswith("_") else getattr(value, part, None)
  return getattr(value, "__module__", "").startswith("optax_clip")


def setup(app: Sphinx) -> None:
  """Called by Sphinx."""
  app.add_transform(LinkNames)
