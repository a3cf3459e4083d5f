"""The items of the set: a picture, a question with options, the answer, and where the evidence lies.

Everything is a function of a photograph and a `numpy.random.Generator`. Questions are about an attribute of one thing (a
letter, a digit, a colour) or about the places of two, as in V* (arXiv 2312.14135, §4).
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from pixel_jax.search_set import things
from pixel_jax.search_set.photographs import Photograph, PhotographError, pixels
from pixel_jax.search_set.things import Patch, Size

Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels, x2 and y2 exclusive
Difficulty = Literal["easy", "medium", "hard"]
Kind = Literal["letter", "colour", "side", "digit", "larger"]
DIFFICULTIES: tuple[Difficulty, ...] = ("easy", "medium", "hard")
SPATIAL: tuple[Kind, ...] = ("side", "larger")
DISTRACTORS = 4  # things that are not asked about, in items that are not easy
OPTIONS = 4  # of a question about a letter or a colour
ENLARGED = 1.5  # times that a photograph may be enlarged
ASIDE = 0.12  # of the picture's side, by which two things at least differ in a question about their places
CONTRAST = 110  # levels between ink and what it is on, before it is hidden
TRIES = 200  # places that are tried for a thing before all are placed anew

DIGIT_QUESTION = "What is the digit on the card?"  # the quickstart's
LARGER_QUESTION = "Is the larger digit on the card on the left or on the right?"
MAGENTA, GREEN = (190, 60, 185), (60, 165, 95)  # the card that is asked about, and others


@dataclasses.dataclass(frozen=True)
class Tier:
    """Items of one resolution. In an overview that is `factor` times smaller the marks cannot be seen."""

    name: str
    size: Size  # of the pictures; both sides are multiples of 28 x factor, so that the overview is shown as it is
    factor: int
    kinds: tuple[Kind, ...]
    items: int  # of the usual set
    marks: tuple[int, int, int]  # height of a mark in pixels: easy, medium, hard
    landmark: int  # side in pixels

    @property
    def overview(self) -> Size:
        """The size of the overview."""
        return self.size[0] // self.factor, self.size[1] // self.factor

    @property
    def max_pixels(self) -> int:
        """The pixel budget (`RolloutConfig.max_pixels`) with which the model sees the overview and no more."""
        return self.overview[0] * self.overview[1]


USUAL: tuple[Kind, ...] = ("letter", "colour", "side")
TIERS = {
    tier.name: tier
    for tier in (
        Tier("miniature", (448, 448), 8, ("digit", "larger"), 1000, (56, 52, 46), 120),
        Tier("1k", (1120, 896), 4, USUAL, 600, (36, 32, 28), 84),
        Tier("2k", (2240, 1568), 4, USUAL, 500, (36, 32, 28), 84),
        Tier("4k", (3808, 2128), 4, USUAL, 300, (36, 32, 28), 84),
    )
}


class Item(NamedTuple):
    """A question about a picture."""

    image: np.ndarray  # uint8 [h, w, 3]
    question: str
    options: tuple[str, ...]
    answer: str  # one of the options
    boxes: tuple[Box, ...]  # of the marks that show the answer
    kind: Kind
    difficulty: Difficulty
    photograph: str

    @property
    def category(self) -> str:
        """By which a report groups it: "attribute" or "spatial", and the difficulty."""
        return f"{'spatial' if self.kind in SPATIAL else 'attribute'}, {self.difficulty}"

    @property
    def lettered(self) -> str:
        """The question with its options below, as released of V*."""
        return "\n".join([self.question, *(f"({letter}) {x}" for letter, x in zip("ABCD", self.options, strict=False))])

    @property
    def letter(self) -> str:
        """The letter of the answer among the options."""
        return "ABCD"[self.options.index(self.answer)]


class Thing(NamedTuple):
    """A mark, possibly on a landmark, that is to be placed."""

    marks: tuple[tuple[Patch, tuple[int, int]], ...]  # with the places of their corners in the box of the thing
    landmark: Patch | None
    size: Size
    asked: bool  # whether its marks are the evidence


def suits(photograph: Photograph, tier: Tier) -> bool:
    """Whether a photograph is large enough for a tier."""
    return all(ENLARGED * have >= need for have, need in zip(photograph.size, tier.size, strict=True))


def suitable(photographs: Sequence[Photograph], tier: Tier) -> list[Photograph]:
    """The photographs that are large enough for a tier.

    Raises:
        PhotographError: none is.
    """
    chosen = [x for x in photographs if suits(x, tier)]
    if not chosen:
        least = " x ".join(str(-int(-side // ENLARGED)) for side in tier.size)
        raise PhotographError(
            f"the tier {tier.name!r} needs photographs of at least {least} pixels; the largest of {len(photographs)} is "
            f"{max((x.size for x in photographs), default='none')}: name a folder with larger ones, such as wallpapers"
        )
    return chosen


def background(rng: np.random.Generator, photograph: Photograph, size: Size) -> np.ndarray:
    """A part of a photograph, possibly mirrored, at the given size: uint8 [h, w, 3]."""
    image = pixels(photograph)
    least = max(need / have for have, need in zip(image.size, size, strict=True))
    scale = rng.uniform(least, max(1.0, least))
    width, height = (min(need / scale, have) for have, need in zip(image.size, size, strict=True))
    x, y = (rng.uniform(0, have - need) for have, need in zip(image.size, (width, height), strict=True))
    part = image.resize(size, Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))
    if rng.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(part)


def draw_item(
    rng: np.random.Generator, image: np.ndarray, tier: Tier, kind: Kind, difficulty: Difficulty, photograph: str = ""
) -> Item:
    """Draws an item.

    Args:
        rng: of everything that is drawn.
        image: the background, uint8 [h, w, 3] of the tier's size, in which landmarks are pasted.
        tier: of the picture.
        kind: of the question.
        difficulty: easy, with one thing on a landmark; medium, with others beside it; hard, with others, smaller and (but for
            the miniature tier) without landmarks.
        photograph: the name of that of the background.
    """
    height = tier.marks[DIFFICULTIES.index(difficulty)]
    make = {"letter": _letter, "colour": _colour, "side": _side, "digit": _digit, "larger": _larger}[kind]
    some, question, options, answer = make(rng, tier, difficulty, height)
    apart = kind == "side"
    places = _places(rng, [x.size for x in some], tier.size, apart=apart)
    if apart:  # the question is about where the first two lie
        question, options, answer = _about_sides(rng, question, places)
    for one, (x, y) in zip(some, places, strict=True):
        if one.landmark is not None:
            things.paste(image, one.landmark, x, y)
    image = things.faded(image, rng, tier.factor)
    boxes = []
    for one, (x, y) in zip(some, places, strict=True):
        for mark, (dx, dy) in one.marks:
            inner = _inked(mark, image, x + dx, y + dy)
            things.hide(image, inner, x + dx, y + dy, tier.factor)
            if one.asked:
                boxes.append((x + dx, y + dy, x + dx + inner.cover.shape[1], y + dy + inner.cover.shape[0]))
    return Item(image, question, tuple(options), answer, tuple(boxes), kind, difficulty, photograph)


Made = tuple[list[Thing], str, Sequence[str], str]  # things, question, options, answer


def _letter(rng: np.random.Generator, tier: Tier, difficulty: Difficulty, height: int) -> Made:
    options = _chosen(rng, things.LETTERS, OPTIONS)
    answer = str(rng.choice(options))
    wrong = [x for x in options if x != answer]
    count = 1 if difficulty == "easy" else 1 + DISTRACTORS
    letters = [answer, *(wrong[i % len(wrong)] for i in range(count - 1))]
    if difficulty == "hard":
        shapes = _chosen(rng, things.SHAPES, len(things.SHAPES))
        chosen = [shapes[0], *(shapes[1 + i % (len(shapes) - 1)] for i in range(count - 1))]
        some = [
            framed(shape, letter, height, tier, asked=i == 0)
            for i, (shape, letter) in enumerate(zip(chosen, letters, strict=True))
        ]
        return some, f"Which letter is inside the {shapes[0]}?", options, answer
    names = _chosen(rng, LANDMARKS, count)
    some = [
        _on_landmark(name, _written(letter, height), tier, asked=i == 0)
        for i, (name, letter) in enumerate(zip(names, letters, strict=True))
    ]
    return some, f"Which letter is on the {names[0]}?", options, answer


def _colour(rng: np.random.Generator, tier: Tier, difficulty: Difficulty, height: int) -> Made:
    options = _chosen(rng, list(things.COLOURS), OPTIONS)
    answer = str(rng.choice(options))
    wrong = [x for x in options if x != answer]
    count = 1 if difficulty == "easy" else 1 + DISTRACTORS
    shapes = _chosen(rng, things.SHAPES, len(things.SHAPES))
    chosen = [shapes[0], *(shapes[1 + i % (len(shapes) - 1)] for i in range(count - 1))]
    colours = [answer, *(wrong[i % len(wrong)] for i in range(count - 1))]
    marks = [
        shape_mark(shape, things.COLOURS[colour], height, tier) for shape, colour in zip(chosen, colours, strict=True)
    ]
    question = f"What colour is the {shapes[0]}?"
    if difficulty == "hard":
        return [_bare(mark, asked=i == 0) for i, mark in enumerate(marks)], question, options, answer
    names = _chosen(rng, CUT_OUT_LANDMARKS + ("white card",), count)  # a coloured card could be mistaken for the shape
    some = [
        _on_landmark(name, mark, tier, asked=i == 0) for i, (name, mark) in enumerate(zip(names, marks, strict=True))
    ]
    return some, f"What colour is the {shapes[0]} on the {names[0]}?", options, answer


def _side(rng: np.random.Generator, tier: Tier, difficulty: Difficulty, height: int) -> Made:
    count = 2 if difficulty == "easy" else 2 + DISTRACTORS
    letters = _chosen(rng, things.LETTERS, count)
    marks = [_written(letter, height) for letter in letters]
    if difficulty == "hard":
        some = [_bare(mark, asked=i < 2) for i, mark in enumerate(marks)]
    else:
        names = _chosen(rng, LANDMARKS, count)
        some = [
            _on_landmark(name, mark, tier, asked=i < 2) for i, (name, mark) in enumerate(zip(names, marks, strict=True))
        ]
    return some, f"letter {letters[0]} or letter {letters[1]}", (), ""


def _about_sides(
    rng: np.random.Generator, question: str, places: Sequence[tuple[int, int]]
) -> tuple[str, list[str], str]:
    """The question about the places of the first two things, along the axis on which they lie further apart."""
    one, other = question.split(" or ")
    axis = int(abs(places[0][1] - places[1][1]) > abs(places[0][0] - places[1][0]))
    before, after = (("left", "right"), ("above", "below"))[axis]
    options = [before, after] if rng.random() < 0.5 else [after, before]
    words = f"above or below the {other}" if axis else f"to the left or to the right of the {other}"
    return f"Is the {one} {words}?", options, before if places[0][axis] < places[1][axis] else after


def _digit(rng: np.random.Generator, tier: Tier, difficulty: Difficulty, height: int) -> Made:
    options = sorted(_chosen(rng, things.DIGITS, OPTIONS))
    answer = str(rng.choice(options))
    some = [_card(MAGENTA, [answer], height, tier, asked=True)]
    for other in _chosen(rng, [x for x in options if x != answer], len(_others(difficulty))):
        some.append(_card(GREEN, [other], height, tier, asked=False))
    return some, DIGIT_QUESTION, options, answer


def _larger(rng: np.random.Generator, tier: Tier, difficulty: Difficulty, height: int) -> Made:
    height = round(0.8 * height)  # two side by side
    pair = _chosen(rng, things.DIGITS, 2)
    some = [_card(MAGENTA, pair, height, tier, asked=True)]
    for _ in _others(difficulty):
        some.append(_card(GREEN, _chosen(rng, things.DIGITS, 2), height, tier, asked=False))
    return some, LARGER_QUESTION, ("left", "right"), "left" if pair[0] > pair[1] else "right"


def _others(difficulty: Difficulty) -> range:
    """One for each other card of the miniature tier."""
    return range(DIFFICULTIES.index(difficulty))


# ---- things

CUT_OUT_LANDMARKS = tuple(things.CUT_OUTS)
CARDS = {
    "red card": (205, 60, 60),
    "green card": (70, 150, 80),
    "blue card": (80, 110, 200),
    "white card": (232, 232, 228),
}
LANDMARKS = (*CUT_OUT_LANDMARKS, *CARDS)


def _written(text: str, height: int) -> Patch:
    """A letter or a digit, whose ink is chosen where it is put (`_inked`)."""
    return Patch(None, things.glyph(text, height))


def _inked(mark: Patch, image: np.ndarray, x: int, y: int) -> Patch:
    """A mark with its colour; ink is darker than what is bright and brighter than what is dark."""
    if mark.colour is not None:
        return mark
    height, width = mark.cover.shape
    around = image[y : y + height, x : x + width].mean(axis=(0, 1))
    ink = around - CONTRAST if around.mean() > 127 else around + CONTRAST
    return things.plain(mark.cover, np.clip(ink, 0, 255))


def _line(tier: Tier) -> float:
    """The width of lines in pixels: half a pixel of the overview."""
    return tier.factor / 2


def shape_mark(shape: str, colour: tuple[int, int, int], side: int, tier: Tier) -> Patch:
    """The outline of a shape, twice, one inside the other, so that much of it has its colour."""
    cover, inner, line = things.outline(shape, side, _line(tier)), side // 2, _line(tier)
    cover = cover.copy()
    start = (side - inner) // 2 + (side // 8 if shape == "triangle" else 0)
    middle = (side - inner) // 2
    place = cover[start : start + inner, middle : middle + inner]
    np.maximum(place, things.outline(shape, inner, line), out=place)
    return things.plain(cover, colour)


def _bare(mark: Patch, *, asked: bool) -> Thing:
    return Thing(((mark, (0, 0)),), None, mark.cover.shape[::-1], asked)


def framed(shape: str, letter: str, height: int, tier: Tier, *, asked: bool) -> Thing:
    """A letter inside the outline of a shape."""
    side = round(2.4 * height)
    text, cover = things.glyph(letter, height), things.outline(shape, side, _line(tier)).copy()
    high, wide = text.shape  # about `height`: fonts have whole sizes
    x, y = place_in_frame(shape, side, (wide, high))
    place = cover[y : y + high, x : x + wide]
    np.maximum(place, text, out=place)
    return _bare(Patch(None, cover), asked=asked)


def place_in_frame(shape: str, side: int, letter: Size) -> tuple[int, int]:
    """The upper left corner of a letter inside the outline of a shape."""
    x = (side - letter[0]) // 2
    return x, side - letter[1] - round(0.18 * side) if shape == "triangle" else (side - letter[1]) // 2


def _on_landmark(name: str, mark: Patch, tier: Tier, *, asked: bool) -> Thing:
    side = tier.landmark
    landmark = things.card((side, side), CARDS[name]) if name in CARDS else things.cut_out(name, side)
    width, height = landmark.cover.shape[::-1]
    at = ((width - mark.cover.shape[1]) // 2, (height - mark.cover.shape[0]) // 2)
    return Thing(((mark, at),), landmark, (width, height), asked)


def _card(colour: tuple[int, int, int], digits: Sequence[str], height: int, tier: Tier, *, asked: bool) -> Thing:
    """A card with digits side by side."""
    side = tier.landmark
    marks = [_written(digit, height) for digit in digits]
    gap = (side - sum(mark.cover.shape[1] for mark in marks)) // (len(marks) + 1)
    placed, x = [], gap
    for mark in marks:
        placed.append((mark, (x, (side - mark.cover.shape[0]) // 2)))
        x += mark.cover.shape[1] + gap
    return Thing(tuple(placed), things.card((side, side), colour), (side, side), asked)


# ---- places


def _chosen(rng: np.random.Generator, items: Sequence[str], count: int) -> list[str]:
    """Chooses `count` different items in random order."""
    return [items[int(i)] for i in rng.permutation(len(items))[:count]]


def _places(
    rng: np.random.Generator, sizes: Sequence[Size], whole: Size, *, apart: bool = False
) -> list[tuple[int, int]]:
    """Corners of things that do not touch; with `apart` the first two differ clearly along one axis."""
    while True:
        placed: list[Box] = []
        for width, height in sizes:
            for _ in range(TRIES):
                x, y = int(rng.integers(whole[0] - width + 1)), int(rng.integers(whole[1] - height + 1))
                gap = min(whole) // 40
                if all(
                    x >= b[2] + gap or b[0] >= x + width + gap or y >= b[3] + gap or b[1] >= y + height + gap
                    for b in placed
                ):
                    placed.append((x, y, x + width, y + height))
                    break
            else:
                break
        if len(placed) < len(sizes):
            continue
        corners = [(box[0], box[1]) for box in placed]
        moved = [abs(a - b) / side for a, b, side in zip(*corners[:2], whole, strict=True)] if apart else [1.0]
        if max(moved) >= ASIDE:
            return corners
