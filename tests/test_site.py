"""The documentation site builds without a warning, has every page in its navigation, and fetches nothing from elsewhere."""

import html.parser
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

import pixel_jax
import unlearn_jax
from tests.test_docs import ROOT

SETTINGS = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]
DOCS = ROOT / "docs"
# Elements that a browser loads by itself, and the attribute that says from where.
LOADED = {
    "img": "src",
    "script": "src",
    "link": "href",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
}


def entries(nav: list) -> list[tuple[int, str]]:
    """(level, file) of the pages of a navigation, the top level being 1."""
    found = []
    for (where,) in (item.values() for item in nav):
        found += [(1, where)] if isinstance(where, str) else [(level + 1, file) for level, file in entries(where)]
    return found


def test_the_navigation_has_every_page_once_and_two_levels():
    """The program that builds the site does not look at either."""
    found = entries(SETTINGS["nav"])
    assert max(level for level, _ in found) == 2
    assert sorted(file for _, file in found) == sorted(page.name for page in DOCS.rglob("*.md"))


def test_pages_link_to_pages_of_the_site():
    """Files that are not in `docs` are not on the site."""
    for page in DOCS.rglob("*.md"):
        for link in re.findall(r"\]\((?!\w+:)([^)#]+)", page.read_text()):
            where = (page.parent / link).resolve()
            assert where.is_relative_to(DOCS.resolve()) and where.exists(), f"{page.name}: {link}"


def test_drawings_say_what_they_show():
    """A drawing has a title, holds no script and names no other file; an image in a page has a text."""
    for drawing in (DOCS / "drawings").glob("*.svg"):
        text = drawing.read_text()
        assert "<title>" in text and not re.search(r"<script|href=|url\((?!#)|@import", text), drawing.name
        assert any(f"drawings/{drawing.name}" in page.read_text() for page in DOCS.glob("*.md")), drawing.name
        assert drawing.stat().st_size < 20_000
    for page in DOCS.glob("*.md"):
        assert "![](" not in page.read_text(), page.name


class Loads(html.parser.HTMLParser):
    """What a page loads, its anchors and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given["id"]} if given.get("id") else set()
        link = tag != "link" or (given.get("rel") or "") in (
            "stylesheet",
            "icon",
            "preload",
            "modulepreload",
            "preconnect",
        )
        if tag in LOADED and link and given.get(LOADED[tag]):
            self.loaded.append(given[LOADED[tag]])

    def handle_data(self, text):
        self.words.append(text)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built from a copy: where the package is installed, no source of it lies beside the tests."""
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(DOCS, root / "docs")
    sources = str(pathlib.Path(pixel_jax.__file__).parents[1])
    settings = (ROOT / "zensical.toml").read_text().replace('paths = ["."]', f'paths = ["{sources}"]')
    (root / "zensical.toml").write_text(settings)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    said = ran.stdout + ran.stderr
    assert ran.returncode == 0 and not re.search("warning|error", said, re.IGNORECASE), said
    return {page.name: Loads(page.read_text()) for page in (root / "build" / "site").glob("*.html")}


@pytest.mark.docs
def test_every_page_is_built(site):
    assert {file.replace(".md", ".html") for _, file in entries(SETTINGS["nav"])} <= set(site)


@pytest.mark.docs
def test_pages_load_nothing_from_elsewhere(site):
    for name, page in site.items():
        assert page.loaded, name
        assert not [x for x in page.loaded if re.match(r"(\w+:)?//", x)], name


@pytest.mark.docs
def test_the_reference_has_every_public_name_with_its_signature(site):
    """And with the words of its docstring."""
    pages = [page for name, page in site.items() if name.startswith("reference-")]
    text = " ".join("".join(page.words) for page in pages)
    ids = set().union(*(page.ids for page in pages))
    squeezed = " ".join(text.split())
    for package in (pixel_jax, unlearn_jax):
        for name in package.__all__:
            found = getattr(package, name)
            assert any(anchor.rpartition(".")[2] == found.__name__ for anchor in ids), name
            first = re.sub(r"[`*]", "", found.__doc__.strip().splitlines()[0])
            assert " ".join(first.split())[:40] in squeezed, name


@pytest.mark.docs
def test_a_broken_link_ends_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Page\n\n[gone](gone.md)\n")
    (tmp_path / "zensical.toml").write_text('[project]\nsite_name = "x"\n')
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode and "page does not exist" in ran.stderr
