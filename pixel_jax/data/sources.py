"""Where the pixels of an example lie until they are needed: a file, a member of an archive, a record; image or video.

Names come from data and are not trusted: they are relative, stay below the folder they are looked up in, and nothing is
fetched from anywhere.
"""

import contextlib
import functools
import io
import pathlib
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pixel_jax.data.clips import clip_size, is_clip, read_frames
from pixel_jax.data.images import ImageError, image_size, read_image
from pixel_jax.data.limits import room_for_content
from pixel_jax.files import open_regular


class SourceError(ValueError):
    """A name that leads nowhere, or out of the folder; the message has it."""


class Member(NamedTuple):
    """A file in a ZIP archive, which stays packed."""

    archive: pathlib.Path
    name: str

    def __str__(self) -> str:
        return f"{self.archive}:{self.name}"


class Stored(NamedTuple):
    """The `place`-th encoded image of a record of a random-access data source (`record["images"]`)."""

    records: Sequence[Any]
    index: int
    place: int

    def __str__(self) -> str:
        return f"image {self.place + 1} of record {self.index}"


Source = pathlib.Path | Member | Stored


def open_archive(path: pathlib.Path) -> zipfile.ZipFile:
    """The archive, opened once as long as it stays the same; several threads may read it."""
    try:
        status = path.stat()
        return _open_archive(path, status.st_mtime_ns, status.st_size)
    except (zipfile.BadZipFile, OSError) as error:
        raise SourceError(f"{path} is no ZIP archive: {error}") from None


@functools.lru_cache(maxsize=16)
def _open_archive(path: pathlib.Path, *version: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _open_member(source: Member) -> BinaryIO:
    archive = open_archive(source.archive)
    try:
        info = archive.getinfo(source.name)
        if info.flag_bits & 1:
            raise ImageError(f"{source} is encrypted")
        return archive.open(info)
    except (KeyError, zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise ImageError(f"{source} cannot be opened: {error}") from None


def _open(source: Source) -> BinaryIO:
    """A file to look at the beginning of; of a member no more is unpacked than is read."""
    if isinstance(source, Member):
        return _open_member(source)
    if isinstance(source, Stored):
        return io.BytesIO(source.records[source.index]["images"][source.place])
    return open_regular(source, ImageError)


def _length(source: Source) -> int:
    """Bytes that a file says it has, of those that are not in memory already."""
    if isinstance(source, Member):
        return open_archive(source.archive).getinfo(source.name).file_size
    return 0 if isinstance(source, Stored) else source.stat().st_size


@contextlib.contextmanager
def _content(source: Source) -> Iterator[BinaryIO]:
    """A file that can be read anywhere. A member is unpacked into memory, once there is room for what it says it has."""
    if not isinstance(source, Member):
        with _open(source) as file:
            yield file
        return
    with _open_member(source) as file:
        with room_for_content(_length(source), str(source)):
            try:
                data = file.read()  # at most what it says; more is an error of its checksum
            except (zipfile.BadZipFile, EOFError, OSError) as error:
                raise ImageError(f"{source} cannot be read: {error}") from None
            except Exception as error:  # zlib's own
                raise ImageError(f"{source} cannot be unpacked: {error}") from None
            yield io.BytesIO(data)


def read_bytes(source: Source) -> bytes:
    """The file's content."""
    with _content(source) as file:
        return file.read()


def shows_clip(source: Source) -> bool:
    """Whether this is a video file rather than an image, by its first bytes."""
    with _open(source) as file:
        try:
            return is_clip(file.read(16))
        except Exception as error:
            raise ImageError(f"{source} cannot be read: {error}") from None


def load_frames(sources: Sequence[Source], video: bool) -> tuple[list[np.ndarray], float | None]:
    """The images, uint8 [h, w, 3] each; for one video file its frames, and the seconds that two of them cover."""
    if video and len(sources) == 1 and shows_clip(sources[0]):
        with _content(sources[0]) as file:
            frames, seconds = read_frames(file, str(sources[0]))
        return list(frames), 2 * seconds
    return [_load(source) for source in sources], None


def frame_sizes(sources: Sequence[Source], video: bool) -> list[tuple[int, int]]:
    """(height, width) of what `load_frames` returns, from headers and, of a video, its first frame."""
    if video and len(sources) == 1 and shows_clip(sources[0]):
        with _content(sources[0]) as file:
            return clip_size(file, str(sources[0]))
    sizes = []
    for source in sources:
        # Of some formats Pillow reads the whole file to see its header.
        with _open(source) as file, room_for_content(_length(source), str(source)):
            sizes.append(image_size(file, name=str(source)))
    return sizes


def _load(source: Source) -> np.ndarray:
    if isinstance(source, pathlib.Path):
        return read_image(source)
    with _content(source) as file:
        return read_image(file.getbuffer(), name=str(source))


class Folder:
    """Files of one folder and of the ZIP archives in it, by the names that the data gives them.

    `images/2-0.jpg` is looked for as a file, as a member of an archive, and with the archive's own name (`images` of
    `images.zip`) added in front or taken away, for archives are packed, and unpacked, with and without it.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.archives = {archive: frozenset(open_archive(archive).namelist()) for archive in sorted(path.glob("*.zip"))}
        self.stems = sorted({archive.stem for archive in self.archives} | {"images", "videos"})

    def find(self, name: Any) -> Source:
        """Where `name` lies. SourceError: it is no relative name, or nothing or more than one thing is called so."""
        check_name(name)
        name = name.removeprefix("./")
        for candidate in self._candidates(name):
            if (self.path / candidate).is_file():
                return self.path / candidate
        found = [
            Member(archive, candidate)
            for archive, names in self.archives.items()
            for candidate in self._candidates(name, archive.stem)
            if candidate in names
        ]
        if not found:
            places = ", ".join([str(self.path), *(archive.name for archive in self.archives)])
            raise SourceError(f"there is no {name!r} in {places}")
        if len(found) > 1:
            raise SourceError(f"{name!r} is both {found[0]} and {found[1]}")
        return found[0]

    def _candidates(self, name: str, stem: str | None = None) -> list[str]:
        stems = self.stems if stem is None else [stem]
        first, _, rest = name.partition("/")
        return [name, *(f"{x}/{name}" for x in stems), *([rest] if rest and first in stems else [])]


def check_name(name: Any) -> None:
    """Raises SourceError unless `name` is a relative POSIX path that stays where it begins."""
    if not isinstance(name, str) or not name:
        raise SourceError(f"the name of a file must be a text, not {name!r}")
    parts = name.removeprefix("./").split("/")
    if "\\" in name or "\0" in name or name.startswith("/") or ":" in parts[0] or {"..", "", "."} & set(parts):
        raise SourceError(f"the name of a file must be relative and lead downwards, not {name!r}")
