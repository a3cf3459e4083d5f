"""Traces and pages: what is drawn is what happened, and nothing from outside becomes markup."""

import base64
import contextlib
import dataclasses
import http.server
import io
import json
import subprocess
import threading
import typing
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pixel_jax.evaluation import report
from pixel_jax.evaluation import transcript as traces
from pixel_jax.files import FileError
from pixel_jax.rollouts.rollout import rollout
from pixel_jax.rollouts.trajectory import answered_calls
from tests.rollouts import scripted_model

HOSTILE = '</script><script>alert(1)</script>"&<img src=x onerror=alert(1)>'


@pytest.fixture(scope="module")
def found():
    """Traces of images and videos, as one rollout made them."""
    prompts = scripted_model.prompts(4, video=True)
    t = scripted_model.with_pixels(
        rollout(scripted_model.model(), prompts, jax.random.key(7), scripted_model.CONFIG), prompts
    )
    queries = scripted_model.queries(4, video=True)
    rows = range(t.tokens.shape[0])
    made = [
        traces.make_transcript(t, row, queries[t.prompt[row]], scripted_model.vocabulary(), correct=row % 2 == 0)
        for row in rows
    ]
    return t, made


def pixels(picture):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.uri.split(",", 1)[1]))))


def test_traces_show_what_happened(found):
    t, made = found
    queries, crops, frames = scripted_model.queries(4, video=True), 0, 0
    for row, item in enumerate(made):
        query = queries[t.prompt[row]]
        assert len(item.overview) == len(item.pictures) == len(query.images)
        for picture, image in zip(item.pictures, query.images, strict=True):
            np.testing.assert_array_equal(pixels(picture), image)
        tools = [turn for turn in item.turns if turn.role == "tool"]
        chosen = [turn for turn in item.turns if turn.role == "assistant"]
        log_probs = [x for turn in chosen for x in turn.log_probs]
        np.testing.assert_allclose(log_probs, t.logprobs[row][t.loss_mask[row]], atol=1e-4)
        assert all("".join(turn.pieces).removesuffix("<|im_end|>") == turn.text for turn in chosen if turn.pieces)
        assert len(tools) == answered_calls(t)[row]
        for call, turn in enumerate(tools):
            outcome, source = scripted_model.outcomes(t)[row, call], t.calls.source
            assert turn.failed == (outcome not in (scripted_model.CROPPED, scripted_model.SELECTED))
            assert "<|" not in turn.text
            boxes = [(i, b) for i, p in enumerate(item.pictures) for b in p.boxes if b[0] == call + 1]
            if outcome == scripted_model.CROPPED:
                crops += 1
                assert [(i, b[1:]) for i, b in boxes] == [
                    (source.image[row, call, 0], tuple(source.region[row, call, 0]))
                ]
                size = f"(Image Size: {turn.pictures[0].width}x{turn.pictures[0].height})"
                assert size in turn.text and len(turn.pictures) == 1
            elif outcome == scripted_model.SELECTED:
                frames += 1
                assert len(turn.pictures) == len(boxes) > 0
            else:
                assert not boxes and not turn.pictures
    assert crops > 2 and frames > 0


def test_messages_follow_from_who_wrote_them(found):
    """Whatever tokens the policy writes, and whatever its turn was made to begin with."""
    t, made = found
    words = scripted_model.vocabulary()
    row = next(i for i, item in enumerate(made) if len(item.turns) > 2)
    at = np.flatnonzero(t.loss_mask[row])
    tokens = t.tokens.copy()
    tokens[row, at[:2]] = words.im_start, words.im_start
    item = traces.make_transcript(
        t._replace(tokens=tokens), row, scripted_model.queries(4, video=True)[t.prompt[row]], words
    )
    assert item.turns[0].text.startswith("<|im_start|><|im_start|>") and item.turns[1:] == made[row].turns[1:]
    chosen = t.loss_mask.copy()
    chosen[row, at[:2]] = False  # an opening
    item = traces.make_transcript(
        t._replace(loss_mask=chosen), row, scripted_model.queries(4, video=True)[t.prompt[row]], words
    )
    first = dataclasses.replace(made[row].turns[0], pieces=item.turns[0].pieces, log_probs=item.turns[0].log_probs)
    assert item.turns == (first, *made[row].turns[1:])
    assert item.turns[0].pieces == made[row].turns[0].pieces[2:]


def test_traces_survive_a_file(found, tmp_path):
    traces.save(tmp_path / "traces.json", found[1])
    again = traces.load(tmp_path / "traces.json")
    assert json.dumps([a.__dict__ for a in again], default=vars, sort_keys=True) == json.dumps(
        [a.__dict__ for a in found[1]], default=vars, sort_keys=True
    )


class Reader(HTMLParser):
    """Counts elements, and scripts that would run."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.runs, self.attributes, self.texts, self.values = [], 0, [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.values += attrs
        self.runs += tag == "script" and dict(attrs).get("type") != "application/json"

    def handle_data(self, data):
        self.texts.append(data)


def test_nothing_from_outside_becomes_markup(found):
    item = found[1][0]
    item = traces.Transcript(
        **{**item.__dict__, "question": HOSTILE, "answer": HOSTILE, "reference": HOSTILE, "title": HOSTILE}
    )
    item.turns = [traces.ShownTurn("assistant", HOSTILE), traces.ShownTurn("tool", HOSTILE, failed=True)]
    page = report.page(
        HOSTILE,
        [(HOSTILE, report.transcript(item) + report.table([HOSTILE], [[HOSTILE]]) + report.paragraph(HOSTILE))],
        {"x": HOSTILE},
    )
    seen = Reader(page)
    assert seen.runs == 0 and "img" not in seen.tags and "onerror" not in seen.attributes
    assert seen.tags.count("script") == 1
    assert sum(HOSTILE in text for text in seen.texts) >= 8
    stored = page.split('id="metrics">', 1)[1].split("</script>", 1)[0]
    assert json.loads(stored) == {"x": HOSTILE}


LEAVE = "\"'><meta http-equiv=refresh content='0;url={0}'><base href='{0}'><form action='{0}'><iframe src='{0}'>"
LEAVE += (
    "<img src='{0}'><link rel=stylesheet href='{0}'><svg onload=\"fetch('{0}')\"></svg><script>location='{0}'</script>"
)


def hostile(kind, text):
    """An instance of the dataclass with `text` in every field that is a text and in every part that has one."""
    made = {}
    for name, hint in typing.get_type_hints(kind).items():
        (part, *_) = typing.get_args(hint) or (hint,)
        if typing.get_origin(hint) is dict:
            made[name] = {text: 20.0}
        elif hint is tuple or typing.get_origin(hint) is tuple:
            made[name] = (hostile(part, text),) if dataclasses.is_dataclass(part) else ((1, 2, 3, 4, 5),)
        else:
            made[name] = {str: text, bool: True, int: 20, float: 20.0}.get(part, text)
    item = object.__new__(kind)  # as no file can bring it: nothing is checked
    item.__dict__ |= made
    return item


def hostile_page(text):
    head = report.table([text], [[text]]) + report.paragraph(text)
    item = hostile(traces.Transcript, text)
    return report.page(text, [(text, head), ("", report.transcript(item))], {text: text})


@pytest.mark.parametrize("text", [HOSTILE, LEAVE.format("http://127.0.0.1/")], ids=["script", "leave"])
def test_every_field_is_escaped(text):
    ours, theirs = Reader(hostile_page("plain")), Reader(hostile_page(text))
    assert theirs.tags == ours.tags and theirs.attributes == ours.attributes and theirs.runs == 0
    classes = lambda seen: [value for name, value in seen.values if name == "class"]
    assert classes(theirs) == classes(ours)
    policy = [value for name, value in theirs.values if name == "content"][-1]
    assert all(f"{name} 'none'" in policy for name in ("default-src", "base-uri", "form-action"))
    assert [t for t in theirs.texts if text in t]


BROKEN_TRACES = {
    "role": lambda x: x["turns"][0].update(role='"><meta http-equiv=refresh>'),
    "uri": lambda x: x["pictures"][0].update(uri="http://127.0.0.1/a.png"),
    "uri behind a picture": lambda x: x["pictures"][0].update(uri=x["pictures"][0]["uri"] + '"><b>'),
    "width": lambda x: x["pictures"][0].update(width="40"),
    "no width": lambda x: x["pictures"][0].update(width=0),
    "boxes": lambda x: x["pictures"][0].update(boxes=[[1, 2, 3, 4, "5"]]),
    "box": lambda x: x["pictures"][0].update(boxes=[[1, 2, 3, 4]]),
    "question": lambda x: x.update(question=["?"]),
    "title": lambda x: x.update(title=None),
    "correct": lambda x: x.update(correct=1),
    "more": lambda x: x.update(script="alert(1)"),
    "less": lambda x: x.pop("stop"),
    "turns": lambda x: x.update(turns={}),
    "failed": lambda x: x["turns"][0].update(failed="yes"),
}


@pytest.mark.parametrize("what", BROKEN_TRACES)
def test_what_is_no_trace_is_refused(found, what, tmp_path):
    rows = [dataclasses.asdict(item) for item in found[1][:2]]
    BROKEN_TRACES[what](rows[1])
    (tmp_path / "t.json").write_text(json.dumps(rows))
    with pytest.raises(FileError, match=r"t.json' holds no traces: .*trace 2"):
        traces.load(tmp_path / "t.json")


@given(st.binary(max_size=40), st.integers(0, 10_000), st.booleans())
def test_a_damaged_file_of_traces_is_named(tmp_path_factory, noise, place, over):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    picture = traces.Picture(traces.data_uri(np.zeros((4, 4, 3), np.uint8)), 4, 4, "c", ((1, 0, 0, 2, 2),))
    traces.save(
        path, [traces.Transcript("q", (picture,), (picture,), (traces.ShownTurn("tool", "t", (picture,)),), "s")]
    )
    whole = path.read_bytes()
    place %= len(whole)
    path.write_bytes(whole[:place] + noise + whole[place + len(noise) * over :])
    try:
        report.traces_page(traces.load(path))
    except FileError as error:
        assert "fuzzed.json" in str(error)


@contextlib.contextmanager
def listening():
    """A server that should never be asked: its address, and the paths that it was asked for."""
    asked = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802 (the library's name)
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_POST = do_GET  # noqa: N815
        log_message = lambda *arguments: None

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/x", asked
        server.shutdown()


@pytest.mark.slow
@pytest.mark.chromium
def test_a_browser_stays_on_the_page(tmp_path):
    """Headless Chromium asks for nothing; without the escaping it would (which shows that the test can fail)."""

    def look(page, asked):
        asked.clear()
        (tmp_path / "page.html").write_text(page)
        line = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
        line += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()]
        seen = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)
        return seen.stdout

    with listening() as (address, asked):
        leave = LEAVE.format(address)
        assert "turn tool failed" in look(hostile_page(leave), asked)
        assert asked == []
        look(hostile_page("plain").replace("turn tool failed", f"turn {leave}"), asked)  # a role as it is
        assert "/x" in asked


def test_a_page_is_written_whole(tmp_path):
    report.write(tmp_path / "a.html", "one")
    report.write(tmp_path / "a.html", "two")
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"] and (tmp_path / "a.html").read_text() == "two"


def test_large_photographs_are_compressed():
    photo = np.asarray(Image.fromarray(scripted_model.image(0, 8, 8)).resize((400, 300), Image.Resampling.BICUBIC))
    uri = traces.data_uri(photo)
    assert uri.startswith("data:image/jpeg;base64,") and len(uri) < photo.size / 8
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))
    assert shown.shape == photo.shape and np.abs(shown.astype(int) - photo).mean() < 6
