"""Tokenizers: a view of any fast tokenizer whose tokens are bytes, and a builder of small ones.

`Vocabulary` reads a Hugging Face tokenizer (Qwen's, SmolLM2's, LLaMA-2's, or one of `build_tokenizer`): the bytes of every token,
and the ids of the special tokens and of the ten digits. The bytes serve to parse the text of a policy (`call_parser.py`);
observations are assembled from ids (`observations.py`).

Two kinds are read. Byte-level ones (GPT-2's convention) keep every text as it is. Those of SentencePiece (Llama 1 and 2, Vicuna)
write a space as U+2581, bytes without a token as `<0x0A>`, and put a space before some texts: before the first one of a dialog,
or before each one behind a special token. `Place` says where a text stands.

`build_tokenizer` makes a tokenizer whose tokens are the caller's pieces of text and the 256 bytes, so that every text survives
`decode(encode(text))`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pixel_jax.dialog.formats import MARKS
from pixel_jax.dialog.layout import Layout, Place, Special
from pixel_jax.dialog.template import (
    ABSENT,
    CHAT_TEMPLATE,
    LLAMA3_TEMPLATE,
    OTHER_SPELLINGS,
    SPECIAL_TOKENS,
    VISUAL_TOKENS,
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
    """The ids of a fast tokenizer whose tokens are bytes.

    `table` covers the ids 0..len(tokenizer)-1. An id that the tokenizer does not use, and any id beyond (a model's
    embedding is often padded), has no bytes.

    `encode` never returns a token that structures a dialog, whoever wrote the text. Those tokens are in `special`; templates put
    them between texts (`template.to_ids`). Some are also properties, `im_start` to `video_pad`, which are `ABSENT` where a
    tokenizer lacks the token. Their bytes are ChatML's spelling, by which parsers, rewards and transcripts know them,
    whatever the tokenizer calls them.
    """

    tokenizer: PreTrainedTokenizerFast
    encoders: Mapping[Place, Tokenizer]  # copies that read the spelling of a special token as ordinary text
    table: TokenBytes
    layout: Layout  # how dialogs are written
    special: Mapping[str, int]  # name, as in `Layout.special` -> id
    digits: tuple[int, ...]  # the tokens of "0", "1", ... "9"
    # Texts encoded before.
    known: dict[tuple[Place, str], tuple[int, ...]] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
        """Reads a tokenizer with its chat template; ChatML's or Llama 3's if it has none, but their tokens.

        Raises:
          TypeError: the tokenizer is not a fast one.
          ValueError: its tokens are not bytes, its chat template cannot be used, or it lacks a special token or a digit. Of the
            four tokens of images and videos in ChatML it may lack all, not some.
        """
        tokens = token_bytes(tokenizer)
        added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        layout = read_layout(tokenizer)
        special = {name: added[text] for name, text in layout.special.items()}
        encoders = text_encoders(tokenizer, frozenset(layout.special.values()))
        for name, index in special.items():
            tokens[index] = spelling(name).encode()
        for text in layout.special.values():
            if set(special.values()) & set(encoders[Place.TEXT].encode(text, add_special_tokens=False).ids):
                raise ValueError(
                    f"the tokenizer cannot write {text} as text: its vocabulary has it beside its special tokens"
                )
        single = {token: index for index, token in reversed(list(enumerate(tokens))) if len(token) == 1}
        for index in single.values():  # a byte may have a token besides that of the character
            written = encoders[Place.TEXT].encode(tokens[index].decode("latin-1"), add_special_tokens=False).ids
            if len(written) == 1 and tokens[written[0]] == tokens[index]:
                single[tokens[index]] = written[0]
        missing = [character for character in "0123456789" if character.encode() not in single]
        if missing:
            raise ValueError(
                f"the tokenizer has no token for {missing} alone: numbers in observations are written digit by digit"
            )
        digits = tuple(single[str(digit).encode()] for digit in range(10))
        return cls(tokenizer, encoders, TokenBytes.of(tokens), layout, special, digits)

    def _named(self, name: str) -> int:
        return self.special.get(name, ABSENT)

    im_start = property(lambda self: self._named("im_start"))
    im_end = property(lambda self: self._named("im_end"))
    vision_start = property(lambda self: self._named("vision_start"))
    vision_end = property(lambda self: self._named("vision_end"))
    image_pad = property(lambda self: self._named("image_pad"))
    video_pad = property(lambda self: self._named("video_pad"))

    @property
    def end_of_text(self) -> int:
        """The token that ends a text; with some tokenizers the one that ends a turn."""
        return self.special.get("end_of_text", self.im_end)

    @functools.cached_property
    def structure(self) -> frozenset[int]:
        """The tokens that structure a dialog."""
        return frozenset(self.special.values())

    def encode(self, text: str, place: Place = Place.TEXT) -> list[int]:
        """Returns the token ids of `text`. A special token spelled out in it is encoded as its letters.

        Args:
          text: any text.
          place: its position in the dialog.

        Raises:
          ValueError: the text is not Unicode (half a surrogate pair), or the tokenizer makes a special token of it.
        """
        # System prompts, tags and sentences repeat in every row. Encoding them again would take half of the time of making a row.
        ids = self.known.get((place, text))
        if ids is None:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError(f"{text[:200]!r} holds half a surrogate pair, which is no Unicode text") from None
            ids = tuple(self.encoders[place].encode(text, add_special_tokens=False).ids)
            if not self.structure.isdisjoint(ids):
                raise ValueError(f"the tokenizer makes tokens that structure a dialog of {text[:200]!r}")
            if len(self.known) >= KNOWN_TEXTS:
                self.known.clear()
            self.known[place, text] = ids
        return list(ids)

    def to_bytes(self, ids: Sequence[int]) -> bytes:
        """Returns the bytes of `ids`, special tokens written out."""
        data, start, length = self.table.data, self.table.start, self.table.length
        known = (int(index) for index in ids if 0 <= index < len(start))
        return b"".join(data[start[index] : start[index] + length[index]].tobytes() for index in known)


def read_layout(tokenizer: PreTrainedTokenizerFast) -> Layout:
    """Reads the layout of dialogs from the chat template of a tokenizer.

    Raises:
      ValueError: the template cannot be used; or there is none, and the tokenizer lacks the tokens of ChatML and Llama 3.
    """
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    chatml = {text: name for name, text in SPECIAL_TOKENS.items()}
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if not isinstance(token, list)}
    special = [text for text, token in added.items() if token.special or text in chatml or text in named.values()]
    special = [text for text in special if text not in MARKS]  # marks of calls are parts of turns, which are text
    visual = [SPECIAL_TOKENS[name] for name in VISUAL_TOKENS]
    missing = [text for text in visual if text not in special]
    if 0 < len(missing) < len(visual):
        raise ValueError(f"the tokenizer has no special token {missing[0]}, but {len(visual) - len(missing)} like it")
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if source is None and "<|start_header_id|>" in special:
        source = LLAMA3_TEMPLATE
    elif source is None:
        source = CHAT_TEMPLATE
        if missing := [SPECIAL_TOKENS[x] for x in ("im_start", "im_end") if SPECIAL_TOKENS[x] not in special]:
            raise ValueError(
                f"the tokenizer has no chat template, and no special token {missing[0]} of ChatML: put the template that the "
                "model was tuned with beside it, in chat_template.jinja, or take a model that was tuned on dialogs"
            )
    names = {text: chatml.get(text) or OTHER_SPELLINGS.get(text, text) for text in special}
    names = {
        text: name if [*names.values()].count(name) == 1 or text in chatml else text for text, name in names.items()
    }
    first = tokenizer.encode("a", add_special_tokens=True)[:1]
    own = names.get("<image>") == "image_pad" and first == [tokenizer.bos_token_id]
    begin = named.get("bos_token") if own else None
    layout = Layout.from_template(source, names, tokens=[*added], variables=named, begin=begin)
    for name in {piece.name for piece in (*layout.before, *layout.after) if isinstance(piece, Special)}:
        if (token := added[layout.special[name]]).lstrip or token.rstrip:
            raise ValueError(
                f"the special token {token.content} takes off the spaces around it, which is not supported"
            )
    return layout


def text_encoders(tokenizer: PreTrainedTokenizerFast, special: Collection[str]) -> dict[Place, Tokenizer]:
    """Copies a fast tokenizer so that the spelling of a special token is text like any other.

    The tags of calls stay tokens if the tokenizer has them (Qwen's does, not as special ones), because turns are text.
    It is a copy, because transformers resets this option of its own at every call, which is not safe among threads.

    Returns:
      One for each place: they differ in the space that they put before a text.
    """
    from tokenizers import Tokenizer

    def copy(document) -> Tokenizer:
        encoder = Tokenizer.from_str(json.dumps(document | {"truncation": None, "padding": None}))
        encoder.encode_special_tokens = True
        return encoder

    document = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in document["added_tokens"]:
        token["special"] = (token["special"] or token["content"] in special) and token["content"] not in MARKS
    first = copy(document)
    bare = {name: _without_space(document[name]) for name in ("normalizer", "pre_tokenizer")}
    if bare == {name: document[name] for name in bare}:
        return dict.fromkeys(Place, first)
    inner = copy(document | bare)
    # Metaspace can tell the beginning of a dialog from that of a text behind a special token; a normalizer cannot.
    parts = (document["pre_tokenizer"] or {}).get("pretokenizers", [document["pre_tokenizer"] or {}])
    only_first = any(part.get("prepend_scheme") == "first" for part in parts)
    return {Place.DIALOG: first, Place.SPECIAL: inner if only_first else first, Place.TEXT: inner}


def _without_space(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns a normalizer or a pre-tokenizer without the space that it puts before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            return part | {name: [x for x in map(_without_space, part[name]) if x is not None]}
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    return part | {"add_prefix_space": False} if part.get("add_prefix_space") else part


SPACE = "\u2581"  # stands for a space in tokens of SentencePiece
BYTE = re.compile("<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """Returns the bytes of every token id of a fast tokenizer; b"" for ids that are not used.

    Raises:
      TypeError: the tokenizer is not a fast one.
      ValueError: its tokens are not bytes: it is neither byte-level nor one of SentencePiece that falls back to bytes.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(f"{type(tokenizer).__name__} is not a fast tokenizer: it has no tokenizer.json behind it")
    document = json.loads(backend.to_str())
    decoder = document["decoder"] or {}
    kinds = {part.get("type") for part in decoder.get("decoders", [decoder])}
    vocabulary = backend.get_vocab(with_added_tokens=False)
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    tokens = [b""] * (max([*vocabulary.values(), *added]) + 1)
    if kinds == {"ByteLevel"}:
        alphabet = byte_alphabet()
        for text, index in vocabulary.items():
            try:
                tokens[index] = bytes([alphabet[character] for character in text])
            except KeyError as error:
                raise ValueError(f"token {index} {text!r} has {error}, which is outside the byte alphabet") from None
    elif "ByteFallback" in kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        if missing := [x for x in (f"<0x{byte:02X}>" for byte in range(256)) if x not in vocabulary]:
            raise ValueError(f"the tokenizer has no token for the byte {missing[0]}, so it cannot write every text")
        for text, index in vocabulary.items():
            byte = BYTE.fullmatch(text)
            tokens[index] = bytes([int(byte[1], 16)]) if byte else text.replace(SPACE, " ").encode()
    else:
        raise ValueError(
            f"the tokenizer's decoder is {decoder.get('type')}, not ByteLevel nor one with ByteFallback: its tokens are "
            "not bytes, which calls are read from; take a model with a byte-level tokenizer (Qwen's, SmolLM2's) or LLaMA-2's"
        )
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
    checked = set()
    for piece in pieces:
        if len(piece.encode()) < 2:
            raise ValueError(f"piece {piece!r} is shorter than two bytes: every single byte is a token already")
        if piece in checked:
            raise ValueError(f"piece {piece!r} is given twice")
        if inside := [token for token in special if token in piece]:
            raise ValueError(
                f"piece {piece!r} contains the special token {inside[0]}, which is always a token of its own"
            )
        checked.add(piece)

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
