"""Converts Pillow images of any mode to the RGB pixels that a person would see.

The same rules hold in training, evaluation, chat and `Processor`: images are upright, 16 bits are scaled to 8, transparent
parts are white.
"""

import warnings

import numpy as np
from PIL import ExifTags, Image

DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", *DEEP_MODES)
STRIPE = 1 << 20  # pixels that are converted at a time: conversions take several copies

# The transformations that the values of EXIF's Orientation ask for.
TURNS = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


class ImageError(ValueError):
    """A file that is no image or video, or one that is refused; the message names the file and the value at fault."""


class ImageWarning(UserWarning):
    """A part of an image or video could not be read, or asks for something that is not supported; the rest was read."""


def announce(what: str) -> None:
    """Warns about a file; its name and content are escaped, so that they cannot steer a terminal."""
    shown = "".join(x if x.isprintable() else ascii(x)[1:-1] for x in what)
    warnings.warn(shown, ImageWarning, stacklevel=2)


def rgb(image: Image.Image, name: str = "the image") -> np.ndarray:
    """The pixels of a Pillow image, as a person would see it.

    A rotation noted in EXIF is carried out. Of 16 bits a channel the upper 8 are taken, as Pillow itself does for colour.
    Transparent parts are composited on white, as transformers 5 does.

    Args:
      image: an image of any mode whose values have a scale.
      name: what errors and warnings call it.

    Returns:
      uint8 [height, width, 3].

    Raises:
      ImageError: the values have no scale: 32-bit integers and floats.
    """
    if image.mode not in MODES:
        raise ImageError(
            f"{name} has mode {image.mode!r}, whose values have no scale: convert it to 8 or 16 bits a channel"
        )
    image.load()
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, STRIPE // image.width)
    for top in range(0, image.height, rows):
        stripe = image.crop((0, top, image.width, min(top + rows, image.height)))
        pixels[top : top + rows] = _on_white(stripe)
    turn = TURNS.get(orientation(image, name))  # after loading: Pillow turns TIFFs itself, then
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def orientation(image: Image.Image, name: str = "the image") -> int:
    """EXIF's Orientation, 1 to 8; 1 where there is none, or none that can be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # a parser fed with hostile bytes raises errors of every kind
        announce(f"{name} has EXIF data that cannot be read ({error}): shown as stored")
        return 1


def _on_white(image: Image.Image) -> np.ndarray:
    """Composites an image on white: uint8, to be broadcast to [h, w, 3]."""
    if image.mode in DEEP_MODES:
        grey = np.asarray(image)
        shown = (grey >> 8).astype(np.uint8)
        if (clear := image.info.get("transparency")) is not None:
            shown[grey == clear] = 255
        return shown[..., None]
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))
