"""The traces that an adapter learns, and the requests that have been carried out on them, one after another."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pixel_jax.config import load
from pixel_jax.data import miniature, synthesis
from pixel_jax.data.miniature import SceneConfig
from pixel_jax.data.traces import Trace, right, to_trajectories
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.files import read_json
from pixel_jax.quickstart import zoom
from pixel_jax.quickstart.lesson import scene_query
from pixel_jax.quickstart.zoom import CUE
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.prompts import tables
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.training.batch import from_trajectories
from unlearn_jax.dataset import Dataset
from unlearn_jax.edits import CorrectResponse, Edit, ModifyQuery, Remove
from unlearn_jax.quickstart.config import TracesConfig
from unlearn_jax.quickstart.job import ADAPTER, EDITED
from unlearn_jax.vision_language import examples

SPLIT = "test"  # photographs and digits that the base model has not seen
KINDS = ("zoom", "direct", "video")
ROOM = 2048  # tokens of a trace: a question that the tokenizer has no piece for takes one a byte


@dataclasses.dataclass(frozen=True)
class EditRequest:
    """Edits of traces by id. A trace can be in one of the three only."""

    remove: tuple[str, ...] = ()
    correct: dict[str, str] = dataclasses.field(default_factory=dict)  # id: the answer it should have been
    ask: dict[str, str] = dataclasses.field(default_factory=dict)  # id: the question it should have been

    @classmethod
    def read(cls, path: pathlib.Path) -> "EditRequest":
        """Reads a request from a JSON file."""
        return load(cls, read_json(path), str(path))

    @classmethod
    def example(cls, traces: Mapping[str, Trace]) -> "EditRequest":
        """One of each: a zoom is removed, an answer corrected (to the next digit), a clip asked about as if it were an image."""
        if not all(f"{kind}-0" in traces for kind in KINDS):
            raise ValueError(
                f"the example request is about a trace of each kind ({', '.join(KINDS)}): write one of your own"
            )
        answer = (int(traces["direct-0"].answer) + 1) % 10
        return cls(("zoom-0",), {"direct-0": str(answer)}, {"video-0": miniature.QUESTION})

    def names(self) -> list[str]:
        """The ids of all traces that it is about."""
        return [*self.remove, *self.correct, *self.ask]


def draw_traces(config: TracesConfig, seed: int) -> dict[str, Trace]:
    """Traces by id, "zoom-0", "zoom-1", ...: each depends on the seed and its own id only."""
    found = {}
    for number, kind in enumerate(KINDS):
        for i in range(getattr(config, kind)):
            found[f"{kind}-{i}"] = _draw(kind, np.random.default_rng([seed, number, i]), config.scenes)
    if not found:
        raise ValueError("config.traces has no trace of any kind")
    return found


def _draw(kind: str, rng: np.random.Generator, scenes: SceneConfig) -> Trace:
    if kind == "video":
        clip = miniature.draw_clip(rng, SPLIT, scenes)
        return synthesis.video_trace(rng, zoom.clip_query(clip), CUE, [clip.target + 1], str(clip.label), "single")
    scene = miniature.draw_scene(rng, SPLIT, scenes, small=kind == "zoom")
    query, answer = scene_query(scene), str(scene.label)
    if kind == "direct":
        return synthesis.direct_trace(query, answer)
    return synthesis.image_trace(rng, query, CUE, zoom.reference_box(scene), answer, "single")


def answered(trace: Trace, answer: str) -> Trace:
    """The trace with another answer at its end."""
    last = right(synthesis.final_answer(answer))
    return Trace(trace.query, (*trace.turns[:-1], last), answer)


def asked(trace: Trace, question: str) -> Trace:
    """The trace with another question."""
    return trace._replace(query=trace.query._replace(question=question))


def to_examples(traces: Mapping[str, Trace], vocabulary: Vocabulary, limits: RolloutConfig) -> dict[str, Any]:
    """The traces as examples, see `unlearn_jax.vision_language.examples`."""
    limits = dataclasses.replace(limits, max_calls=zoom.MOST_CALLS)
    budgets = (limits.max_pixels, limits.crop_max_pixels, limits.select_max_pixels, limits.video_max_pixels)
    images = miniature.NUM_FRAMES + zoom.MOST_CALLS
    room = BatchShape(ROOM, images, images, limits.merge_unit * (max(budgets) // limits.factor**2))
    made = to_trajectories(list(traces.values()), vocabulary, tables(vocabulary), limits, room)
    return examples(from_trajectories(made), list(traces))


@dataclasses.dataclass(frozen=True, eq=False)
class Edited:
    """Traces and what a request makes of them, as examples of one shape."""

    dataset: Dataset  # the traces as they were
    edits: list[Edit]
    replacements: dict[str, Any]  # the new forms, in the order of `request.correct` and `request.ask`
    request: EditRequest

    @classmethod
    def of(
        cls, traces: Mapping[str, Trace], request: EditRequest, vocabulary: Vocabulary, limits: RolloutConfig
    ) -> "Edited":
        """The traces and the new forms, made together so that they have one shape."""
        for name in request.names():
            if name not in traces:
                raise ValueError(f"no trace has the id {name!r}; there are {describe_ids(traces)}")
        new = {name: answered(traces[name], answer) for name, answer in request.correct.items()}
        new |= {name: asked(traces[name], question) for name, question in request.ask.items()}
        # Made together, so that both forms have the same shape.
        both = to_examples({**traces, **{f"{name} edited": trace for name, trace in new.items()}}, vocabulary, limits)
        pick = lambda index: jax.tree.map(lambda x: x[index], both)
        count, corrected = len(traces), len(request.correct)
        replacement = lambda names, index: {**pick(index), "id": np.array(names)}
        middle, end = count + corrected, count + len(new)
        edits: list[Edit] = []
        if request.remove:
            edits.append(Remove(list(request.remove)))
        if request.correct:
            edits.append(
                CorrectResponse(list(request.correct), replacement(list(request.correct), slice(count, middle)))
            )
        if request.ask:
            edits.append(ModifyQuery(list(request.ask), replacement(list(request.ask), slice(middle, end))))
        return cls(Dataset.of(pick(slice(count))), edits, pick(slice(count, end)), request)

    def everything(self) -> dict[str, Any]:
        """All traces in their old form, then the new forms: fields [n + k, ...], without ids."""
        old = self.dataset.take()
        new = {name: x for name, x in self.replacements.items() if name != "id"}
        return jax.tree.map(lambda *x: np.concatenate(x), old, new)

    def groups(self) -> dict[str, np.ndarray]:
        """Where in `everything` each kind of example is, int [k]."""
        request, count = self.request, len(self.dataset)
        at = lambda names: self.dataset.positions(list(names))
        new = count + np.arange(len(request.correct) + len(request.ask))
        kept = np.setdiff1d(np.arange(count), at(request.names()))
        groups = {
            "removed": at(request.remove),
            "corrected, old answer": at(request.correct),
            "corrected, new answer": new[: len(request.correct)],
            "asked, old question": at(request.ask),
            "asked, new question": new[len(request.correct) :],
            "retained": kept,
        }
        return {name: index for name, index in groups.items() if len(index)}

    def forgotten(self) -> np.ndarray:
        """Where in `everything` what should be forgotten is: the old forms of what is edited."""
        return self.dataset.positions(self.request.names())


def describe_ids(traces: Mapping[str, Trace]) -> str:
    """The ids of `draw_traces` in words."""
    kinds = {kind: sum(name.startswith(kind) for name in traces) for kind in KINDS}
    return ", ".join(f"{kind}-0 to {kind}-{n - 1}" for kind, n in kinds.items() if n)


def describe(request: EditRequest, traces: Mapping[str, Trace]) -> Sequence[str]:
    """The request in words, a line an edit."""
    found = [f"remove   {name}: {traces[name].query.question} {traces[name].answer}" for name in request.remove]
    found += [f"correct  {name}: {traces[name].answer} becomes {answer}" for name, answer in request.correct.items()]
    found += [f"ask      {name}: {question}" for name, question in request.ask.items()]
    return found


REQUEST, REPORT = "request.json", "report.json"  # the report is written last: where it is, the request was carried out


def folder(number: int) -> str:
    """Of the request carried out as number 1, 2, ..."""
    return f"request-{number}"


def adapter_after(number: int) -> str:
    """The file of the adapter that `number` requests have left."""
    return f"{folder(number)}/{EDITED}" if number else ADAPTER


def carried_out(directory: pathlib.Path) -> list[EditRequest]:
    """All requests of the run in `directory`, in order."""
    found: list[EditRequest] = []
    while (place := directory / folder(len(found) + 1)).joinpath(REPORT).exists():
        found.append(load(EditRequest, read_json(place / REQUEST), str(place / REQUEST)))
    return found


def left_by(traces: Mapping[str, Trace], request: EditRequest) -> dict[str, Trace]:
    """The traces as they are after a request."""
    left = {name: trace for name, trace in traces.items() if name not in request.remove}
    left |= {name: answered(traces[name], answer) for name, answer in request.correct.items()}
    return left | {name: asked(traces[name], question) for name, question in request.ask.items()}


@dataclasses.dataclass(frozen=True)
class Todo:
    """What of a request is still to be done, and in words what is done already."""

    request: EditRequest
    done: list[str]


def still_to_do(request: EditRequest, first: Mapping[str, Trace], now: Mapping[str, Trace]) -> Todo:
    """`request` against the traces as they are now; `first`: before any request.

    An id that never was, and an answer or a question of a trace that has been removed, are a ValueError.
    """
    for name in request.names():
        if name not in first:
            raise ValueError(f"no trace has the id {name!r}; there are {describe_ids(first)}")
    for name in (*request.correct, *request.ask):
        if name not in now:
            raise ValueError(f"{name!r} was removed by an earlier request: it has no answer or question to be changed")
    done = [f"{name} has been removed" for name in request.remove if name not in now]
    done += [f"{name} is answered {text!r}" for name, text in request.correct.items() if now[name].answer == text]
    done += [f"{name} is asked {text!r}" for name, text in request.ask.items() if now[name].query.question == text]
    rest = EditRequest(
        tuple(name for name in request.remove if name in now),
        {name: text for name, text in request.correct.items() if now[name].answer != text},
        {name: text for name, text in request.ask.items() if now[name].query.question != text},
    )
    return Todo(rest, done)
