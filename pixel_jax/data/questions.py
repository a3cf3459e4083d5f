"""Prompts for reinforcement learning, in batches: questions in an endless random order, their images read ahead."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from pixel_jax.data.batches import Batches, stack
from pixel_jax.data.buckets import shuffled
from pixel_jax.data.example import Example, ReadReport
from pixel_jax.data.prompt_shapes import Assignment, ScaledPrompt, ShapeFinder, Size, size_of
from pixel_jax.data.shapes import AutoShapes
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.prompts import PromptError, build_prompts
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.rollouts.trajectory import HostPrompts, Tables
from pixel_jax.tools import RELEASED, Tool

Sizes = list[Size]  # of the images of a question, as their files have them

BY_HAND = (
    "config.image_buffer and config.prompt_width (of videos config.video_buffer and config.video_prompt_width) fix the "
    "batch shapes; without them these are worked out"
)
WORKED_OUT = (
    "config.rl.rollout.max_tokens says how long a row may be, max_pixels and video_max_pixels there how large pictures "
    "are"
)


@dataclasses.dataclass(frozen=True)
class ShapedQuestion:
    """A question and the batch shape that it is asked in."""

    example: Example
    shape: BatchShape
    prompt: ScaledPrompt


def assign_shapes(
    examples: Sequence[Example],
    shapes: Sequence[BatchShape] | AutoShapes,
    vocabulary: Vocabulary,
    config: RolloutConfig,
    report: ReadReport,
    tools: tuple[Tool, ...] = RELEASED,
) -> list[ShapedQuestion]:
    """Assigns each question to one of the `shapes`, which are fixed or worked out, by the sizes of its images.

    Images that are too large are scaled down, which `report` counts. A question that fits no shape is dropped and counted if
    `report.drop`.

    Raises:
        PromptError: no question is left; or, without `report.drop`, one fits no shape. The message names its example.
    """
    questions = []
    assigned = ShapeFinder(vocabulary, config, tools=tools).assign_all([x.outline for x in examples], shapes)
    for example, assignment in zip(examples, assigned, strict=True):
        if isinstance(assignment, Assignment):
            questions.append(ShapedQuestion(example, *assignment))
            if assignment.prompt.scale < 1.0:
                report.mended["a picture was made smaller to fit its batch shape"] += 1
            continue
        why = f"{example.id}: {assignment}"
        if isinstance(assignment, PromptError):
            why += f" ({WORKED_OUT if isinstance(shapes, AutoShapes) else BY_HAND})"
        if not report.drop:
            raise PromptError(why) from assignment
        report.dropped.append(why)
    if not questions:
        raise PromptError(f"no question is left. {report}")
    return questions


def padding(questions: Sequence[ShapedQuestion]) -> dict[str, float]:
    """The shares of padding among the tokens of the prompts and the patches of their images."""
    shapes = [x.shape for x in questions]
    return {
        "tokens": 1 - sum(x.prompt.tokens for x in questions) / sum(shape.tokens for shape in shapes),
        "patches": 1 - sum(x.prompt.patches for x in questions) / sum(shape.images * shape.patches for shape in shapes),
    }


def describe_shapes(questions: Sequence[ShapedQuestion]) -> str:
    """Says how many questions each shape has, and how much of the prompts is padding."""
    counts = collections.Counter(x.shape for x in questions)
    prompts = "; ".join(f"{count} in prompts of {shape}" for shape, count in counts.items())
    wasted = ", ".join(f"{share:.1%} of the {name}" for name, share in padding(questions).items())
    return f"{prompts}; padding is {wasted}"


def question_batches(
    questions: Sequence[ShapedQuestion],
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
    """Makes the endless batches: (prompts, examples, sizes of their images) of `size` questions of one shape.

    Args:
        questions: the questions with their shapes.
        vocabulary: the vocabulary of the model.
        tables: the tables of the tokenizer and the tools.
        config: limits and pixel budgets of rollouts.
        size: questions of a batch of all processes together.
        seed: the seed of the order.
        process_index: the index of this process, which gets its shard of each batch.
        process_count: the number of processes.
        reading: `threads` and `ahead` of `Batches`.
    """

    def load(i: int) -> tuple[HostPrompts, Example, Sizes]:
        question = questions[i]
        query = question.example.query()
        prompt = build_prompts([question.prompt.apply(query)], vocabulary, tables, config, shape=question.shape)
        return prompt._replace(tables=()), question.example, [size_of(image) for image in query.images]

    def collate(
        rows: Iterator[tuple[HostPrompts, Example, Sizes]], count: int
    ) -> tuple[HostPrompts, list[Example], list[Sizes]]:
        prompts, examples, sizes = map(list, zip(*rows, strict=True))
        stacked = stack(iter(prompts), count)._replace(uid=np.arange(count, dtype=np.int32), tables=tables)
        return stacked, examples, sizes

    shapes = dict.fromkeys(x.shape for x in questions)
    return Batches(
        shuffled([[i for i, x in enumerate(questions) if x.shape == shape] for shape in shapes], size, seed),
        load,
        collate,
        size,
        same={"seed": seed},
        process_index=process_index,
        process_count=process_count,
        **reading,
    )
