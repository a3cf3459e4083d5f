"""Transcripts of trajectories for people to read: the images with the boxes on them, the crops, and the text."""

import base64
import codecs
import dataclasses
import functools
import io
import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from PIL import Image, ImageDraw

from pixel_jax.arrays import AnyArray
from pixel_jax.config import ConfigError
from pixel_jax.config import load as load_config
from pixel_jax.dialog.observations import observation_text
from pixel_jax.dialog.template import SPECIAL_TOKENS, flatten
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.evaluation.curves import COLORS
from pixel_jax.files import MAX_BYTES, FileError, read_json, write_file
from pixel_jax.models.inputs import Visual
from pixel_jax.rollouts.prompts import Query
from pixel_jax.rollouts.trajectory import STOP_REASONS, CallStatus, Trajectories
from pixel_jax.terminal import brief
from pixel_jax.tools.tool import Tool

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
    """A turn. Its role is "assistant", or "tool" for an observation; `failed` marks an error message."""

    role: Literal["assistant", "tool"]
    text: str
    pictures: tuple[Picture, ...] = ()
    failed: bool = False
    tool: str = ""  # whose observation it is; "": it is not known, or the call named none
    pieces: tuple[str, ...] = ()  # the tokens that the model chose, as text; none where they were written, not sampled
    log_probs: tuple[float, ...] = ()  # natural logarithms of the probabilities with which it chose them

    def __post_init__(self):
        if len(self.pieces) != len(self.log_probs):
            raise ValueError(f"a turn has {len(self.pieces)} tokens and {len(self.log_probs)} log-probabilities")


@dataclasses.dataclass
class Transcript:
    """A conversation, ready to be drawn. `answer` and the fields below it are None where they are not known."""

    question: str
    pictures: tuple[Picture, ...]  # the images of the question, at full resolution
    overview: tuple[Picture, ...]  # the same images as the model saw them first
    turns: tuple[ShownTurn, ...]
    stop: str
    answer: str | None = None
    reference: str | None = None
    correct: bool | None = None
    title: str = ""
    reward: float | None = None  # known in training only
    advantage: float | None = None  # relative to the other rows of its group
    terms: dict[str, float] = dataclasses.field(default_factory=dict)  # summands of the reward, by name
    category: str = ""  # of the question


LOSSLESS_AREA = 256 * 256  # pixels; what the model saw is shown exactly, large photographs are not


def data_uri(image: np.ndarray) -> str:
    """A data URI of an image uint8 [h, w, 3]: PNG, or JPEG where the image is large."""
    lossless = image.shape[0] * image.shape[1] <= LOSSLESS_AREA
    buffer = io.BytesIO()
    if lossless:
        Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    else:
        Image.fromarray(image).save(buffer, format="JPEG", quality=88)
    return f"data:image/{'png' if lossless else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def unpatchify(patches: AnyArray, height: int, width: int, merge: int) -> np.ndarray:
    """The pixels uint8 [h, w, 3] of frame patches uint8 [P, 3 p p], in a grid of `height` by `width` patches.

    The merge x merge patches of a token stand in a row.
    """
    patch = math.isqrt(patches.shape[-1] // 3)
    used = np.asarray(patches)[: height * width].reshape(height // merge, width // merge, merge, merge, 3, patch, patch)
    return used.transpose(0, 2, 5, 1, 3, 6, 4).reshape(height * patch, width * patch, 3)


def make_transcript(
    trajectories: Trajectories[Visual],
    row: int,
    query: Query,
    vocabulary: Vocabulary,
    *,
    tools: Sequence[Tool] = (),
    side: int | None = None,
    **known: Any,
) -> Transcript:
    """The transcript of a row.

    Args:
        trajectories: on the host.
        row: index of the row.
        query: the query that the row answers.
        vocabulary: the vocabulary of the tokens.
        tools: the tools that calls name, in the order of the tables; none: their names are left out.
        side: longest side of a picture in it, in pixels; larger ones are shrunk. None: no picture is.
        **known: further fields of the `Transcript`, `answer` and those below it.
    """
    t = trajectories
    boxes: list[list[tuple[int, int, int, int, int]]] = [[] for _ in query.images]
    # Items and slices come in the order in which the row saw them, with gaps; the prompt's are first.
    grids = t.visual.grids[row][t.visual.grids[row, :, 0] > 0]
    frames = t.visual.slices[row][t.visual.slices[row, :, 0] >= 0]
    draw = functools.partial(_picture, side=side)

    pads = np.isin(t.tokens[row][t.valid[row]], (vocabulary.image_pad, vocabulary.video_pad))
    merge = math.isqrt(int(grids.prod(axis=1).sum()) // max(1, int(pads.sum())))

    def seen(frame, grid, caption: str) -> Picture:
        return draw(unpatchify(t.visual.patches[row, frame], int(grid[1]), int(grid[2]), merge), caption)

    overview = []
    for i in range(len(query.images)):
        frame, grid = (frames[i // 2, i % 2], grids[0]) if query.is_video else (frames[i, 0], grids[i])
        overview.append(seen(frame, grid, f"{_name(query, i)} as the model first sees it"))
    slices = -(-len(query.images) // 2) if query.is_video else len(query.images)
    items = int(np.searchsorted(np.cumsum(grids[:, 0]), slices, side="left")) + 1 if slices else 0  # of the prompt
    shown = iter(zip(frames[slices:, 0], grids[items:], strict=True))

    written, answered = _messages(t, row, vocabulary)
    turns = []
    for call, ids in enumerate(answered):
        turns.append(written[call])
        is_pad = ids == vocabulary.image_pad
        first_pads = np.diff(is_pad, prepend=False) & is_pad  # the first pad token of each image
        images = tuple(seen(*next(shown), "what it saw") for _ in range(int(np.sum(first_pads))))
        failed = t.calls.status[row, call] != CallStatus.DONE
        called = int(t.calls.tool[row, call])
        name = tools[called].name if 0 <= called < len(tools) else ""
        turns.append(ShownTurn("tool", observation_text(ids, vocabulary), images, failed=bool(failed), tool=name))
        source = jax.tree.map(lambda x: x[row, call].tolist(), t.calls.source)  # noqa: B023
        for image, region in zip(source.image, source.region, strict=True):
            if image >= 0:  # else the region is of a picture that a tool made; no boxes are drawn on those
                boxes[image].append((call + 1, *region))
    turns.append(written[-1])
    return Transcript(
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
    """A picture with its boxes. Its width and height, in which the boxes are, stay those of the image if pixels are shrunk."""
    height, width = image.shape[:2]
    if side is not None and max(height, width) > side:
        smaller = Image.fromarray(image)
        smaller.thumbnail((side, side))
        image = np.asarray(smaller)
    return Picture(data_uri(image), width, height, caption, tuple(boxes))


def _messages(t: Trajectories, row: int, vocabulary: Vocabulary) -> tuple[list[ShownTurn], list[np.ndarray]]:
    """The policy's turns, and the ids of the observations between them.

    Turns are told apart by the loss mask, not by the tokens, because the policy may write any token. Outside its turns all
    special tokens are the template's: texts have none.
    """
    valid = np.asarray(t.valid[row])
    ids, loss_mask = np.asarray(t.tokens[row])[valid], np.asarray(t.loss_mask[row])[valid]
    edges = np.flatnonzero(np.diff(loss_mask)) + 1
    runs, log_probs = np.split(ids, edges), np.split(np.asarray(t.logprobs[row])[valid], edges)
    if len(runs) % 2:  # the row ends with an observation
        runs.append(ids[:0])
        log_probs.append(np.zeros(0))
    # The prompt ends where the assistant begins; a prefix of its first turn may follow.
    decode = lambda run: vocabulary.to_bytes(run.tolist()).decode("utf-8", "replace")
    texts = [decode(run).removesuffix(END) for run in runs[1::2]]
    texts[0] = decode(runs[0]).rpartition(flatten(vocabulary.layout.after))[2] + texts[0]
    sampled = any(np.any(x) for x in log_probs)  # those of a trace that was written are zeros
    turns = [
        ShownTurn("assistant", text, **(_chosen(run, x, vocabulary) if sampled else {}))
        for text, run, x in zip(texts, runs[1::2], log_probs[1::2], strict=True)
    ]
    return turns, runs[2::2]


def _chosen(ids: np.ndarray, log_probs: np.ndarray, vocabulary: Vocabulary) -> dict[str, Any]:
    """The tokens of a turn and their log-probabilities. A character of several tokens stands with the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = tuple(decoder.decode(vocabulary.to_bytes([token])) for token in ids.tolist())
    return {"pieces": pieces, "log_probs": tuple(np.round(log_probs.astype(np.float64), 4).tolist())}


def _name(query: Query, index: int) -> str:
    if query.is_video:
        return f"frame {index + 1}"
    return "image" if len(query.images) == 1 else f"image {index + 1}"


def drawn(picture: Picture) -> np.ndarray:
    """The pixels of a picture with its boxes drawn on it, uint8 [h, w, 3]."""
    encoded = base64.b64decode(picture.uri.partition(",")[2])
    image = Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG")).convert("RGB")
    pen, scale = ImageDraw.Draw(image), image.width / picture.width
    for number, *box in picture.boxes:
        color = COLORS[(number - 1) % len(COLORS)]
        pen.rectangle([x * scale for x in box], outline=color, width=max(1, max(image.size) // 150))
    return np.asarray(image)


def as_text(transcript: Transcript) -> str:
    """A conversation as text, without its pictures: a line for each turn, then the fields that are known."""
    lines = [f"question: {transcript.question}"]
    for turn in transcript.turns:
        lines.append(f"{'model' if turn.role == 'assistant' else 'tool'}: {turn.text}")
        lines += [f"      ({picture.caption}, {picture.width}x{picture.height})" for picture in turn.pictures]
    known = {name: getattr(transcript, name) for name in ("answer", "reference", "correct", "reward", "advantage")}
    lines += [f"{name}: {value}" for name, value in known.items() if value is not None]
    lines += [f"reward {name}: {value}" for name, value in transcript.terms.items()]
    return "\n".join([*lines, f"ended: {transcript.stop}"])


def as_document(transcript: Transcript) -> dict[str, Any]:
    """A transcript as JSON has it: an entry of the list that `load` reads."""
    return dataclasses.asdict(transcript)


def save(path: str | os.PathLike, transcripts: Sequence[Transcript]) -> None:
    """Writes `transcripts` as one JSON file, whole or not at all."""
    write_file(path, json.dumps([*map(as_document, transcripts)]))


def load(path: str | os.PathLike, limit: int = MAX_BYTES) -> list[Transcript]:
    """Reads the transcripts of a file that `save` wrote, of at most `limit` bytes. The file is not trusted.

    Raises:
        FileError: the file is not as `save` writes it.
    """
    rows = read_json(path, limit=limit)
    if not isinstance(rows, list):
        raise FileError(f"{os.fspath(path)!r} holds {type(rows).__name__}, not a list of traces")
    try:
        return [load_config(Transcript, row, f"trace {i}") for i, row in enumerate(rows, 1)]
    except ConfigError as error:
        raise FileError(f"{os.fspath(path)!r} holds no traces: {str(error)[:300]}") from None
