"""Runs the phases of one seed. A phase can be resumed; when it is done it writes a JSON file, and is not run again."""

import contextlib
import dataclasses
import json
import math
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
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
from pixel_jax.quickstart.network import model_config, new_model
from pixel_jax.quickstart.task import Task, TrainingScenes, evaluate, lesson_of, pick_traces
from pixel_jax.rollouts.limits import write_limits
from pixel_jax.run_lock import hold
from pixel_jax.signals import SIGNALS
from pixel_jax.state_files import read_note, write_json
from pixel_jax.training.progress import ProgressLine, announce_compiles, use_compilation_cache
from pixel_jax.training.rewards import Rewards
from pixel_jax.training.rl import rl
from pixel_jax.training.sft import sft
from pixel_jax.training.stages import Stages
from pixel_jax.training.writers import read_metrics

POLL = 1.0  # seconds between two readings of the arms' progress


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


def run_seed(config: QuickstartConfig, directory: pathlib.Path) -> dict:
    """Runs all phases of `config.seed` in `directory`; returns what they measured, and their seconds."""
    directory.mkdir(parents=True, exist_ok=True)
    with hold(directory), contextlib.ExitStack() as stack:
        check_same(config, directory / "config.json")
        elapsed = stack.enter_context(Elapsed(directory / "clock.json"))
        run_alone(directory, "tuning")
        names = lesson_of(config).arms
        labels = " and ".join(arm.label for arm in names.values())
        say(f"[seed {config.seed}] 3/4 reinforcement learning {labels}, and a look at the warm start")
        run_side_by_side(config, directory)
        arms = {arm: read_json(directory / arm / "result.json") for arm in names}
        seconds = {name: read_json(directory / f"{name}.json")["seconds"] for name in ("ground", "warm")}
        warm_start = read_json(directory / "warm_evaluation.json")
        seconds["warm_evaluation"] = warm_start.pop("seconds")
        for arm in names:
            seconds[f"rl_{arm}"] = arms[arm].pop("seconds_training")
            seconds[f"evaluation_{arm}"] = arms[arm].pop("seconds_evaluation")
        seconds["total"] = elapsed.total
    return {"sft": warm_start, "rl": arms, "seconds": seconds}


def start_phase(directory: pathlib.Path, *arguments: str, **options) -> subprocess.Popen:
    """Starts `python -m pixel_jax.quickstart.phase`, which ends when this process does."""
    command = [sys.executable, "-m", "pixel_jax.quickstart.phase", str(directory), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, **options)


def run_alone(directory: pathlib.Path, phase: str) -> None:
    """Runs a phase on all cores; its output goes to the terminal."""
    with start_phase(directory, phase) as process:
        try:
            code = process.wait()
        finally:
            process.terminate()
    if code:
        raise RuntimeError(f"the phase {phase} ended with code {code}; what it said is above")


def run_tuning(config: QuickstartConfig, directory: pathlib.Path) -> None:
    """Runs phases 1 and 2; writes `ground.json`, `warm.json` and the models."""
    task = Task(config)

    def ground() -> dict:
        say(f"[seed {config.seed}] 1/4 ground and read: {config.ground.steps} steps")
        rows = MemoryBatches(task.ground_rows(), config.ground.batch_size, config.seed)
        model = new_model(model_config(config.network, task.vocabulary), jax.random.key(config.seed))
        mesh = all_devices(config.ground.batch_size)
        model = sft(model, rows, config.ground, directory=directory / "ground", mesh=mesh, label="ground and read")
        rows.close()
        save(task, model, directory / "ground" / "model")
        return {}

    def warm() -> dict:
        say(f"[seed {config.seed}] 2/4 warm start: {config.warm.steps} steps on traces")
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


# ---- the two arms


def run_side_by_side(config: QuickstartConfig, directory: pathlib.Path) -> None:
    """Evaluates the warm start, and trains and evaluates both arms, in a process each with its own cores.

    The arms run the same programs. The second begins once the first has compiled them; before that its cores evaluate the warm
    start.
    """
    first, second = lesson_of(config).arms
    with SideBySide(config, directory) as phases:
        phases.start(first, core=0)
        phases.start("judging", core=1)
        phases.wait(lambda: "judging" not in phases.running and phases.has_compiled(first))
        phases.start(second, core=1)
        phases.wait(lambda: not phases.running)


class SideBySide(contextlib.ExitStack):
    """Phases that run side by side. None outlives the block; a phase that fails ends it, with its output in the error."""

    def __init__(self, config: QuickstartConfig, directory: pathlib.Path):
        super().__init__()
        self.seed, self.directory = config.seed, directory
        self.running: dict[str, subprocess.Popen] = {}
        self.arms = tuple(lesson_of(config).arms)
        self.done_before = {arm: len(self.iterations(arm)) for arm in self.arms if read_note(self.result(arm)) is None}
        self.total = config.rl.iterations * len(self.done_before)
        self.progress, self.shown = ProgressLine("rl", self.total), None

    def result(self, phase: str) -> pathlib.Path:
        """The file with the result of a phase."""
        return self.directory / ("warm_evaluation.json" if phase == "judging" else f"{phase}/result.json")

    def iterations(self, arm: str) -> list[dict]:
        """The metrics of the iterations that an arm has done."""
        return read_metrics(self.directory / arm / "rl" / "metrics.jsonl")

    def has_compiled(self, arm: str) -> bool:
        """Whether an arm has compiled its programs."""
        return arm not in self.running or bool(self.iterations(arm))

    def start(self, phase: str, core: int) -> None:
        """Starts a phase unless its result is there. The output of an arm goes to its directory, other output to the terminal."""
        if read_note(self.result(phase)) is not None:
            return
        options = {}
        if phase in self.arms:
            (self.directory / phase).mkdir(exist_ok=True)
            log = self.enter_context((self.directory / phase / "log.txt").open("w"))
            options = {"stdout": log, "stderr": log}
        process = self.running[phase] = self.enter_context(start_phase(self.directory, phase, str(core), **options))
        self.callback(process.terminate)

    def wait(self, until: Callable[[], bool]) -> None:
        """Shows the progress of the arms until `until()`.

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
                    log = self.directory / phase / "log.txt"
                    output = f":\n{log.read_text()[-4000:]}" if log.exists() else "; what it said is above"
                    raise RuntimeError(f"the phase {phase} ended with code {process.returncode}{output}")

    def show(self) -> None:
        """Prints the progress if there is any."""
        lines = {arm: self.iterations(arm) for arm in self.done_before}
        done = sum(map(len, lines.values()))
        if done in (self.shown, sum(self.done_before.values())):
            return
        metrics = {f"{arm} {name}": x[-1][name] for arm, x in lines.items() if x for name in ("accuracy", "rapr")}
        self.progress.update(done, metrics)
        self.shown = done
        if done == self.total:
            say(f"[seed {self.seed}] 4/4 judging both arms")


def run_arm(config: QuickstartConfig, directory: pathlib.Path, arm: str) -> None:
    """Trains and evaluates one arm; writes `result.json`."""
    config = lesson_of(config).arm_config(config, arm)
    task, folder = Task(config), directory / arm

    def train() -> dict:
        model, _ = from_pretrained(directory / "warm" / "model")
        stages = Stages(Rewards.of(config.rl.reward, task.decode))
        model = rl(model, TrainingScenes(task), stages, config.rl, directory=folder / "rl", label=arm)
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
    curve = [{name: line.get(name) for name in names} for line in read_metrics(folder / "rl" / "metrics.jsonl")]
    times = {"seconds_training": seconds, "seconds_evaluation": judged.pop("seconds")}
    write_json(folder / "result.json", {**judged, "curve": curve, **times})
