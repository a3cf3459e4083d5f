"""Observations: the original's texts byte for byte, assembled from ids that decode to exactly them."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen import qwen_vocabulary

from pixel_jax.dialog import Observations, ObservationValues, Vocabulary, build_tokenizer
from pixel_jax.dialog.layout import Place
from pixel_jax.dialog.observations import kinds_of
from pixel_jax.tools import RELEASED

NAMES = tuple(map(str, kinds_of(RELEASED)))
CROP, MALFORMED = NAMES.index("crop_image_normalized: shown"), NAMES.index("malformed")
FRAMES, SELECT_ON_IMAGE, TOO_MANY_FRAMES, FRAMES_OUT_OF_RANGE = (
    NAMES.index(f"select_frames: {x}") for x in ("shown", "no video", "too many frames", "out of range")
)
BAD_IMAGE_INDEX, BAD_VIDEO_INDEX, BAD_SELECTED_INDEX, CROP_TOO_SMALL = (
    NAMES.index(f"crop_image_normalized: {x}")
    for x in ("no such image", "no such frame", "no such selection", "too small")
)
HEAD, TAIL = "\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
IMAGE = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
TARGET = "Execution Error: Incorrect `target_image` argument in `crop_image_normalized` operation. "
GOLDEN = [
    (CROP, (448, 28), (), (2,), "\nHere is the cropped image (Image Size: 448x28):" + IMAGE),
    (
        FRAMES, (336, 252, 1, 3), (), (2, 2, 2),
        "\nHere are the selected frames (Frame Size: 336x252, Numbered 1 to 3):" + IMAGE * 3,
    ),
    (
        SELECT_ON_IMAGE, (), (), (),
        "\nExecution error:\nExecution Error: You attempted to `select_frames` from **image** not **video**. You should use"
        " `crop_image_normalized` instead for inspecting **image**.\n",
    ),
    (
        TOO_MANY_FRAMES, (11,), (), (),
        "\nExecution error:\nExecution Error: You have selected 11 frames in total. Think again which frames you need to"
        " check in details (no more than 8 frames)\n",
    ),
    (
        FRAMES_OUT_OF_RANGE, (16,), (1, -2, 30, 999999), (),
        "\nExecution error:\nExecution Error: There are 16 frames numbered in range [1,16]. Your selection"
        " `target_frames=[1, -2, 30, 999999]` is out of range.\n",
    ),
    (
        FRAMES_OUT_OF_RANGE, (16,), (), (),
        "\nExecution error:\nExecution Error: There are 16 frames numbered in range [1,16]. Your selection"
        " `target_frames=[]` is out of range.\n",
    ),
    (
        BAD_IMAGE_INDEX, (2,), (), (),
        f"\nExecution error:\n{TARGET}You can only pick an image within [1,2]\n",
    ),
    (
        BAD_VIDEO_INDEX, (16, 100), (), (),
        f"\nExecution error:\n{TARGET}You can only pick an image **from** the video within [1,16], but the current argument"
        " `target_image=100`.\n",
    ),
    (
        BAD_SELECTED_INDEX, (4, -1), (), (),
        f"\nExecution error:\n{TARGET}You can only pick an image within range [2,4], but the current argument"
        " `target_image=-1`.\n",
    ),
    (CROP_TOO_SMALL, (28, 0), (), (), "\nExecution error:\nCropped image is too small: 28x0\n"),
    (
        MALFORMED, (), (), (),
        "\nExecution error:\nExecution Error: The tool call could not be carried out. Between the tool_call tags, write one"
        " JSON object with the keys `name` and `arguments`: either `crop_image_normalized` with `bbox_2d`, four numbers"
        " [x1, y1, x2, y2], and `target_image`, the number of an image; or `select_frames` with `target_frames`, a list of"
        " one to eight frame numbers.\n",
    ),
]  # fmt: skip

# Pieces that a tokenizer would rather take than single digits, and that run across the ends of the constant stretches.
PIECES = [
    "448", "16", ", ", "[1", "12", "-1", "Size: 4", ":<|", "\nHere is the cropped image (Image Size: ", "):", "x", "\n<|",
    "Execution Error: Incorrect `target_image` argument in `crop_image_normalized` operation. You can only pick an image",
]  # fmt: skip
PIECES = [piece for piece in PIECES if len(piece) > 1]


@functools.cache
def load(name: str) -> tuple[Vocabulary, Observations]:
    vocabulary = qwen_vocabulary() if name == "qwen" else Vocabulary.of(build_tokenizer(PIECES))
    return vocabulary, Observations.of(vocabulary)


@functools.partial(jax.jit, static_argnums=(0, 2))
def assemble(observations: Observations, arguments: ObservationValues, length: int):
    return observations.assemble(arguments, length)


def test_all_kinds_have_a_golden_text():
    assert {row[0] for row in GOLDEN} == set(range(len(NAMES)))


@pytest.mark.parametrize("name", ["qwen", "pieces"])
@pytest.mark.parametrize(("kind", "integers", "items", "pads", "golden"), GOLDEN)
def test_golden_texts(name, kind, integers, items, pads, golden):
    vocabulary, observations = load(name)
    assert observations.text(kind, integers, items, pads) == HEAD + golden + TAIL
    ids = observations.ids(kind, integers, items, pads)
    assert vocabulary.to_bytes(ids).decode() == HEAD + golden + TAIL
    written = [digit for number in integers for digit in str(abs(number))]
    count = sum(index in vocabulary.digits for index in ids)
    if name == "qwen":
        assert ids == vocabulary.tokenizer.encode(
            HEAD + golden + TAIL, add_special_tokens=False
        )  # what a server makes of the same text
    assert count >= len(written)  # digit by digit, though "448" and "16" are tokens


INTEGER = st.one_of(
    st.integers(-20, 20), st.sampled_from([s * 10**e + d for s in (1, -1) for e in range(8) for d in (-1, 0, 1)]),
    st.integers(-(2**31), 2**31 - 1),
)  # fmt: skip
ROW = st.fixed_dictionaries(
    {
        "kind": st.sampled_from([-1, *range(len(NAMES))]),
        "integers": st.lists(INTEGER, min_size=4, max_size=4),
        "items": st.lists(INTEGER, max_size=16),
        "more": st.sampled_from([0, 0, 0, 1, 5]),
        "pads": st.lists(st.integers(1, 6), max_size=8),
    }
)
BATCH = 16


@pytest.mark.parametrize("name", ["qwen", "pieces"])
@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROW, min_size=BATCH, max_size=BATCH))
def test_a_batch_of_any_arguments(name, rows):
    vocabulary, observations = load(name)

    def pad(values, width):
        return values + [0] * (width - len(values))

    arguments = ObservationValues(
        kind=np.array([row["kind"] for row in rows], np.int32),
        integers=np.array([row["integers"] for row in rows], np.int32),
        items=np.array([row["items"] + [7] * (16 - len(row["items"])) for row in rows], np.int32),
        # "more": a list of which only the first sixteen are at hand
        num_items=np.array([len(row["items"]) + (16 if row["more"] else 0) + row["more"] for row in rows], np.int32),
        pads=np.array([pad(row["pads"], 8) for row in rows], np.int32),
    )
    bound = observations.bound([6] * len(NAMES), observations.images)
    ids, lengths = map(np.asarray, assemble(observations, arguments, bound))
    for row, ours, length in zip(rows, ids, lengths, strict=True):
        kind = row["kind"]
        if kind < 0:
            assert length == 0 and not ours.any()
            continue
        used = {CROP: 2, FRAMES: 4, TOO_MANY_FRAMES: 1, FRAMES_OUT_OF_RANGE: 1}
        used |= {BAD_IMAGE_INDEX: 1, BAD_VIDEO_INDEX: 2, BAD_SELECTED_INDEX: 2, CROP_TOO_SMALL: 2}
        integers = row["integers"][: used.get(kind, 0)]
        items = row["items"] + ([0] * 17 if row["more"] else []) if kind == FRAMES_OUT_OF_RANGE else []
        shown = {CROP: row["pads"][:1], FRAMES: row["pads"]}.get(kind, [])
        assert vocabulary.to_bytes(ours[:length]).decode() == observations.text(kind, integers, items, shown)
        if name == "qwen":
            wanted = vocabulary.tokenizer.encode(
                observations.text(kind, integers, items, shown), add_special_tokens=False
            )
            assert ours[:length].tolist() == wanted
        assert not ours[length:].any() and length <= bound
        assert ours[:length].tolist() == observations.ids(kind, integers, items, shown)


def test_what_cannot_be_written_is_the_fixed_message():
    vocabulary, observations = load("pieces")
    text, malformed = observations.text, observations.text(MALFORMED)
    assert text(BAD_VIDEO_INDEX, (16, 10**6)) == malformed != text(BAD_VIDEO_INDEX, (16, 10**6 - 1))
    assert text(BAD_VIDEO_INDEX, (16, -(10**6))) == malformed
    assert text(FRAMES_OUT_OF_RANGE, (16,), range(17)) == malformed != text(FRAMES_OUT_OF_RANGE, (16,), range(16))
    for integers in [(16, 10**6), (16, -(10**40))]:
        assert vocabulary.to_bytes(observations.ids(BAD_VIDEO_INDEX, integers)).decode() == malformed


@pytest.mark.parametrize("name", ["qwen", "pieces"])
def test_the_bound_is_the_length_of_the_longest(name):
    _, observations = load(name)

    def longest(crop_pads: int, frame_pads: int, frames: int) -> int:
        least = [-999999] * 16
        pads = {CROP: [crop_pads], FRAMES: [frame_pads] * frames}
        return max(len(observations.ids(kind, least[:4], least, pads.get(kind, []))) for kind in range(len(NAMES)))

    for arguments in [(1, 1, 1), (300, 2, 8), (4, 100, 3), (4, 100, 8)]:
        pads = [arguments[1] if kind == FRAMES else arguments[0] for kind in range(len(NAMES))]
        bound = observations.bound(pads, arguments[2])
        assert bound == longest(*arguments)


def test_the_tokenizer_must_keep_the_texts():
    class Lossy(Vocabulary):
        def encode(self, text, place=Place.TEXT):
            return super().encode(text.lower(), place)

    vocabulary, _ = load("pieces")
    lossy = Lossy(**{field: getattr(vocabulary, field) for field in Vocabulary.__dataclass_fields__})
    with pytest.raises(ValueError, match="must keep every text"):
        Observations.of(lossy)


def test_too_many_of_something():
    _, observations = load("pieces")
    with pytest.raises(ValueError, match="9 images"):
        observations.ids(FRAMES, (1, 1, 1, 9), (), [1] * 9)
