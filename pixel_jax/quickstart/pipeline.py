"""The phases of one seed, each resumable: a phase that is done leaves a JSON file and is not done again."""

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
from pixel_jax.evaluation import trace
from pixel_jax.files import read_json
from pixel_jax.identity import RunError, changes, describe, flatten
from pixel_jax.models.io import from_pretrained, save_pretrained
from pixel_jax.models.processor import Processor
from pixel_jax.parallel import make_mesh
from pixel_jax.quickstart.config import QuickstartConfig
from pixel_jax.quickstart.network import model_config, new_model
from pixel_jax.quickstart.task import Task, TrainingScenes, evaluate, pick_traces
from pixel_jax.rollouts.limits import write_limits
from pixel_jax.run_lock import hold
from pixel_jax.signals import SIGNALS
from pixel_jax.state_files import read_note, write_json
from pixel_jax.training.progress import Progress, announce_compiles, use_compilation_cache
from pixel_jax.training.rewards import Rewards
from pixel_jax.training.rl import rl
from pixel_jax.training.sft import Shuffled, sft
from pixel_jax.training.stages import Stages
from pixel_jax.training.writers import read_metrics

POLL = 1.0  # seconds between looks at the arms' progress


def say(text: str) -> None:
    terminal.say(text, sys.stderr)


def once(path: pathlib.Path, work: Callable[[], dict]) -> dict:
    """The JSON object in `path`; made by `work`, with the seconds that took, if it is not there or damaged."""
    values = read_note(path, _is_timed)
    if values is None:
        began = time.monotonic()
        made = work()
        write_json(path, {**made, "seconds": time.monotonic() - began})
        values = read_json(path)
    return values


def _is_timed(values: Any) -> bool:
    return isinstance(values, dict) and isinstance(values.get("seconds"), float)


def start_process(cache: pathlib.Path) -> None:
    """What every process of the quickstart does first."""
    use_compilation_cache(cache)
    announce_compiles()


def all_devices(rows: int) -> Mesh | None:
    """A mesh that splits `rows` rows over as many devices as divide them; None for one."""
    count = math.gcd(len(jax.devices()), rows)
    return make_mesh({"data": count}, jax.devices()[:count]) if count > 1 else None


def run_seed(config: QuickstartConfig, directory: pathlib.Path) -> dict:
    """All phases of `config.seed` in `directory`: what each measured, and the seconds it took."""
    directory.mkdir(parents=True, exist_ok=True)
    with hold(directory), contextlib.ExitStack() as stack:
        check_same(config, directory / "config.json")
        elapsed = stack.enter_context(Elapsed(directory / "clock.json"))
        run_alone(directory, "tuning")
        names = config.taught.arms
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
    """`python -m pixel_jax.quickstart.phase`, which ends when this process does."""
    command = [sys.executable, "-m", "pixel_jax.quickstart.phase", str(directory), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, **options)


def run_alone(directory: pathlib.Path, phase: str) -> None:
    """A phase on all cores; it speaks for itself."""
    with start_phase(directory, phase) as process:
        try:
            code = process.wait()
        finally:
            process.terminate()
    if code:
        raise RuntimeError(f"the phase {phase} ended with code {code}; what it said is above")


def run_tuning(config: QuickstartConfig, directory: pathlib.Path) -> None:
    """Phases 1 and 2; leaves `ground.json`, `warm.json` and the models."""
    task = Task(config)

    def ground() -> dict:
        say(f"[seed {config.seed}] 1/4 ground and read: {config.ground.steps} steps")
        rows = Shuffled(task.ground_rows(), config.ground.batch_size, config.seed)
        model = new_model(model_config(config.network, task.vocabulary), jax.random.key(config.seed))
        mesh = all_devices(config.ground.batch_size)
        model = sft(model, rows, config.ground, directory=directory / "ground", mesh=mesh, label="ground and read")
        save(task, model, directory / "ground" / "model")
        return {}

    def warm() -> dict:
        say(f"[seed {config.seed}] 2/4 warm start: {config.warm.steps} steps on traces")
        rows = Shuffled(task.warm_rows(), config.warm.batch_size, config.seed)
        model, _ = from_pretrained(directory / "ground" / "model")
        mesh = all_devices(config.warm.batch_size)
        model = sft(model, rows, config.warm, directory=directory / "warm", mesh=mesh, label="warm start")
        save(task, model, directory / "warm" / "model")
        return {}

    for name, work in (("ground", ground), ("warm", warm)):
        once(directory / f"{name}.json", work)


def run_judging(config: QuickstartConfig, directory: pathlib.Path) -> None:
    """What tuning led to; leaves `warm_evaluation.json` and traces."""
    task = Task(config)

    def judge() -> dict:
        model, _ = from_pretrained(directory / "warm" / "model")
        numbers, answers = evaluate(task, model, lambda what: say(f"    judging the warm start: {what}"))
        trace.save(directory / "warm" / "traces.json", pick_traces(task, answers, "warm start"))
        return numbers

    once(directory / "warm_evaluation.json", judge)


class Elapsed(contextlib.ExitStack):
    """Seconds spent on a directory by this process and those before it: written down however this one ends."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.began = time.monotonic()
        self.before = (read_note(path, _is_timed) or {"seconds": 0.0})["seconds"]
        self.enter_context(SIGNALS.at_end(lambda: write_json(path, {"seconds": self.total})))

    @property
    def total(self) -> float:
        return self.before + time.monotonic() - self.began


def check_same(config: QuickstartConfig, path: pathlib.Path) -> None:
    """A directory belongs to one configuration: going on with another would mix two runs."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    begun = read_note(path)
    if begun is not None and (changed := changes(flatten(begun), flatten(values))):
        raise RunError(f"{path.parent} was begun with {describe(changed)}: choose another --out or delete it")
    write_json(path, values)


def save(task: Task, model, directory: pathlib.Path) -> None:
    """A model as a Hugging Face directory that `pixel-jax chat` opens, with the limits it was trained under."""
    limits = task.config.rl.rollout
    processor = Processor(task.vocabulary.tokenizer, min_pixels=limits.min_pixels, max_pixels=limits.max_pixels)
    save_pretrained(model, processor, directory)
    write_limits(directory, limits)


# ---- the two arms


def run_side_by_side(config: QuickstartConfig, directory: pathlib.Path) -> None:
    """Judge the warm start, train and judge both arms: a process each, one a core.

    The arms run the same programs. The second begins once the first has compiled them; until then its core judges.
    """
    first, second = config.taught.arms
    with SideBySide(config, directory) as phases:
        phases.start(first, core=0)
        phases.start("judging", core=1)
        phases.wait(lambda: "judging" not in phases.running and phases.has_compiled(first))
        phases.start(second, core=1)
        phases.wait(lambda: not phases.running)


class SideBySide(contextlib.ExitStack):
    """Phases that run beside each other. None outlives the block; one that fails ends it and is quoted."""

    def __init__(self, config: QuickstartConfig, directory: pathlib.Path):
        super().__init__()
        self.seed, self.directory = config.seed, directory
        self.running: dict[str, subprocess.Popen] = {}
        self.arms = tuple(config.taught.arms)
        self.done_before = {arm: len(self.iterations(arm)) for arm in self.arms if read_note(self.result(arm)) is None}
        self.total = config.rl.iterations * len(self.done_before)
        self.progress, self.shown = Progress("rl", self.total), None

    def result(self, phase: str) -> pathlib.Path:
        return self.directory / ("warm_evaluation.json" if phase == "judging" else f"{phase}/result.json")

    def iterations(self, arm: str) -> list[dict]:
        return read_metrics(self.directory / arm / "rl" / "metrics.jsonl")

    def has_compiled(self, arm: str) -> bool:
        return arm not in self.running or bool(self.iterations(arm))

    def start(self, phase: str, core: int) -> None:
        """Unless its result is there. What an arm says is kept in its directory; judging speaks for itself."""
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
        """Show how far the arms are, until `until()`."""
        while not until():
            time.sleep(POLL)
            self.show()
            for phase, process in list(self.running.items()):
                if process.poll() is None:
                    continue
                del self.running[phase]
                if process.returncode:
                    log = self.directory / phase / "log.txt"
                    said = f":\n{log.read_text()[-4000:]}" if log.exists() else "; what it said is above"
                    raise RuntimeError(f"the phase {phase} ended with code {process.returncode}{said}")

    def show(self) -> None:
        lines = {arm: self.iterations(arm) for arm in self.done_before}
        done = sum(map(len, lines.values()))
        if done in (self.shown, sum(self.done_before.values())):
            return
        facts = {f"{arm} {name}": lines[arm][-1][name] for arm in lines if lines[arm] for name in ("accuracy", "rapr")}
        self.progress.update(done, facts)
        self.shown = done
        if done == self.total:
            say(f"[seed {self.seed}] 4/4 judging both arms")


def run_arm(config: QuickstartConfig, directory: pathlib.Path, arm: str) -> None:
    """Train and judge one arm, in a process of its own; leaves `result.json`."""
    config = config.taught.arm_config(config, arm)
    task, place = Task(config), directory / arm

    def train() -> dict:
        model, _ = from_pretrained(directory / "warm" / "model")
        stages = Stages(Rewards.of(config.rl.reward, task.decode))
        model = rl(model, TrainingScenes(task), stages, config.rl, directory=place / "rl", label=arm)
        save(task, model, place / "model")
        return {}

    def judge() -> dict:
        model, _ = from_pretrained(place / "model")
        numbers, answers = evaluate(task, model)
        trace.save(place / "traces.json", pick_traces(task, answers, arm.replace("_", " ")))
        return numbers

    seconds = once(place / "trained.json", train)["seconds"]
    judged = once(place / "evaluation.json", judge)
    names = ("step", "accuracy", "rapr", "reward", "operations", "call_errors", "entropy", "nonzero_variance")
    curve = [{name: line.get(name) for name in names} for line in read_metrics(place / "rl" / "metrics.jsonl")]
    times = {"seconds_training": seconds, "seconds_evaluation": judged.pop("seconds")}
    write_json(place / "result.json", {**judged, "curve": curve, **times})
