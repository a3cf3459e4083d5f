"""Traces and pages: what is drawn is what happened, and nothing from outside becomes markup."""

import base64
import dataclasses
import io
import json
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from PIL import Image

from pixel_jax.chat import show
from pixel_jax.dialog.observations import Kind
from pixel_jax.evaluation import report
from pixel_jax.evaluation import trace as traces
from pixel_jax.rollout import trajectory
from pixel_jax.rollout.rollout import rollout
from tests.rollout import talker

HOSTILE = '</script><script>alert(1)</script>"&<img src=x onerror=alert(1)>'


@pytest.fixture(scope="module")
def found():
    """Traces of images and videos, as one rollout made them."""
    t = trajectory.to_host(rollout(talker.model(), talker.prompts(4, video=True), jax.random.key(7), talker.CONFIG))
    queries = talker.queries(4, video=True)
    rows = range(t.tokens.shape[0])
    made = [
        traces.make_trace(t, row, queries[t.prompt[row]], talker.vocabulary(), correct=row % 2 == 0) for row in rows
    ]
    return t, made


def pixels(picture):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.uri.split(",", 1)[1]))))


def test_traces_show_what_happened(found):
    t, made = found
    queries, crops, frames = talker.queries(4, video=True), 0, 0
    for row, item in enumerate(made):
        query = queries[t.prompt[row]]
        assert len(item.overview) == len(item.pictures) == len(query.images)
        for picture, image in zip(item.pictures, query.images, strict=True):
            np.testing.assert_array_equal(pixels(picture), image)
        tools = [turn for turn in item.turns if turn.role == "tool"]
        assert len(tools) == (t.calls.observation[row] >= 0).sum()
        for call, turn in enumerate(tools):
            kind = Kind(int(t.calls.observation[row, call]))
            assert turn.failed == (kind not in (Kind.CROP, Kind.FRAMES))
            assert "<|" not in turn.text
            boxes = [(i, b) for i, p in enumerate(item.pictures) for b in p.boxes if b[0] == call + 1]
            if kind == Kind.CROP:
                crops += 1
                assert [(i, b[1:]) for i, b in boxes] == [(t.calls.canvas[row, call], tuple(t.calls.box[row, call]))]
                size = f"(Image Size: {turn.pictures[0].width}x{turn.pictures[0].height})"
                assert size in turn.text and len(turn.pictures) == 1
            elif kind == Kind.FRAMES:
                frames += 1
                assert len(turn.pictures) == len(boxes) > 0
            else:
                assert not boxes and not turn.pictures
    assert crops > 2 and frames > 0


def test_messages_follow_from_who_wrote_them(found):
    """Whatever tokens the policy writes, and whatever its turn was made to begin with."""
    t, made = found
    words = talker.vocabulary()
    row = next(i for i, item in enumerate(made) if len(item.turns) > 2)
    at = np.flatnonzero(t.chosen[row])
    tokens = t.tokens.copy()
    tokens[row, at[:2]] = words.im_start, words.im_start
    item = traces.make_trace(t._replace(tokens=tokens), row, talker.queries(4, video=True)[t.prompt[row]], words)
    assert item.turns[0].text.startswith("<|im_start|><|im_start|>") and item.turns[1:] == made[row].turns[1:]
    chosen = t.chosen.copy()
    chosen[row, at[:2]] = False  # an opening
    item = traces.make_trace(t._replace(chosen=chosen), row, talker.queries(4, video=True)[t.prompt[row]], words)
    assert dataclasses.replace(item, correct=made[row].correct) == made[row]


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
        self.tags, self.runs, self.attributes, self.texts = [], 0, [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.runs += tag == "script" and dict(attrs).get("type") != "application/json"

    def handle_data(self, data):
        self.texts.append(data)


def test_nothing_from_outside_becomes_markup(found):
    item = found[1][0]
    item = traces.Trace(
        **{**item.__dict__, "question": HOSTILE, "answer": HOSTILE, "reference": HOSTILE, "title": HOSTILE}
    )
    item.turns = [traces.Turn("assistant", HOSTILE), traces.Turn("tool", HOSTILE, failed=True)]
    page = report.page(
        HOSTILE,
        [(HOSTILE, report.trace(item) + report.table([HOSTILE], [[HOSTILE]]) + report.paragraph(HOSTILE))],
        {"x": HOSTILE},
    )
    seen = Reader(page)
    assert seen.runs == 0 and "img" not in seen.tags and "onerror" not in seen.attributes
    assert seen.tags.count("script") == 1
    assert sum(HOSTILE in text for text in seen.texts) >= 8
    stored = page.split('id="metrics">', 1)[1].split("</script>", 1)[0]
    assert json.loads(stored) == {"x": HOSTILE}


def test_curves_are_drawn_inline():
    svg = report.curves({"accuracy": {"a": [(0, 0.1), (1, 0.5)], "b": [(0, 0.2), (1, 0.1)]}}, "step")
    assert svg.count("<svg") == 1 and "accuracy" in svg and "http" not in svg.replace("http://www.w3.org", "")


def test_a_conversation_in_the_terminal(found):
    stream = io.StringIO()
    with_crop = next(item for item in found[1] if any(picture.boxes for picture in item.pictures))
    show(with_crop, stream)
    text = stream.getvalue()
    assert with_crop.question in text and "looks at" in text and "answer" in text


def test_a_page_is_written_whole(tmp_path):
    report.write(tmp_path / "a.html", "one")
    report.write(tmp_path / "a.html", "two")
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"] and (tmp_path / "a.html").read_text() == "two"


def test_large_photographs_are_compressed():
    photo = np.asarray(Image.fromarray(talker.image(0, 8, 8)).resize((400, 300), Image.Resampling.BICUBIC))
    uri = traces.data_uri(photo)
    assert uri.startswith("data:image/jpeg;base64,") and len(uri) < photo.size / 8
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))
    assert shown.shape == photo.shape and np.abs(shown.astype(int) - photo).mean() < 6
