"""Evaluates a run on held-out examples ("looks") while it trains, and saves a sample of its rollouts, and models.

Looks do not change training: they have their own keys, and do not use its data or random state. In the directory of a phase are

    looks.jsonl           a line for every look: the number of steps done, and its metrics
    traces/held_out/      conversations about a few fixed held-out examples at each look (`pixel_jax.evaluation.transcript`)
    traces/rollouts/      some rows of every iteration of RL
    best.json             the look of the model in `best`, which is beside the phase
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from pixel_jax.config import positive
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.evaluation import transcript as traces
from pixel_jax.evaluation.transcript import Transcript
from pixel_jax.parallel.processes import all_gather, is_main_process, say
from pixel_jax.state_files import LineLog, filter_json_lines, read_json_lines, read_note, write_json
from pixel_jax.training.looks import draw_rollouts
from pixel_jax.training.preemption import NOTICE
from pixel_jax.training.stages import Scored, Weighed, advantages
from pixel_jax.training.state import TrainState
from pixel_jax.training.writers import Writer

if TYPE_CHECKING:
    from pixel_jax.training.rl import Learner

LOOKS, BEST = "looks.jsonl", "best.json"
HELD_OUT, ROLLOUTS = "held_out", "rollouts"
USUAL_LOOKS = 5  # of a run, besides the one before its first step
VIEW_FIELDS = ("loss", "accuracy", "rapr", "finished", "questions")  # of a look, on the terminal
Criterion = Literal["accuracy", "loss"]
BETTER: Mapping[Criterion, float] = {"accuracy": 1.0, "loss": -1.0}  # the sign: 1 if higher is better, -1 if lower is


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """How often held-out examples are evaluated, how many, and which results are kept."""

    every: int | None = None  # steps (rl: iterations) between two looks. None: five looks in the run; 0: none
    share: float = 0.05  # of the examples that are held out, if `data_eval` names no file
    most: int = 64  # the most held-out examples of a look
    batch: int = 8  # held-out questions that are asked together
    answers: bool = True  # sft: whether held-out questions are answered, too; False: only their loss is computed
    drawn: int = 4  # conversations that are saved of a look, and of an iteration of rl
    files: int = 32  # the most files of looks, and of iterations; more are thinned out evenly

    def __post_init__(self):
        positive(self, "most", "batch", "files")
        if not 0 <= self.share < 1:
            raise ValueError(f"share must lie in [0, 1): {self.share}")
        for name in ("every", "drawn"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")

    def interval(self, steps: int) -> int:
        """The number of steps between two looks of a run of `steps`; 0: there are no looks."""
        return max(1, -(-steps // USUAL_LOOKS)) if self.every is None else self.every


class Look(Protocol):
    """An evaluation on held-out examples."""

    def __call__(self, state: TrainState) -> tuple[dict[str, float], list[Transcript]]:
        """Returns the metrics of the state's model, and its conversations about a few examples, the same in every look."""
        ...


def read_looks(directory: pathlib.Path) -> list[dict[str, Any]]:
    """The metrics of the looks of a phase, in their order."""
    return read_json_lines(directory / LOOKS, done=int)


class Watch:
    """The observer of a phase, which the loop calls before the first step and after every one, in all processes."""

    def __init__(
        self,
        config: WatchConfig,
        directory: pathlib.Path,
        steps: int,
        vocabulary: Vocabulary,
        *,
        look: Look | None,
        save: Callable[[TrainState, pathlib.Path], None],
        save_every: int = 0,
        best: Criterion | None = None,
        draw: Callable[[], None] = lambda: None,
    ):
        """Watches a phase.

        Args:
            config: the numbers of looks, examples and files.
            directory: of the phase; models are saved beside it.
            steps: of the phase.
            vocabulary: of the model.
            look: the evaluation; None: no examples are held out.
            save: writes the model of a state as a model directory.
            save_every: steps between two models that are saved, each in `models/STEP`. 0: none are saved.
            best: the criterion by which the best look's model is saved in `best`.
            draw: writes the page of the run.
        """
        if best is not None and (look is None or not config.interval(steps)):
            raise ValueError(
                f"keep_best={best!r} needs held-out examples: give data_eval, or a watch.share and watch.every above 0"
            )
        self.config, self.directory, self.steps, self.vocabulary = config, directory, steps, vocabulary
        self.look, self.save, self.draw = look, save, draw
        self.save_every = save_every
        self.best: Criterion | None = best
        self.interval = config.interval(steps) if look is not None else 0
        self.begun = False
        self.seen: dict[int, dict[str, Any]] = {}  # the looks so far, by the number of steps done

    def __call__(self, state: TrainState, done: int, log: Writer | None) -> None:
        """Looks and saves, if due, with the state after `done` steps. `log` is None in all processes but the main one."""
        if not self.begun:
            self._begin(done)
        if NOTICE.reached():  # the checkpoint comes first; the next start makes the look
            return
        if self.save_every and done and done % self.save_every == 0:
            self.save(state, self.directory.parent / "models" / str(done))
        due = self.interval and (done % self.interval == 0 or done == self.steps)
        if self.look is not None and due and not all_gather(np.array(done in self.seen))[0]:
            self._look(self.look, state, done, log)

    def _begin(self, start: int) -> None:
        """Removes the looks at steps that will be repeated."""
        self.begun = True
        if not is_main_process():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        looks = filter_json_lines(self.directory / LOOKS, lambda line: line["done"] <= start, done=int)
        self.seen = {x["done"]: x for x in looks}
        best = read_note(self.directory / BEST)
        if best is not None and not best.get("done", 0) <= start:
            (self.directory / BEST).unlink()
        for name in (HELD_OUT, ROLLOUTS):
            for path in numbered(self.directory / "traces" / name):
                if int(path.stem) > start:
                    path.unlink()

    def _look(self, look: Look, state: TrainState, done: int, log: Writer | None) -> None:
        metrics, conversations = look(state)
        shown = ", ".join(f"{name} {metrics[name]:.4g}" for name in VIEW_FIELDS if name in metrics)
        say(f"{f'after step {done}' if done else 'before the first step'}, on what is held out: {shown}")
        if self.best is not None:
            self._keep_best(self.best, state, done, metrics)
        if log is None:
            return
        named = {f"eval_{name}": value for name, value in metrics.items()}
        log.write(done - 1, named)  # the number of the last step that is done; -1 before the first
        log.show(done - 1, HELD_OUT, conversations)
        self._keep(HELD_OUT, done, conversations)
        with LineLog(self.directory / LOOKS) as looks:
            looks.append([{"done": done, **named}])
        self.seen[done] = named
        self.draw()

    def _keep_best(self, by: Criterion, state: TrainState, done: int, metrics: Mapping[str, float]) -> None:
        """Saves the model if it is the best so far.

        All processes have the same `metrics`; the main process has the note of the best model so far.
        """
        value = metrics.get(by, float("nan"))
        note = read_note(self.directory / BEST) if is_main_process() else None
        before = note["value"] if note is not None and note.get("by") == by else float("nan")
        before = float(all_gather(np.asarray(before, np.float64))[0])
        sign = BETTER[by]
        if np.isnan(value) or sign * value <= sign * before:  # the first of equals
            return
        self.save(state, self.directory.parent / "best")
        if is_main_process():
            write_json(self.directory / BEST, {"done": done, "by": by, "value": value})
            say(f"the model of step {done} is the best so far: {by} {value:.4g}")

    def advantages(self, learner: "Learner", state: TrainState, scored: Scored) -> Weighed:
        """The stage `advantages`, which also saves some rows of a group, a different group in each iteration."""
        weighed = advantages(learner, state, scored)
        questions, limits = scored.collected.questions, learner.config.rollout
        count = min(self.config.drawn, limits.group_size)
        if is_main_process() and count:
            start = questions.iteration % len(questions.examples) * limits.group_size
            rows = range(start, start + count)
            self._keep(
                ROLLOUTS, questions.iteration + 1, draw_rollouts(weighed, rows, self.vocabulary, limits, learner.shard)
            )
        return weighed

    def _keep(self, name: str, number: int, conversations: Sequence[Transcript]) -> None:
        folder = self.directory / "traces" / name
        folder.mkdir(parents=True, exist_ok=True)
        traces.save(folder / f"{number:06}.json", conversations)
        thin(folder, self.config.files)


def numbered(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of conversations in a folder, in order."""
    return sorted((x for x in folder.glob("*.json") if x.stem.isdecimal()), key=lambda path: int(path.stem))


def thin(folder: pathlib.Path, most: int) -> None:
    """Deletes numbered files until `most` are left: the newest, and others at multiples of a power of two."""
    files = numbered(folder)
    stride = 1
    remaining = files if most > 1 else files[-1:]
    while len(remaining) > most:
        stride *= 2
        remaining = [path for path in files if int(path.stem) % stride == 0 or path == files[-1]]
    for path in files:
        if path not in remaining:
            path.unlink()
