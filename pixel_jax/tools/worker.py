"""`python -m pixel_jax.tools.worker NAME ...`: carries out calls of tools of the host, one by one (`pixel_jax.tools.host`)."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pixel_jax.pictures import rgb
from pixel_jax.tools import Tool
from pixel_jax.tools.host import MOST_TEXT, receive, send
from pixel_jax.tools.named import find_tools


def main(names: list[str]) -> None:
    # What a tool prints must not stand between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    tools = find_tools(names)
    send(answers, "ready")
    while True:
        try:
            request, pixels = receive(_read)
        except EOFError:
            return
        send(answers, *answer(tools[request["tool"]], request, pixels))


def _read(count: int) -> bytes:
    found = sys.stdin.buffer.read(count)
    if len(found) < count:
        raise EOFError
    return found


def answer(tool: Tool, request: Mapping[str, Any], pixels: bytes) -> tuple[dict[str, Any], Sequence[np.ndarray]]:
    """What the tool returns to a request, or what went wrong: a document, and the picture if there is one."""
    images, at = [], 0
    for shape in request["shapes"]:
        count = int(np.prod(shape))
        images.append(np.frombuffer(pixels, np.uint8, count, at).reshape(shape))
        at += count
    try:
        text, picture = returned(tool, tool.execute(images, **request["arguments"]))
        small = None if picture is None else fitted(picture, request["side"])
    except Exception as error:  # whatever it is, the model is told, and the run goes on
        print(f"tool {tool.name!r}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return {"error": f"{type(error).__name__}: {error}"[:500].encode("utf-8", "replace").decode()}, ()
    if small is None:
        return {"text": text, "shape": None, "shrunk": False}, ()
    return {"text": text, "shape": small.shape, "shrunk": small.shape != picture.shape}, (small,)


def returned(tool: Tool, value: Any) -> tuple[str, np.ndarray | None]:
    """The text and the picture, uint8 [h, w, 3], that a tool returned; "" and None where it did not.

    TypeError, ValueError: it is something else.
    """
    text, picture = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if picture is None and not isinstance(text, str):
        text, picture = "", text
    if not isinstance(text, str):
        raise TypeError(f"a tool of the host returns a text, not {type(text).__name__}")
    text.encode()  # half a surrogate pair is no text
    if len(text) > MOST_TEXT:
        raise ValueError(f"the answer has {len(text)} characters, at most {MOST_TEXT} are read")
    if picture is None:
        return text, None
    if isinstance(picture, Image.Image):
        picture = rgb(picture, "the picture")
    if not (isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3):
        kind = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
        raise TypeError(f"a tool of the host returns a text, or a picture as uint8 [h, w, 3], not {kind}")
    if picture.shape[2] != 3 or 0 in picture.shape:
        raise TypeError(f"a picture is uint8 [h, w, 3], not {picture.shape}: Pillow's convert('RGB') makes one")
    if not tool.picture:
        raise TypeError(f"the tool {tool.name!r} returns a picture: it needs Tool(..., picture=True)")
    return text, picture


def fitted(picture: np.ndarray, side: int) -> np.ndarray:
    """The picture, made smaller if it is longer than `side`."""
    if max(picture.shape) <= side:
        return picture
    smaller = Image.fromarray(picture)
    smaller.thumbnail((side, side), reducing_gap=None)
    return np.asarray(smaller)


if __name__ == "__main__":
    main(sys.argv[1:])
