"""Sources of images and videos: a file, a member of an archive, a record, or bytes in the data. Pixels are read when needed.

Names come from data and are not trusted. One rule holds for all readers (`locate`): a name leads to a file in the folder of
the data, or in a folder that the user allows (`image_folders` of the configs), and nothing is fetched from anywhere.
"""

import contextlib
import functools
import io
import os
import pathlib
import stat
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np

from pixel_jax.data.clips import clip_size, is_clip, read_frames
from pixel_jax.data.images import ImageError, image_size, read_image
from pixel_jax.data.limits import reserve_content
from pixel_jax.files import open_regular
from pixel_jax.terminal import brief


class SourceError(ValueError):
    """Raised for a name that leads to no file, or out of the allowed folders. The message has the name."""


class Member(NamedTuple):
    """A file in a ZIP archive, which stays packed."""

    archive: pathlib.Path
    name: str

    def __str__(self) -> str:
        return f"{self.archive}:{self.name}"


class Stored(NamedTuple):
    """An encoded image of a record of a random-access data source, `record["images"][number]`, kept in `folder`."""

    records: Sequence[Any]
    record: int
    number: int
    folder: pathlib.Path

    def __str__(self) -> str:
        return f"image {self.number + 1} of record {self.record}"


class Embedded(NamedTuple):
    """An encoded picture that stands in the data itself."""

    data: bytes
    name: str  # its position in the data, for messages

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__


Source = pathlib.Path | Member | Stored | Embedded


def locate(
    name: Any,
    folder: pathlib.Path,
    others: Sequence[str | os.PathLike] = (),
    *,
    directory: bool = False,
    error: Callable[[str], Exception] = SourceError,
) -> pathlib.Path:
    """Finds the file that data calls `name`, relative to `folder`.

    The name may have `..`, be an absolute path or lead through links, as long as it leads into `folder` or into one of the
    `others`. (The files of a snapshot in a cache of the Hugging Face hub are links; the folder that they lead to counts as one
    of the `others`.)

    Args:
        name: any value that the data has.
        folder: the folder to which names are relative.
        others: folders that names may lead to as well.
        directory: whether it may be a folder.
        error: the class of the errors.

    Raises:
        error: the name is no text, or leads to nothing, to something else than a regular file (a device, a named pipe), or out
            of the folders.
    """
    if not isinstance(name, str) or not name:
        raise error(f"the name of a file must be a text, not {brief(name)}")
    path = folder / name
    try:
        real = os.path.realpath(path, strict=True)
        mode = os.stat(path).st_mode  # of the path as written: `FILE/..` is an error here, and none for `realpath`
    except FileNotFoundError:
        raise error(f"there is no image {brief(str(path))}") from None
    except (OSError, ValueError) as reason:  # ValueError: a zero byte, half a surrogate pair
        raise error(f"{brief(str(path))} cannot be looked up: {getattr(reason, 'strerror', None) or reason}") from None
    if not (stat.S_ISREG(mode) or (directory and stat.S_ISDIR(mode))):
        raise error(f"{brief(str(path))} is not a file")
    if not any(pathlib.Path(real).is_relative_to(root) for root in _roots(folder, *others)):
        raise error(
            f"{brief(name)} leads to {real!r}, which is not in {str(folder)!r}: put a folder around it into image_folders to "
            "allow it"
        )
    return path


@functools.lru_cache(maxsize=64)
def _roots(*folders: str | os.PathLike) -> tuple[str, ...]:
    """The folders with links resolved."""
    real = [os.path.realpath(folder) for folder in folders]
    for path in map(pathlib.Path, list(real)):
        # ../datasets--NAME/snapshots/REVISION/...: links to ../datasets--NAME/blobs/DIGEST
        real += [str(above.parent / "blobs") for above in (path, *path.parents) if above.name == "snapshots"]
    return tuple(real)


def open_archive(path: pathlib.Path) -> zipfile.ZipFile:
    """Opens an archive, once as long as its file stays the same. Several threads may read it."""
    try:
        status = path.stat()
        return _open_archive(path, status.st_mtime_ns, status.st_size)
    except SourceError:
        raise
    except Exception as error:  # zipfile raises errors of many types for a damaged directory of members
        raise SourceError(f"{path} is no ZIP archive: {error}") from None


@functools.lru_cache(maxsize=16)
def _open_archive(path: pathlib.Path, *version: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(open_regular(path, SourceError))


def _open_member(source: Member) -> IO[bytes]:
    archive = open_archive(source.archive)
    try:
        info = archive.getinfo(source.name)
        if info.flag_bits & 1:
            raise ImageError(f"{source} is encrypted")
        return archive.open(info)
    except ImageError:
        raise
    except Exception as error:  # of many types: a damaged header may hold a name that is no text
        raise ImageError(f"{source} cannot be opened: {error}") from None


def _open(source: Source) -> IO[bytes]:
    """Opens a source to read its beginning; of a member no more is unpacked than is read."""
    if isinstance(source, Member):
        return _open_member(source)
    if isinstance(source, pathlib.Path):
        return open_regular(source, ImageError)
    return io.BytesIO(_encoded(source))


def _encoded(source: Stored | Embedded) -> bytes:
    """The bytes of a source that is in memory already."""
    return source.data if isinstance(source, Embedded) else source.records[source.record]["images"][source.number]


def _length(source: Source) -> int:
    """The size of a file in bytes; 0 if it is in memory already."""
    if isinstance(source, Member):
        return open_archive(source.archive).getinfo(source.name).file_size
    return 0 if isinstance(source, Stored | Embedded) else source.stat().st_size


@contextlib.contextmanager
def _content(source: Source) -> Iterator[BinaryIO]:
    """Opens a source as a file that can seek. A member is unpacked into memory, which is reserved before."""
    if isinstance(source, pathlib.Path):
        with open_regular(source, ImageError) as file:
            yield file
        return
    if not isinstance(source, Member):
        yield io.BytesIO(_encoded(source))
        return
    with _open_member(source) as file:
        with reserve_content(_length(source), str(source)):
            try:
                data = file.read()  # at most the size that it states; more makes the checksum fail
            except (zipfile.BadZipFile, EOFError, OSError) as error:
                raise ImageError(f"{source} cannot be read: {error}") from None
            except Exception as error:  # zlib's own
                raise ImageError(f"{source} cannot be unpacked: {error}") from None
            yield io.BytesIO(data)


def read_bytes(source: Source) -> bytes:
    """The content of a source: an encoded image or a video file."""
    with _content(source) as file:
        return file.read()


def shows_clip(source: Source) -> bool:
    """Whether a source is a video file rather than an image, by its first bytes."""
    with _open(source) as file:
        try:
            return is_clip(file.read(16))
        except Exception as error:
            raise ImageError(f"{source} cannot be read: {error}") from None


def load_frames(sources: Sequence[Source], video: bool) -> tuple[list[np.ndarray], float | None]:
    """Reads images, uint8 [h, w, 3] each; of one video file the frames, and the seconds that two of them cover."""
    if video and len(sources) == 1 and shows_clip(sources[0]):
        with _content(sources[0]) as file:
            frames, seconds = read_frames(file, str(sources[0]))
        return list(frames), 2 * seconds
    return [_load(source) for source in sources], None


def frame_sizes(sources: Sequence[Source], video: bool) -> list[tuple[int, int]]:
    """Reads the (height, width) of each image that `load_frames` returns, from headers and a video's first frame."""
    if video and len(sources) == 1 and shows_clip(sources[0]):
        with _content(sources[0]) as file:
            return clip_size(file, str(sources[0]))
    sizes = []
    for source in sources:
        # Of some formats Pillow reads the whole file to see its header.
        with _open(source) as file, reserve_content(_length(source), str(source)):
            sizes.append(image_size(file, name=str(source)))
    return sizes


def _load(source: Source) -> np.ndarray:
    if isinstance(source, pathlib.Path):
        return read_image(source)
    with _content(source) as file:
        return read_image(file.read(), name=str(source))


class Folder:
    """The files of a folder and of the ZIP archives in it, by the names that data gives them.

    `images/2-0.jpg` is looked for as a file, as a member of an archive, and with the archive's own name (`images` of
    `images.zip`) added in front or taken away, for archives are packed, and unpacked, with and without it.
    """

    def __init__(self, path: pathlib.Path, others: Sequence[str | os.PathLike] = ()):
        """`others`: folders that names may lead to as well (`locate`)."""
        self.path, self.others = path, tuple(others)
        self.archives = {archive: frozenset(open_archive(archive).namelist()) for archive in sorted(path.glob("*.zip"))}
        self.stems = sorted({archive.stem for archive in self.archives} | {"images", "videos"})

    def find(self, name: Any) -> Source:
        """Finds the file called `name`. SourceError: there is none, there are several, or it leads out (`locate`)."""
        if not isinstance(name, str) or not name:
            raise SourceError(f"the name of a file must be a text, not {brief(name)}")
        name = name.removeprefix("./")
        for candidate in self._candidates(name):
            if _exists(self.path / candidate):
                return locate(candidate, self.path, self.others)
        members = [
            Member(archive, candidate)
            for archive, names in self.archives.items()
            for candidate in self._candidates(name, archive.stem)
            if candidate in names
        ]
        if not members:
            searched = ", ".join([str(self.path), *(archive.name for archive in self.archives)])
            raise SourceError(f"there is no {brief(name)} in {searched}")
        if len(members) > 1:
            raise SourceError(f"{brief(name)} is both {members[0]} and {members[1]}")
        return members[0]

    def _candidates(self, name: str, stem: str | None = None) -> list[str]:
        stems = self.stems if stem is None else [stem]
        first, _, rest = name.partition("/")
        return [name, *(f"{x}/{name}" for x in stems), *([rest] if rest and first in stems else [])]


def _exists(path: pathlib.Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no name that a file could have
        return False
