"""Image files: what is read is what a person would see, and what is not read says why."""

import io
import os
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pixel_jax.data.images import ImageError, ImageWarning, image_size, jpeg_scans, read_image, webp_size
from pixel_jax.data.limits import Limits

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encode(image, format="PNG", **options):
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, format, **options)
    return file.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, data=b""):
    """A PNG whose header may promise anything."""

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def test_bytes_and_paths_give_the_pixels(tmp_path):
    (tmp_path / "image.png").write_bytes(encode(PIXELS))
    for source in (encode(PIXELS), tmp_path / "image.png", str(tmp_path / "image.png"), encode(PIXELS, "BMP")):
        image = read_image(source)
        assert image.dtype == np.uint8 and image.flags.writeable
        np.testing.assert_array_equal(image, PIXELS)


def test_grey_and_palette_become_colour():
    grey = PIXELS[..., 0]
    np.testing.assert_array_equal(read_image(encode(grey)), np.repeat(grey[..., None], 3, axis=-1))
    few = Image.fromarray(PIXELS).quantize(8)
    np.testing.assert_array_equal(read_image(encode(few)), np.asarray(few.convert("RGB")))


def test_transparency_is_white():
    alpha = np.full((6, 9, 1), 255, np.uint8)
    alpha[2:4] = 0
    expected = np.where(alpha == 0, 255, PIXELS)
    np.testing.assert_array_equal(read_image(encode(np.concatenate([PIXELS, alpha], axis=-1))), expected)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    np.testing.assert_array_equal(read_image(encode(palette, transparency=1)), [[[10, 20, 30], [255, 255, 255]]])


def test_exif_orientation_is_carried_out():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned by 90 degrees clockwise
    np.testing.assert_array_equal(read_image(encode(PIXELS, exif=exif)), np.rot90(PIXELS, k=-1))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_header_tells_the_size_of_what_is_loaded(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(PIXELS, format, exif=exif)
    expected = (6, 9, 3) if orientation < 5 else (9, 6, 3)
    assert read_image(data).shape == expected and image_size(io.BytesIO(data)) == image_size(data) == expected[:2]


def test_the_header_is_checked_without_the_pixels():
    noise = np.random.default_rng(1).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    assert image_size(encode(noise, "JPEG")[:1000]) == (200, 300)
    with pytest.raises(ImageError, match="12000 x 6000 pixels, more than"):
        image_size(png(12_000, 6_000))
    with pytest.raises(ImageError, match="here cannot be read"):
        image_size(b"no image", name="here")


def test_two_pictures_of_a_telephone_are_one_image():
    pictures = [Image.fromarray(np.full((16, 16, 3), level, np.uint8)) for level in (40, 200)]
    image = read_image(encode(pictures[0], "MPO", save_all=True, append_images=pictures[1:]))
    assert abs(int(image.mean()) - 40) <= 1


@pytest.mark.parametrize(
    "width, height, message",
    [
        (100_000, 1, "100000 x 1 pixels, more than 65535 on a side"),
        (1, 100_000, "1 x 100000 pixels, more than 65535 on a side"),
        (12_000, 6_000, "12000 x 6000 pixels, more than 67108864 in all"),
        (100_000, 100_000, "cannot be read: make it smaller .*decompression bomb"),  # Pillow's own limit comes first
        (0, 5, "cannot be read"),
        (2**31 - 1, 2**31 - 1, "cannot be read: make it smaller .*decompression bomb"),
    ],
)
def test_promised_sizes_are_refused_before_decoding(width, height, message):
    with pytest.raises(ImageError, match=message):
        read_image(png(width, height))


def test_limits_are_inclusive(own_limits):
    own_limits(Limits(side=9, pixels=54))
    read_image(encode(PIXELS))
    own_limits(Limits(side=8))
    with pytest.raises(ImageError, match=r"9 x 6 pixels, more than 8 on a side \(limits.side\)"):
        read_image(encode(PIXELS))
    own_limits(Limits(pixels=53))
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match=r"9 x 6 pixels, more than 53 in all \(limits.pixels\)"):
            read(encode(PIXELS))


def test_a_small_file_that_inflates_is_no_more_than_its_header_says():
    image = read_image(png(2, 2, bytes(50_000_000)))
    np.testing.assert_array_equal(image, np.zeros((2, 2, 3)))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about corrupt metadata
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF"])
def test_truncation_is_an_error_wherever_it_happens(format):
    noise = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encode(noise, format)
    for length in (0, 1, 10, len(data) // 4, len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(ImageError, match="cannot be read"):
            read_image(data[:length])


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about corrupt metadata
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF"])
def test_flipped_bytes_give_an_image_or_an_image_error(format, own_limits):
    own_limits(Limits(pixels=1 << 20))
    random = np.random.default_rng(2)
    data = np.frombuffer(encode(PIXELS.repeat(4, 0).repeat(4, 1), format), np.uint8)
    outcomes = set()
    for _ in range(150):
        broken = data.copy()
        broken[random.integers(0, min(len(broken), 200), 3)] = random.integers(0, 256, 3)
        try:
            image = read_image(broken.tobytes())
            assert image.ndim == 3 and image.shape[2] == 3
            outcomes.add("image")
        except ImageError:
            outcomes.add("error")
    assert "error" in outcomes


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_more_than_one_picture_is_refused(format):
    frames = [Image.fromarray(np.roll(PIXELS, shift, axis=0)) for shift in range(3)]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match="is animated.*: give its frames as pictures, or make a video of it"):
            read(data)


def test_a_still_gif_may_have_comments_and_extensions():
    still = Image.fromarray(PIXELS).quantize(16)
    data = encode(still, "GIF", comment=b"a comment " * 100, duration=100, loop=0, transparency=3)
    expected = Image.open(io.BytesIO(data)).convert("RGBA")
    expected = np.asarray(Image.alpha_composite(Image.new("RGBA", still.size, "white"), expected))[..., :3]
    np.testing.assert_array_equal(read_image(data), expected)
    assert image_size(data) == (6, 9)


def test_a_damaged_exif_leaves_the_pixels(tmp_path):
    """As Pillow's `convert` and transformers' processor see them."""
    data = encode(PIXELS)
    end = data.index(b"IDAT") - 4
    broken = data[:end] + chunk(b"eXIf", b"no TIFF header at all") + data[end:]
    late = data[: data.index(b"IEND") - 4] + chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff") + chunk(b"IEND", b"")
    for damaged in (broken, late):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(damaged)).convert("RGB")), PIXELS)
        np.testing.assert_array_equal(read_image(damaged), PIXELS)
        assert image_size(damaged) == (6, 9)
    with pytest.warns(ImageWarning, match="here has EXIF data that cannot be read .*: shown as stored"):
        read_image(broken, name="here")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth = Image.fromarray(PIXELS).resize((90, 60), Image.Resampling.BICUBIC)
    data = encode(smooth, "AVIF", exif=exif, quality=100)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(read_image(data), np.asarray(shown))
    assert image_size(data) == (shown.height, shown.width)
    assert (
        np.abs(np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).mean() - np.asarray(smooth).mean()) < 3
    )


def test_a_long_receipt_is_read():
    tall = np.broadcast_to(np.arange(17_000, dtype=np.uint32)[:, None, None] // 67, (17_000, 600, 3)).astype(np.uint8)
    np.testing.assert_array_equal(read_image(encode(tall, compress_level=1)), tall)


def test_what_pillow_takes_long_for_is_refused_at_once():
    gif = encode(np.zeros((4, 4), np.uint8), "GIF")
    start = 13 + 3 * 2 ** ((gif[10] & 7) + 1)
    pages = [Image.fromarray(PIXELS)] * 2
    jpeg = encode(Image.fromarray(PIXELS.repeat(30, 0).repeat(30, 1)), "JPEG", progressive=True)
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x10"
    for data, message in (
        (gif[:start] + b"\x21\xfe\1x\0" * 2_000_000 + gif[start:], "a GIF with more than 4096 blocks of comments"),
        (gif[:start] + b"\x21\xfe\0" * 3_000_000 + gif[start:], "a GIF with more than 4096 blocks of comments"),
        (gif[:start] + b"\x21\xfe" + b"\1x" * 5_000_000 + b"\0" + gif[start:], "a GIF with more than 4096 blocks"),
        (gif[:-1] + b"\x21\xfe" + b"\1x" * 5_000_000 + b"\0;", "a GIF with more than 4096 blocks of comments"),
        (tiff_of_pages(60_000), "has several pages"),
        (encode(pages[0], "TIFF", save_all=True, append_images=pages), "has several pages"),
        (jpeg[:-2] + scan * 400 + jpeg[-2:], "a JPEG of 410 scans, more than 100"),
    ):
        start_time = time.process_time()
        with pytest.raises(ImageError, match=message):
            read_image(data)
        assert time.process_time() - start_time < 2  # it was 9 s to 300 s


def tiff_of_pages(count: int) -> bytes:
    """Grey, 4 x 4, all with the same pixels."""
    tags = [(256, 4), (257, 4), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 4), (279, 16)]
    page = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    size = len(page) + 4
    follow = [24 + size * (i + 1) for i in range(count - 1)] + [0]
    return b"II*\0" + struct.pack("<I", 24) + bytes(16) + b"".join(page + struct.pack("<I", x) for x in follow)


def test_a_tile_larger_than_its_picture_counts():
    tags = [
        (256, 4),
        (257, 4),
        (258, 8),
        (259, 8),
        (262, 1),
        (277, 1),
        (322, 60_000),
        (323, 60_000),
        (324, 8),
        (325, 16),
    ]
    page = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    with pytest.raises(ImageError, match="60000 x 60000 pixels, more than"):
        read_image(b"II*\0" + struct.pack("<I", 24) + bytes(16) + page + bytes(4))


def test_scans_are_those_of_the_first_picture():
    """Previews in its header, and what follows its end, are not decoded."""
    plain = encode(Image.fromarray(PIXELS), "JPEG", subsampling=0)
    assert jpeg_scans(plain) == 1 and jpeg_scans(plain + plain) == 1 and jpeg_scans(b"\x89PNG") == 0
    preview = b"\xff\xe1" + struct.pack(">H", 2 + 1000) + b"\xff\xda" * 500
    assert jpeg_scans(plain[:2] + preview + plain[2:] + b"\xff\xda" * 500) == 1
    np.testing.assert_array_equal(read_image(plain[:2] + preview + plain[2:]), read_image(plain))
    assert jpeg_scans(encode(Image.fromarray(PIXELS), "JPEG", progressive=True)) == 10
    assert jpeg_scans(plain[:-2]) == 1 and jpeg_scans(b"\xff\xd8\xff") == 0


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}])
@given(height=st.integers(1, 300), width=st.integers(1, 300))
@settings(max_examples=20)
def test_the_size_of_a_webp_is_in_its_first_bytes(options, height, width):
    assert webp_size(encode(np.zeros((height, width, 3), np.uint8), "WEBP", **options)[:32]) == (width, height)


@given(st.binary(max_size=60))
def test_headers_of_anything(data):
    for head in (data, b"GIF89a" + data, b"\xff\xd8" + data, b"RIFF\0\0\0\0WEBPVP8" + data):
        assert jpeg_scans(head) >= 0
        assert webp_size(head) is None or min(webp_size(head)) >= 0
        with pytest.raises(ImageError):
            read_image(head)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "note.png").write_text("not an image")
    os.mkfifo(tmp_path / "pipe.png")
    for source, message in [
        (tmp_path / "note.png", "note.png' cannot be read"),
        (tmp_path / "pipe.png", "pipe.png' is not a regular file"),
        (tmp_path / "missing.png", "missing.png' cannot be opened: No such file"),
        (tmp_path, "is not a regular file"),
        ("https://example.org/image.png", "https://example.org/image.png' cannot be opened: No such file"),
        (b"", "image of 0 bytes cannot be read: it is empty .0 bytes., so copy it"),
        (
            b"\0\0\0\x18ftypmp42" + bytes(99),
            "image of 111 bytes cannot be read: it is a video, where a picture is meant; give",
        ),
        (b"P6 1 1 255 rgb", "image of 14 bytes cannot be read: it is no picture .*Convert a picture to PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image of 47 bytes cannot be read"),
    ]:
        with pytest.raises(ImageError, match=message):
            read_image(source)
