"""The server as its clients meet it: OpenAI's own client, hostile bodies, foreign pages, a client that leaves, SIGTERM."""

import asyncio
import base64
import contextlib
import http.client
import io
import json
import random
import re
import socket
import sys
import threading
import time
import types

import numpy as np
import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from pixel_jax.cli import UserError
from pixel_jax.config import load
from pixel_jax.evaluation.transcript import Transcript
from pixel_jax.rollouts.prompts import Query
from pixel_jax.serving import main
from pixel_jax.serving.app import make_app
from pixel_jax.serving.engine import Engine
from pixel_jax.serving.metrics import Metrics
from pixel_jax.serving.session import Session
from tests.rollouts import scripted_model
from tests.serving.conftest import SHAPE, alone

IMAGES = [scripted_model.image(i, 90 + 8 * i, 150) for i in range(6)]


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def data_url(image):
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def asked(question, *images):
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


class Running:
    """A server in a thread, as `pixel-jax serve` runs it, and what stops it as SIGTERM does."""

    def __init__(self, speaker, *, limit=300, key=None, hosts=(), body_bytes=1 << 20, host=None):
        names = ("tiny", "again") if host is None else ("tiny",)
        sessions = {name: Session(speaker, SHAPE, slots=2, host=host) for name in names}
        self.engine = Engine(sessions, limit=limit, budget=16, metrics=Metrics())
        app = make_app(self.engine, dict.fromkeys(sessions, speaker), hosts=hosts, key=key, body_bytes=body_bytes)
        listener = main.listen("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.signals = types.SimpleNamespace(requested=False)
        main.SIGNALS = self.signals
        self.thread = threading.Thread(target=lambda: asyncio.run(main.serve(app, self.engine, listener)))
        self.engine.start()
        self.thread.start()
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)

    def client(self, kind=openai.OpenAI, key="none"):
        return kind(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=300)

    def send(self, body=b"", *, method="POST", path="/v1/chat/completions", headers=None):
        """Status and document of one request, by hand."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} | (headers or {}))
            response = connection.getresponse()
            content = response.read()
            return response.status, json.loads(content) if b"json" in response.headers[
                "content-type"
            ].encode() else content
        finally:
            connection.close()

    def stop(self):
        self.signals.requested = True
        self.thread.join(60)
        assert not self.thread.is_alive()
        self.engine.join(60)


@pytest.fixture(scope="module")
def server(speaker):
    signals, running = main.SIGNALS, Running(speaker)
    yield running
    running.stop()
    assert running.engine.failed is None
    main.SIGNALS = signals


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def ask(client, question, *images, **options):
    options = {"model": "tiny", "temperature": 0} | options
    return client.chat.completions.create(messages=[asked(question, *images)], **options)


def test_two_hundred_at_a_time(server, speaker):
    """None is lost, none is mixed up: each answer is what `rollout` gives for its prompt alone, greedily or from its seed."""
    questions = [(f"Which digit? ({i})", IMAGES[i % 6]) for i in range(40)]
    drawn = [{"temperature": int(i % 4 > 0), "seed": i} for i in range(40)]

    async def all_of_them():
        async with server.client(openai.AsyncOpenAI) as client:
            wanted = [ask(client, *questions[i % 40], **drawn[i % 40]) for i in range(200)]
            return await asyncio.gather(*wanted)

    started = time.monotonic()
    found = asyncio.run(all_of_them())
    print(f"200 requests in {time.monotonic() - started:.1f} s")
    expected = [alone(speaker, Query(x, [image]), **y) for (x, image), y in zip(questions, drawn, strict=True)]
    assert [x.choices[0].message.content for x in found] == expected * 5
    assert len(set(expected)) > 12 and len({x.id for x in found}) == 200
    assert {x.model for x in found} == {"tiny"} and {x.choices[0].finish_reason for x in found} <= {"stop", "length"}
    looked = [x for x in found if any(turn["role"] == "tool" for turn in x.model_extra["pixel_jax"]["turns"])]
    assert 10 < len(looked) and server.engine.counts() == {"tiny": (0, 0), "again": (0, 0)}
    for x in found:
        turns = x.model_extra["pixel_jax"]["turns"]
        assert "\n".join(turn["text"] for turn in turns if turn["role"] == "assistant") == x.choices[0].message.content
        assert x.usage.total_tokens == x.usage.prompt_tokens + x.usage.completion_tokens


def test_streamed_pieces_join_to_the_whole(client):
    for i in range(6):
        whole = ask(client, "Which digit?", IMAGES[i])
        chunks = list(ask(client, "Which digit?", IMAGES[i], stream=True, stream_options={"include_usage": True}))
        text = "".join(x.choices[0].delta.content or "" for x in chunks if x.choices)
        assert text == whole.choices[0].message.content and chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].usage == whole.usage and not chunks[-1].choices
        assert [x.choices[0].finish_reason for x in chunks[:-1]][-1] == whole.choices[0].finish_reason
        told = [x.model_extra["pixel_jax"]["turn"] for x in chunks if "turn" in x.model_extra.get("pixel_jax", {})]
        assert told == [x for x in whole.model_extra["pixel_jax"]["turns"] if x["role"] == "tool"]


def test_the_transcript_comes_with_its_pictures(client):
    own = {"extra_body": {"pixel_jax": {"pictures": True}}, "temperature": 1}
    found = [ask(client, "Which digit?", image, seed=seed, **own) for seed, image in enumerate(IMAGES)]
    traces = [load(Transcript, x.model_extra["pixel_jax"]["transcript"], "transcript") for x in found]
    for trace, image, x in zip(traces, IMAGES, found, strict=True):
        assert (trace.pictures[0].height, trace.pictures[0].width) == image.shape[:2]
        told = x.model_extra["pixel_jax"]["turns"]
        assert [(y.role, y.text) for y in trace.turns] == [(y["role"], y["text"]) for y in told]
        for y in told:
            if y["role"] == "tool" and not y["failed"]:
                assert all(0 <= a < b for a, b in zip(*np.reshape(y["looked_at"][0]["box"], (2, 2)), strict=True))
    assert any(turn.pictures for trace in traces for turn in trace.turns)


def test_later_questions(client, speaker):
    """A conversation goes on in the client's hands."""
    first = ask(client, "Which digit?", IMAGES[0])
    talk = [asked("Which digit?", IMAGES[0]), first.choices[0].message.model_dump(), asked("And this one?", IMAGES[1])]
    found = client.chat.completions.create(model="tiny", messages=talk, temperature=0)
    assert found.usage.prompt_tokens > first.usage.prompt_tokens and found.choices[0].message.content
    system = [{"role": "system", "content": "Be brief."}, *talk]
    assert client.chat.completions.create(model="tiny", messages=system).usage.prompt_tokens > found.usage.prompt_tokens
    words = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello?"}])
    assert words.choices[0].message.content


def test_max_tokens_stop_and_seed(client):
    whole = ask(client, "Which digit?", IMAGES[0])
    text, count = whole.choices[0].message.content, whole.usage.completion_tokens
    assert count > 3
    few = ask(client, "Which digit?", IMAGES[0], max_tokens=3)
    assert few.choices[0].finish_reason == "length" and few.usage.completion_tokens == 3
    assert text.startswith(few.choices[0].message.content) and few.choices[0].message.content != text
    ended = ask(client, "Which digit?", IMAGES[0], stop=[text[5:8], "never"])
    assert ended.choices[0].message.content == text[: text.index(text[5:8])]
    assert ended.choices[0].finish_reason == "stop" and ended.usage.completion_tokens < count
    drawn = [ask(client, "Which digit?", IMAGES[0], temperature=1.0, seed=seed) for seed in (3, 4, 5, 6, 7, 3)]
    texts = [x.choices[0].message.content for x in drawn]
    assert texts[0] == texts[-1] and len(set(texts)) > 1 and drawn[0].model_extra["pixel_jax"]["seed"] == 3
    again = [ask(client, "Which digit?", IMAGES[0], temperature=1.0) for _ in range(2)]
    assert again[0].model_extra["pixel_jax"]["seed"] != again[1].model_extra["pixel_jax"]["seed"]


def test_models_health_and_metrics(server, client):
    assert [model.id for model in client.models.list()] == ["tiny", "again"]
    assert client.models.retrieve("again").id == "again"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert ask(client, "Which digit?", IMAGES[1], model="again").model == "again"
    assert server.send(method="GET", path="/health") == (200, {"status": "ok"})
    status, text = server.send(method="GET", path="/metrics")
    families = {family.name: family for family in text_string_to_metric_families(text.decode())}
    samples = {(x.name, *sorted(x.labels.items())): x.value for family in families.values() for x in family.samples}
    assert status == 200 and families["pixel_jax_request_seconds"].type == "histogram"
    assert samples["pixel_jax_running", ("model", "tiny")] == 0
    assert samples["pixel_jax_requests_total", ("path", "/health"), ("status", "200")] >= 1
    assert samples["pixel_jax_tokens_total", ("kind", "written"), ("model", "again")] > 0
    assert (
        samples["pixel_jax_request_seconds_count",] == samples["pixel_jax_request_seconds_bucket", ("le", "+Inf")] > 0
    )
    assert server.send(method="GET", path="/etc/passwd")[0] == 404 and server.send(method="GET")[0] == 405


GOOD = {"model": "tiny", "messages": [{"role": "user", "content": "Which digit?"}]}
URLS = ("http://127.0.0.1:1/a.png", "file:///etc/passwd", "/etc/passwd", "ftp://a/b.png", "data:text/html;base64,AAAA")
REFUSED = {
    "top_p": (
        {"top_p": 0.5},
        "top_p is 0.5: the server draws with 1.0: leave it out, or start the server with --top_p=0.5",
    ),
    "n": ({"n": 2}, "n is 2: it can only be 1"),
    "n, written otherwise": ({"n": True}, "n is True"),
    "temperature": ({"temperature": 3}, "temperature is 3: give a number from 0 to 2"),
    "seed": ({"seed": -1}, "seed is -1: give a whole number from 0"),
    "max_tokens": ({"max_tokens": 10**6}, "max_tokens is 1000000: behind this prompt of .* there is room for 256"),
    "two limits": ({"max_tokens": 3, "max_completion_tokens": 3}, "are the same: give one"),
    "stop": ({"stop": ["a"] * 5}, "stop is .*: give a text, or a list of up to 4"),
    "an empty stop": ({"stop": ""}, "give texts of 1 to 200 characters"),
    "tools": ({"tools": [{"type": "function"}]}, "tools is .*the server's own tools"),
    "logprobs": ({"logprobs": True}, "logprobs is True"),
    "a field": ({"best_of": 3}, "unknown field 'best_of'"),
    "stream options": ({"stream_options": {"include_usage": True}}, "stream_options without stream"),
    "no messages": ({"messages": []}, r"messages is \[\]"),
    "a role": ({"messages": [{"role": "tool", "content": "a"}]}, r"messages\[0\].role is 'tool': it can be system"),
    "an answer last": ({"messages": [{"role": "assistant", "content": "a"}]}, "the roles are assistant"),
    "no text": ({"messages": [asked("", IMAGES[0])]}, "question 1 of the conversation has no text"),
    "images": (
        {"messages": [asked("?", *IMAGES[:3])]},
        r"content\[2\] is one image too many: a conversation may have 2",
    ),
    "pixels": ({"messages": [asked("?", np.zeros((500, 20, 3), np.uint8))]}, "is 20x500 pixels, more than 192x192"),
    "a long prompt": ({"messages": [{"role": "user", "content": "x" * 500}]}, "does not fit the width of 256"),
    "a video": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AA"}}]}
            ]
        },
        r"content\[0\] is .*video_url.*: the server reads no videos: send frames, as images in their order",
    ),
    "surrogates": (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
    "twice": (b'{"model": "tiny", "model": "tiny", "messages": []}', "model"),
    "deep": (b"[" * 100_000, "the body"),
    "a list": (b"[]", "the body is a list"),
    "nothing": (b"", "the body"),
    "NaN": (b'{"model": "tiny", "temperature": NaN, "messages": []}', "NaN"),
    **{
        url: (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]},
            "nothing is fetched: send the image itself",
        )
        for url in URLS
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_value_and_the_remedy(name, server):
    more, message = REFUSED[name]
    status, document = server.send(more if isinstance(more, bytes) else GOOD | more)
    assert 400 <= status < 500 and re.search(message, document["error"]["message"]), document


def test_an_unknown_model(client):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt': the models are 'tiny', 'again'"):
        ask(client, "?", model="gpt")


def hostile(draw: random.Random) -> bytes:
    """A body that is a request but for one or a few faults, or is none at all."""
    junk = [
        None,
        True,
        -1,
        1e308,
        2**70,
        "",
        "x" * draw.randrange(2000),
        [],
        {},
        [[]],
        "\ufffe\u202e\x00",
        {"a": [{}]},
        [1] * 999,
    ]
    kind = draw.randrange(6)
    if kind == 0:
        return draw.randbytes(draw.randrange(300))
    good = json.dumps(GOOD | {"messages": [asked("Which?", IMAGES[0])]}).encode()
    if kind == 1:  # cut short
        return good[: draw.randrange(len(good))]
    if kind == 2:  # the picture is damaged: cut short, or no picture
        data = bytearray(png(IMAGES[0])[: draw.randrange(1, 200)])
        data[: draw.randrange(8)] = b""
        url = "data:image/png;base64," + base64.b64encode(bytes(data)).decode()
        return json.dumps(GOOD | {"messages": [asked("Which?") | {"content": [
            {"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": url}}]}]}).encode()  # fmt: skip
    document = json.loads(good)
    if kind == 3:  # a field has another value
        names = ("model", "messages", "stream", "temperature", "top_p", "n", "seed", "stop", "tools", "max_tokens")
        document[draw.choice(names)] = draw.choice(
            [x for x in junk if x not in (None, True, []) and type(x) is not str]
        )
    elif kind == 4:  # somewhere inside
        message = document["messages"][0]
        place = draw.choice([message, message["content"][0], message["content"][0]["image_url"], message["content"][1]])
        place[draw.choice([*place, "further"])] = draw.choice([x for x in junk if not isinstance(x, str)][1:])
    else:  # a picture from elsewhere
        document["messages"][0]["content"][0]["image_url"]["url"] = draw.choice(URLS) + "?" * draw.randrange(1, 9)
    return json.dumps(document).encode()


def test_a_thousand_hostile_bodies(server, monkeypatch):
    """Each gets a 4xx, nothing is opened or fetched for it, and the server answers as before."""
    draw, statuses = random.Random(0), []
    connect = socket.socket.connect
    reached = []
    monkeypatch.setattr(
        socket.socket, "connect", lambda self, address: (reached.append(address), connect(self, address))[1]
    )
    before = server.engine.counts()
    for _ in range(1000):
        body = hostile(draw)
        status, document = server.send(body)
        statuses.append(status)
        assert 400 <= status < 500, (status, document, body[:500])
        assert document["error"]["message"] and "Traceback" not in document["error"]["message"]
    assert {address for address in reached} == {("127.0.0.1", server.port)}
    assert set(statuses) <= {400, 404} and server.engine.counts() == before
    assert server.send(GOOD | {"temperature": 0})[0] == 200


def test_bodies_that_are_too_long_or_of_another_kind(server):
    status, document = server.send(b"x" * (3 << 19))
    assert status == 413 and "more than 1,048,576 bytes" in document["error"]["message"]
    assert server.send(b"{}", headers={"Content-Type": "text/plain"})[0] == 415
    assert server.send(b"{}", headers={"Content-Encoding": "gzip"})[0] == 415
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:  # in chunks, its length untold
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:{server.port}\r\nContent-Type: application/json\r\n"
        )
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        with contextlib.suppress(OSError):
            for _ in range(40):
                connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b" 413 " in connection.recv(100)


@pytest.mark.parametrize("headers", [
    {"Host": "evil.example"},
    {"Host": "evil.example:8000"},
    {"Host": "127.0.0.1.evil.example"},
    {"Host": "localhost@evil.example"},
    {"Host": ""},
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost.evil.example"},
    {"Origin": "file://localhost"},
])  # fmt: skip
def test_foreign_hosts_and_origins_are_refused(headers, server):
    for path, method in (("/v1/chat/completions", "POST"), ("/v1/models", "GET"), ("/metrics", "GET")):
        status, document = server.send(GOOD, path=path, method=method, headers=headers)
        assert status == 403 and document["error"]["code"] == "foreign_host"
    own = {name: f"{'http://' * (name == 'Origin')}localhost:{server.port}" for name in ("Host", "Origin")}
    assert server.send(method="GET", path="/v1/models", headers=own)[0] == 200


@contextlib.contextmanager
def running(speaker, **options):
    signals, server = main.SIGNALS, Running(speaker, **options)
    try:
        yield server
    finally:
        server.stop()
        main.SIGNALS = signals


def test_an_api_key_and_other_names(server, speaker):
    with running(speaker, key="sésame", hosts=("models.example",)) as other:
        assert other.send(GOOD)[0] == 401 and other.send(method="GET", path="/metrics")[0] == 401
        assert other.send(GOOD, headers={"Authorization": "Bearer sesame"})[0] == 401
        assert other.send(method="GET", path="/health")[0] == 200
        key = {"Authorization": "Bearer sésame".encode(), "Host": "models.example"}
        assert other.send(method="GET", path="/v1/models", headers=key)[0] == 200


def slow_down(engine, seconds=0.03):
    """Each step takes a while, so that what runs can be met running."""
    for session in engine.sessions.values():
        advance = session.advance
        session.advance = lambda budget, advance=advance: (time.sleep(seconds), advance(1))[1]


def test_more_than_the_queue_holds_is_told_to_come_back(server, speaker):
    with running(speaker, limit=4) as other:
        slow_down(other.engine)

        async def many():
            async with other.client(openai.AsyncOpenAI) as client:
                return await asyncio.gather(
                    *(ask(client, f"Which? {i}", IMAGES[0]) for i in range(10)), return_exceptions=True
                )

        found = asyncio.run(many())
        refused = [x for x in found if isinstance(x, openai.RateLimitError)]
        assert len(refused) == 6 and len([x for x in found if not isinstance(x, Exception)]) == 4
        assert "4 are allowed: ask again" in str(refused[0]) and refused[0].response.headers["retry-after"] == "1"
        assert not isinstance(ask(other.client(), "Which?", IMAGES[0]), Exception)


def test_a_client_that_leaves_frees_its_place(server, speaker):
    with running(speaker) as other:
        slow_down(other.engine)
        streams = [ask(other.client(), f"Which? {i}", IMAGES[0], stream=True) for i in range(6)]
        assert all(next(iter(stream)).choices[0].delta.role == "assistant" for stream in streams)
        wait_for(lambda: other.engine.counts()["tiny"][0] == 4)
        for stream in streams:
            stream.close()
        wait_for(lambda: other.engine.counts()["tiny"] == (0, 0) and other.engine.idle)
        body = json.dumps(GOOD | {"messages": [asked("Which?", IMAGES[0])]}).encode()
        connection = http.client.HTTPConnection("127.0.0.1", other.port)
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        wait_for(lambda: other.engine.counts()["tiny"][0] == 1)
        connection.close()
        wait_for(lambda: other.engine.counts()["tiny"] == (0, 0) and other.engine.idle)
        assert len(other.engine.sessions["tiny"].free) == 4


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_runs_is_finished_and_what_comes_is_refused(speaker, server):
    """What SIGTERM does, in this process; the command itself is tested in `test_command.py`."""
    with running(speaker) as other:
        slow_down(other.engine)
        client, found = other.client(), []
        asking = [
            threading.Thread(target=lambda i=i: found.append(ask(client, f"Which? {i}", IMAGES[i]))) for i in range(6)
        ]
        for thread in asking:
            thread.start()
        wait_for(lambda: sum(other.engine.counts()["tiny"]) == 6)
        other.signals.requested = True
        wait_for(lambda: other.engine.closing)
        with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
            ask(client, "Which?", IMAGES[0])
        assert refused.value.status_code == 503 and other.send(method="GET", path="/health")[0] == 503
        for thread in asking:
            thread.join(60)
        assert len(found) == 6 and all(x.choices[0].message.content for x in found)


def test_a_model_that_fails_says_so(server, speaker):
    with running(speaker) as other:
        session = other.engine.sessions["tiny"]

        def fail(budget):
            raise RuntimeError("RESOURCE_EXHAUSTED")

        session.advance = fail
        with pytest.raises(openai.InternalServerError, match="the model has failed: RESOURCE_EXHAUSTED"):
            ask(other.client(), "Which?", IMAGES[0])
        other.thread.join(20)
        assert not other.thread.is_alive() and isinstance(other.engine.failed, RuntimeError)


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_extra_is_named_before_anything_is_loaded(package, monkeypatch):
    monkeypatch.setattr(main, "FLAGS", types.SimpleNamespace(adapter=[], key="NO_KEY", host="127.0.0.1"))
    monkeypatch.delitem(sys.modules, "pixel_jax.serving.app")
    monkeypatch.setitem(sys.modules, package, None)
    if package == "starlette":
        monkeypatch.setitem(sys.modules, "starlette.applications", None)
    with pytest.raises(UserError, match=rf"{package}.* is missing: pip install 'pixel_jax\[serve\]'"):
        main.main("serve", ["nowhere"])


def test_a_prompt_that_nothing_fits_is_refused(speaker, monkeypatch):
    """Before anything is compiled: the tools and the system message alone are longer."""
    flags = types.SimpleNamespace(prompt_tokens=8, images=1, image_side=192)
    monkeypatch.setattr(main, "FLAGS", flags)
    with pytest.raises(UserError, match=r"--prompt_tokens=8: a question of one letter and no image has \d+ tokens"):
        main.shape_of(speaker)
    flags.prompt_tokens = 256
    assert main.shape_of(speaker).tokens == 256
