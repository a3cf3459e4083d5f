"""Evaluation during `pixel-jax sft` and `rl`: chooses the held-out examples, and makes the looks at them (`training.watch`)."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pixel_jax.data.digests import Digests
from pixel_jax.data.example import Example, ReadReport
from pixel_jax.data.held_out import keys_of, settled
from pixel_jax.data.packed import Packing
from pixel_jax.data.questions import assign_shapes
from pixel_jax.data.read import read_examples
from pixel_jax.data.shapes import AutoShapes
from pixel_jax.data.traces import TraceError
from pixel_jax.dialog.grammar import RELEASED_LANGUAGE, Language
from pixel_jax.parallel.processes import all_gather, say
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.prompts import PromptError
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.terminal import warn
from pixel_jax.train_config import TrainConfig
from pixel_jax.training.looks import AllLooks, Asker, HeldOutLoss, Sampling
from pixel_jax.training.scorers import ScorerConfig
from pixel_jax.training.watch import Look, WatchConfig


class HeldOut(NamedTuple):
    """Examples to train on, and examples to evaluate on."""

    training: list[Example]
    judging: list[Example]
    rows: str  # indices of the latter in the data, separated by commas; "": they come from another file

    def __str__(self) -> str:
        if not self.judging:
            return (
                f"none of {len(self.training)} examples is held out to judge the run by: config.data_eval=FILE does that, "
                "or a larger config.watch.share"
            )
        if not self.rows:
            return f"{len(self.judging)} other examples judge the run"
        return f"{len(self.judging)} more examples are held out and judge the run"


def hold_out(
    examples: Sequence[Example],
    source: str | None,
    config: WatchConfig,
    directory: pathlib.Path,
    digests: Digests | None,
    *,
    seed: int,
    turns: bool,
    image_folders: Sequence[str] = (),
    columns: Mapping[str, str] = {},  # noqa: B006, never changed
    language: Language = RELEASED_LANGUAGE,
    pictures: bool = True,
) -> HeldOut:
    """Divides examples into those to train on and those to evaluate on. With several processes, all call it.

    Args:
        examples: the examples of the data.
        source: a file of examples to evaluate on (`data_eval`). None: a share of `examples` is held out.
        config: the number and the share of held-out examples.
        directory: the directory of the phase, where the choice is recorded.
        digests: the cache of digests of images, in the first process; None in the others, which follow its choice.
        seed: the seed of the choice.
        turns: whether the examples are traces.
        image_folders: folders in which the images of `source` may lie.
        columns: names of our fields in `source`, as in the data.
        language: the language of the calls in `source`.
        pictures: whether its examples need them.
    """
    if source is not None:
        others, report = read_examples(
            source,
            turns=turns,
            image_folders=image_folders,
            columns=columns,
            language=language,
            pictures=pictures,
        )
        _say_report(report)
        if digests is not None and set(keys_of(examples, digests)) & set(keys_of(others, digests)):
            warn(f"{source} has pictures that are in the data, too: they are trained on, so they judge too kindly")
        order = np.random.default_rng(seed).permutation(len(others))[: config.most]
        return HeldOut(list(examples), [others[i] for i in sorted(order)], "")
    held_out = np.zeros(len(examples), bool)
    if digests is not None:
        keys, count = keys_of(examples, digests), min(config.most, int(config.share * len(examples)))
        begun = any((directory / "checkpoints").glob("[0-9]*"))
        noted = settled(directory, keys, count, seed, begun=begun)
        held_out = np.array([key in noted for key in keys])
    held_out = all_gather(held_out)[0]
    training, judging = (
        [x for x, out in zip(examples, held_out, strict=True) if out == which] for which in (False, True)
    )
    return HeldOut(training, judging, ",".join(str(i) for i in np.flatnonzero(held_out)))


def _say_report(report: ReadReport) -> None:
    if text := str(report):
        say(text)


class HeldOutLooks(NamedTuple):
    """The maker of a run's evaluations on held-out examples ("looks")."""

    config: TrainConfig
    auto_shapes: AutoShapes  # how shapes of questions are worked out
    by: Sampling

    def ask(
        self,
        judging: Sequence[Example],
        shapes: Sequence[BatchShape] | AutoShapes,
        limits: RolloutConfig,
        scorer: ScorerConfig,
        dtype: str | None,
    ) -> list[Look]:
        """Makes one look, at the examples that have an answer and fit a batch shape, or none; reports the others."""
        watch, report = self.config.watch, ReadReport("held-out questions", drop=True)
        report.dropped = [f"{x.id} has no answer" for x in judging if not x.answer]
        scored = [x for x in judging if x.answer]
        try:
            vocabulary, tools = self.by.vocabulary, self.by.tables.tools
            shaped = assign_shapes(scored, shapes, vocabulary, limits, report, tools) if scored else []
        except PromptError:  # none is left
            shaped = []
        _say_report(report)
        if not shaped:
            return []
        options = {"batch": watch.batch, "drawn": watch.drawn, "seed": self.config.seed}
        return [Asker(shaped, self.by, limits, scorer, dtype=dtype, **options)]

    def of_tuning(self, judging: Sequence[Example], packing: Packing) -> Look | None:
        """Makes looks at held-out traces: their loss and, with `watch.answers`, the model's answers to their questions.

        Answers may be twice as long as the longest trace, which bounds the cost of a model that does not end its turns yet.
        """
        config, phase = self.config, self.config.tuning
        report = ReadReport("held-out traces", drop=True)
        try:
            packed = Packing(
                judging,
                self.by.vocabulary,
                self.by.tables,
                config.rollout,
                packing.buckets,
                size=phase.batch_size,
                seed=config.seed,
                report=report,
            )
        except TraceError:  # none is left
            say(str(report))
            return None
        _say_report(report)
        looks: list[Look] = [HeldOutLoss(packed, phase.forward, phase.normalizer, phase.batch_size, self.by.mesh)]
        if config.watch.answers:
            longest = 2 * max(len(row.ids) - max(row.loss_mask.find(1), 0) for row in (*packing.rows, *packed.rows))
            limits = dataclasses.replace(
                config.rollout,
                max_response=min(config.rollout.max_response, longest),
                max_new_tokens=min(config.rollout.max_new_tokens, longest),
            )
            looks += self.ask(judging, self.auto_shapes, limits, ScorerConfig(), phase.forward.compute_dtype)
        return AllLooks(*looks)

    def of_learning(self, judging: Sequence[Example], shapes: Sequence[BatchShape]) -> Look | None:
        """Makes a look at the model's answers to held-out questions, in the shapes of the questions of training."""
        phase = self.config.learning
        looks = self.ask(judging, shapes, phase.rollout, phase.reward.scorer, phase.forward.compute_dtype)
        return looks[0] if looks else None
