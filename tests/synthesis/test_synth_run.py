"""`pixel-jax synth` against a model over real HTTP, which sees what it is sent and misbehaves as it is told to."""

import base64
import dataclasses
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pixel_jax import endpoint
from pixel_jax.data.own import read_own
from pixel_jax.endpoint import EndpointConfig, EndpointError
from pixel_jax.synthesis import run
from pixel_jax.synthesis.run import SynthConfig, show, synthesize
from tests.chat_server import Reply, chat_server, endless
from tests.synthesis import seed_files
from tests.test_cli import ENVIRONMENT, ROOT, command

WHOLE = "A grey scene, of which one part stands out; it is worth a closer look."


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.001)


@pytest.fixture
def seeds(tmp_path):
    return seed_files.write_seeds(tmp_path)


def asked(request):
    """What a request is about: "whole", "local" or "direct"; and the pictures it brings."""
    *images, prompt = request["messages"][0]["content"]
    pictures = [x["image_url"]["url"].removeprefix("data:image/jpeg;base64,") for x in images]
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(x)))) for x in pictures]
    text = prompt["text"]
    return "whole" if "Do not answer" in text else "local" if "look closer" in text else "direct", pictures


def painter(number, request):
    """Tells the colour that it sees: the middle of a crop, or the only frame in colour."""
    which, pictures = asked(request)
    if which == "whole":
        return WHOLE
    seen = [colour for picture in pictures if (colour := colour_near_middle(picture))]
    return f"What I see here is {seen[0]} all over.\n\\boxed{{{seen[0].title()}}}" if seen else "Nothing but grey."


def colour_near_middle(picture):
    """Padding is cut off at an image's edge, so that a patch may be off the middle of its crop."""
    rows, columns = np.nonzero(np.ptp(picture.astype(int), axis=2) > 60)
    if not len(rows):
        return None
    y, x = int(np.median(rows)), int(np.median(columns))
    return seed_files.colour_at(picture[y - 2 : y + 3, x - 2 : x + 3])


def config_of(seeds, server, out="out", **more):
    ask = {"url": server.url, "model": "a-model", "workers": 4} | more.pop("endpoint", {})
    return SynthConfig(seeds=str(seeds), out=str(seeds.parent / out), endpoint=EndpointConfig(**ask), **more)


def read(config, name="traces.jsonl"):
    with open(os.path.join(config.out, name), encoding="utf-8") as file:
        return file.read()


def test_a_model_that_sees_makes_traces_of_all_seeds(seeds):
    with chat_server(painter) as server:
        config = config_of(seeds, server)
        report = synthesize(config)
    assert report["made"] == report["seeds"] == 13 and report["dropped"] == {} == report["rejected_texts"]
    assert len(server.received) == 2 * 11 + 2  # a whole and a local analysis each; the direct ones have one
    for request in server.received:
        assert request.body["model"] == "a-model" and request.body["max_tokens"] == 600 and request.body["seed"] == 0
        which, pictures = asked(request.body)
        text = request.body["messages"][0]["content"][-1]["text"]
        if which == "whole":  # whoever writes it has not been told the answer, nor asked for it
            assert not re.search("|".join(seed_files.NAMES), text) and "What is the colour" in text
        if which == "local" and "part of a larger image" in text:
            ((height, width, _),) = [picture.shape for picture in pictures]
            assert width <= 24 + 2 * 40 + 8 and height <= 24 + 2 * 30 + 8  # the crop with its padding of a tenth
    for example in read_own(config.out + "/traces.jsonl", turns=True):
        first, last = (example.turns[i].parts[0][0] for i in (0, -1))
        assert last == f"What I see here is {example.answer[0]} all over.\nThe answer is \\boxed{{{example.answer[0]}}}"
        if len(example.turns) > 1:
            assert first.startswith(WHOLE + "\nNow I will ") and first.endswith("</tool_call>")
    assert json.loads(read(config, "report.json")) == report


def test_trouble_on_the_line_changes_nothing(seeds):
    """Every request first fails, in one way or another; the traces are those of a good day."""
    with chat_server(painter) as server:
        good = config_of(seeds, server, "good")
        synthesize(good)
    bad = [
        Reply("", 429, {"retry-after": "0"}),
        Reply("", 500),
        Reply(b"<html>"),
        Reply({"choices": []}),
        Reply("", 503),
    ]
    tried, lock = Counter(), threading.Lock()

    def answer(number, request):
        with lock:
            mark = json.dumps(request, sort_keys=True)
            tried[mark] += 1
            first = tried[mark] == 1
        return bad[number % len(bad)] if first else painter(number, request)

    with chat_server(answer) as server:
        poor = config_of(seeds, server, "poor")
        report = synthesize(poor)
    assert report["rejected_texts"] == {} and read(good) == read(poor)
    assert set(tried.values()) == {2}


BAD_TEXTS = {
    "whole": [
        ("It is red, or green, or blue, or yellow, I think.", "whole analysis: reveals the answer"),
        ("Let me call crop_image on the patch over there.", "whole analysis: markup in the text"),
        ("", "whole analysis: no answer of the endpoint"),
    ],
    "local": [
        ("What I see here is purple all over.\n\\boxed{purple}", "local analysis: wrong final answer"),
        ("What I see here is a patch of some colour.", "local analysis: no final answer"),
        (Reply({"error": "policy"}, 400), "local analysis: no answer of the endpoint"),
    ],
    "direct": [
        ("What I see here is a colour.", "direct answer: no final answer"),
        ("What I see here is purple all over.\n\\boxed{purple}", "direct answer: wrong final answer"),
        (Reply("What I see", finish="length"), "direct answer: no answer of the endpoint"),
    ],
}


def test_bad_answers_are_asked_for_again_and_counted(seeds):
    """The first text for everything is bad, the second is good."""

    def answer(number, request):
        if request["seed"] == 0:
            return BAD_TEXTS[asked(request)[0]][0][0]
        return painter(number, request)

    with chat_server(answer) as server:
        report = synthesize(config_of(seeds, server))
    assert report["made"] == 13 and report["dropped"] == {}
    assert report["rejected_texts"]["whole analysis: reveals the answer"] == 11
    assert report["rejected_texts"]["local analysis: wrong final answer"] == 11
    assert sum(report["rejected_texts"].values()) == 24


@pytest.mark.parametrize("which", BAD_TEXTS)
def test_what_stays_bad_is_dropped_for_its_reason(seeds, which, capsys):
    bad = BAD_TEXTS[which]

    def answer(number, request):
        return bad[request["seed"]][0] if asked(request)[0] == which else painter(number, request)

    with chat_server(answer) as server:
        config = config_of(seeds, server)
        report = synthesize(config)
    lost = 2 if which == "direct" else 11
    assert report["dropped"] == {bad[-1][1]: lost} and report["made"] == 13 - lost
    assert {x["reason"] for x in report["dropped_seeds"]} == {bad[-1][1]}
    for _, reason in bad:
        assert report["rejected_texts"][reason] == lost
    assert sum(report["rejected_texts"].values()) == 3 * lost
    assert len(read(config).splitlines()) == 13 - lost
    show(report)
    printed = capsys.readouterr().out
    assert f"{13 - lost} traces of 13 seeds" in printed and bad[-1][1] in printed and f"{lost} dropped seeds" in printed


@pytest.mark.parametrize("writer", ["model", "templates"])
def test_images_that_cannot_be_decoded_are_dropped_and_named(seeds, writer):
    """Cut off in the pixels, in a header, and no image at all: the others become traces, now and on a restart."""
    rows = [json.loads(line) for line in seeds.read_text().splitlines()]
    broken = {
        "image-0": "image-0.jpg",
        "image-1": "image-1.png",
        "video-0": "video-0-2.png",
        "direct-0": "direct-0.png",
    }
    with Image.open(seeds.parent / "image-0.png") as image:
        image.save(seeds.parent / "image-0.jpg")  # whose header is not cut off
    rows[0]["images"] = ["image-0.jpg"]
    seeds.write_text("\n".join(map(json.dumps, rows)))
    good = {name: (seeds.parent / file).read_bytes() for name, file in broken.items()}
    for name, file in broken.items():
        (seeds.parent / file).write_bytes(b"no image" if name == "direct-0" else good[name][: len(good[name]) * 2 // 3])
    with chat_server(painter) as server:
        config = config_of(seeds, server) if writer == "model" else SynthConfig(str(seeds), str(seeds.parent / "out"))
        report = synthesize(config)
        assert report["made"] == 9 and report["dropped"] == {"an image cannot be read": 4}
        found = {x["id"]: x["reason"] for x in report["dropped_seeds"]}
        assert found.keys() == broken.keys()
        for name, reason in found.items():
            assert re.fullmatch(f"an image cannot be read: '.*/{broken[name]}' cannot be read: .*", reason)
        assert broken.keys().isdisjoint(json.loads(line)["id"] for line in read(config).splitlines())
        assert synthesize(config) == report
        for name, file in broken.items():
            (seeds.parent / file).write_bytes(good[name])
        assert synthesize(config)["made"] == 13  # mended


def test_a_finished_run_asks_nothing_and_a_changed_one_only_what_is_new(seeds):
    with chat_server(painter) as server:
        config = config_of(seeds, server)
        synthesize(config)
        before, count = read(config), len(server.received)
        synthesize(config)
        assert (read(config), len(server.received)) == (before, count)
        for picture in seeds.parent.glob("*.png"):  # copied somewhere and back: the same pictures
            os.utime(picture)
        synthesize(config)
        assert (read(config), len(server.received)) == (before, count)
        # Other mistakes, the same analyses: they are on disk.
        synthesize(dataclasses.replace(config, seed=1))
        assert read(config) != before and len(server.received) == count
        # One more seed is two more requests.
        lines = seeds.read_text().splitlines()
        pixels, box = seed_files.scene((5, 5), "blue", side=25)
        Image.fromarray(pixels).save(seeds.parent / "more.png")
        more = json.loads(lines[0]) | {"id": "more", "images": ["more.png"], "box": box, "answer": "blue"}
        seeds.write_text("\n".join([*lines, json.dumps(more)]))
        assert synthesize(config)["made"] == 14 and len(server.received) == count + 2


def test_an_endpoint_that_goes_down_stops_the_run_which_then_goes_on(seeds):
    with chat_server(painter) as server:
        whole = config_of(seeds, server, "whole")
        synthesize(whole)

    def answer(number, request):
        return painter(number, request) if number < 9 else Reply("out of order", 503)

    with chat_server(answer) as server:
        config = config_of(seeds, server, endpoint={"retries": 1, "workers": 2})
        with pytest.raises(EndpointError, match=r"out of order.*; \d+ of 13 seeds are finished, start again to go on"):
            synthesize(config)
        assert not os.path.exists(config.out + "/traces.jsonl")
        kept = read(config, "outcomes.jsonl")
        assert 1 <= len(kept.splitlines()) < 13
    with chat_server(painter) as server:
        again = dataclasses.replace(config, endpoint=dataclasses.replace(config.endpoint, url=server.url))
        synthesize(again)
    assert read(again) == read(whole)
    assert len(server.received) <= 24 - len(kept.splitlines())  # what was finished is not asked for again


def test_one_seed_that_breaks_the_endpoint_is_dropped_and_not_forgotten(seeds):
    broken = True

    def answer(number, request):
        _, pictures = asked(request)
        if (
            broken
            and len(pictures) == 1
            and pictures[0].shape == (60, 60, 3)
            and colour_near_middle(pictures[0]) == "red"
        ):
            return Reply("crash", 500)
        return painter(number, request)

    with chat_server(answer) as server:
        config = config_of(seeds, server, endpoint={"retries": 1})
        report = synthesize(config)
        assert report["dropped_seeds"] == [{"id": "direct-0", "reason": run.DOWN}]
        count, broken = len(server.received), False
        assert synthesize(config)["made"] == 13 and len(server.received) == count + 1


HALF = Reply(b'{"choices": [{"message": {"content": "Red \\ud800 it is.\\n\\\\boxed{red}"}}]}')
ALWAYS = {  # what is answered to all questions about one seed, and why it is dropped
    "bad gzip": (Reply(b"x", headers={"content-encoding": "gzip"}), run.DOWN),
    "six encodings": (Reply(b"x", headers={"content-encoding": ", ".join(["gzip"] * 6)}), run.DOWN),
    "no day": (Reply("", 429, {"retry-after": "Fri, 99 Jan 99999999999999999999 00:00:00 GMT"}), run.DOWN),
    "no text": (HALF, "direct answer: no answer of the endpoint"),
    "never done": (endless(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.02), run.DOWN),
}


@pytest.mark.parametrize("name", ALWAYS)
def test_one_bad_answer_ends_nothing(seeds, name, caplog):
    reply, reason = ALWAYS[name]

    def answer(number, request):
        which, pictures = asked(request)
        bad = which == "direct" and colour_near_middle(pictures[0]) == "red"
        return reply if bad else painter(number, request)

    with chat_server(answer) as server:
        config = config_of(seeds, server, endpoint={"retries": 1, "timeout": 3.0})
        for _ in range(2):  # started again, too
            report = synthesize(config)
            assert report["made"] == 12 and report["dropped_seeds"] == [{"id": "direct-0", "reason": reason}]
    assert len(read(config).splitlines()) == 12
    assert ("seed 'direct-0' failed" in caplog.text) == (reason == run.DOWN)


def test_what_an_earlier_release_kept_and_cannot_be_written_is_made_again(seeds):
    with chat_server(painter) as server:
        config = config_of(seeds, server)
        synthesize(config)
        good, path = read(config), os.path.join(config.out, "outcomes.jsonl")
        kept = [json.loads(line) for line in read(config, "outcomes.jsonl").splitlines()]
        kept[3]["row"]["turns"][-1]["text"] += " \ud800"
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        assert synthesize(config)["made"] == 13 and read(config) == good


def test_a_seed_that_fails_is_named_and_the_others_go_on(seeds, monkeypatch, caplog):
    """Whatever the error is, it is not kept: the next run tries again."""
    real, broken = run.make, True

    def make(seed, *rest, **options):
        if broken and seed.id == "image-3":
            raise ZeroDivisionError("of all things")
        return real(seed, *rest, **options)

    monkeypatch.setattr(run, "make", make)
    with chat_server(painter) as server:
        config = config_of(seeds, server)
        report = synthesize(config)
        assert report["dropped_seeds"] == [{"id": "image-3", "reason": f"{run.FAILED}: ZeroDivisionError"}]
        assert "seed 'image-3' failed and is left for another run: ZeroDivisionError: of all things" in caplog.text
        broken = False
        assert synthesize(config)["made"] == 13
        monkeypatch.setattr(run, "make", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # every one of them: it is not the seeds
            synthesize(dataclasses.replace(config, out=config.out + "-2"))


def test_killed_at_any_moment_it_ends_the_same(seeds):
    """SIGKILL after every few answers, and a line cut in two; then to the end."""
    with chat_server(painter) as server:
        whole = config_of(seeds, server, "whole")
        synthesize(whole)
    asked_so_far, process = threading.Semaphore(0), None

    def answer(number, request):
        asked_so_far.release()
        return painter(number, request)

    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pixel_jax.cli import main; main()"
    with chat_server(answer) as server:
        config = config_of(seeds, server)
        line = [
            "synth",
            "--config=configs/pixel/synth.py:endpoint",
            f"--config.seeds={seeds}",
            f"--config.out={config.out}",
        ]
        line += [
            f"--config.endpoint.url={server.url}",
            "--config.endpoint.model=a-model",
            "--config.endpoint.workers=2",
        ]
        for _ in range(2):
            process = subprocess.Popen([sys.executable, "-c", code, *line], cwd=ROOT, env=ENVIRONMENT)
            for _ in range(7):
                assert asked_so_far.acquire(timeout=120)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            while asked_so_far.acquire(blocking=False):
                pass
            with open(config.out + "/outcomes.jsonl", "a") as file:
                file.write('{"print": "cut sho')
        assert not os.path.exists(config.out + "/traces.jsonl")
        status, out, error = command(*line)
        assert status == 0, error
    assert "13 traces of 13 seeds" in out and "traces.jsonl" in out
    assert read(config) == read(whole)


def test_the_command_without_an_endpoint(seeds):
    out = seeds.parent / "out"
    line = ["synth", "--config=configs/pixel/synth.py", f"--config.seeds={seeds}", f"--config.out={out}"]
    status, printed, error = command(*line)
    assert status == 0, error
    assert "analyses by templates" in printed and len(read_own(out / "traces.jsonl", turns=True)) == 13


def test_mistakes(seeds):
    for more, message in (
        ({"image": (0.0, 0.0, 0.0, 0.0)}, "image must be shares"),
        ({"video": (-1.0, 2.0)}, "video must be shares"),
        ({"attempts": 0}, "attempts must be at least 1: 0"),
        ({"pad": 0.5}, r"pad is a share of the image, in \[0, 0.5\): 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            SynthConfig(seeds=str(seeds), out="out", **more)
    status, _, error = command("synth", "--config=configs/pixel/synth.py:poet", "--config.seeds=x", "--config.out=y")
    assert status == 1 and "not by 'poet'" in error
    status, _, error = command("synth", "--config=configs/pixel/synth.py", "--config.seeds=nowhere", "--config.out=y")
    assert status == 1 and "'nowhere' cannot be opened" in error and "Traceback" not in error


def test_pictures_lie_beside_the_traces_under_the_names_of_their_content(seeds, monkeypatch):
    """As links where the disk has them, else as copies; nothing outside the run directory has to be allowed."""
    linked = SynthConfig(seeds=str(seeds), out=str(seeds.parent / "linked"))
    synthesize(linked)
    monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError("another disk")))
    copied = SynthConfig(seeds=str(seeds), out=str(seeds.parent / "copied"))
    synthesize(copied)
    assert read(linked) == read(copied)
    rows = [json.loads(line) for line in read(linked).splitlines()]
    pictures = {json.loads(line)["id"]: json.loads(line)["images"] for line in seeds.read_text().splitlines()}
    for row in rows:
        for name, own in zip(row["images"], pictures[row["id"]], strict=True):
            ours, theirs = (pathlib.Path(x.out) / name for x in (linked, copied))
            assert ours.stat().st_nlink == 2 and theirs.stat().st_nlink == 1
            assert theirs.read_bytes() == ours.read_bytes() == (seeds.parent / own).read_bytes()
    assert not list(pathlib.Path(copied.out).glob("images/*.new"))
