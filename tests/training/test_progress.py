"""What a run says about itself."""

import io
import json
import pathlib

import jax
import jax.numpy as jnp

from pixel_jax.training import progress
from pixel_jax.training.progress import (
    COMPILED,
    LOWERED,
    ProgressLine,
    announce_compiles,
    clock,
    use_compilation_cache,
)
from pixel_jax.training.writers import MetricsLog, read_metrics


def test_clock():
    assert [clock(x) for x in (0, 59.6, 61, 3600, -5)] == ["0:00", "1:00", "1:01", "1:00:00", "0:00"]


def test_a_log_file_gets_whole_lines_and_the_last_one():
    stream = io.StringIO()
    shown = ProgressLine("sft", 3, stream=stream, every=1e9)
    for done in (1, 2, 3):
        shown.update(done, {"loss": 1 / done})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2  # the first, and the end; nothing in between within `every` seconds
    assert lines[0].startswith("sft 1/3  ? left  loss 1") and lines[1].startswith("sft 3/3  0:00 left  loss 0.3333")


def test_a_remark_stands_before_the_numbers():
    stream = io.StringIO()
    ProgressLine("rl", 2, stream=stream).update(1, {"loss": 1.0}, "no group taught anything\x1b[2J")
    assert stream.getvalue() == "rl 1/2  ? left  no group taught anything\\x1b[2J  loss 1\n"


def test_a_terminal_gets_as_much_as_it_has_room_for(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setenv("COLUMNS", "40")
    ProgressLine("rl", 2, stream=stream).update(1, {"accuracy": 0.5, **{f"metric_{i}": i for i in range(30)}})
    (line,) = stream.getvalue().split("\x1b[K")[1:]
    assert line.startswith("rl 1/2  ? left  accuracy 0.5  metric_0") and len(line) == 39


def test_a_restart_drops_the_lines_it_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in range(4):
        log.write(step, {"loss": float(step)})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    log = MetricsLog(path, 2)
    log.write(2, {"loss": 9.0})
    log.close()
    assert [(x["step"], x["loss"]) for x in read_metrics(path)] == [(0, 0.0), (1, 1.0), (2, 9.0)]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_the_place_of_compiled_programs_is_announced(tmp_path, capsys):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        use_compilation_cache(tmp_path)
        use_compilation_cache(tmp_path / "later")  # what is set already stays
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert capsys.readouterr().err == f"compiled programs are kept in {tmp_path}\n" * 2


def test_nothing_is_said_of_compiled_programs_that_are_not_kept(tmp_path, capsys):
    before = jax.config.jax_enable_compilation_cache, jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        use_compilation_cache(tmp_path)
        assert jax.config.jax_compilation_cache_dir == before[1] and capsys.readouterr().err == ""
    finally:
        jax.config.update("jax_enable_compilation_cache", before[0])


def test_compilations_are_announced_before_they_end():
    stream = io.StringIO()
    stop = announce_compiles(minimum=0.0, stream=stream)

    @jax.jit
    def a_peculiar_function(x):
        return jnp.sin(x) + 1

    a_peculiar_function(jnp.ones(3))
    lines = [line for line in stream.getvalue().splitlines() if "a_peculiar_function" in line]
    assert lines[0] == "compiling a program (a_peculiar_function) ..."
    assert lines[1].startswith("compiled a program (a_peculiar_function) in ") and lines[1].endswith(" s")
    stop()
    jax.jit(lambda x: a_peculiar_function(x) * 2)(jnp.ones(4))
    assert len([line for line in stream.getvalue().splitlines() if "a_peculiar_function" in line]) == len(lines)


def test_compiling_says_what_it_is_and_how_long_it_took_the_last_time(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_seconds", {})
    monkeypatch.setattr(progress, "_noted", [tmp_path / "seconds.json"])
    stream = io.StringIO()
    stop = announce_compiles(stream=stream)
    try:
        for seconds in (20.0, 0.3):  # the second was only read from the cache
            # jax names programs so, whatever their functions are called.
            jax.monitoring.record_event_duration_secs(LOWERED, 1.0, fun_name="jit(compiled_rollout)")
            jax.monitoring.record_event_duration_secs(COMPILED, seconds, fun_name="jit(compiled_rollout)")
        jax.monitoring.record_event_duration_secs(LOWERED, 1.0, fun_name="compiled_rollout")
    finally:
        stop()
    first, done, again, read, third = stream.getvalue().splitlines()
    assert (first, done) == ("compiling the rollout ...", "compiled the rollout in 20.0 s")
    assert again == third == "compiling the rollout, about 20 s ..." and read == "compiled the rollout in 0.3 s"
    assert json.loads((tmp_path / "seconds.json").read_text()) == {"compiled_rollout": 20.0}


def test_the_programs_that_have_names_are_there():
    source = "".join(path.read_text() for path in pathlib.Path(progress.__file__).parents[1].rglob("*.py"))
    for name in progress.PROGRAMS:
        assert f"def {name}(" in source or f'"{name}"' in source.replace(f'"{name}":', ""), name
