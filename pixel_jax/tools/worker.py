"""`python -m pixel_jax.tools.worker NAME ...`: carries out calls of tools of the host, one by one (`pixel_jax.tools.host`)."""

import os
import sys

import numpy as np

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
        send(answers, answer(tools[request["tool"]], request, pixels))


def _read(count: int) -> bytes:
    found = sys.stdin.buffer.read(count)
    if len(found) < count:
        raise EOFError
    return found


def answer(tool, request, pixels: bytes) -> dict[str, str]:
    """What the tool says to a request, or what went wrong."""
    images, at = [], 0
    for shape in request["shapes"]:
        count = int(np.prod(shape))
        images.append(np.frombuffer(pixels, np.uint8, count, at).reshape(shape))
        at += count
    try:
        text = tool.execute(images, **request["arguments"])
        if not isinstance(text, str):
            raise TypeError(f"a tool of the host returns a text, not {type(text).__name__}")
        text.encode()  # half a surrogate pair is no text
        if len(text) > MOST_TEXT:
            raise ValueError(f"the answer has {len(text)} characters, at most {MOST_TEXT} are read")
    except Exception as error:  # whatever it is, the model is told, and the run goes on
        print(f"tool {tool.name!r}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return {"error": f"{type(error).__name__}: {error}"[:500].encode("utf-8", "replace").decode()}
    return {"text": text}


if __name__ == "__main__":
    main(sys.argv[1:])
