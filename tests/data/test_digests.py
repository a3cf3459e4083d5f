"""Data is known by its content: not by its path, and not by when it was written."""

import os
import pathlib
import time
import zipfile

import pytest

from pixel_jax.data import digests as module
from pixel_jax.data.digests import Digests, digest_model, digest_rows
from pixel_jax.data.example import Example
from pixel_jax.data.sources import Member
from pixel_jax.data.traces import Turn

OLD = time.time() - 3600


def write(path: pathlib.Path, content: bytes) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (OLD, OLD))
    return path


@pytest.fixture
def reads(monkeypatch):
    """Files that are read, in order. Files are old enough to be kept: their change cannot be made so from here."""
    found, digest = [], module._file_digest
    monkeypatch.setattr(module, "_file_digest", lambda path: found.append(pathlib.Path(path).name) or digest(path))
    monkeypatch.setattr(module, "SETTLED", -1.0)
    return found


def rows(folder: pathlib.Path, answers=("3", "4"), learned=True) -> list[Example]:
    pictures = [write(folder / f"{i}.png", b"picture %d" % i) for i in range(2)]
    return [
        Example(f"{folder}/a.jsonl:{i}", "how many?", (pictures[i],), (answers[i],), (Turn((("so", learned),)),))
        for i in range(2)
    ]


def changed(first, second):
    return {name for name in {**first, **second} if first.get(name) != second.get(name)}


def test_what_differs_is_named(tmp_path):
    def found(examples):
        return digest_rows(examples, Digests(tmp_path / "digests.json"))

    first = found(rows(tmp_path / "a"))
    assert changed(first, found(rows(tmp_path / "elsewhere"))) == set()  # and the ids, which name files, are others
    assert changed(first, found(rows(tmp_path / "a", answers=("3", "5")))) == {"answer"}
    assert changed(first, found(rows(tmp_path / "a", learned=False))) == {"turns"}
    assert changed(first, found(rows(tmp_path / "a")[::-1])) == {"answer", "images"}
    assert changed(first, found(rows(tmp_path / "a")[:1])) == {"count", *Example._fields} - {"id"}
    examples = rows(tmp_path / "a")
    (tmp_path / "a/0.png").write_bytes(b"picture 8")
    assert changed(first, found(examples)) == {"images"}


def test_what_has_not_changed_is_not_read_again(tmp_path, reads):
    examples = rows(tmp_path / "a")

    def found():
        with Digests(tmp_path / "digests.json") as digests:
            return digest_rows(examples, digests)

    first = found()
    assert sorted(reads) == ["0.png", "1.png"]
    assert found() == first and len(reads) == 2
    write(tmp_path / "a/1.png", b"picture 9")  # as long as it was, and as old
    assert changed(first, found()) == {"images"} and reads[2:] == ["1.png"]
    (tmp_path / "digests.json").write_bytes(b"{")  # nothing was noted
    assert changed(first, found()) == {"images"} and len(reads) == 5


def test_a_file_that_was_just_written_is_read_again(tmp_path):
    """Two changes within one tick of the file system's clock, of the same length, look alike."""
    path = tmp_path / "a"
    path.write_bytes(b"1")
    with Digests(tmp_path / "digests.json") as digests:
        digests.file(path)
    assert not (tmp_path / "digests.json").exists()


def test_members_of_an_archive_are_known_like_files(tmp_path):
    path = write(tmp_path / "0.png", b"picture")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/0.png", b"picture")
    with Digests(tmp_path / "digests.json") as digests:
        assert digests.source(Member(tmp_path / "a.zip", "x/0.png")) == digests.source(path)
        assert digests.source(tmp_path / "nowhere.png") == module.UNREADABLE
        os.mkfifo(tmp_path / "pipe.png")
        assert digests.source(tmp_path / "pipe.png") == digests.source(tmp_path) == module.UNREADABLE


def test_models(tmp_path):
    write(tmp_path / "m/model.safetensors", b"weights")
    write(tmp_path / "m/tokenizer.json", b"{}")
    with Digests(tmp_path / "digests.json") as digests:
        first = digest_model(tmp_path / "m", digests)
        write(tmp_path / "m/tokenizer.json", b"{ }")
        write(tmp_path / "m/README.md", b"not part of it")
        assert changed(first, digest_model(tmp_path / "m", digests)) == {"tokenizer"}
        write(tmp_path / "m/model.safetensors", b"another")
        assert changed(first, digest_model(tmp_path / "m", digests)) == {"tokenizer", "weights"}
