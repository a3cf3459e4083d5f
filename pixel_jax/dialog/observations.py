r"""Observations: the answers to calls, as token ids.

An observation is a user message with the text of an outcome and the images that it shows. It is everything between the
`<|im_end|>` of the turn that called and the first token of the next turn:

    \n<|im_start|>user\n  text  images  text  <|im_end|>\n<|im_start|>assistant\n

in ChatML; of other layouts (`layout.Layout`) it has the marks, and the order of text and images.

Its text is that of one of the outcomes of the tools (`pixel_jax.tools`), or the shared one for calls that cannot be carried
out, with a few integers in it. The constant stretches of text between the integers are tokenised once, each with and without
the minus sign that may follow it, because tokenizers join the two. An integer has a token for every digit, whatever longer
tokens the tokenizer has. An image is `<|vision_start|>`, its pad tokens, `<|vision_end|>`. With Qwen2.5's tokenizer, which splits
digits, the ids are those of the whole text.

One function, `assemble`, joins them for a batch, under jit or not. Instruction tuning, the device rollout and its host twin all
take their ids from it. `Observations.text` returns the same observation as text.

If an integer has more than six digits, or a list more than sixteen items, the message is the fixed, malformed one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.arrays import AnyArray
from pixel_jax.dialog.formats import IMAGES, PIXEL_REASONER, CallFormat
from pixel_jax.dialog.layout import Layout, Marks, Place, Special
from pixel_jax.dialog.template import ABSENT, SPECIAL_TOKENS, flatten, to_ids
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.tools import RELEASED, Outcome, Tool, ToolError

MAX_LIST = 16
MAX_DIGITS = 6
NUM_INTEGERS = 4
NAMES = (*map(str, range(NUM_INTEGERS)), "list")  # allowed in the braces of a text


def observation_text(ids: np.ndarray, vocabulary: Vocabulary) -> str:
    """Returns the text of an observation, ids int32 [n], without its images and what the template writes around it."""
    layout = vocabulary.layout

    def spelled(marks: Marks, place: Place) -> bytes:
        return vocabulary.to_bytes(to_ids(marks, vocabulary, (), place))

    opening, closing = spelled(layout.before, Place.SPECIAL), spelled(layout.after, Place.TEXT)
    pads = np.flatnonzero((ids == vocabulary.image_pad) | (ids == vocabulary.video_pad))
    if len(pads) and layout.images_first:
        ids, opening = ids[pads[-1] + 1 :], spelled(layout.image[1], Place.SPECIAL)
    elif len(pads):
        ids, closing = ids[: pads[0]], spelled(layout.image[0], Place.TEXT)
    text = vocabulary.to_bytes(ids.tolist()).removeprefix(opening).removesuffix(closing)
    return text.decode("utf-8", "replace").strip("\n")


def malformed(tools: Sequence[Tool], call_format: CallFormat = PIXEL_REASONER) -> Outcome:
    """Returns the outcome of every malformed call, and of calls for which the tool has no outcome of its own.

    Its text says how to write a call, so that the next one can be right.
    """
    usage = "; or ".join(f"`{call_format.spelling(tool).name}` with {tool.usage}" for tool in tools)
    usage = f"either {usage}" if len(tools) > 1 else usage
    ours = (
        "\nExecution error:\nExecution Error: The tool call could not be carried out. Between the "
        f"{call_format.opening.strip('<>')} tags, write one JSON object with the keys `name` and `arguments`: {usage}.\n"
    )
    return Outcome("malformed", ours if call_format.malformed is None else call_format.malformed)


class ObservationKind(NamedTuple):
    """A kind of observation: an outcome, and the tool that has it."""

    tool: Tool | None  # None: shared by all tools
    outcome: Outcome

    def __str__(self) -> str:
        return self.outcome.name if self.tool is None else f"{self.tool.name}: {self.outcome.name}"


def kinds_of(tools: Sequence[Tool], call_format: CallFormat = PIXEL_REASONER) -> tuple[ObservationKind, ...]:
    """Returns all kinds of observation of calls of `tools`, with the texts of the format, in the order of `Calls.outcome`."""

    def text(tool: Tool, outcome: Outcome) -> str:
        # The text of a host tool gets its frame on the host (`rollouts.host`).
        return outcome.text if tool.host else call_format.text(tool, outcome)

    own = (ObservationKind(tool, x._replace(text=text(tool, x))) for tool in tools for x in tool.outcomes)
    return (*own, ObservationKind(None, malformed(tools, call_format)))


class ObservationValues(NamedTuple):
    """The values from which the observations of R rows are assembled. Values that a kind does not use are ignored."""

    kind: AnyArray  # int32 [R], index into `Observations.kinds`; negative: no observation, no tokens
    integers: AnyArray  # int32 [R, 4], of the braces {0} to {3} in the outcome's text
    items: AnyArray  # int32 [R, 16], of {list}
    num_items: AnyArray  # int32 [R]
    pads: AnyArray  # int32 [R, V], pad tokens of each image shown, 0: no image


# Types of segments: a stretch of constant ids, an integer, or a run of pads.
_CONSTANT, _INTEGER, _PADS = range(3)
# Guards: a segment appears always, or if the list or the images have more than `at` members, or if the list has none.
_ALWAYS, _ITEMS, _IMAGES, _NO_ITEMS = range(4)
# Signs: a stretch before an integer may appear only if the integer is negative, or only if it is not.
_ANY, _NEGATIVE, _POSITIVE = range(3)


class _Segment(NamedTuple):
    """A segment of an observation; or, on the device, arrays of segments."""

    type: int = _CONSTANT
    start: int = 0  # constant: index of its first id
    length: int = 0  # constant: number of ids
    source: int = 0  # integer, or a stretch before it: index into [integers, items]; pads: index of the image
    guard: int = _ALWAYS
    at: int = 0
    sign: int = _ANY


@dataclasses.dataclass(frozen=True, eq=False)
class Observations:
    """The observations of some tools in the ids of one vocabulary. `assemble` is the only source of observation ids."""

    kinds: tuple[ObservationKind, ...]
    segments: np.ndarray  # int32 [kinds, S, 7], fields of _Segment
    constants: np.ndarray  # int32 [N], the ids of all constant stretches
    digits: np.ndarray  # int32 [10]
    image_pad: int
    layout: Layout

    @classmethod
    def of(
        cls, vocabulary: Vocabulary, tools: Sequence[Tool] = RELEASED, call_format: CallFormat = PIXEL_REASONER
    ) -> Observations:
        """Tokenises the texts of all outcomes.

        Raises:
          ToolError: a text has unknown braces, or braces behind its images.
          ValueError: the tokenizer changes a text.
        """
        kinds = kinds_of(tools, call_format)
        constants: list[int] = []

        def constant(text: str | Special, place: Place = Place.TEXT, **guard) -> _Segment:
            ids = [vocabulary.special[text.name]] if isinstance(text, Special) else vocabulary.encode(text, place)
            spelled = vocabulary.to_bytes(ids)
            same = [] if isinstance(text, Special) else [text.encode()]
            if place is Place.SPECIAL:  # some tokenizers put a space there
                same += [b" " + x for x in same]
            if same and spelled not in same:
                raise ValueError(f"the tokenizer changes {text!r} to {spelled!r}: it must keep every text")
            constants.extend(ids)
            return _Segment(_CONSTANT, len(constants) - len(ids), len(ids), **guard)

        def marks(pieces: Marks, **guard) -> list[_Segment]:
            return [constant(piece, Place.SPECIAL, **guard) for piece in pieces]

        def integer(before: str, source: int, place: Place = Place.TEXT, **guard) -> list[_Segment]:
            return [
                constant(before, place, source=source, sign=_POSITIVE, **guard),
                constant(before + "-", place, source=source, sign=_NEGATIVE, **guard),
                _Segment(_INTEGER, source=source, **guard),
            ]

        def listed(before: str, after: str, place: Place) -> list[_Segment]:
            segments = [constant(f"{before}[]{after}", place, guard=_NO_ITEMS)]
            for item in range(MAX_LIST):
                stretch, place = (", ", Place.TEXT) if item else (before + "[", place)
                segments += integer(stretch, NUM_INTEGERS + item, place, guard=_ITEMS, at=item)
            return [*segments, constant("]" + after, guard=_ITEMS)]

        def images(count: int) -> list[_Segment]:
            row: list[_Segment] = []
            before, after = layout.image
            for index in range(count):
                guard = {"guard": _IMAGES, "at": index}
                row += [*marks(before, **guard), _Segment(_PADS, source=index, **guard), *marks(after, **guard)]
            return row

        def braced(opening: str, text: str, closing: str, place: Place) -> list[_Segment]:
            """Returns the segments of a text with braces between two of the template's, whose braces are letters."""
            row: list[_Segment] = []
            *stretches, last = _split(text)
            last = (last[0] + closing, "")
            if stretches:
                stretches[0] = (opening + stretches[0][0], stretches[0][1])
            else:
                last = (opening + last[0], "")
            for i, (before, what) in enumerate(stretches):
                if what != "list":
                    row += integer(before, int(what), place)
                elif i + 1 == len(stretches):
                    return [*row, *listed(before, last[0], place)]
                else:
                    raise ValueError(f"an integer follows the list of {text!r}")
                place = Place.TEXT
            return [*row, constant(last[0], place)] if last[0] else row

        layout = vocabulary.layout
        head, opening = _text_last(layout.before)
        closing, rest = _text_first(layout.after)
        rows = []
        for kind in kinds:
            text, _, behind = kind.outcome.text.partition(IMAGES)
            if "{" in behind:
                raise ToolError(f"the text of {kind} has braces behind its images: {behind!r}")
            if wrong := [what for _, what in _split(text)[:-1] if what not in NAMES]:
                raise ToolError(
                    f"the text of {kind} has {{{wrong[0]}}} in it: braces hold {', '.join(NAMES)} and no more"
                )
            shown = kind.outcome.images if vocabulary.image_pad != ABSENT else 0
            row = marks(head)
            if not shown:
                row += braced(opening, text + behind, closing, Place.SPECIAL)
            elif layout.images_first:
                row += [*marks((opening,) if opening else ()), *images(shown)]
                place = Place.TEXT if _text_last(layout.image[1])[1] else Place.SPECIAL
                row += braced("", text + behind, closing, place)
            else:
                row += [*braced(opening, text, "", Place.SPECIAL), *images(shown)]
                row += marks((behind + closing,) if behind + closing else ())
            rows.append([*row, *marks(rest)])
        width = max(map(len, rows))
        segments = np.array([row + [_Segment()] * (width - len(row)) for row in rows], np.int32)
        return cls(
            kinds=kinds,
            segments=segments,
            constants=np.array(constants, np.int32),
            digits=np.array(vocabulary.digits, np.int32),
            image_pad=vocabulary.image_pad,
            layout=vocabulary.layout,
        )

    @property
    def malformed(self) -> int:
        """The index of the kind of malformed calls."""
        return len(self.kinds) - 1

    @property
    def images(self) -> int:
        """The most images that an observation shows."""
        return max(kind.outcome.images for kind in self.kinds)

    def find(self, tool: Tool, outcome: str) -> int:
        """Returns the index of the kind of an outcome of `tool`."""
        return next(i for i, kind in enumerate(self.kinds) if kind.tool == tool and kind.outcome.name == outcome)

    def text(self, kind: int, integers: Sequence[int] = (), items: Sequence[int] = (), pads: Sequence[int] = ()) -> str:
        """Returns an observation as text; `pads` are the pad counts of the images it shows."""
        template = self.kinds[kind].outcome.text
        template += "" if IMAGES in template else IMAGES
        written = [*integers, *items] if "{list}" in template else list(integers)
        if len(items) > MAX_LIST or any(abs(integer) >= 10**MAX_DIGITS for integer in written):
            template, pads = self.kinds[self.malformed].outcome.text + IMAGES, ()
        before, after = map(flatten, self.layout.image)
        images = "".join(before + SPECIAL_TOKENS["image_pad"] * count + after for count in pads)
        if self.layout.images_first:
            images, template = "", images + template
        text = template.format(*integers, list=list(items), images=images)
        return flatten(self.layout.before) + text + flatten(self.layout.after)

    def bound(self, pads: Sequence[int], images: int) -> int:
        """Returns the most tokens that an observation can have, which is the least `length` for `assemble`.

        Args:
          pads: for each kind, the most pad tokens of one of its images.
          images: the most images that are shown.
        """
        most = 0
        for kind, of_image in zip(self.segments, pads, strict=True):
            segment = _Segment(*kind.T)
            shown = ~((segment.guard == _IMAGES) & (segment.at >= images)) & (segment.guard != _NO_ITEMS)
            lengths = np.select(
                [segment.type == _INTEGER, segment.type == _PADS], [MAX_DIGITS, of_image], segment.length
            )
            # The two forms of a stretch before an integer are neighbours, of which only one appears.
            longer = np.maximum(lengths, np.roll(lengths, -1))
            lengths = np.select([segment.sign == _POSITIVE, segment.sign == _NEGATIVE], [longer, 0], lengths)
            most = max(most, int(np.sum(lengths * shown)))
        return most

    def ids(
        self, kind: int, integers: Sequence[int] = (), items: Sequence[int] = (), pads: Sequence[int] = ()
    ) -> list[int]:
        """Returns the ids of one observation, on the host, from the same assembler; the arguments are those of `text`.

        Raises:
          ValueError: too many integers or images for the kind.
        """
        if len(integers) > NUM_INTEGERS or len(pads) > self.kinds[kind].outcome.images:
            raise ValueError(
                f"{self.kinds[kind]} with {len(integers)} integers (at most {NUM_INTEGERS}) and {len(pads)} images (at "
                f"most {self.kinds[kind].outcome.images})"
            )
        most = max(pads, default=0)
        length = 1 << self.bound([most] * len(self.kinds), self.images).bit_length()  # few lengths, few compilations

        def row(integers: Sequence[int], width: int) -> np.ndarray:
            limit = 10**MAX_DIGITS  # integers beyond it are not written, so they can be clipped
            clipped = [min(max(int(x), -limit), limit) for x in integers[:width]]
            return np.array([clipped + [0] * (width - len(clipped))], np.int32)

        values = ObservationValues(
            kind=np.array([kind], np.int32),
            integers=row(integers, NUM_INTEGERS),
            items=row(items, MAX_LIST),
            num_items=np.array([len(items)], np.int32),
            pads=row(pads, max(1, self.images)),
        )
        ids, total = _assemble(self, values, length)
        return np.asarray(ids)[0, : int(total[0])].tolist()

    def assemble(self, values: ObservationValues, length: int) -> tuple[jax.Array, jax.Array]:
        """Assembles the ids of R observations.

        Args:
          values: the values of R rows.
          length: at least `bound(...)` for the pads that occur.

        Returns:
          ids int32 [R, length], left-aligned, zeros beyond the row's own length, and the lengths, int32 [R].
        """
        kind, integers, items, num_items, pads = map(jnp.asarray, values)
        shown = jnp.arange(MAX_LIST) < num_items[:, None]
        numbers = jnp.concatenate([integers, jnp.where(shown, items, 0)], 1)  # [R, 20]
        segments = jnp.asarray(self.segments)

        # If an integer or a list cannot be written, the message becomes the fixed one.
        own = _Segment(*jnp.moveaxis(segments[jnp.maximum(kind, 0)], -1, 0))  # fields [R, S]
        # Compared with both limits, because abs() of the least int32 is negative.
        wide = (numbers >= 10**MAX_DIGITS) | (numbers <= -(10**MAX_DIGITS))
        unwritable = jnp.any((own.type == _INTEGER) & jnp.take_along_axis(wide, own.source, 1), 1)
        unwritable |= jnp.any(own.guard == _ITEMS, 1) & (num_items > MAX_LIST)
        kind = jnp.where((kind >= 0) & unwritable, self.malformed, kind)

        segment = _Segment(*jnp.moveaxis(segments[jnp.maximum(kind, 0)], -1, 0))
        num_images = jnp.sum(pads > 0, 1)
        members = jnp.stack([jnp.ones_like(num_items), num_items, num_images, num_items == 0], 1)  # of each guard
        present = (jnp.take_along_axis(members, segment.guard, 1) > segment.at) & (kind >= 0)[:, None]
        of_integer = (segment.type == _INTEGER) | (segment.sign != _ANY)
        value = jnp.take_along_axis(numbers, jnp.where(of_integer, segment.source, 0), 1)
        present &= (segment.sign == _ANY) | ((segment.sign == _NEGATIVE) == (value < 0))
        # `pads` may have fewer images than the observation could show.
        image = jnp.minimum(jnp.where(segment.type == _PADS, segment.source, 0), pads.shape[1] - 1)
        num_pads = jnp.take_along_axis(pads, image, 1)
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

        def at_token(field):
            return jnp.take_along_axis(field, at, 1)

        offset = position - at_token(ends - lengths)
        number, count = at_token(value), at_token(num_digits)
        power = jnp.clip(count - 1 - offset, 0, MAX_DIGITS - 1)
        digit = jnp.asarray(self.digits)[jnp.abs(number) // powers[power] % 10]
        constant = jnp.asarray(self.constants)[jnp.clip(at_token(segment.start) + offset, 0, len(self.constants) - 1)]
        kinds = at_token(segment.type)
        ids = jnp.select([kinds == _INTEGER, kinds == _PADS], [digit, jnp.full_like(digit, self.image_pad)], constant)
        return jnp.where(inside, ids, 0), total


_assemble = jax.jit(Observations.assemble, static_argnums=(0, 2))


def _text_last(marks: Marks) -> tuple[Marks, str]:
    """Splits marks into those before a text at their end, and the text."""
    return (marks[:-1], marks[-1]) if marks and isinstance(marks[-1], str) else (marks, "")


def _text_first(marks: Marks) -> tuple[str, Marks]:
    """Splits marks into a text at their beginning, and those behind it."""
    return (marks[0], marks[1:]) if marks and isinstance(marks[0], str) else ("", marks)


def _split(template: str) -> list[tuple[str, str]]:
    """Splits a text with {0} to {3} and {list} into pairs (constant text, name in the braces behind it); the last has no name."""
    first, *rest = (part.rpartition("}") for part in template.split("{"))
    names = [*(name for name, _, _ in rest), ""]
    return list(zip([first[2], *(text for _, _, text in rest)], names, strict=True))
