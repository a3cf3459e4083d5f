"""A trajectory as a person would look at it: the image with each box, the crop the model saw, what it wrote."""

import base64
import dataclasses
import functools
import io
import math
import json
import os
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from PIL import Image, ImageDraw

from pixel_jax.config import ConfigError
from pixel_jax.config import load as load_config
from pixel_jax.dialog.observations import HEAD
from pixel_jax.dialog.template import PROMPT, SPECIAL_TOKENS, flatten
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.evaluation.curves import COLORS
from pixel_jax.files import FileError, read_json, write_file
from pixel_jax.models.inputs import Visual
from pixel_jax.rollouts.prompts import Query
from pixel_jax.rollouts.trajectory import STOP_REASONS, CallStatus, Trajectories
from pixel_jax.terminal import brief

END = SPECIAL_TOKENS["im_end"]
URI = re.compile(r"data:image/(?:png|jpeg);base64,[A-Za-z0-9+/]*={0,2}")


@dataclasses.dataclass
class Picture:
    """A picture as a data URI, with the boxes drawn on it: (number of the call, x1, y1, x2, y2) in its pixels."""

    uri: str
    width: int
    height: int
    caption: str
    boxes: tuple[tuple[int, int, int, int, int], ...] = ()

    def __post_init__(self):
        if not URI.fullmatch(self.uri):
            raise ValueError(f"a picture is a PNG or JPEG as a data URI, not {brief(self.uri, 60)}")
        if self.width < 1 or self.height < 1:
            raise ValueError(f"a picture has no sides of {self.width} x {self.height}")


@dataclasses.dataclass
class ShownTurn:
    """What was said. `role` is "assistant", or "tool" for what came back; `failed` marks an error message."""

    role: Literal["assistant", "tool"]
    text: str
    pictures: tuple[Picture, ...] = ()
    failed: bool = False


@dataclasses.dataclass
class Trace:
    """One conversation, ready to be drawn. `answer` and what follows it are None where nothing is known."""

    question: str
    pictures: tuple[Picture, ...]  # what may be zoomed into, at full resolution
    overview: tuple[Picture, ...]  # the same as the model saw it first
    turns: tuple[ShownTurn, ...]
    stop: str
    answer: str | None = None
    reference: str | None = None
    correct: bool | None = None
    title: str = ""
    reward: float | None = None  # what training made of it
    advantage: float | None = None  # over the others of its group
    terms: dict[str, float] = dataclasses.field(default_factory=dict)  # what the reward is the sum of, by name


LOSSLESS_AREA = 256 * 256  # pixels; what the model saw is shown exactly, large photographs are not


def data_uri(image: np.ndarray) -> str:
    """uint8 [h, w, 3] as PNG, or as JPEG where that saves a page from megabytes of photographs."""
    lossless = image.shape[0] * image.shape[1] <= LOSSLESS_AREA
    buffer = io.BytesIO()
    if lossless:
        Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    else:
        Image.fromarray(image).save(buffer, format="JPEG", quality=88)
    return f"data:image/{'png' if lossless else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def unpatchify(patches: np.ndarray, height: int, width: int, merge: int = 2) -> np.ndarray:
    """Frame patches uint8 [P, 3 p p], merge x merge in a row for each token, of a grid of `height` by `width` patches, back to pixels uint8 [h, w, 3]."""
    patch = math.isqrt(patches.shape[-1] // 3)
    used = patches[: height * width].reshape(height // merge, width // merge, merge, merge, 3, patch, patch)
    return used.transpose(0, 2, 5, 1, 3, 6, 4).reshape(height * patch, width * patch, 3)


def make_trace(
    trajectories: Trajectories[Visual],
    row: int,
    query: Query,
    vocabulary: Vocabulary,
    *,
    side: int | None = None,
    **known: Any,
) -> Trace:
    """Row `row` of host `trajectories` as a `Trace`.

    Args:
        query: what it was asked.
        side: pixels of the longest side of a picture in it; larger ones are kept smaller. None: all are kept as they are.
        known: further fields of the `Trace`, `answer` and those that follow it.
    """
    t = trajectories
    boxes: list[list[tuple[int, int, int, int, int]]] = [[] for _ in query.images]
    # Items and slices come in the order in which the row saw them, with gaps; the prompt's are first.
    grids = t.visual.grids[row][t.visual.grids[row, :, 0] > 0]
    frames = t.visual.slices[row][t.visual.slices[row, :, 0] >= 0]
    draw = functools.partial(_picture, side=side)
    seen = lambda frame, grid, caption: draw(unpatchify(t.visual.patches[row, frame], *map(int, grid[1:])), caption)
    overview = []
    for i in range(len(query.images)):
        frame, grid = (frames[i // 2, i % 2], grids[0]) if query.is_video else (frames[i, 0], grids[i])
        overview.append(seen(frame, grid, f"{_name(query, i)} as the model first sees it"))
    items = 1 if query.is_video else len(query.images)
    shown = iter(zip(frames[int(grids[:items, 0].sum()) :, 0], grids[items:], strict=True))

    written, answered = _messages(t, row, vocabulary)
    turns = []
    for call, ids in enumerate(answered):
        turns.append(ShownTurn("assistant", written[call]))
        images = tuple(seen(*next(shown), "what it saw") for _ in range(int(np.sum(ids == vocabulary.vision_start))))
        failed = t.calls.status[row, call] != CallStatus.DONE
        turns.append(ShownTurn("tool", _text_of(ids, vocabulary), images, failed=bool(failed)))
        source = jax.tree.map(lambda x: x[row, call].tolist(), t.calls.source)  # noqa: B023
        for image, region in zip(source.image, source.region, strict=True):
            if image >= 0:  # of what a tool made, the picture shows enough
                boxes[image].append((call + 1, *region))
    turns.append(ShownTurn("assistant", written[-1]))
    return Trace(
        question=query.question,
        pictures=tuple(draw(image, _name(query, i), boxes[i]) for i, image in enumerate(query.images)),
        overview=tuple(overview),
        turns=tuple(turns),
        stop=STOP_REASONS[int(t.stop[row])],
        **known,
    )


def _picture(
    image: np.ndarray, caption: str, boxes: Sequence[tuple[int, int, int, int, int]] = (), *, side: int | None
) -> Picture:
    """A picture of its own size, in which its boxes are; what is kept of it may be smaller."""
    height, width = image.shape[:2]
    if side is not None and max(height, width) > side:
        smaller = Image.fromarray(image)
        smaller.thumbnail((side, side))
        image = np.asarray(smaller)
    return Picture(data_uri(image), width, height, caption, tuple(boxes))


def _messages(t: Trajectories, row: int, vocabulary: Vocabulary) -> tuple[list[str], list[np.ndarray]]:
    """The texts of the policy's turns and the ids of the answers between them, one fewer.

    Where one ends and the next begins follows from who wrote which token (`chosen`), not from what the tokens are: the
    policy may write anything. In what it did not write, special tokens are the template's: texts have none.
    """
    ids, loss_mask = t.tokens[row][t.valid[row]], t.loss_mask[row][t.valid[row]]
    runs = np.split(ids, np.flatnonzero(np.diff(loss_mask)) + 1)
    if len(runs) % 2:  # it ends with an answer to which the policy wrote nothing
        runs.append(ids[:0])
    # The prompt ends where the assistant begins; how its first turn was made to begin follows, if it was.
    opening = runs[0][np.flatnonzero(runs[0] == vocabulary.im_start)[-1] :]
    texts = [vocabulary.to_bytes(run).decode("utf-8", "replace").removesuffix(END) for run in runs[1::2]]
    texts[0] = vocabulary.to_bytes(opening).decode("utf-8", "replace").removeprefix(flatten(PROMPT)) + texts[0]
    return texts, runs[2::2]


def _text_of(ids: np.ndarray, vocabulary: Vocabulary) -> str:
    """The text of an observation: what the template puts around it goes, and its images are drawn beside it."""
    end = np.flatnonzero((ids == vocabulary.vision_start) | (ids == vocabulary.im_end))[0]
    text = vocabulary.to_bytes(ids[:end]).decode("utf-8", "replace")
    return text.removeprefix(flatten(HEAD)).strip("\n")


def _name(query: Query, index: int) -> str:
    if query.is_video:
        return f"frame {index + 1}"
    return "image" if len(query.images) == 1 else f"image {index + 1}"


def drawn(picture: Picture) -> np.ndarray:
    """What is kept of a picture, its boxes on it: uint8 [h, w, 3]."""
    encoded = base64.b64decode(picture.uri.partition(",")[2])
    image = Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG")).convert("RGB")
    pen, scale = ImageDraw.Draw(image), image.width / picture.width
    for number, *box in picture.boxes:
        color = COLORS[(number - 1) % len(COLORS)]
        pen.rectangle([x * scale for x in box], outline=color, width=max(1, max(image.size) // 150))
    return np.asarray(image)


def as_text(trace: Trace) -> str:
    """A conversation without its pictures, line by line: who said what, and what came of it."""
    lines = [f"question: {trace.question}"]
    for turn in trace.turns:
        lines.append(f"{'model' if turn.role == 'assistant' else 'tool'}: {turn.text}")
        lines += [f"      ({picture.caption}, {picture.width}x{picture.height})" for picture in turn.pictures]
    known = {name: getattr(trace, name) for name in ("answer", "reference", "correct", "reward", "advantage")}
    lines += [f"{name}: {value}" for name, value in known.items() if value is not None]
    lines += [f"reward {name}: {value}" for name, value in trace.terms.items()]
    return "\n".join([*lines, f"ended: {trace.stop}"])


def save(path: str | os.PathLike, traces: Sequence[Trace]) -> None:
    """Write `traces` as one JSON file, whole or not at all."""
    write_file(path, json.dumps([dataclasses.asdict(trace) for trace in traces]))


def load(path: str | os.PathLike) -> list[Trace]:
    """Read what `save` wrote. FileError: the file holds something else, in the smallest part; it may come from anywhere."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise FileError(f"{os.fspath(path)!r} holds {type(rows).__name__}, not a list of traces")
    try:
        return [load_config(Trace, row, f"trace {i}") for i, row in enumerate(rows, 1)]
    except ConfigError as error:
        raise FileError(f"{os.fspath(path)!r} holds no traces: {str(error)[:300]}") from None
