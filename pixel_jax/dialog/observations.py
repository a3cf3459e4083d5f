"""What a tool gives back, as token ids: the user message with the crop, the frames or an error.

An observation is everything between the `<|im_end|>` of the turn that called and the first token of the next turn:

    \\n<|im_start|>user\\n  text  images  <|im_end|>\\n<|im_start|>assistant\\n

Its text is one of ten kinds with a few integers in it. The constant stretches between the integers are tokenised once,
at load, each with the minus sign that may follow it and without, for tokenizers join the two; an integer is a token for
every digit, whatever longer tokens the tokenizer may have; an image is `<|vision_start|>`, its pad tokens,
`<|vision_end|>`. With Qwen2.5's tokenizer, which splits digits, these are the ids that it makes of the whole text. One
function, `assemble`, puts them together for a batch, under jit or not; instruction tuning, the device rollout and its host
twin all take their ids from it. `text` says in a line of Python what the ids mean.

The texts are the original's, byte for byte. Where the original returns the text of a Python exception, and where an
integer has more than six digits or a list more than sixteen items, there is one fixed message, `MALFORMED`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.dialog.template import IM_END, IM_START, PROMPT, VISION_END, VISION_START, Special, flatten
from pixel_jax.dialog.tokenizer import Vocabulary

MAX_LIST = 16
MAX_DIGITS = 6
MAX_IMAGES = 8  # as many as select_frames may show


class Kind(enum.IntEnum):
    """The kinds of observation, with the integers that each takes."""

    CROP = 0  # width, height of the image shown
    FRAMES = 1  # width, height of each image shown, number of the first, number of the last
    SELECT_ON_IMAGE = 2
    TOO_MANY_FRAMES = 3  # how many were selected
    FRAMES_OUT_OF_RANGE = 4  # how many frames there are; and the list that was selected
    BAD_IMAGE_INDEX = 5  # how many images there are
    BAD_VIDEO_INDEX = 6  # how many frames there are, target_image
    BAD_SELECTED_INDEX = 7  # how many images there are, target_image
    CROP_TOO_SMALL = 8  # width, height of the crop
    MALFORMED = 9


_BAD_TARGET = (
    "Execution Error: Incorrect `target_image` argument in `crop_image_normalized` operation. You can only pick "
)
_ERRORS = {
    Kind.SELECT_ON_IMAGE: (
        "Execution Error: You attempted to `select_frames` from **image** not **video**. You should use "
        "`crop_image_normalized` instead for inspecting **image**."
    ),
    Kind.TOO_MANY_FRAMES: (
        "Execution Error: You have selected {0} frames in total. Think again which frames you need to check in details "
        "(no more than 8 frames)"
    ),
    Kind.FRAMES_OUT_OF_RANGE: (
        "Execution Error: There are {0} frames numbered in range [1,{0}]. Your selection `target_frames={list}` is out "
        "of range."
    ),
    Kind.BAD_IMAGE_INDEX: _BAD_TARGET + "an image within [1,{0}]",
    Kind.BAD_VIDEO_INDEX: (
        _BAD_TARGET + "an image **from** the video within [1,{0}], but the current argument `target_image={1}`."
    ),
    Kind.BAD_SELECTED_INDEX: (
        _BAD_TARGET + "an image within range [2,{0}], but the current argument `target_image={1}`."
    ),
    Kind.CROP_TOO_SMALL: "Cropped image is too small: {0}x{1}",
    # Ours: one message for every call that is no call, or that the original would have answered with the text of a
    # Python exception. It says what a call looks like, so that the next one can be right.
    Kind.MALFORMED: (
        "Execution Error: The tool call could not be carried out. Between the tool_call tags, write one JSON object "
        "with the keys `name` and `arguments`: either `crop_image_normalized` with `bbox_2d`, four numbers "
        "[x1, y1, x2, y2], and `target_image`, the number of an image; or `select_frames` with `target_frames`, a list "
        "of one to eight frame numbers."
    ),
}
# A brace stands for itself only outside {0} {1} {2} {3} {list}; none of the texts has another.
TEXTS = {
    Kind.CROP: "\nHere is the cropped image (Image Size: {0}x{1}):",
    Kind.FRAMES: "\nHere are the selected frames (Frame Size: {0}x{1}, Numbered {2} to {3}):",
    **{kind: f"\nExecution error:\n{error}\n" for kind, error in _ERRORS.items()},
}
NUM_INTEGERS = 4
HEAD = ("\n", IM_START, "user\n")  # before the text
TAIL = (IM_END, "\n", *PROMPT)  # behind it and its images
BEFORE, AFTER = flatten(HEAD), flatten(TAIL)


def text(kind: Kind, integers: Sequence[int] = (), items: Sequence[int] = (), pads: Sequence[int] = ()) -> str:
    """The observation as text; `pads` are the pad counts of the images it shows."""
    written = [*integers, *items] if "{list}" in TEXTS[kind] else list(integers)
    if len(items) > MAX_LIST or any(abs(integer) >= 10**MAX_DIGITS for integer in written):
        kind, pads = Kind.MALFORMED, ()
    images = "".join("<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>" for count in pads)
    return BEFORE + TEXTS[kind].format(*integers, list=list(items)) + images + AFTER


class Arguments(NamedTuple):
    """What the observations of R rows are made of. What a kind does not use is ignored."""

    kind: jax.Array  # i32 [R]          a Kind; a negative one: no observation, no tokens
    integers: jax.Array  # i32 [R, 4]   in the order that `Kind` gives
    items: jax.Array  # i32 [R, 16]     the list
    num_items: jax.Array  # i32 [R]
    pads: jax.Array  # i32 [R, 8]       pad tokens of each image shown, 0: no image


# A segment of an observation is a stretch of constant ids, an integer, or a run of pads, ...
_CONSTANT, _INTEGER, _PADS = range(3)
# ... and appears always, or if the list or the images have more than `at` members, or if the list has none; ...
_ALWAYS, _ITEMS, _IMAGES, _NO_ITEMS = range(4)
# ... and, of a stretch before an integer, only if that is negative, or only if it is not.
_ANY, _NEGATIVE, _POSITIVE = range(3)


class _Segment(NamedTuple):
    type: int = _CONSTANT
    start: int = 0  # constant: where its ids are
    length: int = 0  # constant: how many
    source: int = 0  # integer, or a stretch before it: which of [integers, items]; pads: which image
    guard: int = _ALWAYS
    at: int = 0
    sign: int = _ANY


@dataclasses.dataclass(frozen=True, eq=False)
class Observations:
    """The observations in the ids of one vocabulary. `assemble` is the one source of observation ids."""

    segments: np.ndarray  # i32 [kinds, S, 7]   columns of _Segment
    constants: np.ndarray  # i32 [N]            the ids of all constant stretches
    digits: np.ndarray  # i32 [10]
    image_pad: int

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> Observations:
        constants: list[int] = []

        def constant(text: str | Special, **guard) -> _Segment:
            ids = [getattr(vocabulary, text.name)] if isinstance(text, Special) else vocabulary.encode(text)
            if isinstance(text, str) and vocabulary.to_bytes(ids) != text.encode():
                raise ValueError(f"the tokenizer makes {vocabulary.to_bytes(ids)!r} of {text!r}: it must be kept")
            constants.extend(ids)
            return _Segment(_CONSTANT, len(constants) - len(ids), len(ids), **guard)

        def integer(before: str, source: int, **guard) -> list[_Segment]:
            return [
                constant(before, source=source, sign=_POSITIVE, **guard),
                constant(before + "-", source=source, sign=_NEGATIVE, **guard),
                _Segment(_INTEGER, source=source, **guard),
            ]

        def listed(before: str, after: str) -> list[_Segment]:
            segments = [constant(f"{before}[]{after}", guard=_NO_ITEMS)]
            for item in range(MAX_LIST):
                stretch = ", " if item else before + "["
                segments += integer(stretch, NUM_INTEGERS + item, guard=_ITEMS, at=item)
            return [*segments, constant("]" + after, guard=_ITEMS)]

        def image(index: int) -> list[_Segment]:
            guard = {"guard": _IMAGES, "at": index}
            return [
                constant(VISION_START, **guard),
                _Segment(_PADS, source=index, **guard),
                constant(VISION_END, **guard),
            ]

        rows = []
        for kind in Kind:
            *head, opening = HEAD  # the last is text, and the message's own text goes on with it
            row = [constant(piece) for piece in head]
            *stretches, last = _split(opening + TEXTS[kind])
            for i, (before, what) in enumerate(stretches):
                if what != "list":
                    row += integer(before, int(what))
                elif i + 1 == len(stretches):
                    row, last = [*row, *listed(before, last[0])], ("", "")
                else:
                    raise ValueError(f"an integer follows the list of {TEXTS[kind]!r}")
            row += [constant(last[0])] if last[0] else []
            if kind in (Kind.CROP, Kind.FRAMES):
                for index in range(1 if kind == Kind.CROP else MAX_IMAGES):
                    row += image(index)
            rows.append([*row, *map(constant, TAIL)])
        width = max(map(len, rows))
        segments = np.array([row + [_Segment()] * (width - len(row)) for row in rows], np.int32)
        return cls(
            segments=segments,
            constants=np.array(constants, np.int32),
            digits=np.array(vocabulary.digits, np.int32),
            image_pad=vocabulary.image_pad,
        )

    def bound(self, *, crop_pads: int, frame_pads: int, num_frames: int = MAX_IMAGES) -> int:
        """The most tokens that any observation has: the least `length` that `assemble` may be given.

        crop_pads: most pad tokens of a crop; frame_pads: most of one of at most num_frames selected frames.
        """
        most = 0
        for kind in Kind:
            segment = _Segment(*self.segments[kind].T)
            images = num_frames if kind == Kind.FRAMES else 1
            shown = ~((segment.guard == _IMAGES) & (segment.at >= images)) & (segment.guard != _NO_ITEMS)
            pads = crop_pads if kind == Kind.CROP else frame_pads
            lengths = np.select([segment.type == _INTEGER, segment.type == _PADS], [MAX_DIGITS, pads], segment.length)
            # The two forms of a stretch before an integer stand side by side: only one appears.
            longer = np.maximum(lengths, np.roll(lengths, -1))
            lengths = np.select([segment.sign == _POSITIVE, segment.sign == _NEGATIVE], [longer, 0], lengths)
            most = max(most, int(np.sum(lengths * shown)))
        return most

    def ids(
        self, kind: Kind, integers: Sequence[int] = (), items: Sequence[int] = (), pads: Sequence[int] = ()
    ) -> list[int]:
        """One observation on the host, from the same assembler; the arguments are those of `text`."""
        if len(integers) > NUM_INTEGERS or len(pads) > MAX_IMAGES:
            raise ValueError(f"{kind!r} with {len(integers)} integers (at most 4) and {len(pads)} images (at most 8)")
        most = max(pads, default=0)
        length = 1 << self.bound(crop_pads=most, frame_pads=most).bit_length()  # few lengths, few compilations

        def row(values: Sequence[int], width: int) -> np.ndarray:
            limit = 10**MAX_DIGITS  # beyond it no integer is written, so how far beyond is no matter
            values = [min(max(int(value), -limit), limit) for value in values[:width]]
            return np.array([values + [0] * (width - len(values))], np.int32)

        arguments = Arguments(
            kind=np.array([kind], np.int32),
            integers=row(integers, NUM_INTEGERS),
            items=row(items, MAX_LIST),
            num_items=np.array([len(items)], np.int32),
            pads=row(pads, MAX_IMAGES),
        )
        ids, total = _assemble(self, arguments, length)
        return np.asarray(ids)[0, : int(total[0])].tolist()

    def assemble(self, arguments: Arguments, length: int) -> tuple[jax.Array, jax.Array]:
        """The ids of R observations.

        Returns ids i32 [R, length], left-aligned, zeros beyond the row's own length, and the
        lengths i32 [R]. `length` must be at least `bound(...)` for the pads that occur.
        """
        kind, integers, items, num_items, pads = map(jnp.asarray, arguments)
        shown = jnp.arange(MAX_LIST) < num_items[:, None]
        values = jnp.concatenate([integers, jnp.where(shown, items, 0)], 1)  # [R, 20]
        segments = jnp.asarray(self.segments)

        # An integer or a list that cannot be written turns the message into the fixed one.
        own = _Segment(*jnp.moveaxis(segments[jnp.maximum(kind, 0)], -1, 0))  # fields [R, S]
        # abs() of the least int32 is negative: compare both ways.
        wide = (values >= 10**MAX_DIGITS) | (values <= -(10**MAX_DIGITS))
        unwritable = jnp.any((own.type == _INTEGER) & jnp.take_along_axis(wide, own.source, 1), 1)
        unwritable |= jnp.any(own.guard == _ITEMS, 1) & (num_items > MAX_LIST)
        kind = jnp.where((kind >= 0) & unwritable, Kind.MALFORMED, kind)

        segment = _Segment(*jnp.moveaxis(segments[jnp.maximum(kind, 0)], -1, 0))
        num_images = jnp.sum(pads > 0, 1)
        members = jnp.stack([jnp.ones_like(num_items), num_items, num_images, num_items == 0], 1)  # of each guard
        present = (jnp.take_along_axis(members, segment.guard, 1) > segment.at) & (kind >= 0)[:, None]
        of_integer = (segment.type == _INTEGER) | (segment.sign != _ANY)
        value = jnp.take_along_axis(values, jnp.where(of_integer, segment.source, 0), 1)
        present &= (segment.sign == _ANY) | ((segment.sign == _NEGATIVE) == (value < 0))
        num_pads = jnp.take_along_axis(pads, jnp.where(segment.type == _PADS, segment.source, 0), 1)
        powers = jnp.asarray([10**i for i in range(MAX_DIGITS)], jnp.int32)
        num_digits = 1 + jnp.sum(jnp.abs(value)[..., None] >= powers[1:], -1)
        lengths = jnp.select(
            [segment.type == _INTEGER, segment.type == _PADS],
            [num_digits, num_pads],
            segment.length,
        )
        lengths = jnp.where(present, lengths, 0)
        ends = jnp.cumsum(lengths, 1)  # [R, S]

        # Token p belongs to the first segment that ends behind p; empty ones never do.
        position = jnp.arange(length)
        at = jnp.sum(position[None, :, None] >= ends[:, None, :], -1)  # [R, length]
        total = ends[:, -1]
        inside = position < total[:, None]
        at = jnp.minimum(at, ends.shape[1] - 1)

        def of(field):
            return jnp.take_along_axis(field, at, 1)

        offset = position - of(ends - lengths)
        number, count = of(value), of(num_digits)
        place = jnp.clip(count - 1 - offset, 0, MAX_DIGITS - 1)
        digit = jnp.asarray(self.digits)[jnp.abs(number) // powers[place] % 10]
        constant = jnp.asarray(self.constants)[jnp.clip(of(segment.start) + offset, 0, len(self.constants) - 1)]
        kinds = of(segment.type)
        ids = jnp.select([kinds == _INTEGER, kinds == _PADS], [digit, jnp.full_like(digit, self.image_pad)], constant)
        return jnp.where(inside, ids, 0), total


_assemble = jax.jit(Observations.assemble, static_argnums=(0, 2))


def _split(template: str) -> list[tuple[str, str]]:
    """A text with {0} {1} {2} {3} {list} as (constant text, what stands in the braces behind it); the last has none."""
    first, *rest = (part.rpartition("}") for part in template.split("{"))
    names = [*(name for name, _, _ in rest), ""]
    return list(zip([first[2], *(text for _, _, text in rest)], names, strict=True))
