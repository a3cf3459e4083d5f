"""Reads image files that are not trusted: formats, sizes, memory and time are limited."""

import contextlib
import io
import os
import re
import struct
from collections.abc import Iterator
from typing import IO

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from pixel_jax.data.limits import PICTURE_BYTES, limits, reserve_content, reserve_decoding
from pixel_jax.files import open_regular
from pixel_jax.pictures import ImageError, ImageWarning, orientation, rgb

__all__ = ["ImageError", "ImageWarning", "image_size", "read_image"]

# What cameras, phones and the web make (JPEG, PNG, WebP, AVIF), what scanners and 16-bit tools make (TIFF), and what old
# collections hold (GIF, BMP): Pillow decodes them by itself, in time that grows with the file. Others are not read: some
# start programs (EPS), some are decoded in Python a number at a time (PPM), most are parsers that hardly anybody uses.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP")
MAX_SCANS = 100  # scans of a JPEG; encoders write about ten, and each is a pass over all pixels
# Bytes that are reserved for an AVIF. Its header may lie: the picture inside is decoded at its own size, up to 16,384 x 16,384,
# and scaled. That few are decoded at a time costs nothing, because the decoder has its own threads.
AVIF_BYTES = 3 << 29
MAX_BLOCKS = 4096  # blocks of comments in a GIF, 255 bytes each: Pillow's time grows with their square

UNKNOWN = (
    "cannot be read: it is no picture (JPEG, PNG, WebP, AVIF, TIFF, GIF or BMP) and no video (MP4, QuickTime, Matroska, "
    "WebM or AVI). Convert a picture to PNG, and a video by `ffmpeg -i FILE -c copy FILE.mkv`"
)

# Videos are recognised by their first bytes, and ffmpeg's demuxer is chosen by name: left to itself it could choose one for
# playlists, which open other files.
BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")  # first boxes of MP4 and of old QuickTime
STILL = (b"avif", b"avis", b"mif1", b"msf1", b"heic", b"heix", b"hevc", b"hevx")  # brands of pictures in the same boxes


def read_image(source: str | os.PathLike | bytes, *, name: str | None = None) -> np.ndarray:
    """Reads the pixels of an image file, as a person would see it (`pixel_jax.pictures.rgb`).

    `pixel_jax.data.limits` bounds its size, and the memory that all threads together take.

    Args:
      source: path of a local file, or the file's bytes. Nothing is fetched from a URL.
      name: what errors call it.

    Returns:
      uint8 [height, width, 3], RGB. Transparent parts are white; a rotation noted in EXIF is carried out; of 16 bits a
      channel the upper 8 are taken.

    Raises:
      ImageError: the file is missing, not an image, truncated, animated, too large, or has values without a scale.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return _decoded(source, name or f"image of {len(source)} bytes")
    name = name or repr(os.fspath(source))
    with open_regular(source, ImageError) as file:
        size = os.fstat(file.fileno()).st_size
        with reserve_content(size, name):
            return _decoded(file.read(size), name)


def image_size(source: str | os.PathLike | bytes | IO[bytes], *, name: str | None = None) -> tuple[int, int]:
    """Reads the (height, width) that `read_image` would return, from the header alone; raises its errors, but for broken pixels.

    `source` may also be an open file, which need not be read to its end. A PNG is decoded: its EXIF may follow the pixels.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(source, bytes | bytearray | memoryview):
            name, file = name or f"image of {len(source)} bytes", io.BytesIO(source)
        elif isinstance(source, str | os.PathLike):
            name, file = name or repr(os.fspath(source)), stack.enter_context(open_regular(source, ImageError))
            stack.enter_context(reserve_content(os.fstat(file.fileno()).st_size, name))
        else:
            name, file = name or "image", source
        image = stack.enter_context(_opened(file, name))
        width, height = image.size
        # Pillow itself turns TIFFs.
        turned = image.format != "TIFF" and orientation(image, name) in (5, 6, 7, 8)
        return (width, height) if turned else (height, width)


def _decoded(data: bytes, name: str) -> np.ndarray:
    scans = jpeg_scans(data)
    if scans > MAX_SCANS:
        raise ImageError(f"{name} is a JPEG of {scans} scans, more than {MAX_SCANS}: save it again")
    with _opened(io.BytesIO(data), name) as image:
        return rgb(image, name)


@contextlib.contextmanager
def _opened(file: IO[bytes], name: str) -> Iterator[Image.Image]:
    """Opens an image: checks its header, reserves memory for its pixels, and turns all errors into `ImageError`s."""
    head = file.read(32)
    try:
        with contextlib.ExitStack() as stack:
            if not head:
                raise ImageError(f"{name} cannot be read: it is empty (0 bytes), so copy it again")
            file.seek(0)
            if head[:6] in (b"GIF87a", b"GIF89a"):
                file = io.BytesIO(file.read())
                _check_gif(file.getbuffer(), name)
            # Pillow allocates a WebP's pixels when it opens it.
            size = webp_size(head)
            if size is not None:
                stack.enter_context(_reserved(*size, name))
            image = stack.enter_context(Image.open(file, formats=FORMATS))
            if size is None:
                stack.enter_context(_reserved(*_decoded_size(image), name, wary=AVIF_BYTES * (image.format == "AVIF")))
            # A telephone's MPO file holds a preview or another view as well, not another moment. Counting the pictures of a
            # TIFF takes time that grows with their square.
            if image.format not in ("MPO", "GIF") and getattr(image, "is_animated", False):
                raise ImageError(f"{name} is animated, or has several pages: {ANIMATED}")
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError:
        if container_of(head) is not None:
            what = (
                "cannot be read: it is a video, where a picture is meant; give frames of it, or say that it is a video"
            )
            raise ImageError(f"{name} {what}") from None
        raise ImageError(f"{name} {UNKNOWN}") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} cannot be read: make it smaller ({error})") from None
    except Exception as error:  # a decoder fed with hostile bytes raises errors of every kind
        raise ImageError(f"{name} cannot be read: {error}") from error


ANIMATED = "give its frames as pictures, or make a video of it (`ffmpeg -i FILE FILE.mp4`)"


def _decoded_size(image: Image.Image) -> tuple[int, int]:
    """Returns the (width, height) that are decoded: a TIFF's tile may be larger than its picture."""
    width, height = image.size
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return width, height
    tags = image.tag_v2
    return (
        max(width, tags.get(TiffImagePlugin.TILEWIDTH, 0)),
        max(height, tags.get(TiffImagePlugin.TILELENGTH, 0)),
    )


def _reserved(width: int, height: int, name: str, wary: int = 0) -> contextlib.AbstractContextManager[None]:
    limits().check(width, height, name)
    return reserve_decoding(width * height * PICTURE_BYTES, name, wary=wary)


def container_of(head: bytes) -> str | None:
    """ffmpeg's name of the container that begins with these bytes; None: no video that can be read."""
    if head[4:8] in BOXES and not (head[4:8] == b"ftyp" and head[8:12] in STILL):
        return "mp4"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    return "avi" if head[:4] == b"RIFF" and head[8:11] == b"AVI" else None


def webp_size(head: bytes) -> tuple[int, int] | None:
    """Reads the (width, height) from the first 30 bytes of a WebP file (RFC 9649); None for other files."""
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        return None
    kind = head[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


def jpeg_scans(data: bytes) -> int:
    """Counts the scans of the first picture of a JPEG file; 0 for other files."""
    if data[:2] != b"\xff\xd8":
        return 0
    at, scans = 2, 0
    while marker := _MARKER.search(data, at):
        at = marker.end()
        match data[at - 1]:
            case 0xD9:  # end of the image: what follows is another one, or a video
                break
            case 0x01 | 0xD8:  # without content
                continue
            case 0xDA:
                scans += 1
        at += int.from_bytes(data[at : at + 2], "big")
    return scans


_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # within a scan, ff is followed by 0 or d0 to d7


def _check_gif(data: memoryview, name: str) -> None:
    """Raises an ImageError for a GIF of several pictures, or with too many comments. Pillow itself refuses a broken file."""
    if len(data) < 13:
        return
    at, pictures, blocks = 13 + _colours(data[10]), 0, 0
    while at < len(data) - 10:
        match data[at]:
            case 0x21:  # an extension: a label, then blocks
                at, commentary = at + 2, 1
            case 0x2C:  # a picture: its position, its colours, the size of its codes, then blocks
                pictures += 1
                at, commentary = at + 11 + _colours(data[at + 9]), 0
            case _:
                return
        if pictures > 1:
            raise ImageError(f"{name} is animated: {ANIMATED}")
        blocks += commentary
        while at < len(data) and data[at]:
            at += 1 + data[at]
            blocks += commentary
            if blocks > MAX_BLOCKS:
                break
        if blocks > MAX_BLOCKS:
            raise ImageError(f"{name} is a GIF with more than {MAX_BLOCKS} blocks of comments: save it again")
        at += 1


def _colours(flags: int) -> int:
    """Returns the size in bytes of the table of colours that these flags announce."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0
