"""What a person at the terminal sees: progress, time left, and why nothing happens while a program compiles."""

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
    """Say before a program compiles (once lowering it took `minimum` seconds: small ones compile unnoticed) and when it has.

    Call it once, at the start of a process; what it returns ends it.
    """
    announced: set[str] = set()

    def listen(event: str, seconds: float, **details) -> None:
        name = str(details.get("fun_name", "a program"))
        if event == LOWERED and seconds >= minimum:
            announced.add(name)
            say(f"compiling {name} ...", stream or sys.stderr)
        elif event == COMPILED and name in announced:
            announced.discard(name)
            say(f"compiled {name} in {seconds:.1f} s", stream or sys.stderr)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: jax.monitoring.unregister_event_duration_listener(listen)


def use_compilation_cache(directory: str | os.PathLike) -> None:
    """Keep compiled programs in `directory` (unless the environment names another), for the next start, and say so.

    Not where JAX's cache is switched off, as by `parallel.processes.join` on CPUs.
    """
    if not jax.config.jax_enable_compilation_cache:
        return
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    say(f"compiled programs are kept in {jax.config.jax_compilation_cache_dir}", sys.stderr)


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 under an hour."""
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """One line on the terminal, rewritten, as wide as that is; in a log file a whole line every `every` seconds."""

    def __init__(self, label: str, total: int, start: int = 0, *, stream=None, every: float = 10.0):
        self.label, self.total, self.start = label, total, start
        self.stream = stream or sys.stderr
        self.live = self.stream is not None and not self.stream.closed and self.stream.isatty()
        self.every = 0.2 if self.live else every
        self.began, self.shown = None, None

    def update(self, done: int, metrics: Mapping[str, float], remark: str = "") -> None:
        """`done` of `total` steps are behind us; `remark` and `metrics` are shown beside them, the most important first."""
        now = time.monotonic()
        if self.began is None:  # the first step compiles: the pace is measured from its end
            self.began, self.start = now, done
        if done < self.total and self.shown is not None and now - self.shown < self.every:
            return
        self.shown = now
        left = "?" if done == self.start else clock((now - self.began) / (done - self.start) * (self.total - done))
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        said = f"{printable(remark)}  " if remark else ""
        line = f"{printable(self.label)} {done}/{self.total}  {left} left  {said}{shown}"
        if self.live:
            line = line[: shutil.get_terminal_size().columns - 1]
            put("\r\x1b[K" + line + ("\n" if done >= self.total else ""), self.stream)
        else:
            put(line + "\n", self.stream)
