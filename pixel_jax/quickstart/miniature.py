"""The experiment in miniature: photographs with a card on which somebody wrote a digit.

A *scene* is a square crop of a real photograph with one magenta card somewhere on it and a handwritten digit in the middle of
the card. A small card's digit is illegible once the scene is reduced to the overview the model sees first; a large card's
is legible. A *clip* is a few frames cut from photographs, one of which shows a large card.

Photographs and digits come in two disjoint splits. Everything is a function of a `numpy.random.Generator`, so a scene is
named by its seed and costs about half a millisecond.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pixel_jax.ops import host_crop_resize

SIDE = 448  # pixels of a scene
FRAME_SIDE = 224  # pixels of a clip's frame
NUM_FRAMES = 4
# The frequency of each digit as the first digit of numbers in texts (Benford's law).
BENFORD = (0.0, *(math.log10(1 + 1 / digit) for digit in range(1, 10)))
CARD = (230, 40, 220)
BAR = (25, 20, 70)  # along the top of a card that may lie on its side, so that one sees which way is up
SPLITS = {
    "train": (
        "astronaut", "brick", "camera", "chelsea", "china", "coffee", "coins", "flower",
        "grass", "gravel", "hubble_deep_field", "immunohistochemistry", "moon", "retina",
    ),
    "test": ("rocket", "motorcycle"),
}  # fmt: skip
TINTS = 12  # variants of each training photograph, with other colours and other orientations
TRAIN_DIGITS = 1400  # of 1797 handwritten digits; the rest is held out
QUESTION = "What is the digit on the card?"
VIDEO_QUESTION = "What is the digit on the card in the video?"

Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels, x2 and y2 exclusive


class Scene(NamedTuple):
    """A photograph with a card on it, and where the card and its digit lie."""

    image: np.ndarray  # uint8 [SIDE, SIDE, 3]
    label: int | str  # the digit, or another answer
    small: bool  # illegible in the overview
    card: Box
    digit: Box
    turns: int = 0  # quarter turns clockwise that bring the card upright
    question: str = QUESTION


class MiniatureClip(NamedTuple):
    """A few frames, one of which shows a card."""

    frames: np.ndarray  # uint8 [NUM_FRAMES, FRAME_SIDE, FRAME_SIDE, 3]
    label: int
    target: int  # 0-based frame that shows the card


@dataclasses.dataclass(frozen=True)
class SceneConfig:
    """Sizes in pixels of the scene, both ends inclusive."""

    small_share: float = 0.65  # of scenes with a card that cannot be read in the overview
    small_card: tuple[int, int] = (112, 128)  # side of such a card
    small_digit: tuple[int, int] = (52, 60)  # height of its digit
    large_card: tuple[int, int] = (320, 419)  # side of a card that can be read
    large_margin: float = 0.08  # of the card's side, around its digit
    frequencies: tuple[float, ...] | None = None  # of the digits 0 to 9, by any factor; None: as in the data set
    on_side: float = 0.0  # share of cards that lie on one of their sides; above 0, cards have a bar along their top


@functools.cache
def photographs(split: str) -> tuple[np.ndarray, ...]:
    """Loads the photographs of a split, uint8 [h, w, 3], whose short side is 480 to 640.

    Each training photograph has `TINTS` variants, with other colours, mirrored and turned: without them, boxes learned on a
    dozen photographs lose a third of their overlap on new ones.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {sorted(SPLITS)}")
    photos = [_short_side(_photograph(name), 480, 640) for name in SPLITS[split]]
    if split == "train":
        rng = np.random.default_rng(0)
        photos = [_turn(i, _tint(rng, photo) if i else photo) for photo in photos for i in range(TINTS)]
    return tuple(photos)


def _turn(i: int, photo: np.ndarray) -> np.ndarray:
    """Makes one of the eight orientations of a photograph, as a contiguous copy, because crops of it are then fast."""
    photo = photo.swapaxes(0, 1) if i & 1 else photo
    photo = photo[:, ::-1] if i & 2 else photo
    return np.ascontiguousarray(photo[::-1] if i & 4 else photo)


def _photograph(name: str) -> np.ndarray:
    import skimage.data
    from sklearn.datasets import load_sample_image

    if name in ("china", "flower"):
        return np.asarray(load_sample_image(f"{name}.jpg"))
    if name == "motorcycle":
        return np.asarray(skimage.data.stereo_motorcycle()[0])
    return np.asarray(getattr(skimage.data, name)())


def _short_side(photo: np.ndarray, least: int, most: int) -> np.ndarray:
    if photo.ndim == 2:
        photo = np.repeat(photo[:, :, None], 3, axis=2)
    height, width = photo.shape[:2]
    scale = min(max(min(height, width), least), most) / min(height, width)
    if scale == 1:
        return photo
    return host_crop_resize(photo, (0, 0, width, height), (round(height * scale), round(width * scale)))


def _tint(rng: np.random.Generator, photo: np.ndarray) -> np.ndarray:
    """Mixes the channels of a photograph, and changes its exposure and contrast."""
    mix = np.eye(3) + rng.normal(0, 0.35, (3, 3))
    mix *= rng.uniform(0.6, 1.2) / mix.sum(axis=1, keepdims=True).clip(0.5)
    return np.clip(photo @ mix.T.astype(np.float32) + rng.normal(0, 30), 0, 255).astype(np.uint8)


@functools.cache
def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Loads the handwritten digits of a split: ink uint8 [n, 8, 8] (0 white, 255 black) and labels int [n]."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()  # a `Bunch`; its stubs say that it may be a tuple
    order = np.random.default_rng(0).permutation(len(data.target))  # the file is sorted by writer
    chosen = order[:TRAIN_DIGITS] if split == "train" else order[TRAIN_DIGITS:]
    return np.round(data.images[chosen] * (255 / 16)).astype(np.uint8), data.target[chosen]


def draw_scene(
    rng: np.random.Generator, split: str, config: SceneConfig, *, small: bool | None = None, on_side: bool | None = None
) -> Scene:
    """Draws a scene. With None, the size of the card (`small`) and how it lies (`on_side`) are drawn by the configured shares."""
    if small is None:
        small = bool(rng.random() < config.small_share)
    image = _background(rng, split, SIDE)
    side = int(
        rng.integers(*config.small_card, endpoint=True) if small else rng.integers(*config.large_card, endpoint=True)
    )
    inner = (
        int(rng.integers(*config.small_digit, endpoint=True)) if small else round(side * (1 - 2 * config.large_margin))
    )
    turns = _quarter_turns(rng, config, on_side) if config.on_side > 0 else 0
    label, card, digit = _paste_card(rng, split, config, image, side, inner, turns)
    return Scene(image, label, small, card, digit, turns)


def _quarter_turns(rng: np.random.Generator, config: SceneConfig, on_side: bool | None) -> int:
    if on_side is None:
        on_side = bool(rng.random() < config.on_side)
    return int(rng.choice((1, 3))) if on_side else 0


def draw_clip(rng: np.random.Generator, split: str, config: SceneConfig) -> MiniatureClip:
    """Draws a clip: views of photographs, and a large card on one of them."""
    frames = np.stack([_background(rng, split, FRAME_SIDE) for _ in range(NUM_FRAMES)])
    target = int(rng.integers(NUM_FRAMES))
    low, high = config.large_card
    side = int(rng.integers(low, high, endpoint=True)) * FRAME_SIDE // SIDE
    label, _, _ = _paste_card(rng, split, config, frames[target], side, round(side * (1 - 2 * config.large_margin)))
    return MiniatureClip(frames, label, target)


def _background(rng: np.random.Generator, split: str, side: int) -> np.ndarray:
    photos = photographs(split)
    photo = photos[rng.integers(len(photos))]
    y, x = rng.integers(photo.shape[0] - side + 1), rng.integers(photo.shape[1] - side + 1)
    return photo[y : y + side, x : x + side].copy()


def _paste_card(
    rng: np.random.Generator,
    split: str,
    config: SceneConfig,
    image: np.ndarray,
    side: int,
    inner: int,
    turns: int = 0,
) -> tuple[int, Box, Box]:
    """Pastes a card of `side` pixels with a digit of `inner` pixels in its centre, turned `turns` quarters counterclockwise.

    Returns:
        The label, and the boxes of the card and of the digit.
    """
    ink, labels = digits(split)
    if config.frequencies is None:
        which = int(rng.integers(len(labels)))
    else:
        weights = np.array(config.frequencies)
        digit = int(rng.choice(len(weights), p=weights / weights.sum()))
        which = int(rng.choice(np.flatnonzero(labels == digit)))
    size = image.shape[0]
    x, y = (int(v) for v in rng.integers(0, size - side, size=2, endpoint=True))
    dx, dy = x + (side - inner) // 2, y + (side - inner) // 2
    written = 255 - host_crop_resize(ink[which][..., None], (0, 0, *ink[which].shape[::-1]), (inner, inner))[..., 0]
    # Pillow pastes a colour, and repeats a channel, several times faster than NumPy broadcasts over three bytes.
    card = Image.new("RGB", (side, side), CARD)
    card.paste(Image.fromarray(written).convert("RGB"), (dx - x, dy - y))
    if config.on_side > 0:
        card.paste(BAR, (0, 0, side, (side - inner) // 3))
    image[y : y + side, x : x + side] = np.rot90(np.asarray(card), turns)
    return int(labels[which]), (x, y, x + side, y + side), (dx, dy, dx + inner, dy + inner)
