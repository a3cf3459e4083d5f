"""Tokenizers of LLaMA-2's kind: ids, bytes and streamed text are those of the `tokenizers` library."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_templates import LLAMA2, LLAVA
from spaced import KINDS, spaced
from tokenizers.processors import TemplateProcessing

from pixel_jax.dialog import Media, Observations, Vocabulary, call_parser, render, to_ids, token_table
from pixel_jax.dialog.grammar import Language, parse_turn
from pixel_jax.dialog.layout import Place
from pixel_jax.dialog.observations import observation_text
from pixel_jax.serving.session import Reader, Saw, Wrote

VOCABULARIES = {kind: Vocabulary.of(spaced(kind)) for kind in KINDS}
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(["The cat", " sat", "  ", "\n", "[INST]", "12", "é", "日本", "<0x41>", "\u2581", "</s>", "\0"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    ),
    min_size=1,
    max_size=8,
).map("".join)


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_ids_and_bytes(kind, text):
    """Of a text in each place; U+2581 reads as a space, as in the library."""
    vocabulary, theirs = VOCABULARIES[kind], spaced(kind)
    ids = vocabulary.encode(text, Place.TEXT)
    assert vocabulary.to_bytes(ids).decode() == text.replace("\u2581", " ")
    if "</s>" in text:
        assert vocabulary.im_end not in ids
        return
    assert vocabulary.encode(text, Place.DIALOG) == ids_of(theirs, text)
    assert vocabulary.encode(text, Place.SPECIAL) == ids_of(theirs, "<s>" + text)[1:]
    whole = ids_of(theirs, f"<s>[INST] cat [/INST] {text}")
    begun = ids_of(theirs, "<s>[INST] cat [/INST]")
    if whole[: len(begun)] == begun:  # no token reaches from the prompt into the text
        assert [*begun, *vocabulary.encode(" " + text, Place.TEXT)] == whole
    bytes_only = vocabulary.to_bytes(ids_of(theirs, text)).decode()
    assert bytes_only.removeprefix("" if kind == "never" else " ") == theirs.decode(ids_of(theirs, text))


SAID = st.text(st.sampled_from("ab \n1é<>[]/"), min_size=1, max_size=10).filter(str.strip)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(st.lists(SAID, min_size=1, max_size=4), st.booleans())
def test_dialogs(kind, texts, system):
    vocabulary, theirs = VOCABULARIES[kind], spaced(kind)
    roles = ["user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    messages = [{"role": "system", "content": "Be kind."}] * system + messages
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert to_ids(render(messages, layout=vocabulary.layout), vocabulary, ()) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_observations(kind):
    """The ids are those of the conversation; a number has a token for each digit."""
    vocabulary, theirs = VOCABULARIES[kind], spaced(kind)
    observations = Observations.of(vocabulary)
    assert (vocabulary.im_end, vocabulary.end_of_text) == (2, 2)
    assert vocabulary.to_bytes([2]) == b"<|im_end|>" and vocabulary.to_bytes([*vocabulary.digits]) == b"0123456789"
    assert [*vocabulary.digits] == [vocabulary.encode(str(digit))[0] for digit in range(10)]
    assert min(vocabulary.digits) > 258  # not those of the bytes
    said = observations.kinds[observations.malformed].outcome.text.strip()
    spoken = [("user", "cat"), ("assistant", "mat"), ("user", said)]
    messages = [{"role": role, "content": text} for role, text in spoken]
    whole = theirs.apply_chat_template(messages)["input_ids"]
    ids = to_ids(vocabulary.layout.observation([{"type": "text", "text": said}]), vocabulary, (), Place.SPECIAL)
    assert whole[-len(ids) :] == ids and whole[-len(ids) - 1] == vocabulary.im_end
    ids = observations.ids(observations.malformed)
    assert observation_text(np.array(ids), vocabulary) == said.strip("\n")
    with_number = next(i for i, x in enumerate(observations.kinds) if "{0}" in x.outcome.text and not x.outcome.images)
    ids = observations.ids(with_number, (12, -7, 3, 4), (5, 6))
    text = observations.text(with_number, (12, -7, 3, 4), (5, 6))
    assert "[1,12]" in text and vocabulary.to_bytes(ids).decode().replace("<s> ", "<s>") == text


@pytest.mark.parametrize("kind", KINDS)
def test_calls_are_read(kind):
    vocabulary = VOCABULARIES[kind]
    call = ' <tool_call>{"name": "select_frames", "arguments": {"target_frames": [1]}}</tool_call>'
    ids = [*vocabulary.encode(call), vocabulary.im_end]
    assert parse_turn(vocabulary.to_bytes(ids)).call is not None
    assert token_table(vocabulary) is not None and call_parser(Language()) is not None


class Row:
    """What a session says of a row."""

    def __init__(self, ids, by_model, stop=-1):
        self.ids, self.by_model, self.stop = np.array(ids), np.array(by_model, bool), stop
        self.failed, self.regions = [False], np.full((1, 1, 5), -1)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(st.lists(TEXTS, min_size=2, max_size=2))
def test_streamed_text(kind, texts):
    """Token by token, with bytes that are half a character, it is what the library decodes at once."""
    vocabulary = VOCABULARIES[kind]
    observation = vocabulary.layout.observation([{"type": "text", "text": "Seen."}])
    between = to_ids(observation, vocabulary, (), Place.SPECIAL)
    turns = [[*vocabulary.encode(" " + text), vocabulary.im_end] for text in texts]
    ids = [*turns[0], *between, *turns[1]]
    chosen = [True] * len(turns[0]) + [False] * len(between) + [True] * len(turns[1])
    reader, events = Reader(vocabulary), []
    for end in range(len(ids) + 1):
        # The text that is shown comes at once.
        if end < len(ids) and not chosen[end]:
            continue
        events += reader.read(Row(ids[:end], chosen[:end]))
    events += reader.read(Row(ids, chosen, stop=0))
    first, second = (theirs.removesuffix("</s>") for theirs in (spaced("first").decode(turn) for turn in turns))
    written = "".join(event.text for event in events if isinstance(event, Wrote))
    assert written == f"{first}\n{second}"
    assert [event.text for event in events if isinstance(event, Saw)] == ["Seen."]


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_llava_s_processor_writes_the_beginning(kind):
    """The template does not, the tokenizer does, in front of every text."""
    from PIL import Image
    from transformers import CLIPImageProcessor, LlavaProcessor

    tokenizer = spaced(kind, LLAVA, ("<image>",))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    vocabulary = Vocabulary.of(tokenizer)
    known = {"size": {"shortest_edge": 14}, "crop_size": {"height": 14, "width": 14}}
    made = LlavaProcessor(
        CLIPImageProcessor(**known),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA,
    )
    content = [{"type": "text", "text": "Why?"}, {"type": "image", "image": Image.new("RGB", (14, 14))}]
    messages = [{"role": "user", "content": content}]
    theirs = made.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)
    pieces = render([{"role": "user", "content": [content[0], {"type": "image"}]}], layout=vocabulary.layout)
    assert any(isinstance(piece, Media) for piece in pieces)
    assert to_ids(pieces, vocabulary, [1]) == np.asarray(theirs["input_ids"])[0].tolist()


def test_what_is_missing_is_named():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE({"<unk>": 0, "a": 1, "<0x00>": 2}, [], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    with pytest.raises(ValueError, match="no token for the byte <0x01>"):
        Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=core, chat_template=LLAMA2))
