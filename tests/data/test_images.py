"""Image files: what is read is what a person would see, and what is not read says why."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pixel_jax.data.images import ImageError, image_size, read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encode(image, format="PNG", **options):
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, format, **options)
    return file.getvalue()


def png(width, height, data=b""):
    """A PNG whose header may promise anything."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

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
        (100_000, 1, "100000 x 1 pixels, more than 16384 on a side"),
        (1, 100_000, "1 x 100000 pixels, more than 16384 on a side"),
        (12_000, 6_000, "12000 x 6000 pixels, more than 67108864 in all"),
        (100_000, 100_000, "decompression bomb"),  # Pillow's own limit comes first
        (0, 5, "cannot be read"),
        (2**31 - 1, 2**31 - 1, "cannot be read"),
    ],
)
def test_promised_sizes_are_refused_before_decoding(width, height, message):
    with pytest.raises(ImageError, match=message):
        read_image(png(width, height))


def test_limits_are_inclusive():
    read_image(encode(PIXELS), max_side=9, max_pixels=54)
    with pytest.raises(ImageError, match="9 x 6 pixels, more than 8 on a side"):
        read_image(encode(PIXELS), max_side=8)
    with pytest.raises(ImageError, match="9 x 6 pixels, more than 53 in all"):
        read_image(encode(PIXELS), max_pixels=53)


def test_a_small_file_that_inflates_is_no_more_than_its_header_says():
    image = read_image(png(2, 2, bytes(50_000_000)))
    np.testing.assert_array_equal(image, np.zeros((2, 2, 3)))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about corrupt metadata
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_truncation_is_an_error_wherever_it_happens(format):
    noise = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encode(noise, format)
    for length in (0, 1, 10, len(data) // 4, len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(ImageError, match="cannot be read"):
            read_image(data[:length])


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about corrupt metadata
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_flipped_bytes_give_an_image_or_an_image_error(format):
    random = np.random.default_rng(2)
    data = np.frombuffer(encode(PIXELS.repeat(4, 0).repeat(4, 1), format), np.uint8)
    outcomes = set()
    for _ in range(150):
        broken = data.copy()
        broken[random.integers(0, min(len(broken), 200), 3)] = random.integers(0, 256, 3)
        try:
            image = read_image(broken.tobytes(), max_pixels=1 << 20)
            assert image.ndim == 3 and image.shape[2] == 3
            outcomes.add("image")
        except ImageError:
            outcomes.add("error")
    assert "error" in outcomes


def test_animations_are_refused_by_number_of_frames():
    frames = [Image.fromarray(np.roll(PIXELS, shift, axis=0)) for shift in range(3)]
    for format in ("GIF", "PNG", "WEBP"):
        with pytest.raises(ImageError, match="animated, with 3 frames"):
            read_image(encode(frames[0], format, save_all=True, append_images=frames[1:]))


def test_sixteen_bits_are_refused_by_mode():
    with pytest.raises(ImageError, match="mode 'I;16'"):
        read_image(encode(np.full((4, 4), 40_000, np.uint16)))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "note.png").write_text("not an image")
    os.mkfifo(tmp_path / "pipe.png")
    for source, message in [
        (tmp_path / "note.png", "note.png' cannot be read"),
        (tmp_path / "pipe.png", "pipe.png' is not a local file"),
        (tmp_path / "missing.png", "missing.png' is not a local file"),
        (tmp_path, "is not a local file"),
        ("https://example.org/image.png", "https://example.org/image.png' is not a local file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image of 47 bytes cannot be read"),
    ]:
        with pytest.raises(ImageError, match=message):
            read_image(source)
