"""The text around a dialog: system prompt, tool schemas, guidelines, and the chat template of Qwen2.5-VL.

Every string is that of the released Pixel Reasoner checkpoints, byte for byte. One oddity is theirs and kept, since the
checkpoints were trained with it: the guidelines speak of `crop_image` where the tool is called `crop_image_normalized`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

CROP = "crop_image_normalized"
SELECT = "select_frames"

CROP_SCHEMA = {
    "name": CROP,
    "description": (
        "Zoom in on the image based on the bounding box coordinates. It is useful when the object or text in the image "
        "is too small to be seen."
    ),
    "parameters": {
        "type": "object",
        "properties": {
            "bbox_2d": {
                "type": "array",
                "description": (
                    "coordinates for bounding box of the area you want to zoom in. Values should be within [0.0,1.0]."
                ),
                "items": {"type": "number"},
            },
            "target_image": {
                "type": "number",
                "description": (
                    "The index of the image to crop. Index from 1 to the number of images. Choose 1 to operate on "
                    "original image."
                ),
            },
        },
        "required": ["bbox_2d", "target_image"],
    },
}
SELECT_SCHEMA = {
    "name": SELECT,
    "description": "Select frames from a video.",
    "parameters": {
        "type": "object",
        "properties": {
            "target_frames": {
                "type": "array",
                "description": "List of frame indices to select from the video (no more than 8 frames in total).",
                "items": {"type": "integer", "description": "Frame index from 1 to 16."},
            }
        },
        "required": ["target_frames"],
    },
}
TOOLS = (CROP_SCHEMA, SELECT_SCHEMA)

DEFAULT_SYSTEM = "You are a helpful assistant."

# The rendering of Qwen-Agent's NousFnCallPrompt.
_TOOLS_PROMPT = """

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
%s
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


def system_prompt(tools: Sequence[Mapping[str, Any]] = TOOLS) -> str:
    """The system message: one line of JSON for every tool, or no word of tools where there are none."""
    if not tools:
        return DEFAULT_SYSTEM
    lines = [json.dumps({"type": "function", "function": tool}, ensure_ascii=False) for tool in tools]
    return DEFAULT_SYSTEM + _TOOLS_PROMPT % "\n".join(lines)


# What follows the question, after two newlines. "vcot" begins with two of its own.
GUIDELINES = {
    "vcot": (
        "\n\nGuidelines: Understand the given visual information and the user query. Determine if it is beneficial to "
        "employ the given visual operations (tools). For a video, we can look closer by `select_frames`. For an image, "
        "we can look closer by `crop_image`. Reason with the visual information step by step, and put your final "
        "answer within \\boxed{}."
    ),
    "notool": "Please think step by step, and put your final answer within \\boxed{}.",
    "default": "Please reason step by step, and put your final answer within \\boxed{}.",
}


def user_text(question: str, guidelines: str = "vcot") -> str:
    """The text of the first user message; `guidelines` is a key of `GUIDELINES`."""
    if guidelines not in GUIDELINES:
        raise ValueError(f"unknown guidelines {guidelines!r}: choose one of {sorted(GUIDELINES)}")
    return f"{question}\n\n{GUIDELINES[guidelines]}"


class Media(NamedTuple):
    """A place in a rendered dialog that an image or a video fills."""

    kind: str  # "image" or "video"
    value: Any  # whatever the message carried: an array, a path, an index, None


def first_messages(
    question: str,
    media: Sequence[Media],
    *,
    guidelines: str = "vcot",
    tools: Sequence[Mapping[str, Any]] = TOOLS,
    text_first: bool = False,
) -> list[dict[str, Any]]:
    """System and user message that open a dialog.

    Reinforcement learning and evaluation show the images (or the video) first; the released instruction-tuning data puts
    them after the text (`text_first`).
    """
    text = [{"type": "text", "text": user_text(question, guidelines)}]
    shown = [{"type": item.kind, item.kind: item.value} for item in media]
    return [
        {"role": "system", "content": system_prompt(tools)},
        {"role": "user", "content": text + shown if text_first else shown + text},
    ]


# Qwen2.5-VL's own chat template, without its option to number the pictures. Observations are user messages, and roles
# are not checked, as in the original.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n"
    "{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}"
    "{{ content['text'] }}"
    "{% endif %}"
    "{% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def render(messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> list[str | Media]:
    """The dialog as stretches of text with the images and videos between them, in order.

    `messages`: `{"role": ..., "content": text, or a list of {"type": "text" | "image" | "video", <type>: value}}`.
    A dialog that does not begin with a system message gets the default one. Two texts never follow each other.
    """
    pieces: list[str | Media] = []
    if messages and messages[0]["role"] != "system":
        pieces.append(f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n")
    for message in messages:
        pieces.append(f"<|im_start|>{message['role']}\n")
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = part.get("type")
            if kind == "text":
                pieces.append(part["text"])
            elif kind in ("image", "video"):
                pieces += ["<|vision_start|>", Media(kind, part.get(kind)), "<|vision_end|>"]
            else:
                raise ValueError(f"a message's part is of type text, image or video, not {kind!r}: {part}")
        pieces.append("<|im_end|>\n")
    if add_generation_prompt:
        pieces.append("<|im_start|>assistant\n")
    merged: list[str | Media] = []
    for piece in pieces:
        if isinstance(piece, str) and merged and isinstance(merged[-1], str):
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def flatten(pieces: Sequence[str | Media]) -> str:
    """The rendered dialog as one text with one pad token for every image or video: what the Jinja template gives."""
    return "".join(piece if isinstance(piece, str) else f"<|{piece.kind}_pad|>" for piece in pieces)


def to_ids(pieces: Sequence[str | Media], encode: Callable[[str], list[int]], pads: Sequence[int]) -> list[int]:
    """Token ids of a rendered dialog: `pads[i]` pad tokens for the i-th image or video.

    A text's neighbours are special tokens, so encoding stretch by stretch gives the ids that the whole text would have.
    """
    media = [piece for piece in pieces if isinstance(piece, Media)]
    if len(media) != len(pads):
        raise ValueError(f"the dialog shows {len(media)} images and videos, but {len(pads)} pad counts are given")
    ids: list[int] = []
    counts = iter(pads)
    for piece in pieces:
        ids += encode(piece) if isinstance(piece, str) else encode(f"<|{piece.kind}_pad|>") * next(counts)
    return ids
