"""What Pillow is given to do beside us."""

from PIL import Image


def crop(picture: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
    """`box` (x1 y1 x2 y2) of a picture at `size` (height, width).

    One pass a call, horizontal first: the order of Pillow up to 12 in every release, at the cost of one call for both.
    """
    height, width = size
    cut = picture.crop(box)
    across = cut.resize((width, cut.height), Image.Resampling.BICUBIC)
    return across.resize((width, height), Image.Resampling.BICUBIC)
