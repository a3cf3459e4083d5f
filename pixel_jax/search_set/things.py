"""What is put into photographs: landmarks, which the overview shows, and marks on them, which it does not.

A mark is drawn with thin lines, and whatever the overview would show of it is taken away again (`hide`): the mean colour of
every cell of the overview stays that of the photograph.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Size = tuple[int, int]  # (width, height) in pixels

COLOURS = {"red": (225, 30, 40), "green": (25, 170, 60), "blue": (40, 80, 235), "yellow": (245, 215, 25)}
SHAPES = ("circle", "square", "triangle", "diamond")
LETTERS = "ACEFHJKLMNPRTUVXYZ"  # those that are not mistaken for others or for digits
DIGITS = "0123456789"
# What is cut out of which photograph of scikit-image: an ellipse in this box, or with None all that is dark.
CUT_OUTS = {
    "cup": ("coffee.png", (77, 20, 479, 385)),
    "cat": ("chelsea.png", (40, 0, 360, 298)),
    "coin": ("coins.png", (305, 16, 364, 74)),
    "horse": ("horse.png", None),
}
BROWN = (120, 72, 35)  # of the horse, which is a silhouette
RANGE = (40, 215)  # levels of a picture's black and white
GRAIN = 4.0  # levels, standard deviation of the grain
ROUNDS = 8  # of `hide`; in each what the overview shows becomes half or less


class Patch(NamedTuple):
    """Something to be pasted: its colours and how much it covers."""

    colour: np.ndarray | None  # float32 [h, w, 3], 0 to 255; None: ink, whose colour is chosen where it is put
    cover: np.ndarray  # float32 [h, w], 0 to 1


def plain(cover: np.ndarray, colour: tuple[int, int, int] | np.ndarray) -> Patch:
    """A patch of one colour; `cover` is 0 to 1."""
    return Patch(np.broadcast_to(np.asarray(colour, np.float32), (*cover.shape, 3)), cover)


def card(size: Size, colour: tuple[int, int, int]) -> Patch:
    """A rectangular card."""
    return plain(np.ones((size[1], size[0]), np.float32), colour)


@functools.cache
def cut_out(name: str, side: int) -> Patch:
    """An object of `CUT_OUTS`, `side` pixels along its longer side."""
    import skimage

    file, box = CUT_OUTS[name]
    with Image.open(f"{skimage.__path__[0]}/data/{file}") as opened:
        image = opened.convert("RGB")
    if box is None:
        cover = Image.fromarray(np.where(np.asarray(image.convert("L")) < 128, 255, 0).astype(np.uint8))
        box = cover.getbbox()
        image = Image.new("RGB", image.size, BROWN)
    else:
        cover = Image.new("L", image.size)
        ImageDraw.Draw(cover).ellipse(box, fill=255)
    image, cover = image.crop(box), cover.crop(box)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    shown = (x.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0) for x in (image, cover))
    colour, share = (np.asarray(x, np.float32) for x in shown)
    return Patch(colour, share / 255)


@functools.cache
def glyph(text: str, height: int) -> np.ndarray:
    """How much of each pixel the text covers, in Pillow's own font and about as high as asked: float32 [h, w], 0 to 1."""
    size = height
    left, top, right, bottom = ImageFont.load_default(size).getbbox(text)
    for _ in range(8):  # the font's size is that of its line; its capitals are lower
        if bottom - top == height:
            break
        size = max(1, size + round((height - (bottom - top)) * size / max(bottom - top, 1)))
        left, top, right, bottom = ImageFont.load_default(size).getbbox(text)
    image = Image.new("L", (math.ceil(right - left), math.ceil(bottom - top)))
    ImageDraw.Draw(image).text((-left, -top), text, fill=255, font=ImageFont.load_default(size))
    return np.asarray(image, np.float32) / 255


@functools.cache
def outline(shape: str, side: int, line: float) -> np.ndarray:
    """How much of each pixel the outline of a shape covers, `line` pixels wide: float32 [side, side], 0 to 1."""
    fine = 4  # times as fine, for smooth edges
    image = Image.new("L", (fine * side, fine * side))
    draw, low, high, width = ImageDraw.Draw(image), 1, fine * side - 2, round(fine * line)
    inner, outer, middle = low + width / 2, high - width / 2, (low + high) / 2  # of lines drawn along their middle
    match shape:
        case "circle":
            draw.ellipse((low, low, high, high), outline=255, width=width)
        case "square":
            draw.rectangle((low, low, high, high), outline=255, width=width)
        case "triangle":
            _polygon(draw, ((middle, inner), (outer, outer), (inner, outer)), width)
        case "diamond":
            _polygon(draw, ((middle, inner), (outer, middle), (middle, outer), (inner, middle)), width)
        case _:
            raise ValueError(f"there is no shape {shape!r}; there are {', '.join(SHAPES)}")
    return np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float32) / 255


def _polygon(draw: ImageDraw.ImageDraw, corners: tuple[tuple[float, float], ...], width: int) -> None:
    draw.line([*corners, *corners[:2]], fill=255, width=width, joint="curve")


def paste(image: np.ndarray, patch: Patch, x: int, y: int) -> None:
    """Pastes a patch with its upper left corner at (x, y) into uint8 [h, w, 3], in place."""
    if patch.colour is None:
        raise ValueError("ink has no colour of its own: choose one before it is pasted")
    height, width = patch.cover.shape
    place = image[y : y + height, x : x + width]
    mixed = place + patch.cover[..., None] * (patch.colour - place)
    place[:] = np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def faded(image: np.ndarray, rng: np.random.Generator, factor: int) -> np.ndarray:
    """A picture with less contrast, and with a grain as coarse as a pixel of the overview.

    Nothing can be hidden where a picture is black or white: its mean could not stay. The grain covers what little is left of a
    mark where a picture is plain.

    Args:
        image: uint8 [h, w, 3].
        rng: of the grain.
        factor: how many times smaller the overview is.
    """
    height, width = image.shape[:2]
    grain = Image.fromarray(rng.normal(0, GRAIN, (height // factor, width // factor)).astype(np.float32))
    grain = np.asarray(grain.resize((width, height), Image.Resampling.BICUBIC))
    low, high = RANGE
    mixed = image * np.float32((high - low) / 255) + np.float32(low) + grain[..., None]
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def hide(image: np.ndarray, patch: Patch, x: int, y: int, factor: int) -> None:
    """Pastes a patch so that the image, made `factor` times smaller, looks as before.

    Of the change D that pasting makes, what survives making it smaller (Pillow's bicubic filter) and larger again is
    subtracted, and again of what is left, within 0 and 255: in each round D := clip(image + D - up(down(D))) - image.

    Args:
        image: uint8 [h, w, 3], changed in place; its sides are multiples of `factor`.
        patch: what is pasted.
        x: of its left edge.
        y: of its upper edge.
        factor: how many times smaller the overview is.
    """
    (height, width), margin = patch.cover.shape, 4 * factor  # as far as the filter reaches, and once more
    x1, y1 = (max(0, (at - margin) // factor * factor) for at in (x, y))
    x2, y2 = (
        min(whole, -(-(at + side + margin) // factor) * factor)
        for at, side, whole in ((x, width, image.shape[1]), (y, height, image.shape[0]))
    )
    before = image[y1:y2, x1:x2].astype(np.float32)
    after = before.astype(np.uint8)
    paste(after, patch, x - x1, y - y1)
    change = after - before
    for _ in range(ROUNDS):
        change = np.clip(before + change - _seen(change, factor), 0, 255) - before
    image[y1:y2, x1:x2] = np.rint(before + change).astype(np.uint8)


def _seen(change: np.ndarray, factor: int) -> np.ndarray:
    """What an overview that is `factor` times smaller keeps of a change float32 [h, w, c], in the size of the change."""
    height, width = change.shape[:2]
    kept = np.empty_like(change)
    for channel in range(change.shape[2]):
        image = Image.fromarray(change[..., channel])
        small = image.resize((width // factor, height // factor), Image.Resampling.BICUBIC)
        kept[..., channel] = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
    return kept
