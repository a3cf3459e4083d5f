"""Reads requests and writes answers of OpenAI's chat completions, as far as a rollout supports them.

A request for something that is not supported is refused, with the value at fault and the remedy. Only fields that have no meaning
here, such as `user` and `metadata`, are ignored.
"""

import base64
import binascii
import math
import re
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pixel_jax.data.images import image_size, read_image
from pixel_jax.files import parse_json
from pixel_jax.rollouts.prompts import PromptError
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.serving.conversation import ChatMessage, Part, Prompt, Role, Speaker, prompt_of
from pixel_jax.serving.session import Reader, Saw, Wrote
from pixel_jax.terminal import brief

MAX_SEED = 2**31 - 1
MAX_STOPS, MAX_STOP = 4, 200  # texts that end an answer, and their characters
MAX_MESSAGES, MAX_PARTS = 256, 256
DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,", re.IGNORECASE)
WITHOUT_MEANING = ("user", "metadata", "safety_identifier", "prompt_cache_key")
# Fields that may have one value only, and the reason.
FIXED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "send as many requests as you want answers"),
    "frequency_penalty": ((0,), "leave it out"),
    "presence_penalty": ((0,), "leave it out"),
    "logprobs": ((False,), "leave it out"),
    "top_logprobs": ((0,), "leave it out"),
    "logit_bias": (({},), "leave it out"),
    "store": ((False,), "nothing is stored: leave it out"),
    "modalities": ((["text"],), "answers are text"),
    "response_format": (({"type": "text"},), "answers are text: leave it out"),
    "tools": (([],), "the server's own tools are called on the server: leave it out"),
    "tool_choice": (("auto",), "the server's own tools are called on the server: leave it out"),
    "parallel_tool_calls": ((True, False), "leave it out"),
}
ROLES: Mapping[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
KNOWN = {
    *WITHOUT_MEANING,
    *FIXED,
    *("model", "messages", "stream", "stream_options", "temperature", "top_p", "max_tokens", "max_completion_tokens"),
    *("stop", "seed", "pixel_jax"),
}


class RequestError(ValueError):
    """A request that is refused.

    Args:
      message: what is at fault, and what to do about it.
      status: the HTTP status.
      param: the field, as OpenAI's errors name it.
      code: one word for programs.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The JSON document of the error."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class ChatRequest(NamedTuple):
    """A request that was read and checked."""

    model: str
    prompt: Prompt
    temperature: float
    seed: int
    max_tokens: int | None
    stop: tuple[str, ...]
    stream: bool
    usage: bool  # whether the last chunk of a stream counts tokens
    pictures: bool  # whether the answer has a transcript with pictures

    def reader(self, speaker: Speaker) -> Reader:
        """A reader of the row that answers the request."""
        return Reader(speaker.vocabulary, max_tokens=self.max_tokens, stop=self.stop)


def read_request(body: bytes, speakers: Mapping[str, Speaker], shapes: Mapping[str, BatchShape]) -> ChatRequest:
    """Reads the request in a body and decodes its images. It opens no file and fetches nothing.

    Args:
      body: JSON, from anybody.
      speakers: the models, by the names that requests give them.
      shapes: the batch shape that the prompts of each model have to fit.

    Raises:
      RequestError: the request is refused.
    """
    values = parse_json(body, "the body", RequestError, largest=2**63 - 1)
    if not isinstance(values, dict):
        raise RequestError(f"the body is {_kind(values)}: send a JSON object with `model` and `messages`")
    values = {name: value for name, value in values.items() if value is not None}
    if unknown := sorted(values.keys() - KNOWN):
        raise RequestError(f"unknown field {brief(unknown[0])}: leave it out", param=unknown[0][:100])
    for name, (allowed, remedy) in FIXED.items():
        if name in values and not any(_same(values[name], x) for x in allowed):
            raise _refusal(name, values[name], f"it can only be {allowed[0]!r}: {remedy}")
    model = _typed(values, "model", str, required=True)
    if model not in speakers:
        names = ", ".join(map(repr, speakers))
        raise RequestError(
            f"there is no model {brief(model)}: the models are {names}",
            status=404,
            param="model",
            code="model_not_found",
        )
    speaker, shape = speakers[model], shapes[model]
    stream = _typed(values, "stream", bool) or False
    options = _section(values, "stream_options", ("include_usage",))
    if options and not stream:
        raise RequestError("stream_options without stream: leave it out, or set stream to true", param="stream_options")
    own = _section(values, "pixel_jax", ("pictures",))
    temperature = _number(values, "temperature", 0.0, 2.0)
    top_p = _number(values, "top_p", 0.0, 1.0)
    if top_p is not None and top_p != speaker.config.top_p:
        remedy = (
            f"the server draws with {speaker.config.top_p}: leave it out, or start the server with --top_p={top_p:g}"
        )
        raise _refusal("top_p", top_p, remedy)
    seed = _integer(values, "seed", 0, MAX_SEED)
    messages = read_messages(values, shape)
    try:
        prompt = prompt_of(messages, speaker)
        prompt.placed(speaker, shape)
    except PromptError as error:
        raise RequestError(str(error), param="messages") from None
    except ValueError as error:  # a side too long for the other, a text that is none
        raise RequestError(f"messages: {error}", param="messages") from None
    return ChatRequest(
        model=model,
        prompt=prompt,
        temperature=speaker.config.temperature if temperature is None else temperature,
        seed=secrets.randbelow(MAX_SEED + 1) if seed is None else seed,
        max_tokens=_max_tokens(values, len(prompt.ids), speaker),
        stop=_stops(values),
        stream=stream,
        usage=bool(options.get("include_usage", False)),
        pictures=bool(own.get("pictures", False)),
    )


def _max_tokens(values: Mapping[str, Any], prompt: int, speaker: Speaker) -> int | None:
    """Reads the most tokens that the model may write: no more than a row has room for."""
    names = [name for name in ("max_tokens", "max_completion_tokens") if name in values]
    if len(names) > 1:
        raise RequestError("max_tokens and max_completion_tokens are the same: give one", param=names[1])
    if not names:
        return None
    left = min(speaker.config.max_response, speaker.config.max_tokens - prompt)
    wanted = _integer(values, names[0], 1, MAX_SEED)
    assert wanted is not None
    if wanted > left:
        raise _refusal(names[0], wanted, f"behind this prompt of {prompt} tokens there is room for {left}: give less")
    return wanted


def _stops(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts that end the answer."""
    stop = values.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise _refusal("stop", stop, f"give a text, or a list of up to {MAX_STOPS}")
    for text in stops:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP:
            raise _refusal("stop", text, f"give texts of 1 to {MAX_STOP} characters")
    return tuple(stops)


def read_messages(values: Mapping[str, Any], shape: BatchShape) -> list[ChatMessage]:
    """Reads the field `messages` of a request. RequestError: a message is not understood, or shows too much."""
    messages = values.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise _refusal("messages", messages, f"give a list of 1 to {MAX_MESSAGES} messages")
    left = shape.images  # images that may still follow
    parsed = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise _refusal(where, message, "give an object with `role` and `content`")
        # Clients write fields that are not set as null.
        message = {name: value for name, value in message.items() if value is not None}
        if unknown := sorted(message.keys() - {"role", "content"}):
            raise RequestError(f"{where} has the unknown field {brief(unknown[0])}: leave it out", param=where)
        role = ROLES.get(written) if isinstance(written := message.get("role"), str) else None
        if role is None:
            raise _refusal(f"{where}.role", message.get("role"), f"it can be {', '.join(ROLES)}")
        parts = _read_parts(message.get("content"), f"{where}.content", shape, left, images=role == "user")
        left -= sum(isinstance(part, np.ndarray) for part in parts)
        parsed.append(ChatMessage(role, parts))
    return parsed


def _read_parts(content: Any, where: str, shape: BatchShape, left: int, *, images: bool) -> tuple[Part, ...]:
    """Reads the texts and images of a message, at most `left` images."""
    if isinstance(content, str):
        return (content,)
    if not isinstance(content, list) or not 0 < len(content) <= MAX_PARTS:
        raise _refusal(where, content, f"give a text, or a list of 1 to {MAX_PARTS} parts")
    parts: list[Part] = []
    for i, part in enumerate(content):
        here = f"{where}[{i}]"
        match part:
            case {"type": "text", "text": str(text), **rest} if not rest:
                parts.append(text)
            case {"type": "image_url", "image_url": {"url": str(url), **options}, **rest} if not rest and images:
                if set(options) - {"detail"} or options.get("detail", "auto") not in ("auto", "high", None):
                    raise _refusal(f"{here}.image_url", options, "the model zooms in by itself: give `url` alone")
                if not left:
                    raise RequestError(
                        f"{here} is one image too many: a conversation may have {shape.images}; start the server with "
                        "more --images, or show fewer",
                        param=here,
                    )
                left -= 1
                parts.append(read_data_url(url, f"{here}.image_url.url", shape))
            case {"type": "video" | "video_url" | "input_video"} if images:
                raise _refusal(here, part, "the server reads no videos: send frames, as images in their order")
            case _:
                kinds = "{'type': 'text', 'text': ...}"
                kinds += (
                    " and {'type': 'image_url', 'image_url': {'url': 'data:image/...;base64,...'}}" if images else ""
                )
                raise _refusal(here, part, f"parts are {kinds}")
    return tuple(parts)


def read_data_url(url: str, where: str, shape: BatchShape) -> np.ndarray:
    """Decodes the image in a data URL, uint8 [h, w, 3]. RequestError: it is none, or too large for `shape`."""
    head = DATA_URL.match(url)
    if head is None:
        raise _refusal(where, url, "nothing is fetched: send the image itself, as data:image/png;base64,...")
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{where} is no base64: {error}", param=where) from None
    try:
        height, width = image_size(data, name=where)
        if height > shape.height or width > shape.width:
            raise RequestError(
                f"{where} is {width}x{height} pixels, more than {shape.width}x{shape.height}: make it smaller, or start "
                "the server with a larger --image_side",
                param=where,
            )
        return read_image(data, name=where)
    except RequestError:
        raise
    except ValueError as error:  # ImageError
        raise RequestError(str(error), param=where) from None


def _refusal(name: str, value: Any, remedy: str) -> RequestError:
    return RequestError(f"{name} is {brief(value)}: {remedy}", param=name)


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", bool: "a boolean"}.get(type(value), "a number or null")


def _same(value: Any, allowed: Any) -> bool:
    """Whether two values are equal in JSON: true is not 1."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _typed(values: Mapping[str, Any], name: str, kind: type, *, required: bool = False) -> Any:
    if name not in values and not required:
        return None
    if not isinstance(values.get(name), kind):
        what = "a text" if kind is str else "true or false"
        raise _refusal(name, values.get(name), f"give {what}")
    return values[name]


def _section(values: Mapping[str, Any], name: str, fields: Sequence[str]) -> Mapping[str, bool]:
    """An object of booleans."""
    section = values.get(name, {})
    if (
        not isinstance(section, dict)
        or set(section) - set(fields)
        or any(type(x) is not bool for x in section.values())
    ):
        raise _refusal(name, section, f"it may have {', '.join(fields)}: true or false")
    return section


def _number(values: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    value = values.get(name)
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        raise _refusal(name, value, f"give a number from {low:g} to {high:g}")
    return float(value)


def _integer(values: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _refusal(name, value, f"give a whole number from {low} to {high}")
    return value


class ChatAnswer:
    """An answer while it is written, and its documents in the protocol."""

    def __init__(self, request: ChatRequest, reader: Reader):
        self.request, self.reader = request, reader
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.content = ""
        self._between = False
        self.turns: list[dict[str, Any]] = [{"role": "assistant", "text": ""}]

    def add(self, event: Wrote | Saw) -> None:
        """Notes what the model wrote, or what it was shown."""
        if isinstance(event, Saw):
            self.turns += [self.shown(event), {"role": "assistant", "text": ""}]
            self._between = True
            return
        self.content += event.text
        # The line break before a later turn belongs to the content and to no turn.
        self.turns[-1]["text"] += event.text.removeprefix("\n") if self._between else event.text
        self._between = False

    @staticmethod
    def shown(event: Saw) -> dict[str, Any]:
        """The turn of a tool."""
        looked = [{"image": image + 1, "box": box} for image, *box in event.regions]
        return {"role": "tool", "text": event.text, "failed": event.failed, "looked_at": looked}

    def usage(self) -> dict[str, int]:
        """Counts the tokens of the prompt and those that the model wrote, without those that tools showed."""
        prompt, written = len(self.request.prompt.ids), self.reader.written
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def extension(self, transcript: Mapping[str, Any] | None) -> dict[str, Any]:
        """Makes the fields beyond OpenAI's protocol: seed, reason of the end, tokens that tools showed, and the transcript."""
        known = {"seed": self.request.seed, "stop": self.reader.reason, "shown_tokens": self.reader.shown}
        return known | ({} if transcript is None else {"transcript": transcript})

    def completion(self, transcript: Mapping[str, Any] | None) -> dict[str, Any]:
        """The whole answer, as `chat.completion`."""
        message = {"role": "assistant", "content": self.content, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": self.reader.ended, "logprobs": None}
        extension = {"turns": self.turns} | self.extension(transcript)
        return self._document("chat.completion", [choice]) | {"usage": self.usage(), "pixel_jax": extension}

    def chunk(self, delta: Mapping[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
        """A piece of a stream, as `chat.completion.chunk`."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return self._document("chat.completion.chunk", [choice]) | more

    def usage_chunk(self) -> dict[str, Any]:
        """The last piece of a stream that counts tokens."""
        return self._document("chat.completion.chunk", []) | {"usage": self.usage()}

    def _document(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.request.model,
            "choices": choices,
        }
