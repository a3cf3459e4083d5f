"""The parts that the phases share: tokenizer, training rows, scenes, and the evaluation of a policy."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import jax
import numpy as np

from pixel_jax.data import synthesis
from pixel_jax.data.traces import WAVE, Trace, to_trajectories
from pixel_jax.evaluation.stats import proportion
from pixel_jax.evaluation.transcript import Transcript, make_transcript
from pixel_jax.parallel.processes import waiting
from pixel_jax.quickstart import miniature
from pixel_jax.quickstart.config import QuickstartConfig
from pixel_jax.quickstart.lesson import Lesson, scene_query
from pixel_jax.quickstart.turn import TURN
from pixel_jax.quickstart.vocabulary import build_vocabulary
from pixel_jax.quickstart.zoom import ZOOM
from pixel_jax.rollouts.images import ragged
from pixel_jax.rollouts.limits import single_answer
from pixel_jax.rollouts.materialize import VisualRecord, materialize_on_host
from pixel_jax.rollouts.prompts import build_prompts, tables
from pixel_jax.rollouts.rollout import rollout
from pixel_jax.rollouts.shapes import BatchShape, prompt_shape
from pixel_jax.rollouts.trajectory import (
    HostPrompts,
    Trajectories,
    concatenate,
    executed_calls,
    take_rows,
    to_host,
)
from pixel_jax.search_set.lesson import SEARCH
from pixel_jax.training.answers import last_boxed
from pixel_jax.training.batch import Batch, from_trajectories, pack

BUFFER = (1, miniature.SIDE, miniature.SIDE)
EVALUATION_SEED = 1_000_003  # scenes of the evaluation are the same for all seeds and arms


def lesson_of(config: QuickstartConfig) -> Lesson:
    """The lesson that `config.lesson` names."""
    return {"zoom": ZOOM, "turn": TURN, "search": SEARCH}[config.lesson]


class Task:
    """The experiment of one configuration."""

    def __init__(self, config: QuickstartConfig):
        self.config, self.lesson = config, lesson_of(config)
        self.vocabulary = build_vocabulary(self.lesson)
        self.tables = tables(self.vocabulary, self.lesson.tools)

    # ---- rows to train on

    def ground_rows(self) -> Batch:
        """The rows of phase 1: the box of the digit, and the digit."""
        config = self.config
        look = round(config.ground_rows * config.look_share)
        # Every digit is equally frequent; the skewed frequencies are learned in the warm start.
        scenes = dataclasses.replace(config.scenes, frequencies=None)

        def make(i: int) -> Trace:
            row = self.lesson.look_row if i < look else self.lesson.read_row
            return row(np.random.default_rng([config.seed, 1, i]), scenes)

        return self.compile(make, config.ground_rows, images=2)

    def warm_rows(self) -> Batch:
        """The rows of phase 2: traces of all kinds."""
        config = self.config

        def make(i: int) -> Trace:
            return self.lesson.warm_start(np.random.default_rng([config.seed, 2, i]), config)

        return self.compile(make, config.warm_rows, images=self.lesson.most_images)

    def compile(self, make: Callable[[int], Trace], count: int, *, images: int) -> Batch:
        """Packs traces into rows as long as the longest trace.

        The scenes of at most two waves are in memory at a time.

        Args:
            make: index -> trace.
            count: the number of traces.
            images: the most images that a trace shows.
        """
        # A trace may have more calls than a rollout, whose limit keeps updates cheap.
        limits = dataclasses.replace(self.config.rl.rollout, max_calls=self.lesson.most_calls)
        budget = max(limits.max_pixels, limits.crop_max_pixels, limits.select_max_pixels)
        wide = BatchShape(limits.max_tokens, images, images, limits.merge_unit * (budget // limits.factor**2))
        waves: list[Future] = []
        # One wave is rendered, without the interpreter's lock, while the next is drawn.
        with ThreadPoolExecutor(1) as pool, waiting("drawing the training data") as drawing:
            for indices in batched(range(count), WAVE):
                traces = [make(i) for i in indices]
                wait(waves[-1:])
                drawing.at(f"{indices[0]} of {count} traces")
                waves.append(pool.submit(to_trajectories, traces, self.vocabulary, self.tables, limits, wide))
        return pack(from_trajectories(concatenate([wave.result() for wave in waves])))

    # ---- scenes to ask about

    def prompts(self, scenes: Sequence[miniature.Scene], uids: Sequence[int]) -> HostPrompts:
        """The prompts about scenes."""
        queries = [scene_query(scene) for scene in scenes]
        return build_prompts(
            queries,
            self.vocabulary,
            self.tables,
            self.config.rl.rollout,
            shape=prompt_shape(*BUFFER, self.config.width, self.config.rl.rollout, video=False),
            uids=uids,
        )

    @functools.cached_property
    def held_out(self) -> list[miniature.Scene]:
        """The scenes of the evaluation: photographs and digits no phase has seen."""
        rng = np.random.default_rng(EVALUATION_SEED)
        return [self.lesson.scene(rng, "test", self.config.scenes) for _ in range(self.config.evaluation.scenes)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        return self.vocabulary.to_bytes(ids).decode("utf-8", "replace")


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Yields lists of `size` items, of which the last may be shorter, like `itertools.batched` of Python 3.12."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


class TrainingScenes:
    """An iterator of prompts and answers for reinforcement learning: the scenes of batch b are drawn from (seed, b)."""

    def __init__(self, task: Task):
        self.task, self.batch = task, 0

    def __iter__(self):
        return self

    def __next__(self) -> tuple[HostPrompts, list[str]]:
        config = self.task.config
        rng = np.random.default_rng([config.seed, 3, self.batch])
        scenes = [self.task.lesson.scene(rng, "train", config.scenes) for _ in range(config.rl.prompts)]
        self.batch += 1
        return self.task.prompts(scenes, range(len(scenes))), [str(scene.label) for scene in scenes]

    def get_state(self) -> dict[str, int]:
        """The position, for a checkpoint."""
        return {"batch": self.batch}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a position."""
        self.batch = state["batch"]


# ---- evaluation


@dataclasses.dataclass
class ScoredScenes:
    """The rollouts of a policy on held-out scenes, a row for each."""

    trajectories: Trajectories[VisualRecord]
    texts: list[str]
    right: np.ndarray  # bool [scenes]
    looked: np.ndarray  # bool [scenes], at least one operation returned pixels


def ask(
    task: Task, model, scenes: Sequence[miniature.Scene], *, greedy: bool = False, opening: str = ""
) -> ScoredScenes:
    """Asks the model about every scene once; its first turn begins with `opening`."""
    size = task.config.evaluation.batch
    limits = single_answer(task.config.rl.rollout, 0.0 if greedy else 1.0)
    ids = task.vocabulary.encode(opening) if opening else []
    batches = []
    for start in range(0, len(scenes), size):
        batch = list(scenes[start : start + size])
        padded = batch + batch[:1] * (size - len(batch))
        prompts = task.prompts(padded, range(start, start + size))
        trajectories = to_host(rollout(model, prompts, jax.random.key(EVALUATION_SEED), limits, assistant_prefix=ids))
        batches.append(take_rows(trajectories, slice(len(batch))))
    t = concatenate(batches)
    response = t.valid & (np.arange(t.tokens.shape[1]) >= task.config.width)
    texts = [task.decode(row[mask]) for row, mask in zip(t.tokens, response, strict=True)]
    right = np.array([last_boxed(text) == str(scene.label) for text, scene in zip(texts, scenes, strict=True)])
    return ScoredScenes(t, texts, right, np.asarray(executed_calls(t)) > 0)


def chosen(task: Task, free: ScoredScenes) -> dict[str, np.ndarray]:
    """What answers to all held-out scenes are judged by, where the policy chose whether to make a call: bool [scenes]."""
    lesson = task.lesson
    hard = np.array([lesson.is_hard(scene) for scene in task.held_out])
    return {
        "accuracy": free.right,
        f"accuracy_{lesson.hard}": free.right[hard],
        f"accuracy_{lesson.easy}": free.right[~hard],
        "rapr": free.looked,
        f"rapr_{lesson.hard}": free.looked[hard],
        f"rapr_{lesson.easy}": free.looked[~hard],
    }


def look(task: Task, model, label: str) -> tuple[dict[str, float], list[Transcript]]:
    """Measures, while a model is trained, what `evaluate` measures freely at temperature 1, with the same keys."""
    free = ask(task, model, task.held_out)
    return {name: float(np.mean(x)) for name, x in chosen(task, free).items()}, pick_traces(task, free, label)


def evaluate(task: Task, model, progress: Callable[[str], None] = lambda text: None) -> tuple[dict, ScoredScenes]:
    """Measures rates and accuracies on the held-out scenes, with intervals.

    In the free mode the policy chooses whether to make a call, at temperature 1 and greedily. In the forced mode (hard scenes
    only) its turn begins with an answer, or, where calls are executed, with a call.

    Returns:
        The numbers, and the answers sampled freely at temperature 1.
    """
    scenes, lesson = task.held_out, task.lesson
    few = [scene for scene in scenes if lesson.is_hard(scene)]
    progress("sampled")
    free = ask(task, model, scenes)
    progress("greedy")
    greedy = ask(task, model, scenes, greedy=True)
    shares = {**chosen(task, free), "greedy_accuracy": greedy.right, "greedy_rapr": greedy.looked}
    measured = {"operations": float(executed_calls(free.trajectories).mean())}
    if task.config.rl.rollout.max_calls:
        progress("made to look")
        looked = ask(task, model, few, opening=lesson.opening)
        shares[f"{lesson.look}_{lesson.hard}"] = looked.right
        measured |= lesson.measure(looked.trajectories, few)
    progress("made to answer")
    shares[f"direct_{lesson.hard}"] = ask(task, model, few, opening=synthesis.SENTENCES.answer).right
    intervals = {name: proportion(hits) for name, hits in shares.items()}
    numbers = {name: interval["mean"] for name, interval in intervals.items()}
    return {**numbers, **measured, "intervals": intervals}, free


def pick_traces(task: Task, answers: ScoredScenes, label: str) -> list:
    """Returns transcripts of as many answers as configured, of each kind (with calls or not, right or wrong) in turn."""
    kinds = answers.looked * 2 + answers.right
    queues = [list(np.flatnonzero(kinds == kind)) for kind in (3, 2, 1, 0)]
    picked = []
    while len(picked) < task.config.evaluation.traces and any(queues):
        picked += [int(queue.pop(0)) for queue in queues if queue]
    conversations, lesson = [], task.lesson

    def name(scene: miniature.Scene) -> str:
        return (lesson.hard if lesson.is_hard(scene) else lesson.easy).replace("_", " ")

    for row in picked[: task.config.evaluation.traces]:
        scene = task.held_out[row]
        query = scene_query(scene)
        one_row = take_rows(answers.trajectories, [row])
        conversations.append(
            make_transcript(
                materialize_on_host(one_row, ragged([query.images]), task.tables.tools, task.config.rl.rollout),
                0,
                query,
                task.vocabulary,
                tools=task.tables.tools,
                answer=last_boxed(answers.texts[row]),
                reference=str(scene.label),
                correct=bool(answers.right[row]),
                title=f"{label}: scene {row + 1}, {name(scene)}",
                category=name(scene),
            )
        )
    return conversations
