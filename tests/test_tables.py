"""The tables of the pages are what the records beside them give, so that no figure is older than its record."""

import pathlib
import subprocess
import sys

import pytest

from launch import tables
from pixel_jax import provenance

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {page.relative_to(ROOT).as_posix(): page for page in tables.pages()}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_a_page_is_what_its_records_give(page):
    text = PAGES[page].read_text()
    assert tables.filled(text) == text, f"{page} differs from its records: python -m launch.tables"


def test_every_table_stands_in_a_page():
    shown = {found[2] for page in PAGES.values() for found in tables.MARKED.finditer(page.read_text())}
    assert shown == set(tables.TABLES)


def test_marks_come_in_pairs():
    """A misspelt mark would leave a table that nothing fills."""
    for name, page in PAGES.items():
        text = page.read_text()
        assert text.count("<!-- table: ") == text.count("<!-- end of table -->") == len(tables.MARKED.findall(text)), (
            name
        )


def test_a_figure_that_was_changed_by_hand_is_noticed(tmp_path, monkeypatch, capsys):
    """And written again by the command without `--check`."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("nothing\n")
    for name in ("unlearn-cost.json", "bench.json"):
        (tmp_path / "docs" / name).write_bytes((ROOT / "docs" / name).read_bytes())
    page = tmp_path / "docs" / "page.md"
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    page.write_text(tables.filled("<!-- table: unlearn-cost -->\nx\n<!-- end of table -->\n"))
    right = page.read_text()
    assert "20,000 texts, 200 removed" in right and "| 6.7 |" in right
    page.write_text(right.replace("6.7", "6.6"))
    monkeypatch.setattr(sys, "argv", ["tables", "--check"])
    with pytest.raises(SystemExit) as ended:
        tables.main()
    assert ended.value.code == 1 and "docs/page.md: differs from its records" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["tables"])
    with pytest.raises(SystemExit) as ended:
        tables.main()
    assert not ended.value.code and page.read_text() == right


def test_a_table_that_is_none_is_named():
    with pytest.raises(ValueError, match="there is no table 'nonsense'; the tables are bench, "):
        tables.filled("<!-- table: nonsense -->\n<!-- end of table -->")


@pytest.mark.parametrize(
    ("value", "text"), [(13616.4, "13600"), (0.0123456, "0.0123"), (2.5813, "2.58"), (1e6, "1000000")]
)
def test_digits(value, text):
    assert tables.digits(value) == text


def test_a_caption_says_where_records_mix_commits():
    assert tables.origin("x", ["b", "a", "b"]) == "[`x.json`](x.json), several commits a, b."
    assert tables.origin("x", [None]) == "[`x.json`](x.json), commit not recorded."


def test_records_name_the_commit(tmp_path):
    """As git itself does; an installed package has none, also inside another project's checkout."""
    package = pathlib.Path(provenance.__file__).parent
    git = lambda folder, *words: subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True)
    if git(package, "ls-files", "--error-unmatch", "provenance.py").returncode:
        assert provenance.commit() is None
    else:
        head = git(package, "rev-parse", "HEAD").stdout.strip()
        found = provenance.commit()
        assert found and head.startswith(found.removesuffix("+changes"))
    git(tmp_path, "init", "--quiet")
    copy = tmp_path / "lib" / "pixel_jax"
    copy.mkdir(parents=True)
    (copy / "provenance.py").write_bytes(pathlib.Path(provenance.__file__).read_bytes())
    code = "import runpy, sys; print(runpy.run_path(sys.argv[1])['commit']())"
    ran = subprocess.run(
        [sys.executable, "-c", code, copy / "provenance.py"], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "None\n"
