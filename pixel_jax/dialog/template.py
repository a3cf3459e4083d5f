"""The text around a dialog: system prompt, tool schemas, guidelines, and the chat templates of Qwen2.5-VL, Llama 3 and LLaVA-1.5.

Every string is that of the released Pixel Reasoner checkpoints, byte for byte. One oddity is kept, because the checkpoints were
trained with it: the guidelines speak of `crop_image` where the tool is called `crop_image_normalized`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pixel_jax.dialog.formats import PIXEL_REASONER, CallFormat
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
VISUAL_TOKENS = ("vision_start", "vision_end", "image_pad", "video_pad")  # which tokenizers of language models may lack
ABSENT = -1  # the id of a special token that a tokenizer lacks


class Special(NamedTuple):
    """A token that structures a dialog. Only templates write it; no text is ever encoded as one."""

    name: str  # a key of `Layout.special`, and the field of `Vocabulary` with its id


class Media(NamedTuple):
    """The position of an image or a video in a rendered dialog."""

    kind: str  # "image" or "video"
    value: Any  # the message's value: an array, a path, an index, None
    before: str = ""  # text in front of it: the time of a temporal patch, of which each is an item (`timestamps`)

    @property
    def part(self) -> dict[str, Any]:
        """It as a part of a message."""
        return {"type": self.kind, self.kind: self.value} | ({"before": self.before} if self.before else {})


Piece = str | Special | Media  # of a rendered dialog; a str is text and never contains special tokens
IM_START, IM_END = Special("im_start"), Special("im_end")
VISION_START, VISION_END = Special("vision_start"), Special("vision_end")
BEGIN, HEADER_END = Special("begin"), Special("header_end")
Marks = tuple[str | Special, ...]  # that a layout puts around contents


class Layout(NamedTuple):
    """How a dialog is written: `begin`, and for each message its `opening`, its content and its `closing`."""

    special: Mapping[str, str]  # field of `Vocabulary`: what the tokenizer calls the token
    known_by: str  # the one of these tokens by which a tokenizer of this layout is known
    opening: Callable[[str], Marks]  # role -> marks; text comes last
    closing: Callable[[str], Marks]  # role -> marks; of the assistant's, IM_END is first, which ends a turn
    begin: Marks = ()
    image: tuple[Marks, Marks] = ((VISION_START,), (VISION_END,))  # before and behind an image or a video
    images_first: bool = False  # whether those of a message stand before all its text
    lead: str = ""  # between the marks and the text of the assistant, which writes it itself

    @property
    def prompt(self) -> Marks:
        """Where the assistant begins."""
        return self.opening("assistant")

    @property
    def behind(self) -> Marks:
        """What stands between the end of a turn and the next message."""
        return self.closing("assistant")[1:]

    @property
    def before(self) -> Marks:
        """What stands between the end of a turn and the text of an observation; text comes last."""
        return (*self.behind, *self.opening("user"))

    @property
    def after(self) -> Marks:
        """What follows an observation."""
        return (*self.closing("user"), *self.prompt)

    def turn(self, text: str) -> str:
        """Returns what the assistant writes to say `text`."""
        return self.lead + text.removeprefix(self.lead)


CHATML = Layout(
    SPECIAL_TOKENS,
    known_by="im_start",
    opening=lambda role: (IM_START, f"{role}\n"),
    closing=lambda role: (IM_END, "\n"),
)
LLAMA3 = Layout(
    {
        "end_of_text": "<|end_of_text|>",
        "im_start": "<|start_header_id|>",
        "im_end": "<|eot_id|>",
        "begin": "<|begin_of_text|>",
        "header_end": "<|end_header_id|>",
    },
    known_by="im_start",
    opening=lambda role: (IM_START, role, HEADER_END, "\n\n"),
    closing=lambda role: (IM_END,),
    begin=(BEGIN,),
)
# That of Vicuna 1.1 (`llava-hf/llava-1.5-7b-hf`). Its template writes a space where an answer of an earlier turn ends; here is
# the token that ends it, because the model has written that, and LLaVA was trained with it. No token marks where a person's
# turn begins, so a person's text can spell it.
VICUNA_ROLES = {"system": "", "user": "USER: ", "assistant": "ASSISTANT:"}
VICUNA = Layout(
    {"begin": "<s>", "end_of_text": "</s>", "im_end": "</s>", "image_pad": "<image>"},
    known_by="image_pad",
    opening=lambda role: (VICUNA_ROLES[role],),
    closing=lambda role: (IM_END,) if role == "assistant" else (" ",),
    begin=(BEGIN,),
    image=((), ("\n",)),
    images_first=True,
    lead=" ",
)
LAYOUTS = (CHATML, LLAMA3, VICUNA)


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
    shown = [item.part for item in media]
    return [
        {"role": "system", "content": system_prompt(tools, call_format)},
        {"role": "user", "content": text + shown if text_first else shown + text},
    ]


def timestamps(frames: int, seconds: float) -> list[str]:
    """Returns the texts in front of the temporal patches of a video, where each of them is an item (Qwen3-VL).

    Args:
      frames: of the video. The last one is repeated if their number is odd.
      seconds: that two frames cover.
    """
    times = [min(i, frames - 1) / (2 / seconds) for i in range(frames + frames % 2)]
    return [f"<{(first + second) / 2:.1f} seconds>" for first, second in zip(times[::2], times[1::2], strict=True)]


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


def render(
    messages: Sequence[Mapping[str, Any]], *, layout: Layout = CHATML, add_generation_prompt: bool = True
) -> list[Piece]:
    """Renders a dialog as special tokens, texts, images and videos, in order. No two texts are adjacent.

    Args:
      messages: `{"role": ..., "content": text, or a list of {"type": "text" | "image" | "video", <type>: value}}`; an image or
        a video may have a text "before" it. If the first is no system message, the default one is added.
      layout: of the tokenizer.
      add_generation_prompt: whether to end with the beginning of an assistant message.
    """
    pieces: list[Piece] = list(layout.begin)
    if messages and messages[0]["role"] != "system":
        pieces += message_pieces("system", DEFAULT_SYSTEM, layout)
    for message in messages:
        pieces += message_pieces(message["role"], message["content"], layout)
    return join_texts([*pieces, *(layout.prompt if add_generation_prompt else ())])


def message_pieces(role: str, content: str | Sequence[Mapping[str, Any]], layout: Layout = CHATML) -> list[Piece]:
    """Renders one message, in the form of `render`.

    Raises:
      ValueError: a part is neither text, image nor video.
    """
    if isinstance(content, str):
        content = [{"type": "text", "text": layout.turn(content) if role == "assistant" else content}]
    pieces: list[Piece] = []
    images: list[Piece] = []
    for part in content:
        kind = part.get("type")
        if kind == "text":
            pieces.append(part["text"])
        elif kind in ("image", "video"):
            before, behind = layout.image
            media = Media(kind, part.get(kind), part.get("before", ""))
            text = [media.before] if media.before else []
            (images if layout.images_first else pieces).extend((*text, *before, media, *behind))
        else:
            raise ValueError(f"a message's part is of type text, image or video, not {kind!r}: {part}")
    return [*layout.opening(role), *images, *pieces, *layout.closing(role)]


def join_texts(pieces: Iterable[Piece]) -> list[Piece]:
    """Joins adjacent texts, because a token may reach from one into the next."""
    joined: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def spelling(name: str) -> str:
    """What a token that structures a dialog reads like: ChatML's name of it, if it has one."""
    return next(layout.special[name] for layout in LAYOUTS if name in layout.special)


def flatten(pieces: Iterable[Piece]) -> str:
    """Returns the dialog as one text with one pad token for every image or video, as the Jinja template would.

    It is to be read, not to be encoded: a special token in it may come from the template or from a person's text.
    """

    def spelled(piece: Special | Media) -> str:
        return spelling(f"{piece.kind}_pad" if isinstance(piece, Media) else piece.name)

    return "".join(piece if isinstance(piece, str) else spelled(piece) for piece in pieces)


def to_ids(pieces: Sequence[Piece], vocabulary: Vocabulary, pads: Sequence[int]) -> list[int]:
    """Encodes a rendered dialog, with `pads[i]` pad tokens for the i-th image or video, and no other pad tokens.

    The neighbours of a text are special tokens, or it is the last. So encoding each text on its own gives the ids that the whole
    dialog would have if no text had spelled a special token.

    Raises:
      ValueError: there is not one pad count for each image or video, or the tokenizer has no token for one.
    """
    media = [piece for piece in pieces if isinstance(piece, Media)]
    if len(media) != len(pads):
        raise ValueError(f"the dialog shows {len(media)} images and videos, but {len(pads)} pad counts are given")
    if any(getattr(vocabulary, f"{item.kind}_pad") == ABSENT for item in media):
        raise ValueError(f"the dialog shows {len(media)} images and videos; the tokenizer has no tokens for them")
    ids: list[int] = []
    counts = iter(pads)
    for i, piece in enumerate(pieces):
        if isinstance(piece, str):
            ids += vocabulary.encode(vocabulary.spaced(piece, first=pieces[:i] == [BEGIN] or i == 0))
        elif isinstance(piece, Media):
            ids += [getattr(vocabulary, f"{piece.kind}_pad")] * next(counts)
        else:
            ids.append(getattr(vocabulary, piece.name))
    return ids
