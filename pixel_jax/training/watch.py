"""What a run shows while it goes on: looks at held-out examples, a sample of its rollouts, models that can be used at once.

Nothing here changes what is learned: looks draw from keys of their own, and the training's data and random state are not touched.
In the directory of a phase lie

    looks.jsonl           a line for every look at the held-out examples: steps done, and what was found
    traces/held_out/      what the model did with a fixed handful of them at each look (`pixel_jax.evaluation.trace`)
    traces/rollouts/      of every iteration of reinforcement learning some of its rows
    best.json             which look the model in `best` beside the phase is of
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from pixel_jax.config import positive
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.evaluation import trace as traces
from pixel_jax.evaluation.trace import Trace
from pixel_jax.files import write_file
from pixel_jax.parallel.processes import all_gather, is_main_process, say
from pixel_jax.state_files import LineLog, read_lines, read_note, to_json, write_json
from pixel_jax.training.looks import draw_rollouts
from pixel_jax.training.preemption import NOTICE
from pixel_jax.training.stages import Scored, Weighed, advantages
from pixel_jax.training.state import TrainState
from pixel_jax.training.writers import Writer

LOOKS, BEST = "looks.jsonl", "best.json"
HELD_OUT, ROLLOUTS = "held_out", "rollouts"
USUAL_LOOKS = 5  # in a run, besides the one before its first step
SHOWN = ("loss", "accuracy", "rapr", "finished", "questions")  # of a look, on the terminal
Criterion = Literal["accuracy", "loss"]
BETTER: Mapping[Criterion, float] = {"accuracy": 1.0, "loss": -1.0}  # higher, lower


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """What is looked at, how often, and how much of it is kept."""

    every: int | None = None  # steps (rl: iterations) between two looks at held-out examples. None: five looks; 0: none
    share: float = 0.05  # of the examples that is held out, if `data_eval` names none
    most: int = 64  # examples that are looked at
    batch: int = 8  # of them that are asked together
    answers: bool = True  # sft: held-out questions are asked, too; False: their loss alone is looked at
    drawn: int = 4  # conversations that are kept of a look, and of an iteration of rl
    files: int = 32  # of looks and of iterations that stay; more are thinned out evenly

    def __post_init__(self):
        positive(self, "most", "batch", "files")
        if not 0 <= self.share < 1:
            raise ValueError(f"share must lie in [0, 1): {self.share}")
        for name in ("every", "drawn"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")

    def interval(self, steps: int) -> int:
        """Steps between two looks of a run of `steps`; 0: there are none."""
        return max(1, -(-steps // USUAL_LOOKS)) if self.every is None else self.every


class Look(Protocol):
    """Held-out examples and the model of a state: numbers, and conversations about a fixed handful of them."""

    def __call__(self, state: TrainState) -> tuple[dict[str, float], list[Trace]]: ...


class Watch:
    """Called by the loop before the first step and after every one. With several processes, all call it."""

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
        """Args:
        directory: of the phase; models are kept beside it.
        look: None: nothing is held out.
        save: writes the model of a state as a directory of its own.
        save_every: steps between two models that are kept, each in `models/STEP`. 0: none are.
        best: by what a look's model is kept in `best`, if it is better than those before.
        draw: writes the page of the run.
        """
        if best is not None and (look is None or not config.interval(steps)):
            raise ValueError(
                f"keep_best={best!r} needs held-out examples: give data_eval, or a watch.share and watch.every above 0"
            )
        self.config, self.directory, self.steps, self.vocabulary = config, directory, steps, vocabulary
        self.look, self.save, self.draw = look, save, draw
        self.save_every, self.best = save_every, best
        self.interval = config.interval(steps) if look is not None else 0
        self.begun = False

    def __call__(self, state: TrainState, done: int, log: Writer | None) -> None:
        """`done` steps are behind `state`. `log` gets the numbers and conversations; None in all processes but the first."""
        if not self.begun:
            self._begin(done)
        if NOTICE.reached():  # the step is to be saved; the next start looks
            return
        if self.save_every and done and done % self.save_every == 0:
            self.save(state, self.directory.parent / "models" / str(done))
        due = self.interval and (done % self.interval == 0 or done == self.steps)
        if due and not all_gather(np.array(done in self.seen))[0]:
            self._look(state, done, log)

    def _begin(self, start: int) -> None:
        """Forgets looks at steps that are about to be done again."""
        self.begun, self.seen = True, {}
        if not is_main_process():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        self.seen = {x["done"]: x for x in read_lines(self.directory / LOOKS, done=int) if x["done"] <= start}
        write_file(self.directory / LOOKS, "".join(to_json(x) + "\n" for x in self.seen.values()))
        kept = read_note(self.directory / BEST)
        if kept is not None and not kept.get("done", 0) <= start:
            (self.directory / BEST).unlink()
        for name in (HELD_OUT, ROLLOUTS):
            for path in numbered(self.directory / "traces" / name):
                if int(path.stem) > start:
                    path.unlink()

    def _look(self, state: TrainState, done: int, log: Writer | None) -> None:
        metrics, found = self.look(state)
        shown = ", ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics)
        say(f"{f'after step {done}' if done else 'before the first step'}, on what is held out: {shown}")
        if self.best is not None:
            self._keep_best(state, done, metrics)
        if log is None:
            return
        named = {f"eval_{name}": value for name, value in metrics.items()}
        log.write(done - 1, named)  # beside the step that led here; -1 is before the first
        log.show(done - 1, HELD_OUT, found)
        self._keep(HELD_OUT, done, found)
        with LineLog(self.directory / LOOKS) as looks:
            looks.append([{"done": done, **named}])
        self.seen[done] = named
        self.draw()

    def _keep_best(self, state: TrainState, done: int, metrics: Mapping[str, float]) -> None:
        """All processes see the same `metrics`; what was best before, the first one has noted."""
        value = metrics.get(self.best, float("nan"))
        note = read_note(self.directory / BEST) if is_main_process() else None
        before = note["value"] if note is not None and note.get("by") == self.best else float("nan")
        before = float(all_gather(np.float64(before))[0])
        sign = BETTER[self.best]
        if np.isnan(value) or sign * value <= sign * before:  # the first of equals
            return
        self.save(state, self.directory.parent / "best")
        if is_main_process():
            write_json(self.directory / BEST, {"done": done, "by": self.best, "value": value})
            say(f"the model of step {done} is the best so far: {self.best} {value:.4g}")

    def advantages(self, learner, state: TrainState, scored: Scored) -> Weighed:
        """The stage of that name, of which some rows are kept: of a group, at another place of the batch every time."""
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

    def _keep(self, name: str, number: int, found: Sequence[Trace]) -> None:
        folder = self.directory / "traces" / name
        folder.mkdir(parents=True, exist_ok=True)
        traces.save(folder / f"{number:06}.json", found)
        thin(folder, self.config.files)


def numbered(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of conversations in a folder, in order."""
    return sorted((x for x in folder.glob("*.json") if x.stem.isdecimal()), key=lambda path: int(path.stem))


def thin(folder: pathlib.Path, most: int) -> None:
    """Keeps at most `most` of the numbered files: the newest, and the others as evenly spread as powers of two allow."""
    files = numbered(folder)
    stride = 1
    kept = files
    while len(kept) > most:
        stride *= 2
        kept = [path for path in files if int(path.stem) % stride == 0 or path == files[-1]]
    for path in files:
        if path not in kept:
            path.unlink()


def read_looks(directory: pathlib.Path) -> list[dict[str, Any]]:
    """The looks of a phase, in order."""
    return read_lines(directory / LOOKS, done=int)
