"""A conversation, and the prompt made of it for the model's next answer.

Of an earlier answer the prompt has the text of the last turn only: calls and observations are left out, as the chat templates of
reasoning models leave out the reasoning of earlier answers. A conversation thus grows only by questions and final texts, and the
model looks at images again where it has to. What people wrote is encoded as text: no part of it becomes a structural token.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from pixel_jax.dialog import template
from pixel_jax.dialog.formats import CallFormat
from pixel_jax.dialog.template import Media
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.models.model import Model
from pixel_jax.models.preprocessors import FrameSampling
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.prompts import PromptError, Query, offered, place_prompts, shown_media, with_times
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.rollouts.trajectory import HostPrompts, Tables

Role = Literal["system", "user", "assistant"]


class Clip(NamedTuple):
    """A video of a conversation."""

    frames: Sequence[np.ndarray]  # uint8 [h, w, 3] each
    seconds: float  # time that two frames cover


Part = str | np.ndarray | Clip  # of a message: a text, an image uint8 [h, w, 3], or a video


class ChatMessage(NamedTuple):
    """A message of a conversation."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """Its texts, one after the other."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A model that answers, with what its prompts are made of.

    Args:
      model: the weights.
      vocabulary: the vocabulary of its tokenizer.
      tables: the tables of the tools that it may call.
      config: limits of a row and budgets of what is shown, with one row a prompt.
      guidelines: what follows each question, a key of `template.GUIDELINES`.
      sampling: which frames of a video it is used to.
    """

    model: Model
    vocabulary: Vocabulary
    tables: Tables
    config: RolloutConfig
    guidelines: str = "vcot"
    sampling: FrameSampling = FrameSampling()

    @property
    def call_format(self) -> CallFormat:
        """The format in which the model writes its calls."""
        return self.tables.parser.language.format


class Prompt(NamedTuple):
    """A conversation as the model reads it."""

    query: Query  # the last question, with the images of all messages
    ids: list[int]

    def placed(self, speaker: Speaker, shape: BatchShape, uid: int = 0) -> HostPrompts:
        """Makes the arrays that a rollout of prompts of `shape` admits. PromptError: the prompt does not fit."""
        return place_prompts([self.query], [self.ids], speaker.tables, speaker.config, shape=shape, uids=[uid])


def prompt_of(messages: Sequence[ChatMessage], speaker: Speaker) -> Prompt:
    """Makes the prompt for the answer to the last message, which is the user's.

    A system message is added to the one that says how tools are called. The first question alone, its images in front, has
    the ids that evaluation and training give it (`prompt_tokens`).

    Raises:
      PromptError: there is no question, roles do not take turns, there are several videos or a video beside images, or an
        image cannot be shown.
    """
    system = [message for message in messages if message.role == "system"]
    spoken = [message for message in messages if message.role != "system"]
    if list(messages[: len(system)]) != system:
        raise PromptError("a system message follows another message: put it first")
    roles = [message.role for message in spoken]
    if (
        not roles
        or any(role != ("assistant" if i % 2 else "user") for i, role in enumerate(roles))
        or not len(roles) % 2
    ):
        raise PromptError(
            f"the roles are {', '.join(roles) or 'none'}: they must be user and assistant in turn, first and last user"
        )
    if wrong := [i for i, message in enumerate(spoken) if message.role == "user" and not message.text.strip()]:
        raise PromptError(f"question {wrong[0] // 2 + 1} of the conversation has no text: write what you ask")
    query = _query(spoken)
    if query.images and not speaker.config.max_images:
        raise PromptError(f"{len(query.images)} images are shown, and this model sees none: ask without them")
    media, pads = shown_media(query, speaker.config) if query.images else ([], [])
    guidelines, tools = offered(speaker.guidelines, speaker.tables.tools, speaker.config)
    system_text = "\n\n".join([template.system_prompt(tools, speaker.call_format), *(x.text for x in system)])
    written = [
        {"role": "system", "content": system_text},
        *(_written(message, guidelines, speaker.call_format) for message in spoken),
    ]
    pieces = template.render(written, layout=speaker.vocabulary.layout)
    if len([piece for piece in pieces if isinstance(piece, Media)]) != len(media):
        raise PromptError("only questions may show images or videos")
    return Prompt(query, template.to_ids(with_times(pieces, query, speaker.config), speaker.vocabulary, pads))


def _query(spoken: Sequence[ChatMessage]) -> Query:
    """Makes the query of the last question, about the images or the one video of all messages."""
    shown = [part for message in spoken for part in message.parts if not isinstance(part, str)]
    clips = [part for part in shown if isinstance(part, Clip)]
    if clips and len(shown) > 1:
        count = len(shown) - len(clips)
        raise PromptError(f"{len(clips)} videos and {count} images: a conversation is about images or about one video")
    if clips:
        return Query(spoken[-1].text, list(clips[0].frames), True, clips[0].seconds)
    return Query(spoken[-1].text, [part for part in shown if isinstance(part, np.ndarray)])


def _written(message: ChatMessage, guidelines: str, call_format: CallFormat) -> dict[str, Any]:
    """Writes a message as templates take it: a question with the guidelines behind it, of an answer its last turn."""
    if message.role == "assistant":
        return {"role": "assistant", "content": last_turn(message.text, call_format)}
    parts: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        else:
            kind = "video" if isinstance(part, Clip) else "image"
            parts.append({"type": kind, kind: None})
    parts.append({"type": "text", "text": template.user_text("", guidelines)})
    return {"role": "user", "content": parts}


def last_turn(answer: str, call_format: CallFormat) -> str:
    """The text that a model wrote after its last call."""
    return answer.rpartition(call_format.closing)[2].lstrip("\n")
