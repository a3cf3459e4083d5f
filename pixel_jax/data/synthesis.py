"""Writes reasoning traces from templates around a reference cue (Pixel Reasoner §4.1, App. E).

A cue is the box, or the frames, that answer the question. A trace looks at it at once, or makes one of the paper's
mistakes first and corrects it; the mistake is shown and never learned. The caller names the cue, so nothing here depends on
the subject of the question.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pixel_jax.data.traces import Trace, Turn, right, wrong
from pixel_jax.dialog.grammar import RELEASED_LANGUAGE, Language
from pixel_jax.dialog.writing import as_written, write_call
from pixel_jax.rollouts.prompts import Query
from pixel_jax.tools import CROP_IMAGE, SELECT_FRAMES

CALL_BOX = '<tool_call>\n{"name": "crop_image_normalized", "arguments": {"bbox_2d": ['
CALL_FRAMES = '<tool_call>\n{"name": "select_frames", "arguments": {"target_frames": ['
END_TARGET = '], "target_image": %d}}\n</tool_call>'
END_FRAMES = "]}}\n</tool_call>"

IMAGE_KINDS = ("single", "recrop", "recrop_twice", "further")
VIDEO_KINDS = ("single", "reselect")


@dataclasses.dataclass(frozen=True)
class Mix:
    """Shares of the kinds of traces. Defaults: the paper's (its 7,500 traces are 5,500 with operations and 2,000 without)."""

    direct: float = 2000 / 7500  # share of image traces that answer without looking closer
    image: tuple[float, float, float, float] = (0.3, 0.2, 0.2, 0.3)  # shares of the others, as IMAGE_KINDS
    video: tuple[float, float] = (0.9, 0.1)  # shares of video traces, as VIDEO_KINDS


@dataclasses.dataclass(frozen=True)
class Sentences:
    """The words around calls and answers; `{}` is the name of the cue."""

    zoom: str = "Now I will zoom in to look clearer at '{}'.\n"
    select: str = "Now I will select some frames to look clearer at '{}'.\n"
    missed: str = "It is not in this crop. "
    too_large: str = "It is still too small to read. "
    wrong_frames: str = "It is not in these frames. "
    answer: str = "The answer is \\boxed{"


SENTENCES = Sentences()

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 as shares of the image, in hundredths


def written_box(box: Sequence[float]) -> str:
    """Writes the box as the model does, in hundredths."""
    return ", ".join(f"{x:.2f}" for x in box)


def opening_zoom(cue: str) -> str:
    """The beginning of a turn that zooms in, up to the numbers of the box."""
    return SENTENCES.zoom.format(cue) + CALL_BOX


def opening_select(cue: str) -> str:
    """The beginning of a turn that selects frames, up to their numbers."""
    return SENTENCES.select.format(cue) + CALL_FRAMES


def crop_call(
    cue: str,
    box: Sequence[float],
    target: int = 1,
    size: tuple[int, int] = (1, 1),
    language: Language = RELEASED_LANGUAGE,
) -> str:
    """The sentence and the call that zoom in; `size` is the (height, width) of image number `target`."""
    values = {"bbox_2d": box, "target_image": target}
    return SENTENCES.zoom.format(cue) + write_call(language, CROP_IMAGE.name, values, size=size, label=cue)


def select_call(cue: str, frames: Sequence[int], language: Language = RELEASED_LANGUAGE) -> str:
    """The sentence and the call that select `frames`, which count from 1."""
    values = {"target_frames": frames}
    return SENTENCES.select.format(cue) + write_call(language, SELECT_FRAMES.name, values, label=cue)


def final_answer(answer: str) -> str:
    """The turn that gives the answer."""
    return SENTENCES.answer + answer + "}"


def outward(box: Sequence[float], width: int, height: int) -> Box:
    """The smallest box in whole hundredths of an image that holds `box` (pixels), clipped to the image."""
    x1, y1, x2, y2 = box
    low = [np.floor(100 * x / side) / 100 for x, side in ((x1, width), (y1, height))]
    high = [np.ceil(100 * x / side) / 100 for x, side in ((x2, width), (y2, height))]
    x1, y1, x2, y2 = np.clip([*low, *high], 0.0, 1.0).tolist()
    return x1, y1, x2, y2


def in_pixels(box: Sequence[float], width: int, height: int, pad: float = 0.0) -> tuple[int, int, int, int]:
    """The pixels that the crop tool cuts out for a box in hundredths, with `pad`, a share of the image, on each side."""
    return cut_out([round(x, 2) for x in box], width, height, pad)


def cut_out(shares: Sequence[float], width: int, height: int, pad: float) -> tuple[int, int, int, int]:
    """The pixels that the crop tool cuts out for any box in shares of the image."""

    def edge(share: float, side: int) -> int:
        return round(min(max(share, 0.0), 1.0) * side)

    x1, y1, x2, y2 = shares
    return edge(x1 - pad, width), edge(y1 - pad, height), edge(x2 + pad, width), edge(y2 + pad, height)


def grown(box: Sequence[float], pad: float) -> Box:
    """The box with `pad` on each side, clipped to the image."""
    x1, y1, x2, y2 = box
    return max(x1 - pad, 0.0), max(y1 - pad, 0.0), min(x2 + pad, 1.0), min(y2 + pad, 1.0)


def missing_box(rng: np.random.Generator, reference: Box) -> Box:
    """A random box that does not touch the reference: a tenth to four tenths of the image a side."""
    while True:
        width, height = (int(x) for x in rng.integers(10, 40, size=2, endpoint=True))
        x, y = int(rng.integers(0, 100 - width, endpoint=True)), int(rng.integers(0, 100 - height, endpoint=True))
        box = (x / 100, y / 100, (x + width) / 100, (y + height) / 100)
        if box[2] <= reference[0] or box[0] >= reference[2] or box[3] <= reference[1] or box[1] >= reference[3]:
            return box
        if (reference[2] - reference[0]) * (reference[3] - reference[1]) > 0.3:
            raise ValueError(f"the reference {reference} leaves too little of the image to miss it")


def loose_box(rng: np.random.Generator, reference: Box, factor: tuple[float, float]) -> Box:
    """A box around the reference, `factor` (lowest, highest) times as wide and as high, the reference anywhere in it."""
    box = []
    for low, high in ((reference[0], reference[2]), (reference[1], reference[3])):
        side = min((high - low) * rng.uniform(*factor), 1.0)
        start = np.clip(rng.uniform(high - side, low), 0.0, 1.0 - side)
        box.append((np.floor(100 * start) / 100, min(np.ceil(100 * (start + side)) / 100, 1.0)))
    (x1, x2), (y1, y2) = box
    return float(x1), float(y1), float(x2), float(y2)


def direct_trace(query: Query, answer: str) -> Trace:
    """A trace that answers without looking closer."""
    return Trace(query, (right(final_answer(answer)),), answer)


def image_turns(
    rng: np.random.Generator,
    size: tuple[int, int],
    cue: str,
    reference: Box,
    answer: str,
    kind: str,
    *,
    shown: Box | None = None,
    pad: float = 0.0,
    target: int = 1,
    images: int = 1,
    language: Language = RELEASED_LANGUAGE,
) -> tuple[Turn, ...]:
    """Writes the turns that look at `reference` of image number `target` of `images`, after the mistake of the `kind`.

    `size` is the image's (height, width), `pad` what the crop tool adds on each side: a crop that misses the reference misses it
    with its padding, and a box within a crop is relative to what the crop showed. The box `shown` is cut out instead of
    the reference, while the reference is written: so a model sees crops as imprecise as those of its own boxes, and learns exact
    boxes.
    Calls are written in the `language`, which has the crop among its tools.

    Raises:
        UnwritableError: its format cannot name an image of that number.
    """
    carried_out = reference if shown is None else shown
    end = right(final_answer(answer))

    def look(before: str = "") -> Turn:
        written, executed = (crop_call(cue, box, target, size, language) for box in (reference, carried_out))
        return Turn(((before + written, True),), executed=executed)

    if kind == "single":
        return (look(), end)
    if kind in ("recrop", "recrop_twice"):
        misses = [missing_box(rng, grown(reference, pad)) for _ in range(1 if kind == "recrop" else 2)]
        turns = [
            wrong((SENTENCES.missed if i else "") + crop_call(cue, box, target, size, language))
            for i, box in enumerate(misses)
        ]
        return (*turns, look(SENTENCES.missed), end)
    if kind == "further":
        height, width = size
        loose = loose_box(rng, reference, (3.0, 6.0))
        x1, y1, x2, y2 = cut_out(as_written(language, [round(x, 2) for x in loose], size), width, height, pad)
        shown_first = (y2 - y1, x2 - x1)

        def within(box: Box) -> Box:
            """The box relative to the loose one, as it was shown."""
            inside = np.clip(np.array(in_pixels(box, width, height)) - (x1, y1, x1, y1), 0, (x2 - x1, y2 - y1) * 2)
            return outward(inside.tolist(), x2 - x1, y2 - y1)

        closer = Turn(
            ((SENTENCES.too_large + crop_call(cue, within(reference), images + 1, shown_first, language), True),),
            executed=crop_call(cue, within(carried_out), images + 1, shown_first, language),
        )
        return (wrong(crop_call(cue, loose, target, size, language)), closer, end)
    raise ValueError(f"kind must be one of {IMAGE_KINDS}, not {kind!r}")


def image_trace(
    rng: np.random.Generator,
    query: Query,
    cue: str,
    reference: Box,
    answer: str,
    kind: str,
    *,
    shown: Box | None = None,
) -> Trace:
    """A trace of `image_turns` about the first image of `query`, whose crops are not padded."""
    turns = image_turns(rng, query.images[0].shape[:2], cue, reference, answer, kind, shown=shown)
    return Trace(query, turns, answer)


def video_turns(
    rng: np.random.Generator,
    length: int,
    cue: str,
    frames: Sequence[int],
    answer: str,
    kind: str,
    language: Language = RELEASED_LANGUAGE,
) -> tuple[Turn, ...]:
    """Writes the turns that select `frames` (from 1, of `length`), after as many wrong ones if the `kind` is "reselect"."""
    end = right(final_answer(answer))
    if kind == "single":
        return (right(select_call(cue, frames, language)), end)
    if kind == "reselect":
        others = [i for i in range(1, length + 1) if i not in frames]
        if not others:
            raise ValueError(f"all {length} frames are the reference: none is wrong")
        picked = sorted(int(i) for i in rng.choice(others, min(len(frames), len(others)), replace=False))
        return (
            wrong(select_call(cue, picked, language)),
            right(SENTENCES.wrong_frames + select_call(cue, frames, language)),
            end,
        )
    raise ValueError(f"kind must be one of {VIDEO_KINDS}, not {kind!r}")


def video_trace(
    rng: np.random.Generator, query: Query, cue: str, frames: Sequence[int], answer: str, kind: str
) -> Trace:
    """A trace of `video_turns` about the frames of `query`."""
    return Trace(query, video_turns(rng, len(query.images), cue, frames, answer, kind), answer)


def draw_kind(rng: np.random.Generator, kinds: Sequence[str], shares: Sequence[float]) -> str:
    """Draws one of the kinds, each with its share."""
    return kinds[int(rng.choice(len(kinds), p=np.array(shares) / np.sum(shares)))]
