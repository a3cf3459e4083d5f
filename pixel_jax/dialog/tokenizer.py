"""Tokenizers: a view of fast tokenizers whose tokens are bytes, and a builder of small ones.

`Vocabulary` reads a Hugging Face tokenizer (Qwen's, SmolLM2's, or one of `build_tokenizer`): the bytes of every token, and the
ids of the special tokens and of the ten digits. The bytes serve to parse the text of a policy (`call_parser.py`); observations
are assembled from ids (`observations.py`).

`build_tokenizer` makes a tokenizer whose tokens are the caller's pieces of text and the 256 bytes, so that every text survives
`decode(encode(text))`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from pixel_jax.dialog.formats import MARKS
from pixel_jax.dialog.template import (
    ABSENT,
    CHAT_TEMPLATE,
    CHATML,
    LAYOUTS,
    SPECIAL_TOKENS,
    VISUAL_TOKENS,
    Layout,
    spelling,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

KNOWN_TEXTS = 4096  # texts whose ids are cached


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """Returns the characters that stand for the 256 bytes in the files of a byte-level tokenizer (GPT-2's convention)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def _spell(text: str) -> str:
    """Writes `text` in the byte alphabet."""
    characters = {byte: character for character, byte in byte_alphabet().items()}
    return "".join(characters[byte] for byte in text.encode())


class TokenBytes(NamedTuple):
    """The bytes of every token, one after another: token v is `data[start[v] : start[v] + length[v]]`."""

    data: np.ndarray  # uint8 [N]
    start: np.ndarray  # int32 [V]
    length: np.ndarray  # int32 [V]

    @classmethod
    def of(cls, tokens: Sequence[bytes]) -> TokenBytes:
        """Joins the bytes of tokens."""
        length = np.array([len(token) for token in tokens], np.int32)
        data = np.frombuffer(b"".join(tokens) or b"\0", np.uint8)
        return cls(data, (np.cumsum(length) - length).astype(np.int32), length)

    def __getitem__(self, token):
        # A NamedTuple is indexed by field, so indexing by token would be a silent mistake.
        raise TypeError("TokenBytes is read through .data, .start and .length, or Vocabulary.to_bytes")


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """The ids of a fast tokenizer whose tokens are bytes: a byte-level one, or one of SentencePiece with byte fallback.

    `table` covers the ids 0..len(tokenizer)-1. An id that the tokenizer does not use, and any id beyond (a model's
    embedding is often padded), has no bytes.

    `encode` never returns a token that structures a dialog, whoever wrote the text. Those tokens are the fields `end_of_text` to
    `video_pad`, which templates put between texts (`template.to_ids`). The tokenizer of a language model may lack the four of
    images and videos: their ids are `ABSENT` then, which no text has. The bytes of all of them are ChatML's spelling, by which
    parsers, rewards and transcripts know them, whatever the tokenizer calls them.
    """

    tokenizer: PreTrainedTokenizerFast
    # The same tokenizer, for which the spelling of a special token is ordinary text, and which adds no space (`spaced`).
    encoder: Tokenizer
    table: TokenBytes
    end_of_text: int
    im_start: int
    im_end: int
    vision_start: int
    vision_end: int
    image_pad: int
    video_pad: int
    digits: tuple[int, ...]  # the tokens of "0", "1", ... "9"
    layout: Layout = CHATML  # how dialogs are written
    begin: int = ABSENT  # of a dialog, in Llama 3's layout
    header_end: int = ABSENT  # behind a role, in Llama 3's layout
    prefix: Prefix = "never"  # where the tokenizer puts a space before a text
    known: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict, repr=False)  # texts encoded before

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
        """Reads a tokenizer.

        Raises:
          TypeError: it is no fast tokenizer.
          ValueError: its tokens are not bytes, or it lacks a special token or a digit. All tokens of images and videos may be
            lacking, not some of them.
        """
        tokens = token_bytes(tokenizer)
        added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        layout = next((x for x in LAYOUTS if x.special[x.known_by] in added), CHATML)
        encoder = text_encoder(tokenizer, layout)
        blind = not any(layout.special.get(name) in added for name in VISUAL_TOKENS)
        spelled = {name: text for name, text in layout.special.items() if not (blind and name in VISUAL_TOKENS)}
        if missing := [text for text in spelled.values() if text not in added]:
            raise ValueError(
                f"the tokenizer has no special token {missing[0]}: dialogs are written with <|im_start|> and <|im_end|> "
                "(ChatML), or as Llama 3 or LLaVA-1.5 have them, so take a model that was tuned on one of these"
            )
        special: dict[str, Any] = dict.fromkeys(("im_start", *VISUAL_TOKENS), ABSENT)
        special |= {name: added[text] for name, text in spelled.items()}
        for name in spelled:
            tokens[special[name]] = spelling(name).encode()
        for text in spelled.values():
            if set(special.values()) & set(encoder.encode(text, add_special_tokens=False).ids):
                raise ValueError(
                    f"the tokenizer cannot write {text} as text: its vocabulary has it beside its special tokens"
                )
        # As the tokenizer writes it: SentencePiece has a second token for the byte.
        written = {digit: encoder.encode(digit, add_special_tokens=False).ids for digit in "0123456789"}
        missing = [digit for digit, ids in written.items() if len(ids) != 1 or tokens[ids[0]] != digit.encode()]
        if missing:
            raise ValueError(
                f"the tokenizer has no token for {missing} alone: numbers in observations are written digit by digit"
            )
        digits, prefix = tuple(ids[0] for ids in written.values()), prefix_of(tokenizer)
        return cls(tokenizer, encoder, TokenBytes.of(tokens), digits=digits, layout=layout, prefix=prefix, **special)

    @functools.cached_property
    def structure(self) -> frozenset[int]:
        """The tokens that structure a dialog."""
        return frozenset(getattr(self, name) for name in self.layout.special) - {ABSENT}

    def spaced(self, text: str, *, first: bool = False) -> str:
        """Returns `text` with the space that the tokenizer puts before one behind a special token, or before the `first` one."""
        return " " + text if self.prefix == "always" or (first and self.prefix == "first") else text

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`, to the byte. A special token spelled out in it is encoded as its letters.

        Raises:
          ValueError: it is no Unicode text (half a surrogate pair), or the tokenizer encodes a special token in spite of that.
        """
        # System prompts, tags and sentences repeat in every row. Encoding them again would take half of the time of making a row.
        ids = self.known.get(text)
        if ids is None:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError(f"{text[:200]!r} holds half a surrogate pair, which is no Unicode text") from None
            ids = tuple(self.encoder.encode(text, add_special_tokens=False).ids)
            if not self.structure.isdisjoint(ids):
                raise ValueError(f"the tokenizer makes tokens that structure a dialog of {text[:200]!r}")
            if len(self.known) >= KNOWN_TEXTS:
                self.known.clear()
            self.known[text] = ids
        return list(ids)

    def to_bytes(self, ids: Sequence[int]) -> bytes:
        """Returns the bytes of `ids`, special tokens written out."""
        data, start, length = self.table.data, self.table.start, self.table.length
        known = (int(index) for index in ids if 0 <= index < len(start))
        return b"".join(data[start[index] : start[index] + length[index]].tobytes() for index in known)


def text_encoder(tokenizer: PreTrainedTokenizerFast, layout: Layout = CHATML) -> Tokenizer:
    """Copies a fast tokenizer so that the spelling of a special token is text like any other.

    The tags of calls stay tokens if the tokenizer has them (Qwen's does, not as special ones), because turns are text.
    It is a copy, because transformers resets this option of its own at every call, which is not safe among threads.
    """
    from tokenizers import Tokenizer

    document = json.loads(tokenizer.backend_tokenizer.to_str())
    _without_prefix(document)
    for token in document["added_tokens"]:
        special = token["special"] or token["content"] in layout.special.values()
        token["special"] = special and token["content"] not in MARKS
    encoder = Tokenizer.from_str(json.dumps(document | {"truncation": None, "padding": None}))
    encoder.encode_special_tokens = True
    return encoder


SPACE = "▁"  # as SentencePiece writes it
Prefix: TypeAlias = Literal["never", "first", "always"]  # before no text, the first of an input, or every one


def prefix_of(tokenizer: PreTrainedTokenizerFast) -> Prefix:
    """Returns before which texts a tokenizer puts a space."""
    return _without_prefix(json.loads(tokenizer.backend_tokenizer.to_str()))


def _without_prefix(document: dict[str, Any]) -> Prefix:
    """Changes a `tokenizer.json` so that no space is put before texts; returns before which one was."""
    normalizer, split = document.get("normalizer") or {}, document.get("pre_tokenizer") or {}
    if split.get("type") == "Metaspace":
        scheme = split.get("prepend_scheme", "always")
        split["prepend_scheme"] = "never"
        return scheme
    steps = normalizer.get("normalizers", [])
    if {"type": "Prepend", "prepend": SPACE} not in steps:
        return "never"
    normalizer["normalizers"] = [step for step in steps if step.get("type") != "Prepend"]
    return "always"


def sentencepiece_token(text: str) -> bytes:
    """Returns the bytes of a token of SentencePiece with byte fallback."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", text)
    return bytes([int(byte[1], 16)]) if byte else text.replace(SPACE, " ").encode()


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """Returns the bytes of every token id of a fast tokenizer; b"" for ids that are not used.

    Raises:
      TypeError: it is no fast tokenizer.
      ValueError: its tokens are not bytes.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(f"{type(tokenizer).__name__} is not a fast tokenizer: it has no tokenizer.json behind it")
    document = json.loads(backend.to_str())
    decoder = document["decoder"] or {}
    kinds = {part.get("type") for part in decoder.get("decoders", [decoder])}
    # Of SentencePiece: the space that `Strip` takes away is the one that is put before a text.
    fallback = document["model"].get("byte_fallback") and {"Replace", "ByteFallback"} <= kinds
    fallback = fallback and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"}
    if kinds != {"ByteLevel"} and not fallback:
        raise ValueError(
            f"the tokenizer's decoder is {decoder.get('type')}, neither ByteLevel nor that of SentencePiece with byte fallback: "
            "its tokens are not bytes, which calls are read from; take a model with such a tokenizer (Qwen's, LLaVA's)"
        )
    alphabet = byte_alphabet()
    vocabulary = backend.get_vocab(with_added_tokens=False)
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    tokens = [b""] * (max([*vocabulary.values(), *added]) + 1)
    for text, index in vocabulary.items():
        try:
            tokens[index] = sentencepiece_token(text) if fallback else bytes([alphabet[x] for x in text])
        except KeyError as error:
            raise ValueError(f"token {index} {text!r} has {error}, which is outside the byte alphabet") from None
    for index, text in added.items():
        tokens[index] = text.encode()
    return tokens


def build_tokenizer(pieces: Sequence[str]) -> PreTrainedTokenizerFast:
    """Builds a tokenizer with `pieces` (texts of two bytes or more) as single tokens, and the 256 bytes for everything else.

    At every position of a text the longest piece that matches is a token. The ids are bytes 0..255, the pieces in order, then
    the special tokens. It is saved and loaded like any tokenizer of transformers.

    Raises:
      ValueError: a piece is too short, repeated, or contains a special token.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = list(SPECIAL_TOKENS.values())
    seen = set()
    for piece in pieces:
        if len(piece.encode()) < 2:
            raise ValueError(f"piece {piece!r} is shorter than two bytes: every single byte is a token already")
        if piece in seen:
            raise ValueError(f"piece {piece!r} is given twice")
        if inside := [token for token in special if token in piece]:
            raise ValueError(
                f"piece {piece!r} contains the special token {inside[0]}, which is always a token of its own"
            )
        seen.add(piece)

    vocabulary = {character: byte for character, byte in byte_alphabet().items()}
    for piece in pieces:
        vocabulary[_spell(piece)] = len(vocabulary)
    # No merges: a stretch of text is one token if it is in the vocabulary (`ignore_merges`), and bytes otherwise.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pieces:
        # Alternatives are tried in order: longest first is longest match.
        longest_first = sorted(pieces, key=lambda piece: (-len(piece), piece))
        pattern = Regex("|".join(re.sub(r"([^\w\s])", r"\\\1", piece) for piece in longest_first))
        split = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, behavior="isolated"), split])
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL_TOKENS["im_end"],
        pad_token=SPECIAL_TOKENS["end_of_text"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
