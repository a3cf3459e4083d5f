"""Prompts for reinforcement learning, in batches: questions in an endless random order, their images read ahead."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from pixel_jax.data.batches import Batches, stack
from pixel_jax.data.buckets import shuffled
from pixel_jax.data.example import Example, ReadReport
from pixel_jax.data.prompt_shapes import Fit, Fitter, Place
from pixel_jax.data.shapes import Measured
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.prompts import PromptError, build_prompts
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.rollouts.trajectory import HostPrompts, Tables
from pixel_jax.tools import RELEASED, Tool

Sizes = list[tuple[int, int]]  # (height, width) of each image as its file has it

BY_HAND = (
    "config.image_buffer and config.prompt_width (of videos config.video_buffer and config.video_prompt_width) say how much \
room there is; without them it is worked out"
)
MEASURED = "config.rl.rollout.max_tokens says how long a row may be, max_pixels and video_max_pixels there how large pictures are"


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question that has a room."""

    example: Example
    room: BatchShape
    fit: Fit


def find_rooms(
    examples: Sequence[Example],
    shapes: Sequence[BatchShape] | Measured,
    vocabulary: Vocabulary,
    config: RolloutConfig,
    report: ReadReport,
    tools: tuple[Tool, ...] = RELEASED,
) -> list[Asked]:
    """Every question in one of the `shapes`, given or worked out, by the sizes of its images.

    Larger images are made smaller, which `report` counts. A question that fits nowhere is an error that names its example,
    or is dropped and counted.
    """
    asked = []
    found = Fitter(vocabulary, config, tools=tools).places([example.outline for example in examples], shapes)
    for example, place in zip(examples, found, strict=True):
        if isinstance(place, Place):
            asked.append(Asked(example, *place))
            if place.fit.scale < 1.0:
                report.mended["a picture was made smaller to fit its room"] += 1
            continue
        why = f"{example.id}: {place}"
        if isinstance(place, PromptError):
            why += f" ({MEASURED if isinstance(shapes, Measured) else BY_HAND})"
        if not report.drop:
            raise PromptError(why) from place
        report.dropped.append(why)
    if not asked:
        raise PromptError(f"no question is left. {report}")
    return asked


def padding(asked: Sequence[Asked]) -> dict[str, float]:
    """Shares of padding among the tokens of the prompts and the patches of their pictures."""
    rooms = [x.room for x in asked]
    return {
        "tokens": 1 - sum(x.fit.tokens for x in asked) / sum(room.tokens for room in rooms),
        "patches": 1 - sum(x.fit.patches for x in asked) / sum(room.images * room.patches for room in rooms),
    }


def rooms_of(asked: Sequence[Asked]) -> str:
    """How many questions there are of which shape, and how much of it is padding."""
    counts = collections.Counter(x.room for x in asked)
    parts = [f"{count} in prompts of {room}" for room, count in counts.items()]
    wasted = ", ".join(f"{share:.1%} of the {name}" for name, share in padding(asked).items())
    return f"{'; '.join(parts)}; padding is {wasted}"


def question_batches(
    asked: Sequence[Asked],
    vocabulary: Vocabulary,
    tables: Tables,
    config: RolloutConfig,
    *,
    size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    **reading: int,
) -> Batches:
    """Endless (prompts, examples, sizes of their images): `size` questions in all processes together, this one's part of
    them. The questions of a batch are of one room.

    reading: `threads` and `ahead` of `Batches`.
    """

    def load(i: int) -> tuple[HostPrompts, Example, Sizes]:
        whole = asked[i].example.query()
        prompt = build_prompts([asked[i].fit.apply(whole)], vocabulary, tables, config, shape=asked[i].room)
        return prompt._replace(tables=()), asked[i].example, [image.shape[:2] for image in whole.images]

    def collate(
        rows: Iterator[tuple[HostPrompts, Example, Sizes]], count: int
    ) -> tuple[HostPrompts, list[Example], list[Sizes]]:
        prompts, examples, sizes = map(list, zip(*rows, strict=True))
        stacked = stack(iter(prompts), count)._replace(uid=np.arange(count, dtype=np.int32), tables=tables)
        return stacked, examples, sizes

    rooms = dict.fromkeys(x.room for x in asked)
    return Batches(
        shuffled([[i for i, x in enumerate(asked) if x.room == room] for room in rooms], size, seed),
        load,
        collate,
        size,
        same={"seed": seed},
        process_index=process_index,
        process_count=process_count,
        **reading,
    )
