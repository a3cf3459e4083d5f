"""The traces that an adapter learns, their forms after requests, and their arrays."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from pixel_jax.data import synthesis
from pixel_jax.data.images import read_image
from pixel_jax.data.traces import Trace, right, to_trajectories
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.quickstart import miniature, zoom
from pixel_jax.quickstart.lesson import scene_query
from pixel_jax.quickstart.miniature import SceneConfig
from pixel_jax.quickstart.zoom import CUE
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.prompts import tables
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.training.batch import from_trajectories
from unlearn_jax.loss import MASK
from unlearn_jax.quickstart.config import TracesConfig
from unlearn_jax.requests.request import EditRequestError, Request, refuse_kind
from unlearn_jax.requests.task import Description
from unlearn_jax.vision_language import examples, mask_text

SPLIT = "test"  # photographs and digits that the base model has not seen
KINDS = ("zoom", "direct", "video")
MAX_TOKENS = 2048  # of a trace; text without tokens in the vocabulary takes one token for each byte


def draw_traces(config: TracesConfig, seed: int) -> dict[str, Trace]:
    """Draws traces by id, "zoom-0", "zoom-1", ...; each depends only on the seed and its id."""
    traces = {}
    for number, kind in enumerate(KINDS):
        for i in range(getattr(config, kind)):
            traces[f"{kind}-{i}"] = _draw(kind, np.random.default_rng([seed, number, i]), config.scenes)
    if not traces:
        raise ValueError("config.traces has no trace of any kind")
    return traces


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


class TraceItem(NamedTuple):
    """A trace as a training example."""

    trace: Trace
    masked: tuple[str, ...] = ()  # parts of the learned text that carry no loss


def changed(item: TraceItem, request: Request) -> TraceItem:
    """Returns a trace with another answer, question or image, or with a part of its learned text masked.

    Raises:
        EditRequestError: the request does not fit the trace.
    """
    trace, name = item.trace, request.ids[0]
    refuse_kind(request, "question", "answer", "image", "mask")
    if request.kind == "mask":
        if item.masked and request.value in item.masked:
            return item
        count = sum(text.count(request.value) for text in learned_texts(trace))
        if count != 1:
            raise EditRequestError(
                f"the text to be masked occurs {count} times in what {name!r} teaches: give one that occurs once, "
                f"with what stands around it"
            )
        return TraceItem(trace, (*item.masked, request.value))
    if request.kind == "answer":
        trace = answered(trace, request.value)
    elif request.kind == "question":
        trace = asked(trace, request.value)
    else:
        trace = _shown(trace, request)
    # A masked text is dropped unless the new form has it.
    return TraceItem(trace, tuple(x for x in item.masked if any(x in text for text in learned_texts(trace))))


def _shown(trace: Trace, request: Request) -> Trace:
    if trace.query.is_video or len(trace.query.images) != 1:
        raise EditRequestError(
            f"{request.ids[0]!r} shows {len(trace.query.images)} images: only a single image is changed"
        )
    try:
        image = read_image(request.image, name=request.image_name)
    except ValueError as error:
        raise EditRequestError(f"the new image of {request.ids[0]!r}: {error}") from None
    return trace._replace(query=trace.query._replace(images=[image]))


def learned_texts(trace: Trace) -> list[str]:
    """The learned texts of a trace, one for each contiguous part."""
    return [text for turn in trace.turns for text, learned in turn.parts if learned]


def describe(item: TraceItem) -> Description:
    """A trace as a page shows it."""
    trace = item.trace
    texts = {"question": trace.query.question}
    for number, turn in enumerate(trace.turns, 1):
        texts[f"turn {number}"] = "".join(text for text, _ in turn.parts)
    texts |= {f"masked {number}": text for number, text in enumerate(item.masked, 1)}
    return Description(texts, trace.query.images)


def example_requests(items: Mapping[str, TraceItem]) -> list[Request]:
    """Makes three requests: one removes a zoom, one corrects an answer to the next digit, one changes a clip's question."""
    if not all(f"{kind}-0" in items for kind in KINDS):
        raise EditRequestError(
            f"the example requests are about a trace of each kind ({', '.join(KINDS)}): give --request=FILE"
        )
    answer = str((int(items["direct-0"].trace.answer) + 1) % 10)
    filed = ("an example", "unlearn-jax erase", "2026-01-01")
    return [
        Request(("zoom-0",), "remove", "", b"", *filed),
        Request(("direct-0",), "answer", answer, b"", *filed),
        Request(("video-0",), "question", miniature.QUESTION, b"", *filed),
    ]


def encode(items: Mapping[str, TraceItem], vocabulary: Vocabulary, limits: RolloutConfig) -> dict[str, Any]:
    """Converts items to examples, see `unlearn_jax.vision_language.examples`; masked texts carry no loss."""
    arrays = to_examples({name: item.trace for name, item in items.items()}, vocabulary, limits)
    for row, item in enumerate(items.values()):
        for text in item.masked:
            mask_text(arrays["labels"][row], arrays[MASK][row], text, vocabulary)
    return arrays


def to_examples(traces: Mapping[str, Trace], vocabulary: Vocabulary, limits: RolloutConfig) -> dict[str, Any]:
    """Converts traces to examples, see `unlearn_jax.vision_language.examples`."""
    limits = dataclasses.replace(limits, max_calls=zoom.MOST_CALLS)
    budgets = (limits.max_pixels, limits.crop_max_pixels, limits.select_max_pixels, limits.video_max_pixels)
    images = miniature.NUM_FRAMES + zoom.MOST_CALLS
    shape = BatchShape(MAX_TOKENS, images, images, limits.merge_unit * (max(budgets) // limits.factor**2))
    rows = to_trajectories(list(traces.values()), vocabulary, tables(vocabulary), limits, shape)
    return examples(from_trajectories(rows), list(traces))
