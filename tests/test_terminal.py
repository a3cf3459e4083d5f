"""Foreign text steers no terminal, and output that nobody can take ends no program."""

import io
import os
import pathlib
import re
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixel_jax import terminal
from pixel_jax.chat import Screen
from pixel_jax.parallel import processes
from pixel_jax.rollouts.prompts import Query
from pixel_jax.serving.session import Saw
from pixel_jax.terminal import print_table, table
from pixel_jax.training.progress import ProgressLine

ROOT = pathlib.Path(__file__).parent.parent
ESCAPES = "\x1b]0;PWN\x07\x1b[2J\x9b31m\r\x08\x7f\u202e\u2028"


@given(st.text() | st.text(st.characters(categories=["Cc", "Cs", "Zl", "Zp", "Cf"])))
def test_what_is_printed_steers_nothing(text):
    shown = terminal.printable(text)
    assert not {unicodedata.category(x) for x in shown if x not in "\n\t"} & {"Cc", "Cs", "Zl", "Zp"}
    assert not set(shown) & terminal.BIDIRECTIONAL
    assert shown == "".join(terminal.printable(x) for x in text) and terminal.printable(shown) == shown
    shown.encode("utf-8")


def test_text_of_all_languages_stays_as_it_is():
    for text in ("naïve – “日本語”\u3000한국어\n\tالعربية עברית", "👩\u200d🔬 e\u0301", "a\u00a0b", ""):
        assert terminal.printable(text) == text
    assert terminal.printable(ESCAPES) == r"\x1b]0;PWN\x07\x1b[2J\x9b31m\r\x08\x7f\u202e\u2028"
    assert terminal.printable(ValueError("\x1b")) == r"\x1b"


def test_long_values_are_cut():
    assert terminal.brief("a") == "'a'" and terminal.brief({"a": 1}) == "{'a': 1}"
    for value in ("a" * 10**6, ["b"] * 10**6, {"c": "d" * 10**6}, b"e" * 10**6):
        assert len(terminal.brief(value)) == 203


def test_a_conversation_and_a_table_show_escapes():
    def show(stream):
        screen, query = Screen(stream), Query(ESCAPES, [])
        screen.question(ESCAPES, query, 0)
        screen.wrote(ESCAPES)
        screen.saw(Saw(ESCAPES, False, ()), query)
        screen.answer(None, ESCAPES)

    for draw in (show, lambda stream: print_table(table(["head"], [[ESCAPES]]), stream)):
        stream = io.StringIO()
        draw(stream)
        assert "\x1b" not in stream.getvalue() and r"\x1b]0;PWN\x07" in stream.getvalue()


class Full(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


def test_nobody_listening_is_no_reason_to_end(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (Full(), closed, None, io.TextIOWrapper(io.BytesIO(), "ascii")):
        monkeypatch.setattr(sys, "stdout", stream)
        processes.say("The model is in –.")
        monkeypatch.setattr(sys, "stderr", stream)
        progress = ProgressLine("steps", 2)
        progress.update(1, {"loss": 1.0})
        progress.update(2, {"loss": 0.5})
    monkeypatch.undo()


PROGRAM = """
import pathlib, sys
from pixel_jax.terminal import keep_streams
keep_streams()
opened = open(sys.argv[1] + ".other", "w")
print("\\u2013\\x1b" * 100_000)
print("to the other", file=sys.stderr)
print("the end", flush=True)
print("the end", file=sys.stderr, flush=True)
pathlib.Path(sys.argv[1]).write_text(sys.stdout.encoding)
opened.write("mine")
opened.close()
"""


@pytest.mark.parametrize(
    "how",
    [
        ">/dev/full",
        "2>/dev/full",
        ">/dev/full 2>&1",
        ">&-",
        "2>&-",
        ">&- 2>&-",
        "<&- >&- 2>&-",
        "| true",
        "2>&1 | true",
    ],
)
def test_a_program_outlives_its_output(how, tmp_path):
    done = tmp_path / "done"
    redirected, _, reader = how.partition("|")
    run = f'"{sys.executable}" -c "$PROGRAM" {done} {redirected}; echo $? >{tmp_path / "code"}'
    line = f"{{ sleep .3; {run}; }} | {reader}" if reader else run  # which is gone before anything is written
    found = subprocess.run(
        ["bash", "-c", line],
        env={**os.environ, "PROGRAM": PROGRAM, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (tmp_path / "code").read_text() == "0\n", found.stderr
    assert done.exists() and (tmp_path / "done.other").read_text() == "mine"
    if how == ">/dev/full":
        assert (
            found.stderr.count("standard output is lost: No space left on device") == 1
            and "Traceback" not in found.stderr
        )


def test_a_locale_without_the_character_shows_an_escape(tmp_path):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "done")], env=plain, capture_output=True, check=True, timeout=60
    )
    assert found.stdout.startswith(b"\\u2013\x1b\\u2013")


class Terminal(io.StringIO):
    """A terminal: `lines` are what a person sees of what was written."""

    def isatty(self):
        return True

    @property
    def lines(self):
        shown = [[]]
        for part in re.split(r"(\r\x1b\[K|\n)", self.getvalue()):
            if part == "\r\x1b[K":
                shown[-1] = []
            elif part == "\n":
                shown.append([])
            else:
                shown[-1].append(part)
        return ["".join(line) for line in shown]


def test_a_passing_line_goes_whoever_writes_next(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    progress = ProgressLine("rl", 2)
    progress.update(1, {"loss": 1.0})
    assert stream.lines == ["rl 1/2  ? left  loss 1"]
    terminal.warn("a look")  # not behind the progress, but in its place
    progress.update(2, {"loss": 0.5})
    terminal.warn("the end")
    assert stream.lines == ["a look", "rl 2/2  0:00 left  loss 0.5", "the end", ""]


@pytest.mark.parametrize(
    "about, expected", [(None, "compiling it ... 0 s"), (20.4, "compiling it, about 20 s ... 0 s")]
)
def test_waiting_is_one_line_that_goes(about, expected):
    stream = Terminal()
    waiting = terminal.Waiting("compiling it", about=about, after=0.0, stream=stream)
    while not stream.getvalue():
        pass
    assert stream.lines == [expected]
    waiting.end()
    assert stream.lines == [""]
    with terminal.Waiting("soon done", stream=stream):
        pass
    assert stream.lines == [""]
    log = io.StringIO()
    with terminal.Waiting("reading\x1b the data", after=0.0, stream=log):
        assert log.getvalue() == "reading\\x1b the data ...\n"
    assert log.getvalue().count("\n") == 1


def test_of_works_within_others_the_innermost_is_shown():
    stream = Terminal()
    with terminal.Waiting("the whole", after=0.0, stream=stream):
        while not stream.lines[0]:
            pass
        with terminal.Waiting("a part", after=0.0, stream=stream) as part:
            part.at("3 of 15 GB\x1b")
            while "GB" not in stream.lines[0]:
                pass
            assert re.fullmatch(r"a part: 3 of 15 GB\\x1b \.\.\. \d s", stream.lines[0])
    assert stream.lines == [""] and not terminal._waits


def test_where_there_is_no_terminal_how_far_it_is_is_said_now_and_then():
    log = io.StringIO()
    with terminal.Waiting("reading", after=0.0, every=60.0, stream=log) as often:
        often.at("1 of 2")
    with terminal.Waiting("reading", after=0.0, every=0.0, stream=log) as always:
        always.at("2 of 2")
    always.at("too late")
    assert log.getvalue() == "reading ...\nreading ...\nreading: 2 of 2 ...\n"


def test_work_whose_progress_is_shown_needs_no_more_words(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    progress = ProgressLine("rl", 2)
    with terminal.Waiting("the training", after=0.0) as training:
        progress.update(1, {})
        training.thread.join(1.5)
        assert stream.lines == ["rl 1/2  ? left  "]


def test_the_program_is_starting_until_it_says_anything(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setitem(terminal.Waiting.__init__.__kwdefaults__, "after", 0.0)
    for say in (lambda: terminal.warn("a word"), lambda: terminal.Waiting("a work").end(), terminal.end_starting):
        terminal.start()
        while "starting" not in stream.lines[-1]:
            pass
        say()
        assert terminal._starting is None and not terminal._waits and stream.lines[-1] == ""
    assert stream.lines == ["a word", ""]


def test_quiet_shows_results_and_warnings_only(monkeypatch, capsys):
    monkeypatch.setenv(terminal.QUIET, "")
    terminal.be_quiet()
    terminal.progress("compiled it")
    ProgressLine("rl", 1).update(1, {})
    with terminal.Waiting("compiling it", after=0.0):
        terminal.say("a result")
        terminal.warn("a warning")
    assert capsys.readouterr() == ("a result\n", "a warning\n")
