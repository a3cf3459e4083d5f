"""What a run of `pixel-jax sft` or `pixel-jax rl` is judged by while it goes on: which examples, and how (`training.watch`)."""

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
from pixel_jax.train import TrainConfig
from pixel_jax.training.looks import Asker, HeldOutLoss, Sampling, Together
from pixel_jax.training.scorers import ScorerConfig
from pixel_jax.training.watch import Look, WatchConfig


class HeldOut(NamedTuple):
    training: list[Example]
    judging: list[Example]
    places: str  # of those held out in the data; "": none of its own are

    def __str__(self) -> str:
        if not self.judging:
            return (
                f"none of {len(self.training)} examples is held out to judge the run by: config.data_eval=FILE does that, "
                "or a larger config.watch.share"
            )
        if not self.places:
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
) -> HeldOut:
    """The examples to train on, and those that the run is judged by. With several processes, all call it.

    Args:
        source: a file of examples to judge by (`data_eval`). None: a share of `examples` is held out.
        directory: of the phase, where it is noted what is held out.
        digests: of pictures; in the first process, which alone decides.
        turns: the examples are traces.
        columns: what `source` calls our fields, as the data does; language: of the calls in it.
    """
    if source is not None:
        others, report = read_examples(
            source, turns=turns, image_folders=image_folders, columns=columns, language=language
        )
        say(str(report)) if str(report) else None
        if digests is not None and set(keys_of(examples, digests)) & set(keys_of(others, digests)):
            warn(f"{source} has pictures that are in the data, too: they are trained on, so they judge too kindly")
        order = np.random.default_rng(seed).permutation(len(others))[: config.most]
        return HeldOut(list(examples), [others[i] for i in sorted(order)], "")
    held = np.zeros(len(examples), bool)
    if digests is not None:
        keys, count = keys_of(examples, digests), min(config.most, int(config.share * len(examples)))
        begun = any((directory / "checkpoints").glob("[0-9]*"))
        noted = settled(directory, keys, count, seed, begun=begun)
        held = np.array([key in noted for key in keys])
    held = all_gather(held)[0]
    parts = [[x for x, out in zip(examples, held, strict=True) if out == which] for which in (False, True)]
    places = ",".join(str(i) for i in np.flatnonzero(held))
    return HeldOut(*parts, places)


class Setting(NamedTuple):
    """What looks need to know of a run."""

    config: TrainConfig
    auto_shapes: AutoShapes  # by what shapes of questions are worked out
    by: Sampling

    def ask(
        self,
        judging: Sequence[Example],
        shapes: Sequence[BatchShape] | AutoShapes,
        limits: RolloutConfig,
        scorer: ScorerConfig,
        dtype: str | None,
    ) -> list[Look]:
        """One look, at those of the examples that have an answer and fit a batch shape, or none. What is left out is said."""
        watch, report = self.config.watch, ReadReport("held-out questions", drop=True)
        report.dropped = [f"{x.id} has no answer" for x in judging if not x.answer]
        scored = [x for x in judging if x.answer]
        try:
            given = (self.by.vocabulary, limits, report, self.by.tables.tools)
            asked = assign_shapes(scored, shapes, *given) if scored else []
        except PromptError:  # none is left
            asked = []
        say(str(report)) if str(report) else None
        return [
            Asker(
                asked,
                self.by,
                limits,
                scorer,
                batch=watch.batch,
                drawn=watch.drawn,
                seed=self.config.seed,
                dtype=dtype,
            )
        ][: len(asked)]

    def of_tuning(self, judging: Sequence[Example], packing: Packing) -> Look | None:
        """Looks at held-out traces: their loss, and, if `watch.answers` says so, what the model answers to their questions.

        Answers have room for twice the longest trace: a model that does not end its turns yet takes no longer than that.
        """
        config, phase = self.config, self.config.sft
        report = ReadReport("held-out traces", drop=True)
        try:
            held = Packing(
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
        say(str(report)) if str(report) else None
        looks: list[Look] = [HeldOutLoss(held, phase.forward, phase.normalizer, phase.batch_size, self.by.mesh)]
        if config.watch.answers:
            longest = 2 * max(len(row.ids) - max(row.loss_mask.find(1), 0) for row in (*packing.rows, *held.rows))
            limits = dataclasses.replace(
                config.rollout,
                max_response=min(config.rollout.max_response, longest),
                max_new_tokens=min(config.rollout.max_new_tokens, longest),
            )
            looks += self.ask(judging, self.auto_shapes, limits, ScorerConfig(), phase.forward.compute_dtype)
        return Together(*looks)

    def of_learning(self, judging: Sequence[Example], shapes: Sequence[BatchShape]) -> Look | None:
        """Looks at what the model answers to held-out questions, in the shapes of those that are learned from."""
        phase = self.config.rl
        looks = self.ask(judging, shapes, phase.rollout, phase.reward.scorer, phase.forward.compute_dtype)
        return looks[0] if looks else None
