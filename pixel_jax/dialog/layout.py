"""The layout of a model's dialogs: its chat template, and the pieces that it writes around turns.

A whole dialog is rendered by the template itself. The pieces between the turns of a compiled rollout must be known
beforehand: they are found by rendering short dialogs of made-up words and taking what the template writes between the words.

A rendered dialog is a list of pieces: texts, special tokens, images and videos. Special tokens are those that the template
wrote, never letters of a message: a text that spells one is broken up by markers for the rendering.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pixel_jax.dialog.sandbox import TemplateError, render_source


class Special(NamedTuple):
    """A token that structures a dialog. Only templates write it; no text is ever encoded as one."""

    name: str  # a key of `Layout.special`


class Media(NamedTuple):
    """The position of an image or a video in a rendered dialog."""

    kind: str  # "image" or "video"
    value: Any  # the message's value: an array, a path, an index, None


class Place(enum.Enum):
    """The position of a text, on which its ids depend with tokenizers that put a space before some texts."""

    DIALOG = enum.auto()  # at the very beginning
    SPECIAL = enum.auto()  # behind a special token
    TEXT = enum.auto()  # behind another text


Piece = str | Special | Media  # of a rendered dialog; a str is text and never contains special tokens
Marks = tuple[str | Special, ...]  # pieces that the template writes itself
VISUAL = {"image_pad": "image", "video_pad": "video"}

# Made-up words, which no template contains, for the texts of a system message, questions and an answer.
SYSTEM, FIRST, ANSWER, SECOND, CAPTION = "Sqvfoa", "Uwpkeb", "Azmtic", "Oxjgud", "Chqlye"
NEVER = re.compile(r"<\|\w+\|>")  # text that looks like a special token


class Layout(NamedTuple):
    """A chat template, with what it writes around turns.

    Attributes:
      source: the template.
      special: name -> the tokenizer's spelling of the token. `im_end` is the token that ends a turn of the model.
      variables: tokens by the names that the template has for them (`bos_token`, ...).
      before: pieces between the end of a turn and the text of an observation, which is a message of the user.
      after: pieces between an observation or a question and the answer of the model.
      lead: what the template writes at the beginning of an answer; in a rollout the model writes it.
      tail: what the template writes between an answer and `im_end`; in a rollout the model writes it.
      image: pieces before and behind each image.
      images_first: whether a message's images stand before its text, wherever the message has them.
      lists: whether the template takes messages of text as lists of parts, not as texts.
      system: whether the template takes system messages; if not, they are put in front of the first question.
      begin: name of a token that the tokenizer puts before every dialog that does not begin with it (`to_ids`).
    """

    source: str
    special: Mapping[str, str]
    variables: Mapping[str, str]
    before: Marks = ()
    after: Marks = ()
    lead: str = ""
    tail: str = ""
    image: tuple[Marks, Marks] = ((), ())
    images_first: bool = False
    lists: bool = False
    system: bool = True
    begin: str | None = None

    @classmethod
    def from_template(
        cls,
        source: str,
        names: Mapping[str, str],
        *,
        tokens: Collection[str] = (),
        variables: Mapping[str, str] | None = None,
        begin: str | None = None,
    ) -> Layout:
        """Finds what a template writes around turns.

        Args:
          source: the template.
          names: the tokenizer's spelling of a special token -> its name. Tokens with the names `image_pad` and `video_pad` stand
            for images and videos; any may have its own spelling for a name.
          tokens: spellings of the other tokens, which may also occur in text.
          variables: tokens by the names that the template has for them; `eos_token` ends a turn if the template writes no
            token that does.
          begin: spelling of the token that the tokenizer puts before every text.

        Raises:
          TemplateError: these pieces cannot be found; the message says what the template writes, and what to do.
        """
        try:
            layout = cls(source, {name: text for text, name in names.items()}, dict(variables or {}))
            return _derive(layout, tokens, begin)
        except TemplateError as error:
            remedy = "put one that transformers can render with these roles into chat_template.jinja"
            raise TemplateError(f"the model's chat template cannot be used: {error}; {remedy}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> list[Piece]:
        """Renders a dialog as special tokens, texts, images and videos, in order. No two texts are adjacent.

        Args:
          messages: `{"role": ..., "content": text, or a list of {"type": "text" | "image" | "video", <type>: value}}`.
          add_generation_prompt: whether to end where the model begins.

        Raises:
          ValueError: a part is neither text, image nor video, or the template does not show an image of the messages.
          TemplateError: the template refuses the messages.
        """
        parts = [part for x in messages for part in ([] if isinstance(x["content"], str) else x["content"])]
        for part in parts:
            if part.get("type") not in ("text", *VISUAL.values()):
                raise ValueError(f"a message's part is of type text, image or video, not {part.get('type')!r}: {part}")
        plain_texts = [x["content"] for x in messages if isinstance(x["content"], str)]
        marker = _unused("".join([self.source, *plain_texts, *(part.get("text", "") for part in parts)]))
        text = self._write(messages, add_generation_prompt, marker)
        shown = {
            kind: [Media(kind, part.get(kind)) for part in parts if part["type"] == kind] for kind in VISUAL.values()
        }
        return self._pieces(text, shown, marker)

    def _write(self, messages: Sequence[Mapping[str, Any]], prompt: bool, marker: str = "") -> str:
        """Renders the template, with a marker in texts that spell special tokens."""
        written = [
            {**message, "content": self._content(message["content"], marker)}
            for message in (messages if self.system else _without_system(messages))
        ]
        values = {"messages": written, "tools": None, "documents": None, "add_generation_prompt": prompt}
        return render_source(self.source, {**self.variables, **values})

    def _content(self, content: str | Sequence[Mapping[str, Any]], marker: str) -> str | list[dict[str, Any]]:
        """Makes the content of a message as the template takes it, without special tokens in its texts."""
        opaque = functools.partial(_opaque, spellings=tuple(self.special.values()), marker=marker)
        if isinstance(content, str):
            return [{"type": "text", "text": opaque(content)}] if self.lists else opaque(content)
        if not self.lists and all(part["type"] == "text" for part in content):
            return opaque("".join(part["text"] for part in content))
        return [
            {"type": "text", "text": opaque(part["text"])} if part["type"] == "text" else {"type": part["type"]}
            for part in content
        ]

    def _pieces(self, text: str, shown: Mapping[str, Sequence[Media]], marker: str = "") -> list[Piece]:
        """Splits what the template wrote at its special tokens."""
        names = {spelling: name for name, spelling in self.special.items()}
        left = {kind: iter(media) for kind, media in shown.items()}
        counts = dict.fromkeys(shown, 0)
        pieces: list[Piece] = []
        for i, piece in enumerate(_splitter(tuple(names)).split(text) if names else [text]):
            if i % 2 == 0:
                if plain := piece.replace(marker, "") if marker else piece:
                    pieces.append(plain)
                continue
            kind = VISUAL.get(names[piece])
            if kind is None:
                pieces.append(Special(names[piece]))
                continue
            counts[kind] = counts.get(kind, 0) + 1
            pieces.append(next(left.get(kind, iter(())), Media(kind, None)))
        if wrong := [kind for kind, media in shown.items() if counts[kind] != len(media)]:
            kind, where = wrong[0], "has no token for them" if not counts[wrong[0]] else "repeats or drops some"
            raise ValueError(
                f"the dialog shows {len(shown[kind])} {kind}s, the chat template {counts[kind]}: it {where}"
            )
        return pieces

    def observation(self, content: Sequence[Mapping[str, Any]]) -> list[Piece]:
        """Returns the pieces between the end of a turn and the next one, where a tool answers with these texts and images."""
        texts = [part["text"] for part in content if part["type"] == "text"]
        if self.images_first:
            content = [*(part for part in content if part["type"] != "text"), {"type": "text", "text": "".join(texts)}]
        shown = [
            [part["text"]]
            if part["type"] == "text"
            else [*self.image[0], Media(part["type"], part.get(part["type"])), *self.image[1]]
            for part in content
        ]
        return join_texts([*self.before, *(piece for pieces in shown for piece in pieces), *self.after])


def join_texts(pieces: Iterable[Piece]) -> list[Piece]:
    """Joins adjacent texts, because a token may reach from one into the next."""
    joined: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        elif piece != "":
            joined.append(piece)
    return joined


def _without_system(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Moves the system message in front of the first question, with an empty line between the two."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return list(messages)
    system, question, *others = messages
    parts = [
        [{"type": "text", "text": x["content"]}] if isinstance(x["content"], str) else list(x["content"])
        for x in (system, question)
    ]
    return [{**question, "content": [*parts[0], {"type": "text", "text": "\n\n"}, *parts[1]]}, *others]


@functools.lru_cache(maxsize=64)
def _splitter(spellings: tuple[str, ...]) -> re.Pattern[str]:
    """Matches special tokens, of two that begin alike the longer one, as tokenizers do."""
    return re.compile("(" + "|".join(map(re.escape, sorted(spellings, key=len, reverse=True))) + ")")


@functools.lru_cache(maxsize=64)
def _edges(spellings: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the proper ends and the proper beginnings of special tokens."""
    return tuple({x[i:] for x in spellings for i in range(1, len(x))}), tuple(
        {x[:i] for x in spellings for i in range(1, len(x))}
    )


def _opaque(text: str, spellings: tuple[str, ...], marker: str) -> str:
    """Puts a marker around each character of a text that spells a special token or could be a part of one.

    White space around the text stays outside, because templates strip it.
    """
    core = text.strip()
    rests, starts = _edges(spellings)
    if not core or not (core.startswith(rests) or core.endswith(starts) or _splitter(spellings).search(core)):
        return text
    at = text.index(core)
    return text[:at] + marker + marker.join(core) + marker + text[at + len(core) :]


def _unused(text: str) -> str:
    """Returns a character of the private use area that does not occur in a text."""
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)


def _says(role: str, *parts: str | None) -> dict[str, Any]:
    """Makes a message of one text, or of texts and images (None)."""
    if len(parts) == 1 and parts[0] is not None:
        return {"role": role, "content": parts[0]}
    return {
        "role": role,
        "content": [{"type": "image"} if text is None else {"type": "text", "text": text} for text in parts],
    }


def _derive(layout: Layout, tokens: Collection[str], begin: str | None) -> Layout:
    """Completes a layout that has only its template and the names of tokens (`Layout.from_template`)."""
    names = {spelling: name for name, spelling in layout.special.items()}
    if short := [spelling for spelling in names if len(spelling) == 1]:
        raise TemplateError(f"the special token {short[0]!r} is one character, which every text may have")
    layout = _reads(layout)
    question, answer, second_question = _says("user", FIRST), _says("assistant", ANSWER), _says("user", SECOND)
    system_messages = [_says("system", SYSTEM)] if layout.system else []
    first = layout._write([*system_messages, question], True)
    whole = layout._write([*system_messages, question, answer, second_question], True)
    ended = layout._write([*system_messages, question, answer], False)
    if unknown := [x for x in NEVER.findall(whole) if x not in names and x not in tokens]:
        raise TemplateError(f"it writes {unknown[0]}, and the tokenizer has no special token {unknown[0]}")
    for word in (FIRST, ANSWER, SECOND):
        if whole.count(word) != 1:
            raise TemplateError(f"it writes a message {whole.count(word)} times, not once")
    after, closing, between = (
        text.partition(word)[2] for text, word in ((first, FIRST), (ended, ANSWER), (whole, ANSWER))
    )
    answers, between, after_second = whole.partition(FIRST)[2].partition(ANSWER)[0], *between.split(SECOND)
    if after != after_second:
        raise TemplateError(f"behind the first question it writes {after!r}, behind a later one {after_second!r}")

    split = functools.partial(_marks, layout)
    ends = [piece for piece in split(closing) if isinstance(piece, Special)]
    if ends:
        end = layout.special[ends[0].name]
        tail, _, behind = between.partition(end)
        if closing.partition(end)[0] != tail:
            raise TemplateError(f"behind an answer it writes {closing!r} at the end, and {between!r} before a question")
    elif end := layout.variables.get("eos_token", ""):
        if end not in names:
            raise TemplateError(f"the tokenizer's eos_token {end!r} is no special token of it")
        tail, behind = "", between
    else:
        raise TemplateError("it writes no special token behind an answer, and the tokenizer names no eos_token")
    names = {x: x if name == "im_end" else name for x, name in names.items()} | {end: "im_end"}
    layout = layout._replace(special={name: spelling for spelling, name in names.items()})
    split = functools.partial(_marks, layout)
    lead = answers.removeprefix(after) if answers.startswith(after) else ""
    if any(isinstance(piece, Special) for piece in (*split(lead), *split(tail))):
        lead, tail = "", ""
    layout = layout._replace(before=split(behind), after=split(after), lead=lead, tail=tail)
    if "image_pad" in layout.special:
        layout = _with_images(layout, system_messages)
    return layout._replace(begin=None if begin is None else names.get(begin))


def _reads(layout: Layout) -> Layout:
    """Finds whether the template takes texts or lists of parts, and whether it takes system messages."""
    question, system_message, errors = _says("user", FIRST), _says("system", SYSTEM), []
    for lists in (False, True):
        for system in (True, False):
            layout = layout._replace(lists=lists, system=system)
            try:
                text = layout._write([system_message, question], True)
            except TemplateError as error:
                errors.append(error)
                continue
            if lists and f"'text': {FIRST!r}" in text:
                errors.append(TemplateError("it writes the parts of a message as a list, not their texts"))
            elif SYSTEM in text and FIRST in text:
                return layout
    raise errors[0] if errors else TemplateError("it does not write the text of a question")


def _with_images(layout: Layout, messages: list[dict[str, Any]]) -> Layout:
    """Adds the pieces around images, if the template shows any."""
    try:
        text = layout._write([*messages, _says("user", FIRST, None, None, CAPTION)], True)
    except TemplateError:
        return layout
    pad = layout.special["image_pad"]
    if text.count(pad) != 2:
        return layout
    before, between, behind = text.split(pad)
    size = next(i for i in range(len(between), -1, -1) if behind.startswith(between[:i]))
    split = functools.partial(_marks, layout)
    return layout._replace(image=(split(between[size:]), split(between[:size])), images_first=FIRST not in before)


def _marks(layout: Layout, text: str) -> Marks:
    """Splits a stretch of what the template wrote into pieces."""
    names = {spelling: name for name, spelling in layout.special.items()}
    parts = _splitter(tuple(names)).split(text) if names else [text]
    return tuple(Special(names[part]) if i % 2 else part for i, part in enumerate(parts) if part)
