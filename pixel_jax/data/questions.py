"""Prompts for reinforcement learning, in batches: questions in an endless random order, their images read ahead."""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pixel_jax.data.batches import Batches, stack
from pixel_jax.data.buckets import shuffled
from pixel_jax.data.example import Example, Report
from pixel_jax.data.rooms import Fit, Room, fit
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.rollout.canvases import Canvases
from pixel_jax.rollout.config import RolloutConfig
from pixel_jax.rollout.prompts import PromptError, build_prompts
from pixel_jax.rollout.trajectory import Prompts, Tables

Sizes = list[tuple[int, int]]  # (height, width) of each image as its file has it


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question that has a room."""

    example: Example
    room: Room
    fit: Fit


def find_rooms(
    examples: Sequence[Example],
    room: Room,
    video_room: Room | None,
    vocabulary: Vocabulary,
    config: RolloutConfig,
    report: Report,
) -> list[Asked]:
    """Every question in `room`, or in `video_room` (unless that is None) if it is about a video, by the sizes of its images.

    Larger images are made smaller, which `report` counts. A question that fits nowhere is an error that names its example,
    or is dropped and counted.
    """

    def place(example: Example) -> Asked | ValueError:
        given = video_room if example.video and video_room is not None else room
        try:
            return Asked(example, given, fit(example.outline(), given, vocabulary, config))
        except ValueError as error:  # a PromptError, a file that cannot be read, sides that no size fits
            return error

    asked = []
    with ThreadPoolExecutor() as pool:
        for example, found in zip(examples, pool.map(place, examples), strict=True):
            if isinstance(found, Asked):
                asked.append(found)
                if found.fit.scale < 1.0:
                    report.mended["a picture was made smaller to fit its room"] += 1
            elif report.drop:
                report.dropped.append(f"{example.id}: {found}")
            else:
                raise PromptError(f"{example.id}: {found}") from found
    if not asked:
        raise PromptError(f"no question is left. {report}")
    return asked


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
    """Endless (Prompts, examples, sizes of their images): `size` questions in all processes together, this one's part of
    them. The questions of a batch are of one room.

    reading: `threads` and `ahead` of `Batches`.
    """

    def load(i: int) -> tuple[Prompts, Example, Sizes]:
        example, room = asked[i].example, asked[i].room
        whole, canvas = example.query(), room[:3]
        query = asked[i].fit.apply(whole)
        prompt = build_prompts([query], vocabulary, tables, config, width=room.tokens, canvas=canvas)
        return prompt._replace(tables=None), example, [image.shape[:2] for image in whole.images]

    def collate(
        rows: Iterator[tuple[Prompts, Example, Sizes]], count: int
    ) -> tuple[Prompts, list[Example], list[Sizes]]:
        examples, sizes, canvases = [], [], []

        def prompts() -> Iterator[Prompts]:
            for prompt, example, whole in rows:
                examples.append(example)
                sizes.append(whole)
                canvases.append(prompt.canvases)
                yield prompt._replace(canvases=None)

        stacked = stack(prompts(), count)._replace(uid=np.arange(count, dtype=np.int32), tables=tables)
        return stacked._replace(canvases=Canvases.concatenate(canvases)), examples, sizes

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
