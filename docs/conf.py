"""How the guide is built: ``python -m sphinx -W --keep-going docs build/docs``.

With Sphinx, as the docstrings are reStructuredText: it reads their maths, tables and
roles as they are, where a generator for Markdown would need a translation of each. And
``-W`` makes an error of every formula, table and link that it cannot read.

Pages are Markdown that GitHub shows as well. Their ``python`` blocks are run by
``tests/house/test_docs.py``, those in ``notebooks`` by the build. Comments say what
GitHub need not know: ``<!-- tabs -->`` and ``<!-- index: words -->``, see below.
"""

import hashlib
import os
from pathlib import Path
import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from jax.typing import ArrayLike
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.util.typing import stringify_annotation
from sphinx.writers.html5 import HTML5Translator

import optax_clip

project = "optax_clip"
author = copyright = "The optax_clip authors"
release = version = optax_clip.__version__

extensions = [
  # The parser of MyST, which also runs notebooks.
  "myst_nb",
  "sphinx.ext.autodoc",
  "sphinx.ext.autosummary",
  "sphinx.ext.intersphinx",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
  "sphinx_copybutton",
  "sphinx_design",
]

myst_enable_extensions = ["colon_fence", "dollarmath"]
# The anchors of GitHub, where the same files are read.
myst_heading_anchors = 3

# The build runs notebooks, each in a process of its own, and fails if one does. It
# keeps what they print until they or the package change.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).parents[1]
_sources = b"".join(x.read_bytes() for x in sorted(ROOT.glob("optax_clip/**/*.py")))
_version = hashlib.sha256(_sources).hexdigest()[:12]
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "build" / f"notebooks-{_version}")
nb_execution_timeout = 240
nb_execution_raise_on_error = True
nb_merge_streams = True

# `name` in a docstring is a link where it is a name of this package, else code.
default_role = "py:obj"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autosummary_generate = False
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
napoleon_attr_annotations = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# What others document, and where. The lists are in the repository, with the names that
# pages link: a build must not need, nor depend on, the sites of others.
_OTHERS = {
  "flax": "https://flax.readthedocs.io/en/latest/",
  "jax": "https://docs.jax.dev/en/latest/",
  "numpy": "https://numpy.org/doc/stable/",
  "optax": "https://optax.readthedocs.io/en/latest/",
  "python": "https://docs.python.org/3/",
}
intersphinx_mapping = {
  name: (url, f"_inventories/{name}.txt") for name, url in _OTHERS.items()
}
# Names as they are imported, and as their documentation has them.
_ELSEWHERE = {
  r"jax\.jaxlib\._jax\.Array": "jax.Array",
  r"jnp\.(.*)": r"jax.numpy.\1",
  r"nnx\.Optimizer": "flax.nnx.optimizer.Optimizer",
  r"nnx\.(.*)": r"flax.nnx.\1",
  r"optax\._src\.base\.(.*)": r"optax.\1",
  r"optax\.(Schedule|inject_hyperparams|linear_schedule)": r"optax.schedules.\1",
}

# Of a session in Python, what was typed; of a shell, all.
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"optax_clip {version}"
html_show_sphinx = False
html_copy_source = False
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["guide.css"]
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
html_math_renderer = "mathml"


class LinkNames(SphinxTransform):
  """Makes links of the names that pages write as code, as in docstrings.

  Markdown has no role for this that GitHub would show as code as well.
  """

  default_priority = 400
  _others = ("jax", "jnp", "nnx", "optax")
  _call = re.compile(r"(?:optax_clip\.)?([\w.]+)(?:\(.*\))?", re.DOTALL)

  def apply(self, **unused: object) -> None:
    """Wraps each literal that is a public name, a name of JAX, or a call of one."""
    if Path(self.env.doc2path(self.env.docname)).suffix != ".md":
      return
    for literal in list(self.document.findall(nodes.literal)):
      match = self._call.fullmatch(literal.astext())
      if not match or isinstance(literal.parent, (nodes.reference, nodes.title)):
        continue
      if isinstance(literal.parent, addnodes.pending_xref):
        continue
      is_ours = _public(match[1])
      if not is_ours and match[1].partition(".")[0] not in self._others:
        continue
      link = addnodes.pending_xref(
        "",
        refdomain="py",
        reftype="obj",
        reftarget=f"optax_clip.{match[1]}" if is_ours else match[1],
        refexplicit=True,
        refdoc=self.env.docname,
        refwarn=is_ours,
      )
      literal.replace_self(link)
      link += literal


def _find_elsewhere(
  app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, text: nodes.Node
) -> nodes.Node | None:
  """Finds names of other modules of the package, and of others by another name."""
  if node.get("refdomain") != "py":
    return None
  target = node["reftarget"]
  for prefix in ("optax_clip.", "optax_clip.states."):
    where = node["refdoc"], app.builder, "obj", prefix + target, node, text
    if found := env.domains.python_domain.resolve_xref(env, *where):
      return found
  for imported, documented in _ELSEWHERE.items():
    if match := re.fullmatch(imported, target):
      node["reftarget"] = match.expand(documented)
      return None
  return None


class DarkFigures(SphinxTransform):
  """Adds the twin of a figure for dark pages, where there is one.

  The style of the theme shows one of both. The twin of ``figure.svg`` is
  ``figure_dark.svg``.
  """

  default_priority = 10

  def apply(self, **unused: object) -> None:
    """Looks for twins beside the files."""
    folder = Path(self.env.doc2path(self.env.docname)).parent
    for image in list(self.document.findall(nodes.image)):
      light = Path(image["uri"])
      dark = light.with_stem(f"{light.stem}_dark")
      if not (folder / dark).exists():
        continue
      twin = image.deepcopy()
      twin["uri"] = str(dark)
      image["classes"].append("only-light")
      twin["classes"].append("only-dark")
      image.parent.insert(image.parent.index(image) + 1, twin)


class TablesOfSentences(SphinxTransform):
  """Marks tables that hold sentences, which a phone shows cell below cell.

  Those of numbers scroll there, and their first column stays.
  """

  default_priority = 600

  def apply(self, **unused: object) -> None:
    """Looks for a cell that would not fit beside another one."""
    for table in self.document.findall(nodes.table):
      cells = (
        cell
        for body in table.findall(nodes.tbody)
        for cell in body.findall(nodes.entry)
      )
      if any(len(cell.astext()) > 40 for cell in cells):
        table["classes"].append("sentences")


def _public(name: str) -> bool:
  """Whether the package has it, directly or in one of its namespaces."""
  value: object = optax_clip
  for part in name.split("."):
    value = None if part.startswith("_") else getattr(value, part, None)
  return getattr(value, "__module__", "").startswith("optax_clip")


def _inline_math(page: HTML5Translator, node: nodes.math) -> None:
  page.body.append(_mathml(node, as_block=False))
  raise nodes.SkipNode


def _block_of_math(page: HTML5Translator, node: nodes.math_block) -> None:
  page.body.append(f'<div class="math">{_mathml(node, as_block=True)}</div>')
  raise nodes.SkipNode


def _mathml(node: nodes.Element, as_block: bool) -> str:
  """Returns a formula in the markup of browsers, which needs no script.

  The converter of docutils raises for what it does not know, which ends the build.
  """
  formula = re.sub(r"\\dots\b", r"\\ldots", node.astext())
  return tex2mathml(formula, as_block=as_block)


# What the repository's files are called here: included, so that they have a page.
_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def _make_tabs(app: Sphinx, page: str, source: list[str]) -> None:
  """Makes tabs of what stands between ``<!-- tabs -->`` and ``<!-- /tabs -->``.

  A line in bold is the name of a tab, and a title where GitHub shows the page.
  """

  def tabs(match: re.Match[str]) -> str:
    items = re.sub(r"^\*\*(.+)\*\*$", r":::\n:::{tab-item} \1", match[1], flags=re.M)
    return "::::{tab-set}\n" + items.strip().removeprefix(":::\n") + "\n:::\n::::"

  pattern = r"^<!-- tabs -->$(.*?)^<!-- /tabs -->$"
  source[0] = re.sub(pattern, tabs, source[0], flags=re.DOTALL | re.MULTILINE)


def _index_words(app: Sphinx, page: str, source: list[str]) -> None:
  """Makes index entries of ``<!-- index: words, more words -->``.

  The search puts the page first for these words, whatever other pages say.
  """

  def entry(match: re.Match[str]) -> str:
    # Main entries, "!", are what the search lists before all else.
    words = ", ".join(f"! {word}" for word in match[1].split(", "))
    return f"```{{index}} {words}\n```"

  pattern = r"^<!-- index: (.+) -->$"
  source[0] = re.sub(pattern, entry, source[0], flags=re.MULTILINE)


class IndexSections(SphinxTransform):
  """Has index words lead to their section, not to an empty mark in it.

  The search shows the text of the place, and fails in the browser where there is none.
  """

  # Before Sphinx collects the words.
  default_priority = 840

  def apply(self, **kwargs: object) -> None:
    """Replaces the places of the words."""
    for node in self.document.findall(addnodes.index):
      above = node.parent
      while above is not None and not isinstance(above, nodes.section):
        above = above.parent
      if above is not None:
        node["entries"] = [
          (kind, word, above["ids"][0], main, key)
          for kind, word, _, main, key in node["entries"]
        ]


def _offer_notebook(app: Sphinx, page: str, source: list[str]) -> None:
  """Adds a link to the executed notebook below the title of a page that is one."""
  if page.startswith("notebooks/"):
    name = page.rpartition("/")[2]
    link = f"{{nb-download}}`Download this notebook <{name}.ipynb>`"
    source[0] = re.sub(r"^# .+$", rf"\g<0>\n\n{link}", source[0], count=1, flags=re.M)


def _link_pages(app: Sphinx, page: str, source: list[str]) -> None:
  """Turns links to files that GitHub shows into links to their pages, or downloads."""
  for file, included in _PAGES.items():
    source[0] = source[0].replace(f"](../{file}", f"]({included}")
  outside = r"\[([^\]]+)\]\((\.\./(?!\w+\.md)[\w./]+\.md)\)"
  if page.count("/") == 0:
    source[0] = re.sub(outside, r"{download}`\1 <\2>`", source[0])


# What the types of the package's signatures spell out, and the names of it.
_ARRAY_LIKE = stringify_annotation(ArrayLike, "smart")
_TYPES = {
  _ARRAY_LIKE: "~jax.typing.ArrayLike",
  "~collections.abc.Callable[[~typing.Any], ~jax.typing.ArrayLike]": "~optax.Schedule",
  "~collections.abc.Callable[[~jax.typing.ArrayLike], ~jax.typing.ArrayLike]": (
    "~optax.Schedule"
  ),
}


def _short_types(
  app: Sphinx,
  what: str,
  name: str,
  value: object,
  options: object,
  signature: str | None,
  returns: str | None,
) -> tuple[str | None, str | None]:
  """Returns a signature with names in place of the types that they stand for."""
  for spelled, short in _TYPES.items():
    signature = signature and signature.replace(spelled, short)
    returns = returns and returns.replace(spelled, short)
  return signature, returns


def setup(app: Sphinx) -> None:
  """Called by Sphinx."""
  app.add_transform(DarkFigures)
  app.add_transform(IndexSections)
  app.add_transform(LinkNames)
  app.add_transform(TablesOfSentences)
  # Before intersphinx, which asks for what this has renamed.
  app.connect("missing-reference", _find_elsewhere, priority=400)
  app.connect("autodoc-process-signature", _short_types)
  app.connect("source-read", _link_pages)
  app.connect("source-read", _make_tabs)
  app.connect("source-read", _index_words)
  app.connect("source-read", _offer_notebook)
  app.add_html_math_renderer(
    "mathml",
    inline_renderers=(_inline_math, None),
    block_renderers=(_block_of_math, None),
  )
