"""The guide in a browser: it fits, its links lead somewhere, its search finds.

Needs ``pip install -e ".[docs,browser]"`` and Chromium, that of the system or of
``playwright install chromium``; skipped without. `OPTAX_CLIP_SITE` names a folder with
the built guide, so as not to build it once more.
"""

import functools
import http.server
import os
import pathlib
import posixpath
import shutil
import subprocess
import sys
import threading
from urllib.parse import quote
from urllib.parse import unquote
from urllib.parse import urldefrag
from urllib.parse import urljoin

import pytest

ROOT = pathlib.Path(__file__).parents[2]
WIDTHS = {"phone": 390, "laptop": 1280}
# Chromium looks for updates and reports; a test needs none of it.
OFFLINE = [
  *("--no-sandbox", "--disable-gpu", "--disable-background-networking"),
  *("--disable-component-update", "--disable-sync", "--no-first-run"),
]

# What people type, and where the answer is.
SEARCHES = {
  "bf16": "faq",
  "FAQ": "faq",
  "freeze": "faq",
  "LoRA": "faq",
  "Muon": "faq",
  "accumulate": "skipping",
  "alert": "watching",
  "norm above max_norm": "faq",
  "loss became NaN": "faq",
  "stop": "watching",
  "AGC": "api/limits",
  "zclip": "api/learned",
  "FSDP": "meshes",
  "checkpoint": "resuming",
  "float16": "precision",
  "layer": "metrics",
  "threshold": "threshold",
  "skip": "skipping",
  "cost": "costs",
  "privacy": "which",
  "skip step": "skipping",
  "resume checkpoint": "resuming",
  "BatchNorm": "skipping",
  "learning rate too high": "notebooks/untuned",
}

# Words of 25 questions from the trackers of optax, JAX, PyTorch, Keras, fairseq and
# others, and the page that answers them.
QUESTIONS = {
  "log gradient norm": "metrics",
  "grad_norm higher than max_norm": "faq",
  "clipping gradient accumulation": "skipping",
  "skip NaN loss": "skipping",
  "FSDP norm": "meshes",
  "minimum loss scale": "faq",
  "norm of each layer": "metrics",
  "frozen parameters": "faq",
  "clip Muon": "matrix_optimizers",
  "AGC last layer": "which",
  "clipnorm": "migrating",
  "value of max_norm": "threshold",
  "normalized gradient": "blocks",
  "overhead": "costs",
  "momentum after a resume": "resuming",
  "loss scale below 1": "faq",
  "debug NaN": "notebooks/nan_hunt",
  "per-example gradients": "which",
  "loss spike": "skipping",
  "update norm spikes": "update_clipping",
  "attention logits": "qk_clip",
  "updates are zero": "notebooks/silent_stall",
  "every step clipped": "faq",
  "Keras optimizer": "trainers",
  "mixture of experts": "meshes",
}

# The contrast of text with what is behind it, as WCAG 2 has it, of each element that
# `selector` finds and that is seen: the least, with its text.
CONTRAST = """
selector => {
  const rgba = color => {
    const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => {
      v /= 255;
      return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const over = (front, back) =>
    [0, 1, 2].map(i => front[3] * front[i] + (1 - front[3]) * back[i]);
  const behind = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      layers.push(rgba(getComputedStyle(e).backgroundColor));
    }
    return layers.reverse().reduce((back, front) => over(front, back), [255, 255, 255]);
  };
  const found = [];
  for (const element of document.querySelectorAll(selector)) {
    const text = [...element.childNodes]
      .filter(node => node.nodeType === Node.TEXT_NODE && node.textContent.trim());
    if (!text.length || !element.checkVisibility({visibilityProperty: true})) continue;
    const back = behind(element);
    const front = over(rgba(getComputedStyle(element).color), back);
    const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), text[0].textContent.trim().slice(0, 40)]);
  }
  return found.sort((x, y) => x[0] - y[0])[0] ?? null;
}
"""

pytestmark = [
  pytest.mark.programs,
  # Of Playwright's event loop, when a test fails.
  pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
  """Serves files and says nothing."""

  def log_message(self, *args):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The built guide."""
  if built := os.environ.get("OPTAX_CLIP_SITE"):
    return pathlib.Path(built).resolve()
  for name in ("sphinx", "furo", "myst_nb", "sphinx_copybutton", "sphinx_design"):
    pytest.importorskip(name, reason='needs pip install -e ".[docs,browser]"')
  out = tmp_path_factory.mktemp("site")
  command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
  done = subprocess.run(
    [*command, str(ROOT / "docs"), str(out)],
    capture_output=True,
    text=True,
    check=False,
    # The tests' devices and flags are not those of a reader.
    env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
  )
  assert done.returncode == 0, done.stderr + done.stdout
  return out


@pytest.fixture(scope="module")
def site(folder):
  """Its address."""
  handler = functools.partial(Quiet, directory=str(folder))
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
  """Chromium, of the system if there is one."""
  api = pytest.importorskip(
    "playwright.sync_api", reason='needs pip install -e ".[docs,browser]"'
  )
  names = ("chromium", "chromium-browser", "google-chrome")
  system = next(filter(None, map(shutil.which, names)), None)
  with api.sync_playwright() as playwright:
    kind = playwright.chromium
    if system is None and not pathlib.Path(kind.executable_path).exists():
      pytest.skip("needs Chromium: playwright install chromium")
    launched = kind.launch(executable_path=system, args=OFFLINE)
    yield launched
    launched.close()


@pytest.fixture
def page(browser, request):
  """A page that no error may reach."""
  options = getattr(request, "param", {})
  context = browser.new_context(
    viewport={"width": options.get("width", 1280), "height": 900},
    color_scheme=options.get("scheme", "light"),
    permissions=["clipboard-read", "clipboard-write"],
  )
  opened = context.new_page()
  errors = []
  opened.on("console", lambda m: m.type == "error" and errors.append(m.text))
  opened.on("pageerror", lambda error: errors.append(str(error)))
  opened.on("response", lambda r: r.status >= 400 and errors.append(r.url))
  # The guide needs nothing from elsewhere.
  opened.on("request", lambda r: is_local(r.url) or errors.append(r.url))
  yield opened
  context.close()
  assert not errors


def is_local(url):
  return url.startswith(("http://127.0.0.1:", "data:", "blob:"))


def pages(folder):
  """The names of all pages but those with sources, which are as wide as lines are."""
  found = {str(path.relative_to(folder)) for path in folder.rglob("*.html")}
  return sorted(name for name in found if not name.startswith(("_modules", "_static")))


@pytest.mark.parametrize(
  "page",
  [{"width": width} for width in WIDTHS.values()],
  ids=list(WIDTHS),
  indirect=True,
)
def test_no_page_is_wider_than_the_window(page, site, folder):
  wide = {}
  for name in pages(folder):
    page.goto(site + name)
    seen = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    if seen[0] > seen[1]:
      wide[name] = seen
  assert len(pages(folder)) > 20
  assert not wide


def test_every_link_and_anchor_leads_somewhere(page, site, folder):
  anchors, links = {}, {}
  for name in pages(folder):
    page.goto(site + name)
    anchors[name] = set(
      page.evaluate("[...document.querySelectorAll('[id]')].map(x => x.id)")
    )
    links[name] = page.evaluate(
      "[...document.querySelectorAll('a[href]')].map(x => x.getAttribute('href'))"
    )
  broken, checked = [], 0
  for name, hrefs in links.items():
    for href in set(hrefs):
      target, anchor = urldefrag(urljoin(site + name, href))
      if not target.startswith(site) or href.startswith(("mailto:", "javascript:")):
        continue
      path = posixpath.normpath(unquote(target.removeprefix(site)) or "index.html")
      checked += 1
      known = (folder / path).is_file()
      if not known or (
        anchor and path in anchors and unquote(anchor) not in anchors[path]
      ):
        broken.append((name, href))
  assert checked > 500
  assert not broken


@pytest.mark.parametrize("query", SEARCHES | QUESTIONS)
def test_the_search_finds_the_right_page_first(page, site, query):
  page.goto(f"{site}search.html?q={quote(query)}")
  first = page.locator("#search-results ul.search li > a").first
  first.wait_for()
  # Results come one by one.
  page.wait_for_function(
    "document.querySelector('.search-summary')?.textContent.includes('finished')"
  )
  found = first.get_attribute("href").partition(".html")[0]
  assert found == (SEARCHES | QUESTIONS)[query]


@pytest.mark.parametrize(
  "page", [{"scheme": scheme} for scheme in ("light", "dark")], ids=str, indirect=True
)
@pytest.mark.parametrize(
  "name",
  ["index.html", "api/limits.html", "faq.html", "evidence.html", "migrating.html"],
)
def test_text_and_code_are_readable(page, site, name):
  page.goto(site + name)
  for selector in ("article p, article li, article td", "article code, article pre *"):
    found = page.evaluate(CONTRAST, selector)
    if found is None:
      assert name == "evidence.html", selector
      continue
    assert found[0] >= 4.5, (selector, found)


@pytest.mark.parametrize(
  "page", [{"scheme": scheme} for scheme in ("light", "dark")], ids=str, indirect=True
)
def test_a_figure_has_the_colors_of_the_page(page, site):
  page.goto(site + "index.html")
  shown = [
    image.get_attribute("src")
    for image in page.locator("article img").all()
    if image.is_visible()
  ]
  dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
  assert [("_dark" in name) for name in shown] == [dark]


def test_a_button_copies_what_it_stands_by(page, site):
  page.goto(site + "index.html")
  block = page.locator("div.highlight:has-text('optax.adamw')").first
  block.hover()
  block.locator("button.copybtn").click()
  page.wait_for_function("navigator.clipboard.readText().then(x => x.length > 0)")
  copied = page.evaluate("navigator.clipboard.readText()")
  assert copied.strip() == block.locator("pre").inner_text().strip()


def test_a_button_leaves_prompts_and_output_out(page, site):
  page.goto(site + "api/learned.html")
  block = page.locator("div.highlight:has-text('>>> tx = optax_clip.zclip')").first
  block.hover()
  block.locator("button.copybtn").click()
  page.wait_for_function("navigator.clipboard.readText().then(x => x.length > 0)")
  copied = page.evaluate("navigator.clipboard.readText()")
  assert ">>>" not in copied
  assert "[3. 4.]" not in copied
  assert "tx = optax_clip.zclip(warmup=2)" in copied


def test_tabs_show_one_start_each(page, site):
  page.goto(site + "index.html")
  for label, word in (("Flax NNX", "nnx.Optimizer"), ("Equinox", "eqx.filter_jit")):
    page.locator("label.sd-tab-label", has_text=label).click()
    assert page.locator("div.highlight", has_text=word).first.is_visible()
    assert not page.locator("div.highlight", has_text="params = {").first.is_visible()
