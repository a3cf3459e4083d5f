"""Makes a row of training data from a seed, or says why there is none."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pixel_jax.data.digests import Digests
from pixel_jax.data.images import ImageError, image_size, read_image
from pixel_jax.data.synthesis import VIDEO_KINDS, grown, image_turns, in_pixels, outward, video_turns
from pixel_jax.dialog.grammar import RELEASED_LANGUAGE, Language, parse_turn
from pixel_jax.dialog.writing import UnwritableError, write_call
from pixel_jax.endpoint import NoAnswerError
from pixel_jax.synthesis import checks
from pixel_jax.synthesis.seeds import Seed
from pixel_jax.synthesis.writers import TraceWriter
from pixel_jax.tools import CROP_IMAGE, SELECT_FRAMES
from pixel_jax.training.answers import last_boxed

DIRECT = "direct"
UNREADABLE = "an image cannot be read"  # followed by the error
MOST_MISSED = 0.3  # share of the image that a padded reference may fill if a crop is to miss it
MOST_LOOSE = 1 / 9  # share of the image that a reference may fill if a crop is to be far too large


class SeedOutcome(NamedTuple):
    """The outcome of a seed: a row of JSON lines (`pixel_jax.data.own`), or the reason why it was dropped."""

    row: dict[str, Any] | None
    reason: str | None
    rejected: dict[str, int]  # texts that were tried and refused, counted by "which text: what was wrong"


def possible_kinds(
    seed: Seed, pad: float, min_crop: int, language: Language = RELEASED_LANGUAGE
) -> tuple[str, ...] | str:
    """The kinds of traces that can be made of a seed with calls in the `language`, or why there is none."""
    if not seed.looks:
        return (DIRECT,)
    assert seed.cue is not None  # every seed with a box or frames has one
    if checks.reveals(seed.cue, seed.question, seed.answers):
        return "the cue reveals the answer"
    if checks.unfit(seed.cue, language):
        return "the cue has markup"
    tool = SELECT_FRAMES if seed.video else CROP_IMAGE
    if tool not in language.tools:
        return f"the tools have no {tool.name}"
    if seed.frames is not None:
        return VIDEO_KINDS if len(seed.frames) < len(seed.images) else VIDEO_KINDS[:1]
    try:
        size = image_size(seed.images[seed.image - 1])
    except ImageError as error:
        return f"{UNREADABLE}: {error}"
    height, width = size
    assert seed.box is not None
    reference = outward(seed.box, width, height)
    x1, y1, x2, y2 = in_pixels(reference, width, height, pad)
    if min(x2 - x1, y2 - y1) <= min_crop:
        return "the reference is too small to crop"
    if (x2 - x1, y2 - y1) == (width, height):
        return "the reference is the whole image"
    if not _can_name(language, seed.image):
        return f"the format {language.format.name} cannot name image {seed.image}"
    kinds = ["single"]
    shares = [(reference[2] - reference[0], width), (reference[3] - reference[1], height)]
    padded = grown(reference, pad)
    if (padded[2] - padded[0]) * (padded[3] - padded[1]) <= MOST_MISSED and min(size) * (0.1 + pad) > min_crop + 1:
        kinds += ["recrop", "recrop_twice"]
    # The smallest side of the second crop of a trace: its padding is a share of the first, loose crop, and both are cut off
    # on one side where the reference lies in a corner.
    least = min(side * (share + pad * min(3 * share + pad, 1)) for share, side in shares)
    nameable = _can_name(language, len(seed.images) + 1)
    if nameable and shares[0][0] * shares[1][0] <= MOST_LOOSE and least > min_crop + 1:
        kinds += ["further"]
    return tuple(kinds)


def _can_name(language: Language, image: int) -> bool:
    """Whether calls can be about the image of that number."""
    try:
        write_call(language, CROP_IMAGE.name, {"bbox_2d": (0.0, 0.0, 1.0, 1.0), "target_image": image})
    except UnwritableError:
        return False
    return True


def assign_kinds(possible: Sequence[Sequence[str]], shares: Mapping[str, float], seed: int) -> list[str]:
    """Assigns a kind to each seed, so that the `shares` are met as closely as possible.

    Seeds with few possible kinds come first, in a random order; each gets the kind that is furthest below its share.

    Args:
        possible: the kinds of each seed.
        shares: kind -> its share.
        seed: the seed of the random order.
    """
    total = sum(shares.values())
    lacking = {kind: share / total * len(possible) for kind, share in shares.items()}
    assigned = [""] * len(possible)
    order: list[int] = np.random.default_rng(seed).permutation(len(possible)).tolist()
    for i in sorted(order, key=lambda i: len(possible[i])):
        assigned[i] = max(possible[i], key=lambda kind: lacking[kind])
        lacking[assigned[i]] -= 1
    return assigned


def make(
    seed: Seed,
    kind: str,
    writer: TraceWriter,
    rng: np.random.Generator,
    *,
    attempts: int,
    pad: float,
    language: Language = RELEASED_LANGUAGE,
) -> SeedOutcome:
    """Makes the trace of a seed. Its row has no images yet: their paths are known when it is written.

    Args:
        seed: the question.
        kind: the kind of the trace.
        writer: the writer of the analyses.
        rng: draws the boxes and frames of mistakes.
        attempts: the most attempts at each analysis.
        pad: the pad of a box.
        language: the language of the calls.
    """
    rejected: Counter[str] = Counter()

    def written(which: str, write: Callable[[int], str], problem_of: Callable[[str], str | None]) -> str | None:
        """The first text of `attempts` without a problem; None if there is none."""
        for attempt in range(attempts):
            try:
                text = write(attempt)
            except NoAnswerError:
                problem = "no answer of the endpoint"
            else:
                problem = problem_of(text)
                if problem is None:
                    return text
            rejected[f"{which}: {problem}"] += 1
            last.append(f"{which}: {problem}")
        return None

    last: list[str] = []
    answer = seed.answers[0]
    if last_boxed(f"\\boxed{{{answer}}}") != answer or checks.unfit(answer, language):
        return SeedOutcome(None, "the answer does not fit a box", {})
    try:
        images = [read_image(path) for path in seed.images]  # also for a writer that needs none: tuning will read them
    except ImageError as error:
        return SeedOutcome(None, f"{UNREADABLE}: {error}", {})

    def final(text: str) -> str | None:
        return checks.local_problem(text, seed.answers, language)

    if kind == DIRECT:
        text = written("direct answer", lambda n: writer.direct(seed, images, n), final)
        turns = None if text is None else [{"text": checks.with_answer(text, answer)}]
    else:
        whole = written(
            "whole analysis",
            lambda n: writer.whole(seed, images, n),
            lambda text: checks.whole_problem(text, seed.question, seed.answers, language),
        )
        local = whole and written("local analysis", lambda n: writer.local(seed, views_of(seed, images, pad), n), final)
        turns = None
        if whole and local:
            turns = _turns(seed, kind, rng, pad, whole, checks.with_answer(local, answer), language)
    if not turns:
        return SeedOutcome(None, last[-1], dict(rejected))
    row: dict[str, Any] = {"id": seed.id, "question": seed.question}
    row["answer"] = list(seed.answers) if len(seed.answers) > 1 else answer
    if seed.video:
        row["video"] = True
        row |= {} if seed.seconds is None else {"seconds": seed.seconds}
    return SeedOutcome(row | {"turns": turns}, None, dict(rejected))


def views_of(seed: Seed, images: Sequence[np.ndarray], pad: float) -> list[np.ndarray]:
    """The images that a call of the trace shows: the frames, or the crop with its padding."""
    if seed.frames is not None:
        return [images[i - 1] for i in seed.frames]
    image = images[seed.image - 1]
    height, width = image.shape[:2]
    assert seed.box is not None
    x1, y1, x2, y2 = in_pixels(outward(seed.box, width, height), width, height, pad)
    return [image[y1:y2, x1:x2]]


def _turns(
    seed: Seed, kind: str, rng: np.random.Generator, pad: float, whole: str, end: str, language: Language
) -> list[dict[str, Any]]:
    """The turns of a trace with calls, as JSON lines have them. Turns that show a mistake are not learned."""
    assert seed.cue is not None
    if seed.frames is not None:
        turns = video_turns(rng, len(seed.images), seed.cue, seed.frames, seed.answers[0], kind, language)
    else:
        assert seed.box is not None
        size = image_size(seed.images[seed.image - 1])
        reference = outward(seed.box, size[1], size[0])
        options = {"pad": pad, "target": seed.image, "images": len(seed.images), "language": language}
        turns = image_turns(rng, size, seed.cue, reference, seed.answers[0], kind, **options)
    rows = []
    for turn in turns[:-1]:
        ((text, learned),) = turn.parts
        rows.append({"text": text} if learned else {"text": text, "learn": False})
    rows[0]["text"] = f"{whole}\n{rows[0]['text']}"
    rows.append({"text": end})
    calls = [parse_turn(turn["text"], language) for turn in rows]
    if any(turn.call is None for turn in calls[:-1]) or calls[-1].required:
        raise ValueError(f"the trace of seed {seed.id} does not read as calls and an answer: {rows}")
    return rows


def fingerprint(seed: Seed, kind: str, settings: Mapping[str, Any], digests: Digests) -> str:
    """A digest of everything that an outcome depends on, with the contents of images and their paths."""
    values = [repr(seed), kind, dict(settings), [digests.file(path) for path in seed.images]]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:32]
