"""Runs the phases of one seed. A phase can be resumed; when it is done it writes a JSON file, and is not run again."""

import contextlib
import dataclasses
import json
import math
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from pixel_jax import terminal
from pixel_jax.data.batches import MemoryBatches
from pixel_jax.evaluation import transcript
from pixel_jax.files import read_json
from pixel_jax.identity import RunError, changes, describe, flatten
from pixel_jax.models.io import from_pretrained, save_pretrained
from pixel_jax.models.processor import Processor
from pixel_jax.parallel import make_mesh
from pixel_jax.quickstart.config import QuickstartConfig
from pixel_jax.quickstart.course import Course, parts_of, steps_of
from pixel_jax.quickstart.network import model_config, new_model
from pixel_jax.quickstart.task import Task, TrainingScenes, evaluate, lesson_of, look, pick_traces
from pixel_jax.rollouts.limits import write_limits
from pixel_jax.run_lock import hold
from pixel_jax.signals import SIGNALS
from pixel_jax.state_files import read_note, write_json
from pixel_jax.training.progress import announce_compiles, use_compilation_cache
from pixel_jax.training.rewards import Rewards
from pixel_jax.training.rl import rl
from pixel_jax.training.sft import sft
from pixel_jax.training.stages import Stages
from pixel_jax.training.watch import Watch, WatchConfig, read_looks

POLL = 1.0  # seconds between two readings of how far the phases are
MOST_SAID = 4000  # characters of the output of a phase that failed
JUDGED = ("accuracy", "rapr")  # that a run of reinforcement learning is judged by


def say(text: str) -> None:
    """Prints a line on standard error."""
    terminal.say(text, sys.stderr)


def once(path: pathlib.Path, work: Callable[[], dict]) -> dict:
    """Reads the JSON object in the file `path`; if it is missing or damaged, makes it by `work` and adds the seconds."""
    values = read_note(path, _is_timed)
    if values is None:
        began = time.monotonic()
        result = work()
        write_json(path, {**result, "seconds": time.monotonic() - began})
        values = read_json(path)
    return values


def _is_timed(values: Any) -> bool:
    return isinstance(values, dict) and isinstance(values.get("seconds"), float)


def start_process(cache: pathlib.Path) -> None:
    """Prepares a process of the quickstart."""
    use_compilation_cache(cache)
    announce_compiles()


def all_devices(rows: int) -> Mesh | None:
    """Makes a mesh of the most devices that divide the number of rows; None for one device."""
    count = math.gcd(len(jax.devices()), rows)
    return make_mesh({"data": count}, jax.devices()[:count]) if count > 1 else None


def run_seeds(config: QuickstartConfig, out: pathlib.Path, count: int) -> Iterator[tuple[int, dict]]:
    """Runs all phases of `count` seeds from `config.seed` on, and yields each seed with its result; one bar shows all."""
    seeds = range(config.seed, config.seed + count)
    directories = {seed: out / f"seed-{seed}" for seed in seeds}
    course = Course({seed: parts_of(config, lesson_of(config), x) for seed, x in directories.items()})
    for seed, directory in directories.items():
        yield seed, run_seed(dataclasses.replace(config, seed=seed), directory, course)


def run_seed(config: QuickstartConfig, directory: pathlib.Path, course: Course) -> dict:
    """Runs all phases of `config.seed` in `directory`; returns what they measured, and their seconds."""
    directory.mkdir(parents=True, exist_ok=True)
    with hold(directory), contextlib.ExitStack() as stack:
        check_same(config, directory / "config.json")
        elapsed = stack.enter_context(Elapsed(directory / "clock.json"))
        names = lesson_of(config).arms
        with Phases(config, directory, course) as phases:
            run_phases(phases, *names)
        arms = {arm: read_json(directory / arm / "result.json") for arm in names}
        seconds = {name: read_json(directory / f"{name}.json")["seconds"] for name in ("ground", "warm")}
        warm_start = read_json(directory / "warm_evaluation.json")
        seconds["warm_evaluation"] = warm_start.pop("seconds")
        for arm in names:
            seconds[f"rl_{arm}"] = arms[arm].pop("seconds_training")
            seconds[f"evaluation_{arm}"] = arms[arm].pop("seconds_evaluation")
        seconds["total"] = elapsed.total
    return {"sft": warm_start, "rl": arms, "seconds": seconds}


def run_tuning(config: QuickstartConfig, directory: pathlib.Path) -> None:
    """Runs phases 1 and 2; writes `ground.json`, `warm.json` and the models."""
    task = Task(config)

    def ground() -> dict:
        rows = MemoryBatches(task.ground_rows(), config.ground.batch_size, config.seed)
        model = new_model(model_config(config.network, task.vocabulary), jax.random.key(config.seed))
        mesh = all_devices(config.ground.batch_size)
        model = sft(model, rows, config.ground, directory=directory / "ground", mesh=mesh, label="ground and read")
        rows.close()
        save(task, model, directory / "ground" / "model")
        return {}

    def warm() -> dict:
        rows = MemoryBatches(task.warm_rows(), config.warm.batch_size, config.seed)
        model, _ = from_pretrained(directory / "ground" / "model")
        mesh = all_devices(config.warm.batch_size)
        model = sft(model, rows, config.warm, directory=directory / "warm", mesh=mesh, label="warm start")
        rows.close()
        save(task, model, directory / "warm" / "model")
        return {}

    for name, work in (("ground", ground), ("warm", warm)):
        once(directory / f"{name}.json", work)


def run_judging(config: QuickstartConfig, directory: pathlib.Path) -> None:
    """Evaluates the warm start; writes `warm_evaluation.json` and transcripts."""
    task = Task(config)

    def judge() -> dict:
        model, _ = from_pretrained(directory / "warm" / "model")
        numbers, answers = evaluate(task, model, lambda what: say(f"    judging the warm start: {what}"))
        transcript.save(directory / "warm" / "traces.json", pick_traces(task, answers, "warm start"))
        return numbers

    once(directory / "warm_evaluation.json", judge)


class Elapsed(contextlib.ExitStack):
    """The seconds spent on a directory by this process and earlier ones, recorded however this process ends."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.began = time.monotonic()
        self.before = (read_note(path, _is_timed) or {"seconds": 0.0})["seconds"]
        self.enter_context(SIGNALS.at_end(lambda: write_json(path, {"seconds": self.total})))

    @property
    def total(self) -> float:
        """The seconds so far."""
        return self.before + time.monotonic() - self.began


def check_same(config: QuickstartConfig, path: pathlib.Path) -> None:
    """Checks that a directory belongs to this configuration: another one would mix two runs.

    Raises:
        RunError: the directory belongs to another configuration.
    """
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    begun = read_note(path)
    if begun is not None and (changed := changes(flatten(begun), flatten(values))):
        raise RunError(f"{path.parent} was begun with {describe(changed)}: choose another --out or delete it")
    write_json(path, values)


def save(task: Task, model, directory: pathlib.Path) -> None:
    """Writes a model as a Hugging Face directory that `pixel-jax chat` opens, with the limits of its training."""
    limits = task.config.rl.rollout
    processor = Processor(task.vocabulary.tokenizer, min_pixels=limits.min_pixels, max_pixels=limits.max_pixels)
    save_pretrained(model, processor, directory)
    write_limits(directory, limits)


# ---- processes


def run_phases(phases: "Phases", first: str, second: str) -> None:
    """Tunes on all cores; then trains and evaluates both arms side by side, each with its own cores.

    The arms run the same programs. The second begins once the first has compiled them; before that its cores evaluate the warm
    start.
    """
    phases.start("tuning")
    phases.wait(lambda: not phases.running)
    phases.start(first, core=0)
    phases.start("judging", core=1)
    phases.wait(lambda: "judging" not in phases.running and phases.has_compiled(first))
    phases.start(second, core=1)
    phases.wait(lambda: not phases.running)


class Phases(contextlib.ExitStack):
    """Phases of a seed, each in its own process. None outlives the block; one that fails ends it: the error has its output."""

    def __init__(self, config: QuickstartConfig, directory: pathlib.Path, course: Course):
        super().__init__()
        self.seed, self.directory, self.course = config.seed, directory, course
        self.arms = lesson_of(config).arms
        self.running: dict[str, subprocess.Popen] = {}

    def result(self, phase: str) -> pathlib.Path:
        """The file with the result of a phase."""
        own = {"tuning": "warm.json", "judging": "warm_evaluation.json"}
        return self.directory / own.get(phase, f"{phase}/result.json")

    def log(self, phase: str) -> pathlib.Path:
        """The file with the output of a phase."""
        return self.directory / phase / "log.txt"

    def has_compiled(self, arm: str) -> bool:
        """Whether an arm has compiled its programs."""
        return arm not in self.running or bool(steps_of(self.directory / arm / "rl" / "metrics.jsonl"))

    def start(self, phase: str, core: int | None = None) -> None:
        """Starts `python -m pixel_jax.quickstart.phase`, which ends when this process does, unless its result is there."""
        if read_note(self.result(phase)) is not None:
            return
        self.log(phase).parent.mkdir(exist_ok=True)
        log = self.enter_context(self.log(phase).open("w"))
        command = [sys.executable, "-m", "pixel_jax.quickstart.phase", str(self.directory), phase]
        command += [] if core is None else [str(core)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
        self.running[phase] = self.enter_context(process)
        self.callback(process.terminate)

    def wait(self, until: Callable[[], bool]) -> None:
        """Shows how far the seeds are until `until()`.

        Raises:
            RuntimeError: a phase failed.
        """
        while not until():
            time.sleep(POLL)
            self.show()
            for phase, process in list(self.running.items()):
                if process.poll() is None:
                    continue
                del self.running[phase]
                if process.returncode:
                    said = self.log(phase).read_text(errors="replace")[-MOST_SAID:]
                    raise RuntimeError(f"the phase {phase} ended with code {process.returncode}:\n{said}")
        self.show()

    def show(self) -> None:
        """Shows how far the seeds are: what they wait for or work on, and the newest numbers of the arms on held-out scenes."""
        looks = {arm: read_looks(self.directory / arm / "rl") for arm in self.arms}
        metrics = {f"{arm} {name}": x[-1][f"eval_{name}"] for arm, x in looks.items() if x for name in JUDGED}
        said = [self.log(phase).read_text(errors="replace").splitlines()[-1:] for phase in self.running]
        waits = [line for lines in said for line in lines if line.endswith(" ...")]
        left = [part.name for part in self.course.seeds[self.seed] if not part.result.exists()]
        self.course.show(self.seed, ([*waits, *left] or [""])[0], metrics)


def run_arm(config: QuickstartConfig, directory: pathlib.Path, arm: str) -> None:
    """Trains and evaluates one arm; writes `result.json`."""
    config = lesson_of(config).arm_config(config, arm)
    task, folder = Task(config), directory / arm

    def train() -> dict:
        model, _ = from_pretrained(directory / "warm" / "model")
        stages = Stages(Rewards.of(config.rl.reward, task.decode))
        watch = Watch(
            WatchConfig(),
            folder / "rl",
            config.rl.iterations,
            task.vocabulary,
            look=lambda state: look(task, state.model, arm.replace("_", " ")),
            save=lambda state, place: save(task, state.model, place),
        )
        model = rl(model, TrainingScenes(task), stages, config.rl, directory=folder / "rl", label=arm, watch=watch)
        save(task, model, folder / "model")
        return {}

    def judge() -> dict:
        model, _ = from_pretrained(folder / "model")
        numbers, answers = evaluate(task, model)
        transcript.save(folder / "traces.json", pick_traces(task, answers, arm.replace("_", " ")))
        return numbers

    seconds = once(folder / "trained.json", train)["seconds"]
    judged = once(folder / "evaluation.json", judge)
    names = ("step", "accuracy", "rapr", "reward", "operations", "call_errors", "entropy", "nonzero_variance")
    curve = [{name: line.get(name) for name in names} for line in steps_of(folder / "rl" / "metrics.jsonl")]
    looks = [{"step": x["done"], **{name: x[f"eval_{name}"] for name in JUDGED}} for x in read_looks(folder / "rl")]
    times = {"seconds_training": seconds, "seconds_evaluation": judged.pop("seconds")}
    write_json(folder / "result.json", {**judged, "curve": curve, "looks": looks, **times})
