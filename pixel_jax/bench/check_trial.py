"""Checks that run the model: does it see, one rollout, one update."""

import collections
import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pixel_jax.bench.checklist import Checklist, Kind, UsableExamples, count_text, phases_of, plural
from pixel_jax.bench.image_effect import TOKENS, measure_image_effect
from pixel_jax.data.prompt_shapes import resized
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.models.model import Model
from pixel_jax.models.processor import Processor
from pixel_jax.parallel.sharding import row_shards, shard_batch
from pixel_jax.phases import limits_of, read_model
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.materialize import materialize
from pixel_jax.rollouts.prompts import Query, build_prompts
from pixel_jax.rollouts.rollout import rollout, static_shape
from pixel_jax.rollouts.trajectory import STOP_REASONS, Tables, to_host
from pixel_jax.terminal import Waiting, brief
from pixel_jax.train_config import TrainConfig
from pixel_jax.training.batch import Batch, from_trajectories
from pixel_jax.training.optimizer import make_optimizer
from pixel_jax.training.progress import announce_compiles, use_compilation_cache
from pixel_jax.training.state import init_state
from pixel_jax.training.steps import check_report, make_rl_step, make_sft_step

SIDE = 448  # pixels, the longest side of a picture in the trial rollout
TRIED = 3  # pictures of the data with which the effect of a picture is measured, at most


def trial_lines(
    checks: Checklist,
    config: TrainConfig,
    vocabulary: Vocabulary | None,
    known: Tables | None,
    rows: UsableExamples | None,
    fits: dict[Kind, bool],
) -> None:
    """Reads the weights, checks that the model sees, and tries one rollout and one update."""
    announce_compiles()
    use_compilation_cache(pathlib.Path.home() / ".cache" / "pixel_jax")
    model: Any = None
    with checks.item("weights", "download or save the model again"):
        began = time.monotonic()
        model, processor, mesh = read_model(config)
        checks.add("weights", f"all there, all finite; read in {time.monotonic() - began:.0f} s")
    if model is None or not look(checks, model, processor, rows) or vocabulary is None or known is None:
        return
    kind = rows.kind if rows is not None else phases_of(config)[-1]
    batch = None
    with checks.item("rollout", "chat, serve, rl and eval need rollouts: see docs/families.md for what a family can"):
        batch = write(checks, model, config, kind, vocabulary, known, rows, mesh)
    if batch is None:
        return
    if not fits.get(kind):
        checks.add("update", f"not tried: {kind} does not fit the memory", status="note")
        return
    with checks.item("update", "lower the learning rate, or look for damaged weights or data"):
        change(checks, model, config, kind, batch, mesh)


def look(checks: Checklist, model: Model, processor: Processor, rows: UsableExamples | None) -> bool:
    """Checks whether the model sees; a model without a vision tower passes."""
    if model.config.vision is None:
        checks.add("sees", "text only: nothing to see")
        return True
    effect = None
    for image, question, answer in [*pictures(rows), PICTURE]:
        with contextlib.suppress(ValueError):  # the picture has one colour, or the question a placeholder: try the next
            with Waiting("checking whether the model sees"):
                effect = measure_image_effect(model, processor, image, question, answer)
            if effect.sees:
                break
    if effect is None:
        checks.add(
            "sees", "it cannot be asked about a picture", "see that the tokenizer has the family's tokens of pictures"
        )
        return False
    checks.details["image_effect"] = effect._asdict()
    moves = f"{effect.moved:.2g} nats, rounding alone {effect.rounding:.1g}"
    if effect.sees:
        checks.add("sees", f"yes: without the picture, log-probabilities of an answer move by up to {moves}")
        return True
    checks.add("sees", f"no: without the picture, log-probabilities of an answer move by {moves}", effect.cause)
    return False


def pictures(rows: UsableExamples | None) -> Iterator[tuple[np.ndarray, str, str]]:
    """Iterates over a few pictures of the data, each with its question and a right answer."""
    shown = [x for x in (rows.examples if rows is not None else ()) if x.images and not x.video]
    for example in shown[:TRIED]:
        answer = example.answer[0] if example.answer else "".join(text for text, _ in example.turns[-1].parts)
        if answer:
            yield example.query().images[0], example.question, answer[:200]


def squares() -> np.ndarray:
    """Draws a picture of coloured squares."""
    colours = np.array([[220, 30, 30], [30, 180, 60], [40, 60, 220], [240, 220, 40]], np.uint8)
    rows, columns = np.indices((224, 224)) // 56
    return colours[(rows + columns) % 4]


PICTURE = (squares(), "What does the picture show?", "Red, green, blue and yellow squares.")


def write(
    checks: Checklist,
    model: Model,
    config: TrainConfig,
    kind: Kind,
    vocabulary: Vocabulary,
    known: Tables,
    rows: UsableExamples | None,
    mesh: Mesh | None,
) -> Batch:
    """Tries one rollout at small shapes, and returns its rows as a batch."""
    limits, prompts = small(limits_of(kind, config)), 1 if mesh is None else row_shards(mesh)
    query = question(rows, sees=model.config.vision is not None)
    small_prompts = build_prompts([query] * prompts, vocabulary, known, limits)
    began = time.monotonic()
    t = to_host(rollout(model, small_prompts, jax.random.key(0), limits))
    seconds = time.monotonic() - began
    count = len(t.stop)
    images = np.repeat(small_prompts.images, count // len(small_prompts.length))
    t = t._replace(visual=materialize(t.visual, images, static_shape(small_prompts, limits, mesh), limits, mesh))
    ends = collections.Counter(STOP_REASONS[int(x)] for x in t.stop)
    ended = ", ".join(f"{n} {name}" for name, n in ends.items())
    text = vocabulary.to_bytes(np.asarray(t.tokens[0])[np.asarray(t.loss_mask[0])].tolist()).decode("utf-8", "replace")
    checks.add(
        "rollout",
        f"{plural(count, 'row')} wrote {int(np.sum(t.loss_mask))} tokens in {seconds:.0f} s with compiling "
        f"(ended by: {ended}); the first: {brief(text, 60)}",
    )
    return from_trajectories(t, advantage=np.ones(count, np.float32))


def small(limits: RolloutConfig) -> RolloutConfig:
    """Lowers the limits to few tokens and small pictures."""
    most = TOKENS * limits.factor**2
    pixels = {}
    for name in ("", "crop_", "select_", "video_"):
        high = min(most, getattr(limits, f"{name}max_pixels"))
        pixels |= {f"{name}max_pixels": high, f"{name}min_pixels": min(high, getattr(limits, f"{name}min_pixels"))}
    sampling = {"group_size": 2, "temperature": 1.0, "later_temperature": None, "in_flight": None}
    written = {"max_new_tokens": min(16, limits.max_new_tokens), "max_response": min(512, limits.max_response)}
    return dataclasses.replace(limits, max_calls=min(1, limits.max_calls), **sampling, **written, **pixels)


def question(rows: UsableExamples | None, sees: bool) -> Query:
    """Returns the first question of the data about pictures, made smaller, or one of our own."""
    if not sees:
        return Query(rows.examples[0].question if rows is not None else "What is one and one?", [])
    shown = next((x for x in (rows.examples if rows is not None else ()) if x.images and not x.video), None)
    if shown is None:
        return Query(PICTURE[1], [PICTURE[0]])
    query = shown.query()
    scale = min(1.0, *(SIDE / max(x.shape[:2]) for x in query.images))
    side = lambda length: max(1, int(scale * length))
    return query._replace(images=[resized(x, (side(x.shape[0]), side(x.shape[1]))) for x in query.images])


def change(checks: Checklist, model: Model, config: TrainConfig, kind: Kind, batch: Batch, mesh: Mesh | None) -> None:
    """Tries one update of the weights that the config trains, on these rows."""
    phase = config.tuning if kind == "sft" else config.learning
    optimizer = make_optimizer(phase.optimizer, 1)
    forward = dataclasses.replace(phase.forward, micro_batches=None)
    make = (
        functools.partial(make_sft_step, forward)
        if kind == "sft"
        else functools.partial(make_rl_step, forward, config.learning.loss)
    )
    step = make(optimizer, mesh=mesh)
    began = time.monotonic()
    state = init_state(model, optimizer, trainable=phase.trainable, mesh=mesh)
    trained = sum(x.size for x in jax.tree.leaves(state.trainable))
    _, report = step(state, batch if mesh is None else shard_batch(batch, mesh))
    metrics = check_report(report, 0)
    if not metrics["grad_norm"] > 0:
        raise ValueError(f"the gradient of the {count_text(trained)} weights that {phase.trainable!r} trains is zero")
    checks.add(
        "update",
        f"{kind} on {count_text(trained)} weights: loss {metrics['loss']:.3g}, gradient {metrics['grad_norm']:.3g}, "
        f"{time.monotonic() - began:.0f} s with compiling",
    )
