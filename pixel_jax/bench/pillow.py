"""Crops by Pillow, for comparison."""

from PIL import Image


def crop(picture: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
    """The crop `box` (x1, y1, x2, y2) of a picture, resized to `size` (height, width).

    Each call makes one pass, the horizontal one first: that is the order of a single call up to Pillow 12.
    """
    height, width = size
    cut = picture.crop(box)
    across = cut.resize((width, cut.height), Image.Resampling.BICUBIC)
    return across.resize((width, height), Image.Resampling.BICUBIC)
