"""The text around a dialog: system prompt, tool schemas, guidelines, and the chat templates of Qwen2.5-VL and Llama 3.

The last two are for tokenizers without a template of their own; a model's own template goes first (`layout.py`).

Every string is that of the released Pixel Reasoner checkpoints, byte for byte. One oddity is kept, because the checkpoints were
trained with it: the guidelines speak of `crop_image` where the tool is called `crop_image_normalized`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pixel_jax.dialog.formats import PIXEL_REASONER, CallFormat
from pixel_jax.dialog.layout import Layout, Media, Piece, Place, Special, join_texts
from pixel_jax.tools import RELEASED, Tool

if TYPE_CHECKING:
    from pixel_jax.dialog.tokenizer import Vocabulary

DEFAULT_SYSTEM = "You are a helpful assistant."


def system_prompt(tools: Sequence[Tool] = RELEASED, call_format: CallFormat = PIXEL_REASONER) -> str:
    """Returns the system message, which describes the tools if there are any."""
    return call_format.system_prompt(tools) if tools else DEFAULT_SYSTEM


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
    """Returns the text of the first user message.

    Raises:
      ValueError: `guidelines` is no key of `GUIDELINES`.
    """
    if guidelines not in GUIDELINES:
        raise ValueError(f"unknown guidelines {guidelines!r}: choose one of {sorted(GUIDELINES)}")
    return f"{question}\n\n{GUIDELINES[guidelines]}"


# The names that Qwen2.5-VL's vocabulary gives to the tokens that structure a dialog. Parsers, rewards and transcripts know a
# dialog by them, whatever tokenizer wrote it.
SPECIAL_TOKENS = {
    "end_of_text": "<|endoftext|>",
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image_pad": "<|image_pad|>",
    "video_pad": "<|video_pad|>",
}
VISUAL_TOKENS = ("vision_start", "vision_end", "image_pad", "video_pad")  # tokenizers of language models may lack them
ABSENT = -1  # the id of a special token that a tokenizer lacks
# Spellings of the same tokens in other tokenizers.
OTHER_SPELLINGS = {"<|end_of_text|>": "end_of_text", "<image>": "image_pad", "<video>": "video_pad"}


def first_messages(
    question: str,
    media: Sequence[Media],
    *,
    guidelines: str = "vcot",
    tools: Sequence[Tool] = RELEASED,
    call_format: CallFormat = PIXEL_REASONER,
    text_first: bool = False,
) -> list[dict[str, Any]]:
    """Returns the system and the user message that open a dialog.

    Reinforcement learning and evaluation show the images (or the video) first; the released instruction-tuning data puts
    them after the text (`text_first`).
    """
    text = [{"type": "text", "text": user_text(question, guidelines)}]
    shown = [{"type": item.kind, item.kind: item.value} for item in media]
    return [
        {"role": "system", "content": system_prompt(tools, call_format)},
        {"role": "user", "content": text + shown if text_first else shown + text},
    ]


def in_patches(pieces: Sequence[Piece], times: Sequence[str]) -> list[Piece]:
    """Writes a rendered dialog about a video with its temporal patches, each behind its time and between marks of its own.

    The marks that the template writes around the video stay around all of them, as in transformers since 5.10.
    """
    start, end = Special("vision_start"), Special("vision_end")
    written: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, Media) and piece.kind == "video":
            written += [part for time in times for part in (time, start, piece, end)]
        else:
            written.append(piece)
    return join_texts(written)


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


CHATML = Layout.from_template(CHAT_TEMPLATE, {text: name for name, text in SPECIAL_TOKENS.items()})

# Llama 3's, for tokenizers with its tokens and without a template: Llama 3 (base) is one.
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def render(
    messages: Sequence[Mapping[str, Any]], *, layout: Layout = CHATML, add_generation_prompt: bool = True
) -> list[Piece]:
    """Renders a dialog: `Layout.render`."""
    return layout.render(messages, add_generation_prompt=add_generation_prompt)


def spelling(name: str) -> str:
    """Returns the spelling of a token that structures a dialog: ChatML's, if it has one."""
    return SPECIAL_TOKENS.get(name, name)


def flatten(pieces: Iterable[Piece]) -> str:
    """Returns the dialog as one text with one pad token for every image or video, as the Jinja template would.

    It is to be read, not to be encoded: a special token in it may come from the template or from a person's text.
    """

    def spelled(piece: Special | Media) -> str:
        return spelling(f"{piece.kind}_pad" if isinstance(piece, Media) else piece.name)

    return "".join(piece if isinstance(piece, str) else spelled(piece) for piece in pieces)


def to_ids(
    pieces: Sequence[Piece], vocabulary: Vocabulary, pads: Sequence[int], place: Place = Place.DIALOG
) -> list[int]:
    """Encodes a rendered dialog, with `pads[i]` pad tokens for the i-th image or video, and no other pad tokens.

    The neighbours of a text are special tokens. So encoding each text on its own gives the ids that the whole dialog would have
    if no text had spelled a special token.

    Args:
      pieces: the pieces of the dialog, or of a part of one.
      vocabulary: the vocabulary of the tokenizer.
      pads: the number of pad tokens of each image or video.
      place: the position of the first piece.

    Raises:
      ValueError: the number of pad counts is not that of images and videos, or the tokenizer has no tokens for these.
    """
    media = [piece for piece in pieces if isinstance(piece, Media)]
    if len(media) != len(pads):
        raise ValueError(f"the dialog shows {len(media)} images and videos, but {len(pads)} pad counts are given")
    if any(getattr(vocabulary, f"{item.kind}_pad") == ABSENT for item in media):
        raise ValueError(f"the dialog shows {len(media)} images and videos; the tokenizer has no tokens for them")
    counts = iter(pads)
    begin = vocabulary.layout.begin if place is Place.DIALOG else None
    start = [] if begin is None or Special(begin) in pieces[:1] else [vocabulary.special[begin]]
    ids: list[int] = []
    for piece in pieces:
        if isinstance(piece, str):
            ids += vocabulary.encode(piece, Place.SPECIAL if ids else place)
        elif isinstance(piece, Media):
            ids += [getattr(vocabulary, f"{piece.kind}_pad")] * next(counts)
        else:
            ids.append(vocabulary.special[piece.name])
    return start + ids
