"""A client of OpenAI-compatible chat-completions endpoints for many threads: it retries, limits its rate and caches on disk.

with Endpoint("http://localhost:8000/v1", "Qwen/Qwen2.5-VL-72B-Instruct", key="MY_API_KEY", cache="runs/answers") as ask:
    ask.complete([user("What is this?", image)], temperature=0.7, max_tokens=256)
"""

import asyncio
import base64
import dataclasses
import datetime
import email.utils
import hashlib
import io
import json
import logging as python_logging
import math
import os
import pathlib
import random
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2
import numpy as np
from absl import logging
from PIL import Image

from pixel_jax.config import positive
from pixel_jax.files import write_file

# At lower levels these libraries log the headers of responses, in which an endpoint may repeat the key.
for _name in ("httpx2", "httpcore2"):
    python_logging.getLogger(_name).setLevel(python_logging.WARNING)

MAX_RESPONSE = 4 << 20  # bytes of a response's body
MAX_IMAGE_PIXELS = 1 << 21  # of an image that is sent; larger ones are made smaller
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds between tries; doubled each time
LONGEST_RETRY_AFTER = 600.0  # seconds an endpoint may ask us to wait
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # statuses that another try may mend
SETUP = {301, 302, 303, 307, 308, 401, 402, 403, 404, 405}  # statuses that every request would get


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """A model behind an OpenAI-compatible chat-completions endpoint, and how often it may be asked."""

    url: str  # ends before /chat/completions
    model: str  # its name at the endpoint
    key: str | None = None  # name of the environment variable that holds the API key
    requests_per_second: float | None = None  # at most; None: no limit
    retries: int = 6  # of a request that fails
    timeout: float = 120.0  # seconds of one try
    workers: int = 16  # requests under way at a time
    cache: str | None = None  # directory of answers. None: a synthesis has it in its run directory, a judge has none

    def __post_init__(self):
        positive(self, "requests_per_second", "timeout", "workers")
        if self.retries < 0:
            raise ValueError(f"retries must not be negative: {self.retries}")

    def connect(self, cache: str | os.PathLike | None = None) -> "Endpoint":
        """Makes a client. `cache` is the directory of its answers where the config names none."""
        return Endpoint(
            self.url,
            self.model,
            key=self.key,
            requests_per_second=self.requests_per_second,
            retries=self.retries,
            timeout=self.timeout,
            cache=cache if self.cache is None else os.path.expanduser(self.cache),
        )


class EndpointError(OSError):
    """The endpoint cannot be used: down or busy after all tries, a wrong key, a wrong address."""


class NoAnswerError(EndpointError):
    """The endpoint works, but its answer to this request has no usable text.

    It is refused, filtered, empty, cut at its token limit, not Unicode (half a surrogate pair), or has the API key in it.
    """


def image_url(image: np.ndarray, max_pixels: int = MAX_IMAGE_PIXELS) -> str:
    """A data URL (JPEG) of an image uint8 [h, w, 3], made smaller if it has more than `max_pixels`."""
    picture = Image.fromarray(image)
    if picture.width * picture.height > max_pixels:
        shrink = (max_pixels / (picture.width * picture.height)) ** 0.5
        picture = picture.resize((max(int(picture.width * shrink), 1), max(int(picture.height * shrink), 1)))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def user(text: str, *images: np.ndarray) -> dict[str, Any]:
    """A message of the user: images (uint8 [h, w, 3]) first, then the text."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": image_url(image)}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


class Endpoint:
    """A chat model at an address. It is safe to share among threads.

    Args:
      url: the address; it ends before `/chat/completions`.
      model: the name by which the endpoint knows it.
      key: name of the environment variable that holds the API key. The key is only ever sent to `url`: it is in no
        message, cache or log. Where the endpoint accepts any key, choose one that no answer would contain.
      requests_per_second: the limit for the requests of all threads together.
      retries: further tries after the first, for a busy or failing endpoint. All threads honour its `Retry-After`.
      timeout: seconds that one try may take, from the connection to the last byte.
      cache: directory of answers. One is found by its whole request (address, model, messages with images, sampling).

    Raises:
      EndpointError: the address is not valid, or the variable of the key is not set.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        requests_per_second: float | None = None,
        retries: int = 6,
        timeout: float = 120.0,
        cache: str | os.PathLike | None = None,
    ):
        try:
            address = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise EndpointError(f"{url!r} is no address: {error}") from None
        if address.scheme not in ("http", "https") or not address.host or address.userinfo or address.query:
            raise EndpointError(f"an endpoint is http(s)://host/path, without user or query, not {url!r}")
        if requests_per_second is not None and not requests_per_second > 0:
            raise ValueError(f"requests_per_second must be positive, not {requests_per_second}")
        if retries < 0 or not timeout > 0:
            raise ValueError(f"retries must not be negative and timeout be positive, not {retries} and {timeout}")
        self.url, self.model, self.retries, self.timeout = url.rstrip("/"), model, retries, timeout
        self.cache = None if cache is None else pathlib.Path(cache)
        self._secret = os.environ.get(key, "").strip() if key else ""
        if key and not (self._secret.isascii() and self._secret.isprintable() and self._secret):
            raise EndpointError(
                f"the environment variable {key} does not hold an API key: it is unset or not plain text"
            )
        self._pause = 0.0 if requests_per_second is None else 1 / requests_per_second
        self._next, self._lock = 0.0, threading.Lock()  # when the next request may be sent, on the monotonic clock
        # Compression is refused: a small compressed answer could unpack to any length.
        self._headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._secret:
            self._headers["Authorization"] = f"Bearer {self._secret}"
        self._client = httpx2.AsyncClient(timeout=None, limits=httpx2.Limits(max_connections=None))
        # Exchanges run in an event loop, because only there one deadline covers all that an exchange waits for.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()

    def complete(self, messages: Sequence[Mapping[str, Any]], **sampling: Any) -> str:
        """Asks the model and returns the text of its answer.

        The same request is answered the same way from the cache. For another answer change the request, by its `seed`.

        Args:
            messages: the messages of the conversation, as the endpoint takes them.
            **sampling: further fields of the request (`temperature`, ...).

        Raises:
            EndpointError: the endpoint cannot be used.
            NoAnswerError: the answer to this request has no usable text.
        """
        if unwanted := sampling.keys() & {"model", "messages", "stream", "n"}:
            raise ValueError(f"{sorted(unwanted)[0]!r} is no sampling field of a single, whole answer")
        body = {"model": self.model, "messages": list(messages), **sampling}
        if not is_text(json.dumps(body, ensure_ascii=False)):
            raise NoAnswerError("a message is no text that can be sent: it has half a surrogate pair")
        file = self._kept({"url": self.url, **body})
        text = _read(file)
        if text is None or self._reveals(text):
            text = self._ask(body)
            _write(file, text)
        return text

    def close(self) -> None:
        """Ends the thread and the connections."""
        if self._thread.is_alive():
            self._wait_for(self._client.aclose())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, {self.model!r})"

    def _kept(self, request: Mapping[str, Any]) -> pathlib.Path | None:
        """The file of the cache that belongs to a request; None: there is no cache."""
        if self.cache is None:
            return None
        written = json.dumps(request, sort_keys=True, ensure_ascii=False, allow_nan=False)
        name = hashlib.sha256(written.encode("utf-8", "surrogatepass")).hexdigest()
        return self.cache / name[:2] / f"{name}.json"

    def _ask(self, body: Mapping[str, Any]) -> str:
        problem = ""
        for attempt in range(self.retries + 1):
            self._await_turn()
            wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
            try:
                status, headers, content = self._wait_for(self._post(body))
            except TimeoutError:
                problem = f"no whole answer in {self.timeout} s"
            except httpx2.HTTPError as error:
                problem = self._said(f"{type(error).__name__}: {error}")
            else:
                excerpt = self._said(content.decode("utf-8", "replace"))
                compressed = headers.get("content-encoding", "identity").strip().lower() not in ("", "identity")
                if status in SETUP:
                    where = f" to {self._said(headers['location'])}" if "location" in headers else ""
                    raise EndpointError(f"{self.url} answers {status}{where}: {excerpt}")
                if 200 <= status < 300 and compressed:
                    problem = "its answer is compressed, although the request forbids that"
                elif 200 <= status < 300:
                    try:
                        return self._text_of(json.loads(content))
                    except (ValueError, RecursionError):
                        problem = f"its answer is no chat completion: {excerpt!r}"
                elif status in AGAIN:
                    problem = f"it answers {status}: {excerpt}"
                    if (retry_after := _retry_after(headers)) is not None:
                        if retry_after > LONGEST_RETRY_AFTER:
                            raise EndpointError(
                                f"{self.url} answers {status} and asks to come back in {retry_after:.0f} s"
                            )
                        wait = max(wait, retry_after)
                        self._hold_back(wait)
                else:
                    raise NoAnswerError(f"{self.url} refuses a request with {status}: {excerpt}")
            if attempt < self.retries:
                logging.info("%s, try %d of %d: %s", self.url, attempt + 1, self.retries + 1, problem)
                time.sleep(wait)
        raise EndpointError(f"{self.url} gave no answer in {self.retries + 1} tries; in the last one: {problem}")

    async def _post(self, body: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        """Sends one try; returns status, headers and undecoded content. TimeoutError after `timeout` seconds."""
        content, address = bytearray(), f"{self.url}/chat/completions"
        sent = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        async with asyncio.timeout(self.timeout):
            async with self._client.stream("POST", address, content=sent, headers=self._headers) as response:
                async for chunk in response.aiter_raw():
                    content += chunk
                    if len(content) > MAX_RESPONSE:
                        raise NoAnswerError(f"{self.url} answers with more than {MAX_RESPONSE} bytes")
                return response.status_code, response.headers, bytes(content)

    def _wait_for(self, exchange: Any) -> Any:
        """The result of a coroutine that runs in the loop; an interruption of the caller cancels it."""
        future = asyncio.run_coroutine_threadsafe(exchange, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _await_turn(self) -> None:
        with self._lock:
            start = max(self._next, time.monotonic())
            self._next = start + self._pause
        time.sleep(max(start - time.monotonic(), 0.0))

    def _hold_back(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def _hide(self, text: str) -> str:
        """Removes the key from `text`, also as URLs and JSON write it: endpoints often repeat a key that they refuse."""
        escaped = json.dumps(self._secret)[1:-1]
        for written in (self._secret, urllib.parse.quote(self._secret, safe=""), escaped, escaped.replace("/", "\\/")):
            text = text.replace(written, "***") if written else text
        return text

    def _said(self, text: str) -> str:
        """A text of the endpoint as messages show it: without the key, and cut to 300 characters."""
        return self._hide(text).strip()[:300]

    def _reveals(self, text: str) -> bool:
        return self._hide(text) != text

    def _text_of(self, reply: Any) -> str:
        """The text of a chat completion. ValueError: it is none; NoAnswerError: it has no usable text."""
        match reply:
            case {"choices": [{"message": dict(message)} as choice, *_]}:
                reason = choice.get("finish_reason")
                if message.get("refusal"):
                    raise NoAnswerError(f"the model refuses: {self._said(str(message['refusal']))}")
                if reason in ("length", "content_filter"):
                    raise NoAnswerError(f"the answer was cut off ({reason})")
                text = message.get("content")
                if not isinstance(text, str) or not text.strip():
                    raise NoAnswerError(f"the answer has no text (finish_reason {self._said(repr(reason))})")
                if not is_text(text):
                    raise NoAnswerError("the answer is no text: it has half a surrogate pair")
                if self._reveals(text):
                    raise NoAnswerError("the answer repeats the API key")
                return text
        raise ValueError("no chat completion")


def is_text(text: str) -> bool:
    """Whether `text` can be written as UTF-8: JSON can also spell halves of surrogate pairs, which cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the header `Retry-After` (seconds, or a date) asks to wait; None where it is neither."""
    written = headers.get("retry-after", "")
    try:
        seconds = float(written)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(written)
            if date.tzinfo is None:
                return None
            seconds = (date - datetime.datetime.now(datetime.UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError, IndexError):
            return None
    return None if math.isnan(seconds) else max(seconds, 0.0)


def _read(path: pathlib.Path | None) -> str | None:
    if path is None or not path.is_file():
        return None
    try:
        match json.loads(path.read_text("utf-8")):
            case {"answer": str(text)} if is_text(text):
                return text
    except ValueError:
        pass
    logging.warning("%s is no cached answer; it is asked for again", path)
    return None


def _write(path: pathlib.Path | None, text: str) -> None:
    """Writes an answer to the cache, whole or not at all."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps({"answer": text}))
