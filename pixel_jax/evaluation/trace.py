"""A trajectory as a person would look at it: the image with each box, the crop the model saw, what it wrote."""

import base64
import dataclasses
import io
import json
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pixel_jax.dialog.observations import Kind
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.files import FileError, read_json, write_file
from pixel_jax.rollout.config import PATCH
from pixel_jax.rollout.prompts import Query
from pixel_jax.rollout.trajectory import STOP_REASONS, Trajectories

END = "<|im_end|>"


@dataclasses.dataclass
class Picture:
    """A picture as a data URI, with the boxes drawn on it: (number of the call, x1, y1, x2, y2) in its pixels."""

    uri: str
    width: int
    height: int
    caption: str
    boxes: list[tuple[int, int, int, int, int]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Turn:
    """What was said. `role` is "assistant", or "tool" for what came back; `failed` marks an error message."""

    role: str
    text: str
    pictures: list[Picture] = dataclasses.field(default_factory=list)
    failed: bool = False


@dataclasses.dataclass
class Trace:
    """One conversation, ready to be drawn. `answer`, `reference` and `correct` are None where nothing is known."""

    question: str
    pictures: list[Picture]  # what may be zoomed into, at full resolution
    overview: list[Picture]  # the same as the model saw it first
    turns: list[Turn]
    stop: str
    answer: str | None = None
    reference: str | None = None
    correct: bool | None = None
    title: str = ""


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


def unpatchify(patches: np.ndarray, height: int, width: int) -> np.ndarray:
    """Frame patches uint8 [P, 588] of a grid of `height` by `width` patches, back to pixels uint8 [h, w, 3]."""
    used = patches[: height * width].reshape(height // 2, width // 2, 2, 2, 3, PATCH, PATCH)
    return used.transpose(0, 2, 5, 1, 3, 6, 4).reshape(height * PATCH, width * PATCH, 3)


def make_trace(
    trajectories: Trajectories,
    row: int,
    query: Query,
    vocabulary: Vocabulary,
    *,
    answer: str | None = None,
    reference: str | None = None,
    correct: bool | None = None,
    title: str = "",
) -> Trace:
    """Row `row` of host `trajectories` as a `Trace`; `query` is what it was asked."""
    t = trajectories
    pictures = [_picture(image, _name(query, i)) for i, image in enumerate(query.images)]
    # Items and slices come in the order in which the row saw them, with gaps; the prompt's are first.
    grids = t.visual.grids[row][t.visual.grids[row, :, 0] > 0]
    frames = t.visual.slices[row][t.visual.slices[row, :, 0] >= 0]
    seen = lambda frame, grid, caption: _picture(unpatchify(t.visual.patches[row, frame], *map(int, grid[1:])), caption)
    overview = []
    for i in range(len(query.images)):
        frame, grid = (frames[i // 2, i % 2], grids[0]) if query.is_video else (frames[i, 0], grids[i])
        overview.append(seen(frame, grid, f"{_name(query, i)} as the model first sees it"))
    items = 1 if query.is_video else len(query.images)
    shown = iter(zip(frames[int(grids[:items, 0].sum()) :, 0], grids[items:], strict=True))

    turns, call = [], -1
    for role, text in _messages(t, row, vocabulary)[2:]:
        if role == "assistant":
            turns.append(Turn("assistant", text.removesuffix("\n").removesuffix(END)))
            continue
        call += 1
        kind = int(t.calls.observation[row, call])
        count = text.count("<|vision_start|>")
        images = [seen(*next(shown), "what it saw") for _ in range(count)]
        turns.append(Turn("tool", _readable(text), images, failed=count == 0))
        if kind == Kind.CROP:
            pictures[int(t.calls.canvas[row, call])].boxes.append((call + 1, *map(int, t.calls.box[row, call])))
        for frame in t.calls.frames[row, call] if kind == Kind.FRAMES else ():
            if frame >= 0:
                pictures[int(frame)].boxes.append(
                    (call + 1, 0, 0, pictures[int(frame)].width, pictures[int(frame)].height)
                )
    return Trace(
        question=query.question,
        pictures=pictures,
        overview=overview,
        turns=turns,
        stop=STOP_REASONS[int(t.stop[row])],
        answer=answer,
        reference=reference,
        correct=correct,
        title=title,
    )


def _picture(image: np.ndarray, caption: str) -> Picture:
    return Picture(data_uri(image), image.shape[1], image.shape[0], caption)


def _messages(t: Trajectories, row: int, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """(role, text) of every message. A message begins where the template, not the policy, wrote `<|im_start|>`."""
    messages: list[list[int]] = []
    for token, chosen in zip(t.tokens[row][t.valid[row]], t.chosen[row][t.valid[row]], strict=True):
        if token == vocabulary.im_start and not chosen:
            messages.append([])
        else:
            messages[-1].append(int(token))
    texts = (vocabulary.to_bytes(ids).decode("utf-8", "replace") for ids in messages)
    return [tuple(text.split("\n", 1)) for text in texts]


def _readable(text: str) -> str:
    """An observation without its chat markup; images are drawn beside it."""
    return text.split(END, 1)[0].split("<|vision_start|>", 1)[0].strip("\n")


def _name(query: Query, index: int) -> str:
    if query.is_video:
        return f"frame {index + 1}"
    return "image" if len(query.images) == 1 else f"image {index + 1}"


def save(path: str | os.PathLike, traces: Sequence[Trace]) -> None:
    """Write `traces` as one JSON file, whole or not at all."""
    write_file(path, json.dumps([dataclasses.asdict(trace) for trace in traces]))


def load(path: str | os.PathLike) -> list[Trace]:
    """Read what `save` wrote.

    Raises:
      FileError: the file does not hold traces. The message names it.
    """
    try:
        return [
            Trace(
                **{
                    **item,
                    "pictures": [Picture(**p) for p in item["pictures"]],
                    "overview": [Picture(**p) for p in item["overview"]],
                    "turns": [Turn(**{**t, "pictures": [Picture(**p) for p in t["pictures"]]}) for t in item["turns"]],
                }
            )
            for item in read_json(path)
        ]
    except (TypeError, KeyError) as error:
        raise FileError(f"{os.fspath(path)} does not hold traces: {type(error).__name__}: {error}") from None
