"""A Pillow image as a person would see it: Pillow and transformers are the reference."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from pixel_jax.data.images import read_image
from pixel_jax.pictures import ImageError, ImageWarning, announce, rgb

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (7, 10, 4), dtype=np.uint8)


def in_mode(mode: str) -> Image.Image:
    if mode == "PA":
        return Image.fromarray(PIXELS[..., :3]).quantize(16).convert("PA")
    whole = Image.fromarray(PIXELS)
    return whole.convert("RGB").convert(mode) if mode in ("LAB", "HSV", "YCbCr", "1", "P") else whole.convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"])
def test_opaque_modes_are_converted_as_pillow_does(mode):
    image = in_mode(mode)
    np.testing.assert_array_equal(rgb(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA", "La", "RGBa"])
def test_transparency_is_composited_on_white(mode):
    image = in_mode(mode)
    if mode in ("La", "RGBa"):
        image = in_mode({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    straight = image.convert("LA").convert("RGBA") if mode == "La" else image.convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", image.size, "white"), straight).convert("RGB")
    np.testing.assert_array_equal(rgb(image), np.asarray(expected))


@pytest.mark.torch  # transformers' image processing is on torch
@pytest.mark.parametrize("mode", ["L", "P", "RGB", "CMYK", "LA", "PA", "RGBA"])
def test_it_is_what_transformers_makes_of_it(mode):
    from transformers.image_transforms import convert_to_rgb

    image = in_mode(mode)
    np.testing.assert_array_equal(rgb(image), convert_to_rgb(image, return_numpy=True))
    if mode == "P":
        image.info["transparency"] = image.getpixel((0, 0))
        np.testing.assert_array_equal(rgb(image), convert_to_rgb(image, return_numpy=True))
        assert (rgb(image)[0, 0] == 255).all()


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(format, byte_order):
    """A ramp over all values: as many pixels of each of the 256 levels, as colour of 16 bits has them in Pillow."""
    ramp = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    image = Image.frombytes("I;16B", (256, 256), ramp.astype(">u2").tobytes())
    if byte_order == "<":
        image = Image.fromarray(ramp)
    expected = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 256, 1).repeat(3, 2)
    np.testing.assert_array_equal(rgb(image), expected)
    file = io.BytesIO()
    image.save(file, format)
    np.testing.assert_array_equal(read_image(file.getvalue()), expected)


def test_one_of_sixteen_bit_values_can_be_clear():
    image = Image.fromarray(np.array([[1000, 1001]], np.uint16))
    image.info["transparency"] = 1001
    np.testing.assert_array_equal(rgb(image), [[[3] * 3, [255] * 3]])


@pytest.mark.parametrize("orientation", range(10))
def test_orientations_are_pillow_s(orientation):
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(file, "PNG", exif=exif)
    image = Image.open(file)
    assert (image.size == ImageOps.exif_transpose(image).size) == (orientation not in (5, 6, 7, 8))
    turned = ImageOps.exif_transpose(image)
    expected = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned).convert("RGB")
    np.testing.assert_array_equal(rgb(image), np.asarray(expected))
    assert rgb(image).flags.c_contiguous


def test_large_pictures_are_converted_in_stripes(monkeypatch):
    monkeypatch.setattr("pixel_jax.pictures.STRIPE", 25)
    for mode in ("RGBA", "P", "I;16"):
        image = in_mode(mode) if mode != "I;16" else Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
        striped = rgb(image)
        monkeypatch.undo()
        np.testing.assert_array_equal(striped, rgb(image))
        monkeypatch.setattr("pixel_jax.pictures.STRIPE", 25)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_scale_are_refused(mode):
    with pytest.raises(ImageError, match=f"the image has mode '{mode}', whose values have no scale: convert it"):
        rgb(Image.new(mode, (4, 4), 5))


def test_what_is_announced_commands_no_terminal():
    with pytest.warns(ImageWarning) as caught:
        announce("\x1b]0;PWN\x07 is damaged\n\u202e Größe")
    assert str(caught[0].message) == "\\x1b]0;PWN\\x07 is damaged\\n\\u202e Größe"
