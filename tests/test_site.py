"""The site: it builds without a warning, has every public name, and shows equations as they are written."""

import html
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys

import pytest
from pages import ROOT

import jaxattn

pytest.importorskip("mkdocs")

PACKAGES = [
    "jaxattn",
    *(module.name for module in pkgutil.walk_packages(jaxattn.__path__, "jaxattn.") if module.ispkg),
]
PACKAGES = [name for name in PACKAGES if hasattr(importlib.import_module(name), "__all__")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """site(page) is the HTML of the body of a page."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr

    def site(page):
        text = (folder / page).read_text()
        return text[text.index("<article") : text.index("</article>")]

    site.folder = folder
    return site


def squeezed(text):
    return re.sub(r"\s+", "", text)


def shown(page):
    """The text of a page as a reader sees it, without spaces."""
    return squeezed(html.unescape(re.sub(r"<[^>]+>", "", page)))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_of_a_package_is_on_its_page(site, package):
    page, module = site(f"api/{package}.html"), importlib.import_module(package)
    assert module.__all__
    for name in module.__all__:
        # Under the module that it is from, or a link to there; a module has a heading.
        place = rf'id="{package}\.[\w.]+\.{name}"|href="[\w.]+\.html#[\w.]+\.{name}"|<h2 id="{name}">'
        assert re.search(place, page), name


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_are_shown_as_they_are_written(site, package):
    """No underscore, star, bracket or indented line of an equation is taken for Markdown."""
    page, module = site(f"api/{package}.html"), importlib.import_module(package)
    text, found = shown(page), 0
    objects = [getattr(module, name) for name in module.__all__]
    for thing in (module, *(x for x in objects if f'id="{getattr(x, "__module__", "")}.' in page)):
        if not (inspect.ismodule(thing) or inspect.isclass(thing) or inspect.isfunction(thing)) or not thing.__doc__:
            continue
        written = re.split(r"\n(?:Args|Attributes|Raises|Returns):\n", inspect.cleandoc(thing.__doc__))[0]
        emphasis = r"(?<![\w*])(\*{1,2})(?=[^\s*])([^*]*[^\s*])\1(?![\w*])"
        for paragraph in written.split("\n\n"):
            # Backticks are kept in indented blocks, which are shown to the letter.
            plain = paragraph if paragraph.startswith("    ") else re.sub(emphasis, r"\2", paragraph).replace("`", "")
            plain = re.sub(r"(?m)^- ", "", plain)
            assert squeezed(plain) in text, f"{thing}: {paragraph}"
            found += 1
    assert found


def test_parts_and_named_tuples_are_shown_with_their_arguments(site):
    text = shown(site("api/jaxattn.core.attend.html"))
    assert "Window(left:int,right:int=0)" in text
    assert "Partial(out:" in text


def test_pages_from_elsewhere_are_in_the_site_and_links_lead_to_them(site):
    assert "onesmallfunctionalcore" in shown(site("index.html"))
    assert 'href="attend.html"' in site("index.html")
    assert 'src="mask.png"' in site("index.html")
    assert 'href="benchmarks.html"' in site("linear.html")
    for page in ("benchmarks.html", "changes.html", "results/recall/report.html"):
        assert len(shown(site(page))) > 1000


def test_code_in_tables_has_pipes_without_backslashes(site):
    assert "<code>Causal() &amp; (Window(4) | Sinks(2))</code>" in site("gallery.html")
    assert "\\|" not in site("gallery.html") + site("blocks.html")


def test_nothing_is_fetched_from_elsewhere(site):
    for file in site.folder.rglob("*.html"):
        head = file.read_text()
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//[^"]*"', head), file
