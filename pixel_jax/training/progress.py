"""Output on the terminal: progress, remaining time, and the compilation of programs."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping

import jax

from pixel_jax.terminal import printable, put, say

LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
COMPILED = "/jax/core/compile/backend_compile_duration"


def announce_compiles(minimum: float = 0.2, stream=None) -> Callable[[], None]:
    """Announces on the terminal when the compilation of a program begins and ends.

    Programs whose lowering takes less than `minimum` seconds are not announced. Call it once, when a process starts.

    Returns:
        A function that ends the announcements.
    """
    announced: set[str] = set()

    def listen(event: str, duration_secs: float, **details: str | int) -> None:
        name = str(details.get("fun_name", "a program"))
        if event == LOWERED and duration_secs >= minimum:
            announced.add(name)
            say(f"compiling {name} ...", stream or sys.stderr)
        elif event == COMPILED and name in announced:
            announced.discard(name)
            say(f"compiled {name} in {duration_secs:.1f} s", stream or sys.stderr)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: jax.monitoring.unregister_event_duration_listener(listen)


def use_compilation_cache(directory: str | os.PathLike) -> None:
    """Caches compiled programs in `directory`, unless the environment names another, and prints where.

    It does nothing if JAX's cache is switched off, as by `parallel.processes.initialize` on CPUs.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    say(f"compiled programs are kept in {jax.config.values['jax_compilation_cache_dir']}", sys.stderr)


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
        self.live = self.stream is not None and not self.stream.closed and self.stream.isatty()
        self.every = 0.2 if self.live else every
        self.began, self.shown = None, None

    def update(self, done: int, metrics: Mapping[str, float], remark: str = "") -> None:
        """Shows that `done` of `total` steps are done, with a remark and metrics, the most important first."""
        now = time.monotonic()
        if self.began is None:  # the first step compiles: the pace is measured from its end
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
            put("\r\x1b[K" + line + ("\n" if done >= self.total else ""), self.stream)
        else:
            put(line + "\n", self.stream)
