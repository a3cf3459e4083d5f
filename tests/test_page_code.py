"""The code of the pages runs as it stands there.

A comment in the source, above a block, says what happens to it; readers of the built page do not see it:

    <!-- runs in tests/x.py tests/y.py -->   in these tests
    <!-- dry run -->                         here, with the `--dry-run` that it has
    <!-- continues rollout.md -->            here, behind the blocks of that page
    <!-- not run: REASON -->                 nowhere: it needs what tests do not have

Without one, Python runs here, block after block of a page; JSON is read; text is not run. A shell block always has one.
"""

import dataclasses
import functools
import pathlib
import re
import shlex
import subprocess
import textwrap

import jax
import pytest
from PIL import Image

import pixel_jax
from pixel_jax.files import parse_json
from pixel_jax.models.io import from_pretrained, save_pretrained
from pixel_jax.models.lora import add_lora
from pixel_jax.models.peft import save_adapter
from pixel_jax.models.processor import Processor
from tests.data import ffmpeg
from tests.rollouts import scripted_model
from tests.test_docs import PAGES, ROOT

BLOCK = re.compile(r"(?:^ *<!-- ([^\n]*) -->\n\n)?^( *)```([^\n]*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
LANGUAGES = {"bash", "console", "json", "python", "text"}
MARKS = ("runs in ", "dry run", "continues ", "not run: needs ")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    mark: str
    language: str  # with what follows it, such as the name of a file
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}"


@functools.cache
def blocks() -> tuple[Block, ...]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for x in BLOCK.finditer(text):
            line = text[: x.start(4)].count("\n")
            found.append(Block(page.name, line, x[1] or "", x[3], textwrap.dedent(x[4])))
    return tuple(found)


def of(*languages: str, mark: str = "") -> list[Block]:
    return [x for x in blocks() if x.language.partition(" ")[0] in languages and x.mark.startswith(mark)]


def test_every_block_is_found():
    """Fences that the pattern does not see would not run."""
    fences = sum(len(re.findall(r"^ *```", page.read_text(), re.MULTILINE)) for page in PAGES)
    assert fences == 2 * len(blocks())


@pytest.mark.parametrize("block", blocks(), ids=str)
def test_a_block_says_what_it_is_and_what_happens_to_it(block):
    assert block.language.partition(" ")[0] in LANGUAGES
    assert not block.mark or block.mark.startswith(MARKS)
    if block.language == "bash":
        assert block.mark.startswith(("runs in ", "dry run", "not run: "))


@pytest.mark.parametrize("block", of(*LANGUAGES, mark="runs in "), ids=str)
def test_what_runs_elsewhere_is_there(block):
    """The tests name the page, or everything that the block starts or calls, so that a mark does not outlive its test."""
    text = "".join((ROOT / name).read_text() for name in block.mark.removeprefix("runs in ").split())
    if block.page in text:
        return
    if block.language == "bash":
        names = re.findall(r"^(?:pixel|unlearn)-jax ([a-z]+)", block.text, re.MULTILINE)
        names += re.findall(r"(?:launch[/.]|notebooks/)(\w+)|(/v1/[a-z/]+)|(zensical)", block.text)
        names = ["".join(name) for name in names]
    else:
        names = re.findall(r"\b\w+\.(\w+)\(", block.text)[:2]
    assert names, "the test does not name the page, and nothing in the block can be looked for"
    for name in names:
        assert re.search(rf"{name}\b", text) or re.search(rf"\b{name}", text), name


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_json_is_json(block):
    for line in block.text.splitlines():
        assert isinstance(parse_json(line, block.page), dict)


@pytest.mark.parametrize("block", of("bash", mark="dry run"), ids=str)
def test_a_dry_run(block):
    """It carries nothing out, and prints the command that it is given."""
    ran = subprocess.run(["bash", "-euc", block.text], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "--dry-run" in block.text and ran.returncode == 0, ran.stderr
    words = shlex.split(block.text.replace("\\\n", " "))
    for word in words[words.index("pixel-jax") :]:
        assert word in ran.stdout.replace("\\", ""), word


class Pages:
    """Runs the Python of pages, each once, in one folder that has what they read."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.names: dict[str, dict] = {}

    def run(self, page: str) -> dict:
        """The names that a page's blocks leave."""
        if page not in self.names:
            mine = [x for x in of("python") if x.page == page and not x.mark.startswith(("runs in ", "not run: "))]
            names = {}
            for block in mine:
                if block.mark:
                    names |= self.run(block.mark.removeprefix("continues "))
                code = "\n" * block.line + block.text
                exec(compile(code, page, "exec"), names)  # our own page, at its own lines
            self.names[page] = names
        return self.names[page]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    processor = Processor(scripted_model.vocabulary().tokenizer, min_pixels=784, max_pixels=4 * 784)
    for name in ("DIR", "path/to/Qwen2.5-VL-7B-Instruct", "base"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_pretrained(scripted_model.model(), processor, folder / name)
    base, _ = from_pretrained(folder / "base")
    save_adapter(
        add_lora(base, jax.random.key(0), rank=2, alpha=4.0, targets=r".*\.q_proj"), folder / "my-adapter", base="base"
    )
    Image.fromarray(scripted_model.image(1, 120, 150)).save(folder / "photo.jpg")
    ffmpeg.make(folder / "clip.mp4")
    return Pages(folder)


@pytest.mark.parametrize(
    "page", sorted({x.page for x in of("python") if not x.mark.startswith(("runs in ", "not run: "))})
)
@pytest.mark.slow
def test_the_python_of_a_page(page, pages, monkeypatch):
    """With a small model where the page has a large one, and the room that such a one needs."""
    monkeypatch.chdir(pages.folder)
    monkeypatch.setitem(vars(pixel_jax), "RolloutConfig", lambda **_: scripted_model.CONFIG)
    assert pages.run(page)
