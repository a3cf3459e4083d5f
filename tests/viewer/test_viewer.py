"""The viewer's index and server: what it shows of runs that are written meanwhile, whom it answers, and what it refuses."""

import base64
import contextlib
import io
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import urllib.request
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixel_jax.cli import UserError
from pixel_jax.evaluation import transcript as traces
from pixel_jax.evaluation.results import Results, read_records
from pixel_jax.state_files import to_json
from pixel_jax.training.watch import thin
from pixel_jax.training.writers import MetricsLog, read_metrics
from pixel_jax.view import RunOpener, names_of
from pixel_jax.viewer import index as index_module
from pixel_jax.viewer.app import HEADERS
from pixel_jax.viewer.index import Filter, FilterError
from pixel_jax.viewer.runs import GoneError, open_run
from pixel_jax.viewer.tail import Tail
from tests.viewer import made_runs
from tests.viewer.serving import index_of, serving

QUESTIONS = 60


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(index_module, "REFRESH_SECONDS", 0.0)


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [made_runs.evaluation(folder / str(i), QUESTIONS, seed=i) for i in range(2)]


# ---- runs that are being written


def test_a_running_run(tmp_path):
    run = made_runs.training(tmp_path / "run", steps=16)
    metrics = run / "rl/metrics.jsonl"
    made_runs.torn(metrics)
    index = index_of(run)
    state, version = index.state(), index.version
    assert ["rl", "16 of 16 iterations"] == list(state["runs"][0]["status"][0]) and state["runs"][0]["problems"] == []
    accuracy = next(x for x in state["charts"] if x["title"] == "rl: accuracy")
    expected = [(x["step"] + 1, x["accuracy"]) for x in read_metrics(metrics) if "accuracy" in x]
    assert [line["label"] for line in accuracy["lines"]] == ["training", "held out"]
    assert accuracy["lines"][0]["points"] == expected and len(expected) == 16
    index.refresh()
    assert index.version == version
    # The line is completed, another is damaged, and conversations come and go.
    with metrics.open("a") as file:
        file.write('": 1.0}\n{"step": 17, "accuracy": 0.5}\nnot JSON\n{"step": 18, "accu')
    numbers = {x.entry.when: x.number for x in index.traces if x.entry.title == "photo 1"}
    traces.save(run / "rl/traces/held_out/000017.json", [made_runs.conversation(1, title="photo 1")])
    thin(run / "rl/traces/rollouts", 2)
    index.refresh()
    assert index.version == version + 1
    state = index.state()
    accuracy = next(x for x in state["charts"] if x["title"] == "rl: accuracy")
    assert accuracy["lines"][0]["points"][-1] == (18, 0.5) and len(accuracy["lines"][0]["points"]) in (17, 18)
    (problem,) = state["runs"][0]["problems"]
    assert "metrics.jsonl:" in problem and "is not JSON" in problem and "left out" in problem
    kept = {x.entry.when: x.number for x in index.traces if x.entry.title == "photo 1"}
    assert "after iteration 17" in kept and all(numbers[when] == kept[when] for when in kept.keys() & numbers.keys())
    with pytest.raises(GoneError, match="has deleted this trace"):
        index.read(next(numbers[when] for when in numbers.keys() - kept.keys()))
    # It goes on from an earlier step: the file is written anew, and shorter.
    MetricsLog(metrics, 4).close()
    index.refresh()
    assert index.state()["runs"][0]["status"][0][1] == "4 of 16 iterations"


@given(cuts=st.lists(st.integers(0, 400), max_size=6))
@settings(max_examples=30)
def test_a_file_read_in_any_pieces_is_the_file_read_at_once(cuts, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "tail.jsonl"
    path.unlink(missing_ok=True)
    values = [{"step": i, "text": "é\u2028" * (i % 5)} for i in range(8)]
    data = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in values[:4]).encode() + b'{"step": "no"}\n'
    data += "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in values[4:]).encode()
    tail = Tail(path, step=int)
    assert not tail.refresh() and tail.values == []
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(data)], strict=True):
        with path.open("ab") as file:
            file.write(data[start:end])
        tail.refresh()
        assert tail.values == values[: len(tail.values)]
    assert tail.values == values and len(tail.problems) == 1
    for start, length, value in tail.lines:
        assert json.loads(data[start : start + length]) == value


def test_an_evaluation_grows(evaluations, tmp_path):
    run = made_runs.evaluation(tmp_path / "run", 5)
    index = index_of(run)
    assert len(index.traces) == 5
    results = Results(run / "vstar/operations", 1)  # of another process
    results.append([made_runs.record(7), {**made_runs.record(2), "unanswered": "too large"}])
    Results(run / "vstar/none").append([made_runs.record(0, right=False)])
    index.refresh()
    assert [x["name"] for x in index.state()["runs"][0]["parts"]] == ["vstar, operations", "vstar, none"]
    assert len(index.traces) == 7 and index.read(2)[0].turns  # an answered question stays answered
    # Tool gain and harm of one run: its parts compared.
    (row,) = index.page(Filter(change="any", before="0.1", to="0.0"), 0, 9)["rows"]
    assert row["title"] == "q00000" and row["right"]


# ---- the list, against what the records say


def test_filters_against_the_records(evaluations):
    index = index_of(*evaluations)
    records = [read_records(run / "vstar/operations") for run in evaluations]

    def titles(**wanted):
        return [(x["run"], x["title"]) for x in index.page(Filter(**wanted), 0, 200)["rows"]]

    def expected(passes):
        return [(run, x["id"]) for run, some in enumerate(records) for x in some if passes(run, x)]

    assert titles() == expected(lambda run, x: True) and len(titles()) == 2 * QUESTIONS
    assert titles(side="1") == titles(side="1.0") == expected(lambda run, x: run == 1)
    assert titles(verdict="wrong") == expected(lambda run, x: x["score"][0] < 0.5)
    assert titles(tool="=select_frames") == expected(lambda run, x: "select_frames" in x["tools"][0])
    assert titles(tool="none") == expected(lambda run, x: not x["calls"][0])
    assert titles(category="=spatial", verdict="right", side="0", tool="any") == expected(
        lambda run, x: x["category"] == "spatial" and x["score"][0] and not run and x["calls"][0]
    )
    assert titles(text="NUMBER 17") == expected(lambda run, x: x["index"] == 17)
    page = index.page(Filter(verdict="right"), 10, 5)
    assert [x["title"] for x in page["rows"]] == [x for _, x in titles(verdict="right")[10:15]]
    assert page["of"] == page["right"] == page["judged"] == len(titles(verdict="right"))
    right = [{x["id"]: x["score"][0] for x in some} for some in records]
    for change, pair in {"gained": (0.0, 1.0), "lost": (1.0, 0.0)}.items():
        expected_titles = [x for x in right[1] if (right[0][x], right[1][x]) == pair]
        assert [x for _, x in titles(change=change, before="0", to="1")] == expected_titles and expected_titles
    assert titles(change="any", before="0", to="0") == []
    wanted = Filter(change="lost", before="0", to="1")
    first, second, *_ = [x.number for x in index.select(wanted)]
    found = index.trace(first, wanted)
    assert (found["at"], found["previous"], found["next"]) == (0, None, second)
    assert index.trace(found["before"], Filter())["row"]["title"] == found["row"]["title"]
    assert index.trace(found["before"], Filter())["row"]["right"] is True


def test_looks_of_two_runs_are_compared_by_their_newest_answers(tmp_path):
    runs = [made_runs.training(tmp_path / str(i), steps=16, seed=i, settings={"seed": i}) for i in range(2)]
    index = index_of(*runs)
    assert ("seed", ["0", "1"]) in index.state()["differing"]
    newest = [traces.load(max((run / "rl/traces/held_out").glob("*.json"))) for run in runs]
    expected = [b.title for a, b in zip(*newest, strict=True) if a.correct != b.correct]
    rows = index.page(Filter(change="any", before="0", to="1"), 0, 99)["rows"]
    assert [x["title"] for x in rows] == expected and expected and {x["when"] for x in rows} == {"after iteration 16"}


@pytest.mark.parametrize("side", ["2", "0.9", "-1", "x", "0.x", "³", "0.0.0", "9" * 50])
def test_a_side_that_is_not_there(side, evaluations):
    with pytest.raises(FilterError, match="there is no"):
        index_of(*evaluations).select(Filter(side=side))


def test_a_trace_shows_its_pictures_and_tokens(tmp_path):
    index = index_of(made_runs.training(tmp_path / "run", steps=8))
    number = next(x.number for x in index.traces if x.entry.calls == 2)
    (item,), shown = index.read(number), index.trace(number, Filter())["conversations"][0]
    pictures = [*shown["pictures"], *shown["overview"], *(x for turn in shown["turns"] for x in turn["pictures"])]
    assert [x["picture"] for x in pictures] == [0, 1, 2, 3] and len(shown["pictures"][0]["boxes"]) == 2
    for x, kept in zip(pictures, index_module.pictures_of(item), strict=True):
        kind, data = index.picture(number, x["picture"])
        assert kind == "image/png" and kept.uri.endswith(base64.b64encode(data).decode())
        assert Image.open(io.BytesIO(data)).size == (x["width"], x["height"])
    assert index.tokens(number, 0, 0) == {"pieces": item.turns[0].pieces, "log_probs": item.turns[0].log_probs}
    assert shown["turns"][0]["tokens"] == 11 and shown["turns"][1]["tool"] == "crop_image"
    for wrong in ((number, 4), (number, -1), (10**9, 0)):
        with pytest.raises(GoneError):
            index.picture(*wrong)
    with pytest.raises(GoneError):
        index.tokens(number, 0, 99)


def test_traces_of_no_run_are_shown_too(tmp_path):
    path = tmp_path / "talk.json"
    traces.save(path, [made_runs.conversation(0, title="a"), made_runs.conversation(1, title="b", right=False)])
    index = index_of(path)
    assert [(x.entry.title, x.entry.right) for x in index.traces] == [("a", True), ("b", False)]


# ---- who is answered


@pytest.mark.parametrize("headers", [
    {"Host": "evil.example"}, {"Host": "127.0.0.1.evil.example"}, {"Host": "localhost@evil.example"}, {"Host": ""},
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "file://localhost"},
])  # fmt: skip
def test_foreign_hosts_and_origins_are_refused(headers, evaluations):
    with serving(index_of(evaluations[0])) as ask:
        for path in ("/", "/state", "/traces", "/traces/0/pictures/0"):
            status, _, body = ask(path, **headers)
            assert status == 403 and b"is not this computer" in body and b"q00000" not in body
        assert ask("/state", Host=f"localhost:{ask.port}", Origin=f"http://127.0.0.1:{ask.port}")[0] == 200


def test_requests_that_are_none(evaluations):
    with serving(index_of(evaluations[0])) as ask:
        statuses = {
            404: ["/etc/passwd", "/../../etc/passwd", "/..%2f..%2fetc/passwd", "/traces/x", "/traces/-1", "/viewer.py",
                  "/traces/999999", "/traces/0/pictures/99", "/traces/0/pictures/..%2f0", "/traces/0/tokens/0/99"],
            400: ["/traces?start=x", "/traces?start=-1", "/traces?verdict=maybe",
                  "/traces?side=9", "/traces?change=any"],
            414: ["/traces/" + "9" * 5000, "/traces?text=" + "x" * 5000],
            200: ["/", "/viewer.js", "/viewer.css", "/state", "/traces?start=999999999&count=999999", "/traces/0",
                  "/traces?unknown=1"],
        }  # fmt: skip
        for status, paths in statuses.items():
            for path in paths:
                answer = ask(path)
                assert answer[0] == status, path
                assert {name: answer[1].get(name) for name in HEADERS} == dict(HEADERS)
                assert answer[1]["content-type"].startswith(
                    "text/" if path in ("/", "/viewer.js", "/viewer.css") else "application/json"
                )
        assert len(json.loads(ask("/traces?count=999999")[2])["rows"]) == QUESTIONS
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE"):
            assert ask("/traces", method)[0] == 405
        version = json.loads(ask("/state")[2])["version"]
        assert ask(f"/state?since={version}")[::2] == (204, b"")
        assert ask("/traces/0/pictures/0")[1]["content-type"] == "image/png"


def a_png(width, height):
    """The head of a PNG of that size, which has no pixels."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "data", [b"<svg onload=alert(1)>", b"", b"GIF89a", a_png(60_000, 60_000), a_png(20_000, 8_000)]
)
@pytest.mark.filterwarnings("ignore:Image size")
def test_a_picture_that_is_none_is_not_sent(data, tmp_path):
    item = made_runs.conversation(0)
    item.pictures[0].uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    path = tmp_path / "talk.json"
    traces.save(path, [item])
    with pytest.raises(GoneError, match="picture"):
        index_of(path).picture(0, 0)


DAMAGES = ("[\n", "\x00\n", '{"a": {"b": [1e999]}}\n')  # lines that are whole and wrong
DAMAGED = [
    "score",
    "answers",
    "category",
    "id",
    "given",
    "responses",
    "stop",
    "tools",
    "calls",
    "question",
    "unanswered",
]


@pytest.mark.parametrize("value", [None, 7, "x", [], {}, [None], [[[]]], [True], {"a": 1}, 1e300], ids=repr)
@pytest.mark.parametrize("field", DAMAGED)
def test_damaged_records_end_nothing(field, value, tmp_path):
    directory = tmp_path / "vstar/operations"
    Results(directory).append([{**made_runs.record(0), field: value}, made_runs.record(1)])
    index = index_of(tmp_path)
    to_json([index.state(), index.page(Filter(text="red"), 0, 9)])
    assert index.read(next(x.number for x in index.traces if x.entry.title == "q00001"))
    for x in index.traces:
        with contextlib.suppress(GoneError):
            to_json(index.trace(x.number, Filter()))


@pytest.mark.parametrize(
    "name", ["settings.json", "rl/run.json", "rl/history.jsonl", "rl/metrics.jsonl", "rl/traces/held_out/000000.json"]
)
@pytest.mark.parametrize("content", ["[\n", "\x00\n", '{"a": {"b": [1e999]}}\n', '{"of": "x", "what": "y"}\n', "\x00"])
def test_damaged_files_are_named_and_end_nothing(name, content, tmp_path):
    run = made_runs.training(tmp_path / "run", steps=8)
    (run / name).write_text(content)
    state = index_of(run).state()
    to_json(state)
    assert state["traces"] > 0
    if content in DAMAGES:
        assert name.rpartition("/")[2] in state["runs"][0]["problems"][0]


# ---- what the command is given


def test_what_is_no_run(tmp_path):
    with pytest.raises(
        UserError, match=r"is no directory of pixel-jax sft, rl, eval or synth: it has neither sft/metrics"
    ):
        open_run(tmp_path)
    made_runs.training(tmp_path / "seed-0/curiosity", steps=8)
    with pytest.raises(UserError, match=r"it holds runs: .*seed-0/curiosity$"):
        open_run(tmp_path)
    assert open_run(tmp_path / "seed-0/curiosity/rl").directory == tmp_path / "seed-0/curiosity"
    with pytest.raises(UserError, match="there is no file or directory"):
        open_run(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="there is no file or directory|does not hold"):
        RunOpener(9).open(tmp_path / "pipe.json")


@pytest.mark.parametrize("paths, names", [
    (["/a/run"], ["run"]), (["/a/run", "/b/run"], ["a/run", "b/run"]), (["/a/x", "/a/y"], ["x", "y"]),
    (["/a/run", "/a/run"], ["a/run (1)", "a/run (2)"]), (["/"], ["/"]), (["/x/r", "/r"], ["x/r", "r"]),
])  # fmt: skip
def test_names(paths, names):
    assert names_of([pathlib.Path(path) for path in paths]) == names


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_end(evaluations):
    line = [sys.executable, "-c", "from pixel_jax.cli import main; main()", "view", str(evaluations[0])]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, env=environment, **pipes) as process:
        said = process.stdout.readline()
        assert said.startswith(f"{QUESTIONS} traces at http://127.0.0.1:"), process.stderr.read()
        with urllib.request.urlopen(said.split()[3].rstrip(",") + "state", timeout=60) as answer:
            assert json.load(answer)["traces"] == QUESTIONS
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0 and process.stderr.read() == ""
