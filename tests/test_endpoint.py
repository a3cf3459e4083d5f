"""An endpoint that is slow, busy, down, refusing, or talks nonsense: over real HTTP, to a server on this machine."""

import base64
import datetime
import email.utils
import io
import json
import logging
import socket
import threading
import time
import traceback
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from pixel_jax import endpoint
from pixel_jax.endpoint import Endpoint, EndpointError, NoAnswerError, image_url, user
from tests.chat_server import Reply, chat_server, dripping, endless

ASK = [{"role": "user", "content": "What is this?"}]
BUSY = Reply({"error": {"message": "overloaded"}}, 503)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No proxy between this process and itself, and short waits."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)


def listed(*replies):
    """Replies in turn; the last one for ever."""
    return lambda number, request: replies[min(number, len(replies) - 1)]


def test_the_request_is_the_openai_one(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    picture = np.zeros((20, 30, 3), np.uint8)
    with chat_server(listed("A cat.")) as server, Endpoint(server.url + "/", "a-model", key="SOME_KEY") as ask:
        assert ask.complete([user("What is this?", picture)], temperature=0.5, seed=3) == "A cat."
        assert "sk-secret" not in repr(ask)
    (received,) = server.received
    assert received.path == "/v1/chat/completions"
    assert received.headers["authorization"] == "Bearer sk-secret"
    assert received.headers["content-type"] == "application/json"
    parts = [
        {"type": "image_url", "image_url": {"url": image_url(picture)}},
        {"type": "text", "text": "What is this?"},
    ]
    messages = [{"role": "user", "content": parts}]
    assert received.body == {"model": "a-model", "messages": messages, "temperature": 0.5, "seed": 3}


@pytest.mark.parametrize(("shape", "expected"), [((150, 200), (200, 150)), ((200, 400), (282, 141))])
def test_images_are_sent_within_a_size(shape, expected):
    ramp = np.linspace(0, 255, shape[0], dtype=np.uint8)[:, None, None] * np.ones((1, shape[1], 3), np.uint8)
    head, data = image_url(ramp, max_pixels=40_000).split(",")
    assert head == "data:image/jpeg;base64"
    found = Image.open(io.BytesIO(base64.b64decode(data)))
    assert found.size == expected
    assert np.abs(np.asarray(found.resize(shape[::-1]), int) - ramp).mean() < 2


@pytest.mark.parametrize("status", sorted(endpoint.AGAIN))
def test_a_busy_endpoint_is_asked_again(status):
    with chat_server(listed(Reply("", status), Reply("", status), "yes")) as server, Endpoint(server.url, "m") as ask:
        assert ask.complete(ASK) == "yes"
    assert len(server.received) == 3


GARBAGE = {
    "no JSON": b"<html>Bad gateway</html>",
    "half of it": b'{"choices": [{"message": {"content": "ye',
    "no choices": {"choices": []},
    "another shape": {"choices": [{"text": "yes"}]},
    "a list": [1, 2],
    "bytes of no encoding": b"\xff\xfe\x00",
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_nonsense_is_asked_again_and_then_named(garbage):
    with chat_server(listed(Reply(GARBAGE[garbage]), "yes")) as server, Endpoint(server.url, "m") as ask:
        assert ask.complete(ASK) == "yes"
    with chat_server(listed(Reply(GARBAGE[garbage]))) as server, Endpoint(server.url, "m", retries=1) as ask:
        with pytest.raises(EndpointError, match="in 2 tries.*no chat completion") as caught:
            ask.complete(ASK)
    assert len(server.received) == 2 and not isinstance(caught.value, NoAnswerError)


def test_an_endpoint_that_stays_down_is_given_up():
    with chat_server(listed(BUSY)) as server, Endpoint(server.url, "m", retries=3) as ask:
        with pytest.raises(EndpointError, match="gave no answer in 4 tries.*503.*overloaded"):
            ask.complete(ASK)
    assert len(server.received) == 4
    with Endpoint(server.url, "m", retries=1) as ask, pytest.raises(EndpointError, match="2 tries.*ConnectError"):
        ask.complete(ASK)  # nobody listens any more


def test_a_slow_answer_is_not_waited_for():
    done = threading.Event()

    def answer(number, request):
        if number == 0:
            done.wait(60)
        return "soon"

    with chat_server(answer) as server, Endpoint(server.url, "m", timeout=1.0) as ask:
        assert ask.complete(ASK) == "soon"
        done.set()
    assert len(server.received) >= 2


class Clock:
    """Stands still, and notes how long it was asked to sleep."""

    def __init__(self):
        self.slept, self.monotonic = [], lambda: 100.0

    def sleep(self, seconds):
        self.slept.append(pytest.approx(seconds))


def test_waits_grow_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(endpoint, "time", clock := Clock())
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 8.0)
    monkeypatch.setattr(endpoint.random, "uniform", lambda low, high: high)
    with chat_server(listed(BUSY)) as server, Endpoint(server.url, "m", retries=4) as ask:
        with pytest.raises(EndpointError, match="in 5 tries"):
            ask.complete(ASK)
    assert clock.slept == [
        0,
        8,
        0,
        16,
        0,
        32,
        0,
        60,
        0,
    ]  # a turn to be awaited before each try, a wait after each but one


def test_retry_after_is_honoured_by_everybody(monkeypatch):
    monkeypatch.setattr(endpoint, "time", clock := Clock())
    stop = Reply("", 429, {"retry-after": "30"})
    with chat_server(listed(stop, "yes")) as server, Endpoint(server.url, "m") as ask:
        assert ask.complete(ASK) == "yes"
        assert clock.slept == [0, 30, 30]  # the clock stands still: the second try still finds the endpoint closed
        assert ask.complete(ASK, seed=1) == "yes"
        assert clock.slept == [0, 30, 30, 30]


def test_the_rate_is_kept_by_all_threads_together(monkeypatch):
    monkeypatch.setattr(endpoint, "time", clock := Clock())
    with chat_server(listed("yes")) as server, Endpoint(server.url, "m", requests_per_second=20) as ask:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: ask.complete(ASK, seed=i), range(8)))
    assert sorted(x.expected for x in clock.slept) == pytest.approx([i / 20 for i in range(8)])


def test_retry_after_may_be_a_date_and_not_for_ever():
    later = lambda seconds: email.utils.format_datetime(
        datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds), usegmt=True
    )
    assert 50 < endpoint._retry_after({"retry-after": later(60)}) <= 60
    assert endpoint._retry_after({"retry-after": later(-60)}) == 0
    assert endpoint._retry_after({"retry-after": "soon"}) is None and endpoint._retry_after({}) is None
    with chat_server(listed(Reply("", 429, {"retry-after": "86400"}))) as server, Endpoint(server.url, "m") as ask:
        with pytest.raises(EndpointError, match="come back in 86400 s"):
            ask.complete(ASK)
    assert len(server.received) == 1


@pytest.mark.parametrize("status", [301, 401, 403, 404])
def test_what_no_request_would_survive_stops_at_once(status):
    headers = {"location": "http://127.0.0.1:9/elsewhere"} if status == 301 else {}
    with chat_server(listed(Reply({"error": "no"}, status, headers))) as server, Endpoint(server.url, "m") as ask:
        with pytest.raises(EndpointError, match=f"answers {status}.*no") as caught:
            ask.complete(ASK)
    assert len(server.received) == 1 and not isinstance(caught.value, NoAnswerError)


REFUSALS = {
    "400": (Reply({"error": "content policy"}, 400), "refuses a request with 400: .*content policy"),
    "cut": (Reply("A long", finish="length"), r"cut off \(length\)"),
    "filtered": (Reply("A", finish="content_filter"), "cut off"),
    "empty": (Reply(" \n"), "has no text"),
    "null": (Reply({"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}), "has no text"),
    "refusal": (Reply({"choices": [{"message": {"content": None, "refusal": "I won't"}}]}), "refuses: I won't"),
    "endless": (Reply(b" " * (endpoint.MAX_RESPONSE + 1)), "more than 4194304 bytes"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_request_without_a_usable_answer(name, tmp_path):
    reply, message = REFUSALS[name]
    with chat_server(listed(reply)) as server, Endpoint(server.url, "m", cache=tmp_path) as ask:
        with pytest.raises(NoAnswerError, match=message):
            ask.complete(ASK)
    assert len(server.received) == 1
    assert not list(tmp_path.rglob("*.json"))  # only answers are kept


def test_answers_are_kept_by_their_whole_request(tmp_path):
    with chat_server(lambda number, request: f"answer {number}") as server:
        with Endpoint(server.url, "m", cache=tmp_path) as ask:
            questions = [
                dict(messages=ASK),
                dict(messages=ASK, seed=1),
                dict(messages=[{"role": "user", "content": "What is that?"}]),
                dict(messages=[user("What is this?", np.zeros((9, 9, 3), np.uint8))]),
                dict(messages=[user("What is this?", np.full((9, 9, 3), 255, np.uint8))]),
            ]
            first = [ask.complete(**question) for question in questions]
        with Endpoint(server.url, "m", cache=tmp_path) as again:
            assert [again.complete(**question) for question in questions] == first
        assert len(server.received) == len(questions)
        with Endpoint(server.url, "another", cache=tmp_path) as other:
            assert other.complete(ASK) == f"answer {len(questions)}"
        kept = sorted(tmp_path.rglob("*.json"))
        assert len(kept) == len(questions) + 1 and not list(tmp_path.rglob("*.part"))
        for path in kept:  # as after a full disk: not an answer, and not believed
            path.write_text('{"answer": ')
        with Endpoint(server.url, "m", cache=tmp_path) as again:
            assert again.complete(ASK) == f"answer {len(questions) + 1}"


def test_threads_share_an_endpoint_and_its_cache(tmp_path):
    gate = threading.Barrier(4, timeout=20)  # all four requests are under way at once

    def answer(number, request):
        gate.wait()
        return request["messages"][0]["content"].upper()

    with chat_server(answer) as server, Endpoint(server.url, "m", cache=tmp_path) as ask, ThreadPoolExecutor(4) as pool:
        wanted = [f"word {i}" for i in range(4)]
        ask_one = lambda text: ask.complete([{"role": "user", "content": text}])
        assert list(pool.map(ask_one, wanted)) == [text.upper() for text in wanted]
        assert list(pool.map(ask_one, wanted)) == [text.upper() for text in wanted]
    assert len(server.received) == 4


def test_the_key_is_in_no_message_log_or_file(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    replies = listed(Reply(b"sk-secret is busy", 503), "yes", Reply(b"wrong key: sk-secret", 401))
    with caplog.at_level(logging.DEBUG), chat_server(replies) as server:
        with Endpoint(server.url, "m", key="SOME_KEY", cache=tmp_path) as ask:
            assert ask.complete(ASK) == "yes"
            with pytest.raises(EndpointError, match=r"wrong key: \*\*\*") as caught:
                ask.complete(ASK, seed=1)
    assert "sk-secret" not in caplog.text + str(caught.value) + repr(vars(caught.value))
    for path in tmp_path.rglob("*"):
        assert "sk-secret" not in path.name and (path.is_dir() or b"sk-secret" not in path.read_bytes())
    for value in ("", " ", "sk-se\ncret"):
        monkeypatch.setenv("SOME_KEY", value)
        with pytest.raises(EndpointError, match="SOME_KEY does not hold an API key") as caught:
            Endpoint(server.url, "m", key="SOME_KEY")
        assert "cret" not in str(caught.value)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
PACKED = HEAD + b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


EMPTY_BLOCK = b"\x00\x00\x00\xff\xff"  # of a deflate stream: it unpacks to nothing


NEVER_DONE = {
    "headers a byte at a time": dripping(HEAD * 100),
    "one header a byte at a time": dripping(b"x" * 10_000, HEAD + b"X-Long: "),
    "hints, slowly": endless(b"", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", 0.02),
    "hints, fast": endless(b"", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 500),
    "a body a byte at a time": dripping(b" " * 10_000, HEAD + b"Content-Length: 10000\r\n\r\n"),
    "empty blocks of gzip": endless(PACKED + chunk(b"\x1f\x8b\x08\0\0\0\0\0\0\3"), chunk(EMPTY_BLOCK), 0.01),
    "nothing at all": endless(b"", b"", 0.05),
}


@pytest.mark.parametrize("name", NEVER_DONE)
def test_a_try_ends_in_time_whatever_comes(name):
    with chat_server(listed(NEVER_DONE[name], "yes")) as server, Endpoint(server.url, "m", timeout=0.6) as ask:
        began = time.monotonic()
        assert ask.complete(ASK) == "yes"
        assert time.monotonic() - began < 6
    with chat_server(listed(NEVER_DONE[name])) as server, Endpoint(server.url, "m", timeout=0.3, retries=1) as ask:
        with pytest.raises(EndpointError, match="in 2 tries"):
            ask.complete(ASK)


def test_a_request_that_is_not_taken_ends_in_time():
    """The other end stops to read: what is sent waits, too."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        began = time.monotonic()
        with Endpoint(url, "m", timeout=0.5, retries=0) as ask:
            with pytest.raises(EndpointError, match="no whole answer in 0.5 s"):
                ask.complete([{"role": "user", "content": "x" * 20_000_000}])
        assert time.monotonic() - began < 6


TROUBLE = {
    "gzip that is none": Reply(b'{"choices": []}', headers={"content-encoding": "gzip"}),
    "gzip": Reply(zlib.compress(b"{}", wbits=31), headers={"content-encoding": "gzip"}),
    "six encodings": Reply(b"x", headers={"content-encoding": ", ".join(["gzip"] * 6)}),
    "an unknown encoding": Reply(b"x", headers={"content-encoding": "\xe9"}),
    "gzip of an error": Reply(b"x", 503, {"content-encoding": "gzip"}),
    "come back on no day": Reply("", 429, {"retry-after": "Fri, 99 Jan 99999999999999999999 00:00:00 GMT"}),
    "come back in no time": Reply("", 429, {"retry-after": "nan"}),
    "come back some day": Reply("", 429, {"retry-after": "99999999999999999999-99-99"}),
    "no status": Reply(raw=lambda send: send(b"HELLO\r\n\r\n")),
    "a strange status": Reply(raw=lambda send: send(b"HTTP/1.1 999999 OK\r\n\r\n")),
    "two lengths": Reply(raw=lambda send: send(HEAD + b"Content-Length: 3\r\nContent-Length: 5\r\n\r\n{}")),
    "a bad chunk": Reply(raw=lambda send: send(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}")),
    "half a body": Reply(raw=lambda send: send(HEAD + b"Content-Length: 100\r\n\r\n{}")),
    "a long header": Reply(raw=lambda send: send(HEAD + b"X: " + b"y" * 2_000_000 + b"\r\n\r\n{}")),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_any_trouble_on_the_line_is_a_try(name, tmp_path):
    with chat_server(listed(TROUBLE[name], "yes")) as server, Endpoint(server.url, "m", cache=tmp_path) as ask:
        assert ask.complete(ASK) == "yes"
        assert server.received[0].headers["accept-encoding"] == "identity"
    assert len(server.received) == 2
    with chat_server(listed(TROUBLE[name])) as server, Endpoint(server.url, "m", retries=1) as ask:
        with pytest.raises(EndpointError, match="in 2 tries"):
            ask.complete(ASK)


def test_what_is_no_text_is_no_answer_and_is_not_kept(tmp_path):
    half = Reply(b'{"choices": [{"message": {"content": "A cat \\ud800."}, "finish_reason": "stop"}]}')
    with chat_server(listed(half, "A cat.")) as server, Endpoint(server.url, "m", cache=tmp_path) as ask:
        with pytest.raises(NoAnswerError, match="no text: it has half a surrogate pair"):
            ask.complete(ASK)
        assert not list(tmp_path.rglob("*.json"))
        assert ask.complete(ASK) == "A cat."
        (kept,) = tmp_path.rglob("*.json")
        kept.write_text('{"answer": "A cat \\ud800."}')  # as an earlier release kept it
        assert ask.complete(ASK) == "A cat."
        with pytest.raises(NoAnswerError, match="no text that can be sent"):
            ask.complete([{"role": "user", "content": "\ud800"}])
    assert len(server.received) == 3


KEY = "sk-s3cret/key"
LEAKS = {
    "where to": Reply("", 302, {"location": f"http://127.0.0.1:9/?key={KEY}"}),
    "where to, quoted": Reply("", 302, {"location": "http://127.0.0.1:9/?key=sk-s3cret%2Fkey"}),
    "an error": Reply({"error": KEY}, 400),
    "an error as some write it": Reply(b'{"error": "sk-s3cret\\/key"}', 400),
    "a refusal": Reply({"choices": [{"message": {"content": None, "refusal": f"not for {KEY}"}}]}),
    "a reason": Reply({"choices": [{"message": {"content": None}, "finish_reason": KEY}]}),
    "an answer": Reply(f"The key is {KEY}."),
    "an answer in escapes": Reply(b'{"choices": [{"message": {"content": "sk\\u002ds3cret\\/key"}}]}'),
    "no status": Reply(raw=lambda send: send(f"{KEY}\r\n\r\n".encode())),
    "no answer": Reply([KEY]),
    "a header": Reply("", 503, {"x-key": KEY}),
}


@pytest.mark.parametrize("name", LEAKS)
def test_the_key_does_not_come_back(name, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("SOME_KEY", KEY)
    with caplog.at_level(logging.DEBUG), chat_server(listed(LEAKS[name])) as server:
        with Endpoint(server.url, "m", key="SOME_KEY", cache=tmp_path, retries=1) as ask:
            with pytest.raises(EndpointError) as caught:
                ask.complete(ASK)
    said = "".join(traceback.format_exception(caught.value)) + caplog.text + repr(vars(caught.value))
    assert "s3cret" not in said
    assert not list(tmp_path.rglob("*.json"))


def test_an_answer_with_the_key_in_an_old_cache_is_asked_for_again(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_KEY", KEY)
    with chat_server(listed("one", "two")) as server:
        with Endpoint(server.url, "m", key="SOME_KEY", cache=tmp_path) as ask:
            assert ask.complete(ASK) == "one"
            (kept,) = tmp_path.rglob("*.json")
            kept.write_text(json.dumps({"answer": f"It is {KEY}"}))
            assert ask.complete(ASK) == "two"


def test_mistakes_are_named():
    for url in ("localhost:8000", "file:///etc/passwd", "http:///v1", "http://me:pass@host/v1", "http://host/v1?x=1"):
        with pytest.raises(EndpointError, match="an endpoint is http"):
            Endpoint(url, "m")
    with pytest.raises(EndpointError, match="'http://host:port' is no address"):
        Endpoint("http://host:port", "m")
    with pytest.raises(ValueError, match="requests_per_second must be positive, not 0"):
        Endpoint("http://localhost", "m", requests_per_second=0)
    with pytest.raises(ValueError, match="-1 and 3"):
        Endpoint("http://localhost", "m", retries=-1, timeout=3)
    with Endpoint("http://localhost", "m") as ask, pytest.raises(ValueError, match="'stream' is no sampling field"):
        ask.complete(ASK, stream=True)
