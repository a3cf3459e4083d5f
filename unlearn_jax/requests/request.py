"""Requests, a line of a file each: which training examples are to be removed, or what they should have been.

    {"id": "zoom-3", "kind": "remove", "reason": "consent withdrawn", "who": "A. Person", "when": "2026-11-30"}
    {"id": ["a", "b"], "kind": "remove", ...}                  several examples, by one edit
    {"id": "direct-1", "kind": "answer", "answer": "4", ...}   the answer should have been this one
    {"id": "video-0", "kind": "question", "text": "...", ...}  the question should have been this one
    {"id": "zoom-2", "kind": "image", "image": "new.png", ...} the image; its path is relative to the file of requests
    {"id": "zoom-5", "kind": "mask", "mask": "...", ...}       this part of the learned text should not have been learned
    {"id": "zoom-6", "kind": "part", "part": "0.10, 0.20", "becomes": "0.50, 0.60", ...}
                                                               this part, such as a box, should have been another
    {"id": "zoom-7", "kind": "trace", "turns": ["...", ...], ...}  the turns should have been these, as in a row of data

`when` is a date or a time in ISO 8601. All fields are required and there are no others.
"""

import dataclasses
import datetime
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from pixel_jax.files import FileError, parse_json, read_bytes, read_lines

Kind = Literal["remove", "question", "answer", "image", "mask", "part", "trace"]
# For each kind, the fields with the new content.
VALUES: Mapping[str, tuple[str, ...]] = {
    "remove": (),
    "question": ("text",),
    "answer": ("answer",),
    "image": ("image",),
    "mask": ("mask",),
    "part": ("part", "becomes"),
    "trace": ("turns",),
}
COMMON = ("id", "kind", "reason", "who", "when")
MAX_LINE = 2**20  # bytes
MAX_IMAGE = 2**26  # bytes
STORED = "sha256-"  # prefix of the name of an image's file beside a stored request; the image's hash follows


class EditRequestError(ValueError):
    """A request that cannot be carried out. The message names its place and the remedy."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A request. Two requests are equal if all fields are."""

    ids: tuple[str, ...]  # of training examples
    kind: Kind
    # The new text or answer; the text that is masked or replaced; the new turns, as JSON. Empty for other kinds.
    value: str
    image: bytes  # the file of the new image; empty for the others
    reason: str
    who: str  # who asked
    when: str  # when they asked
    becomes: str = ""  # what replaces a part; empty for other kinds

    @property
    def image_name(self) -> str:
        """The name of the image's file beside a stored request."""
        return STORED + hashlib.sha256(self.image).hexdigest()

    def stored(self) -> bytes:
        """The request as a JSON document that `parse_request` reads, the same for equal requests.

        An image is stored in a separate file, `image_name`.
        """
        fields: dict[str, Any] = {"id": list(self.ids), "kind": self.kind}
        fields |= {"reason": self.reason, "who": self.who, "when": self.when}
        match self.kind:
            case "image":
                values: tuple[Any, ...] = (self.image_name,)
            case "trace":
                values = (json.loads(self.value),)
            case _:
                values = (self.value, self.becomes)
        fields |= dict(zip(VALUES[self.kind], values, strict=False))
        return (json.dumps(fields, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_requests(path: pathlib.Path) -> list[Request]:
    """Reads the requests of a file of JSON lines, in order.

    Raises:
        EditRequestError: a line is malformed or cut off, or there is none. The message names `FILE:LINE`.
    """
    requests = list(_read(path))
    if not requests:
        raise EditRequestError(f'{path} holds no request: a line each, as {{"id": ..., "kind": "remove", ...}}')
    return requests


def _read(path: pathlib.Path) -> Iterator[Request]:
    for where, line in read_lines(path, limit=MAX_LINE, error=EditRequestError):
        try:
            value = parse_json(line, where, EditRequestError)
        except EditRequestError as error:
            cut = "" if line.endswith(b"\n") else ". The file ends in the middle of this line: get the whole file"
            raise EditRequestError(f"{error}{cut}") from None
        yield parse_request(value, where, path.parent)


def parse_request(value: Any, where: str, folder: pathlib.Path) -> Request:
    """Checks a JSON value and returns it as a `Request`.

    Args:
        value: the object of a line.
        where: its file and line, for messages.
        folder: the directory that the path of an image is relative to.

    Raises:
        EditRequestError: a field is missing, unknown or of another type, or the image cannot be read.
    """
    if not isinstance(value, dict):
        raise EditRequestError(f"{where} must be an object, not {type(value).__name__}")
    kind: Any = value.get("kind")
    if kind not in get_args(Kind):
        raise EditRequestError(f"{where}: kind must be one of {', '.join(get_args(Kind))}, not {kind!r}")
    wanted = (*COMMON, *VALUES[kind])
    if missing := [field for field in wanted if field not in value]:
        raise EditRequestError(f"{where}: a request of kind {kind!r} needs the field {missing[0]!r}")
    if unknown := [field for field in value if field not in wanted]:
        raise EditRequestError(
            f"{where}: a request of kind {kind!r} has no field {unknown[0]!r}; it has {', '.join(wanted)}"
        )
    for field in wanted[1:]:
        if field == "turns":
            continue
        if not isinstance(value[field], str) or not value[field].strip():
            raise EditRequestError(f"{where}: {field} must be a text that is not empty, not {value[field]!r}")
    ids = _ids(value["id"], kind, where)
    try:
        datetime.datetime.fromisoformat(value["when"])
    except ValueError:
        raise EditRequestError(f"{where}: when must be a date or time as 2026-11-30, not {value['when']!r}") from None
    image = _image(folder / value["image"], where) if kind == "image" else b""
    texts = [value[field] for field in VALUES[kind]] if kind != "image" else []
    if kind == "trace":
        texts = [_turns(value["turns"], where)]
    text, becomes = (*texts, "", "")[:2]
    return Request(ids, kind, text, image, value["reason"], value["who"], value["when"], becomes)


def _turns(value: Any, where: str) -> str:
    if not isinstance(value, list) or not value:
        raise EditRequestError(f"{where}: turns must be a list of turns that is not empty, not {value!r}")
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def refuse_kind(request: Request, *kinds: Kind) -> None:
    """Raises EditRequestError unless the request is of one of these kinds, which its examples support."""
    if request.kind not in kinds:
        raise EditRequestError(f"{request.ids[0]!r}: examples of this kind know {', '.join(kinds)}, not {request.kind}")


def _ids(value: Any, kind: str, where: str) -> tuple[str, ...]:
    ids = value if isinstance(value, list) else [value]
    if not ids or not all(isinstance(x, str) and x for x in ids):
        raise EditRequestError(f"{where}: id must be the id of a training example, or a list of them, not {value!r}")
    if len(ids) > 1 and kind != "remove":
        raise EditRequestError(f"{where}: a request of kind {kind!r} is about one example, not {len(ids)}")
    if twice := [x for i, x in enumerate(ids) if x in ids[:i]]:
        raise EditRequestError(f"{where}: the id {twice[0]!r} occurs twice")
    return tuple(ids)


def _image(path: pathlib.Path, where: str) -> bytes:
    try:
        return read_bytes(path, limit=MAX_IMAGE)
    except FileError as error:
        raise EditRequestError(f"{where}: {error}") from None
