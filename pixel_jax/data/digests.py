"""Digests (SHA-256) of content, by which equal rows, answers and pictures are recognised wherever their files are."""

import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from pixel_jax.data.images import ImageError
from pixel_jax.data.sources import Embedded, Member, Source, SourceError, Stored, read_bytes
from pixel_jax.files import FileError, open_regular
from pixel_jax.state_files import read_note, write_json

UNREADABLE = "unreadable"  # stands for the digest of a file that cannot be read
SETTLED = 2.0  # seconds: a digest is cached if the file is older, so that another change is sure to change its times
PIECE = 2**22  # bytes read at a time
DIGITS = 32  # of a digest, hexadecimal: 128 bits
NAMES = {"id"}  # fields that name a row and say nothing about its content
SAID = ("question", "answer", "turns", "video", "seconds", "text_first")  # fields that a trained row is made of
PICTURES = "images"  # the field with the sources of a row's pictures
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "*.gguf")
TOKENIZER = ("tokenizer*.json", "vocab.json", "merges.txt", "chat_template*", "*preprocessor_config.json")


class Digests:
    """Digests of files, cached in a file by size and times: a file that has not changed is not read again."""

    def __init__(self, cache: str | os.PathLike):
        self.path = pathlib.Path(cache)
        self.cached: dict[str, list[Any]] = read_note(self.path) or {}
        self.folders: dict[pathlib.Path, str] = {}
        self.changed = False

    def __enter__(self) -> "Digests":
        return self

    def __exit__(self, *error) -> None:
        if self.changed:
            write_json(self.path, self.cached)
        self.changed = False

    def file(self, path: str | os.PathLike) -> str:
        """The digest of a file's bytes; `UNREADABLE` if it cannot be read."""
        return self._of(os.path.abspath(path), pathlib.Path(path), lambda: _file_digest(path))

    def source(self, source: Source) -> str:
        """The digest of an encoded picture or video. That of a record combines the digest of its folder and its number."""
        if isinstance(source, Member):
            name = f"{os.path.abspath(source.archive)}:{source.name}"
            return self._of(name, source.archive, lambda: _digest(read_bytes(source)))
        if isinstance(source, Stored):
            return _digest(f"{self.folder(source.folder)}:{source.record}:{source.number}".encode())
        if isinstance(source, Embedded):
            return _digest(source.data)
        return self.file(source)

    def files(self, paths: Sequence[pathlib.Path]) -> str:
        """The digest of several files and their names."""
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(self.file, paths))
        return _digest(json.dumps([[path.name, x] for path, x in zip(paths, digests, strict=True)]).encode())

    def folder(self, path: pathlib.Path) -> str:
        """The digest of all files of a folder."""
        if path not in self.folders:
            self.folders[path] = self.files(sorted(x for x in path.rglob("*") if x.is_file()))
        return self.folders[path]

    def _of(self, name: str, file: pathlib.Path, read: Callable[[], str]) -> str:
        try:
            status = file.stat()
            stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            cached = self.cached.get(name)
            if isinstance(cached, list) and cached[:-1] == stamp and isinstance(cached[-1], str):
                return cached[-1]
            digest = read()
        except (OSError, FileError, ImageError, SourceError):
            return UNREADABLE
        if time.time() - max(stamp[1:]) / 1e9 > SETTLED:
            self.cached[name], self.changed = [*stamp, digest], True
        return digest


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def _file_digest(path: str | os.PathLike) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()[:DIGITS]


def digest_rows(rows: Sequence[NamedTuple], digests: Digests | None) -> dict[str, Any]:
    """Digests a data set: {"count": number of rows, FIELD: digest of that field in all rows, in order}.

    Args:
        rows: `Example`s. Their ids are left out: they may be names of files.
        digests: computes the digests of pictures; None leaves pictures out.
    """
    columns: dict[str, Any] = {"count": len(rows)}
    for field in rows[0]._fields if rows else ():
        if field in NAMES:
            continue
        values = [getattr(row, field) for row in rows]
        if field == PICTURES:
            if digests is None:
                continue
            values = digest_sources(values, digests)
        columns[field] = _digest(json.dumps(values).encode())
    return columns


def digest_example(row: Any) -> str:
    """Digests an `Example` without its pictures and its id."""
    return _digest(json.dumps([getattr(row, name) for name in SAID]).encode())


def digest_sources(sources: Sequence[Sequence[Source]], digests: Digests) -> list[list[str]]:
    """Digests each picture of every row."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda row: [digests.source(source) for source in row], sources))


def digest_model(directory: str | os.PathLike, digests: Digests) -> dict[str, str]:
    """Digests a model directory: {"weights": of the network's files, "tokenizer": of those that make its input}."""
    directory = pathlib.Path(directory)

    def matching(*patterns: str) -> list[pathlib.Path]:
        return sorted({path for pattern in patterns for path in directory.glob(pattern)})

    return {
        "weights": digests.files([directory] if directory.is_file() else matching(*WEIGHTS)),
        "tokenizer": digests.files(matching(*TOKENIZER)),
    }


def digest_adapter(directory: str | os.PathLike | None, digests: Digests) -> dict[str, str]:
    """Digests an adapter: {"adapter_weights": of its files}; {} if there is none."""
    if directory is None:
        return {}
    files = [pathlib.Path(directory) / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    return {"adapter_weights": digests.files(files)}
