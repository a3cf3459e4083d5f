"""Readers of data sets, by name; each reads or makes `ChoiceQuestion`s as `config.data` says."""

import pathlib
from collections.abc import Callable, Mapping

from pixel_jax.data.example import ReadReport
from unlearn_jax.noisy_responses import photographs
from unlearn_jax.noisy_responses.config import QuestionsConfig
from unlearn_jax.noisy_responses.questions import ChoiceQuestion
from unlearn_jax.noisy_responses.readers.mm_spubench import read_mm_spubench
from unlearn_jax.noisy_responses.readers.r_bench import read_r_bench


def _photographs(data: QuestionsConfig, report: ReadReport) -> list[ChoiceQuestion]:
    return photographs.draw_questions(photographs.STUDY, data.each, data.agreement, data.seed)


def _mm_spubench(data: QuestionsConfig, report: ReadReport) -> list[ChoiceQuestion]:
    return read_mm_spubench(pathlib.Path(data.path), report)


def _r_bench(data: QuestionsConfig, report: ReadReport) -> list[ChoiceQuestion]:
    folder = lambda path: None if path is None else pathlib.Path(path)
    images, subset = folder(data.images), folder(data.subset)
    return read_r_bench(pathlib.Path(data.path), report, images=images, image_folders=data.image_folders, subset=subset)


READERS: Mapping[str, Callable[[QuestionsConfig, ReadReport], list[ChoiceQuestion]]] = {
    "photographs": _photographs,
    "mm_spubench": _mm_spubench,
    "r_bench": _r_bench,
}
