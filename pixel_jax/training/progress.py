"""Output on the terminal: progress, remaining time, and the compilation of programs."""

import contextlib
import os
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping

import jax

from pixel_jax.state_files import read_note, write_json
from pixel_jax.terminal import Waiting, is_live, is_quiet, leave_line, printable, progress, put

LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
COMPILED = "/jax/core/compile/backend_compile_duration"


# What programs are called when they are compiled, by the names of their functions.
PROGRAMS: Mapping[str, str] = {
    "compiled_rollout": "the rollout",
    "rl_step": "the training step (rl)",
    "sft_step": "the training step (sft)",
    "score_step": "the scoring of answers",
    "_cut_patches": "the cutting of pictures",
    "_respond": "the answers of tools",
    "start": "the beginning of answers",
    "admit": "the reading of questions",
    "_advanced": "the writing of answers",
    "finish": "the reading of answers",
    "new_model": "the new model",
}
WORTH_NOTING = 1.0  # seconds; what compiles faster is not noted
_seconds: dict[str, float] = {}  # that compiling took the last time, by the name of the function
_noted: list[pathlib.Path] = []  # the file that holds them, once it is known


def announce_compiles(minimum: float = 0.2, stream=None) -> Callable[[], None]:
    """Says when a program is being compiled, with the seconds that it took the last time, and when that has ended.

    Programs whose lowering takes less than `minimum` seconds are not announced. Call it once, when a process starts.

    Returns:
        A function that ends the announcements.
    """
    waiting: dict[str, Waiting] = {}

    def listen(event: str, duration_secs: float, **details: str | int) -> None:
        name = re.sub(r"^p?jit\((.*)\)$", r"\1", str(details.get("fun_name", "without a name")))
        if event == LOWERED and duration_secs >= minimum and name not in waiting:
            waiting[name] = Waiting(f"compiling {_called(name)}", about=_seconds.get(name), after=0.0, stream=stream)
        elif event == COMPILED and name in waiting:
            waiting.pop(name).end()
            progress(f"compiled {_called(name)} in {duration_secs:.1f} s", stream)
            _note_seconds(name, duration_secs)

    def end() -> None:
        jax.monitoring.unregister_event_duration_listener(listen)
        for name in list(waiting):  # whose compilation has failed, or goes on
            waiting.pop(name).end()

    jax.monitoring.register_event_duration_secs_listener(listen)
    return end


def _called(name: str) -> str:
    return PROGRAMS.get(name, f"a program ({name})")


def _note_seconds(name: str, seconds: float) -> None:
    """Remembers how long compiling took. A program that was only read from the cache took less, and is not noted."""
    if seconds < max(WORTH_NOTING, _seconds.get(name, 0.0) / 2):
        return
    _seconds[name] = round(seconds, 1)
    for path in _noted:
        with contextlib.suppress(OSError):  # nobody waits for this
            write_json(path, _seconds)


def use_compilation_cache(directory: str | os.PathLike) -> None:
    """Caches compiled programs in `directory`, unless the environment names another, and prints where.

    It does nothing if JAX's cache is switched off, as by `parallel.processes.initialize` on CPUs.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    place = str(jax.config.values["jax_compilation_cache_dir"])
    _noted[:] = [pathlib.Path(place) / "seconds.json"]
    found = read_note(_noted[0]) or {}
    _seconds.update({name: float(x) for name, x in found.items() if isinstance(x, int | float)})
    progress(f"compiled programs are kept in {place}")


def clock(seconds: float) -> str:
    """Formats a time as 1:02:03, or 2:03 under an hour."""
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class ProgressLine:
    """A progress line: on a terminal one line that is rewritten, in a log file a new line after every `every` seconds."""

    def __init__(self, label: str, total: int, start: int = 0, *, stream=None, every: float = 10.0):
        self.label, self.total, self.start = label, total, start
        self.stream = stream or sys.stderr
        self.live = is_live(self.stream)
        self.every = 0.2 if self.live else every
        self.began, self.shown = None, None

    def update(self, done: int, metrics: Mapping[str, float], remark: str = "") -> None:
        """Shows that `done` of `total` steps are done, with a remark and metrics, the most important first."""
        if is_quiet():
            return
        now = time.monotonic()
        if self.began is None or done == self.start:  # until the first step has ended, as it compiles, there is no pace
            self.began, self.start = now, done
        if done < self.total and self.shown is not None and now - self.shown < self.every:
            return
        self.shown = now
        remaining = "?" if done == self.start else clock((now - self.began) / (done - self.start) * (self.total - done))
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        prefix = f"{printable(remark)}  " if remark else ""
        line = f"{printable(self.label)} {done}/{self.total}  {remaining} left  {prefix}{shown}"
        if self.live:
            line = line[: shutil.get_terminal_size().columns - 1]
            put(line, self.stream, passing=True)
            if done >= self.total:
                leave_line()
        else:
            put(line + "\n", self.stream)
