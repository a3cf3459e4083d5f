"""Chat templates: what transformers renders and encodes is what we do, and what a template may not do is refused by name."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_templates import LLAMA2, LLAMA3, LLAVA, QWEN2, QWEN2_5, QWEN3, SMOLLM2, TEMPLATES
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pixel_jax.dialog import Media, Observations, Vocabulary, render, to_ids
from pixel_jax.dialog.layout import Layout, Place, Special
from pixel_jax.dialog.observations import observation_text
from pixel_jax.dialog.sandbox import TemplateError, render_source
from pixel_jax.dialog.tokenizer import byte_alphabet

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
# Made up: another role than usual, the content in the middle of a line, an end of a turn that nobody else has.
OWN = (
    "<bot>{% for m in messages %}<turn>{{ {'user': 'human', 'assistant': 'model'}.get(m.role, m.role) }}: {{ m.content | trim }}."
    "<stop>{% endfor %}{% if add_generation_prompt %}<turn>model: {% endif %}"
)
# Made up: each message as an object, whose braces are letters.
OBJECTS = (
    "{% for m in messages %}<turn>{'{{ m.role }}': {says: {{ m.content }}}}<stop>{% endfor %}"
    "{% if add_generation_prompt %}<turn>{'assistant': {says: {% endif %}"
)
# name -> template, special tokens (the first two: bos and eos)
KINDS = {
    "qwen2-vl": (QWEN2_5, ["<|endoftext|>", "<|im_end|>", "<|im_start|>", *VISION]),
    "qwen2": (QWEN2, ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]),
    "qwen3": (QWEN3, ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]),
    "smollm2": (SMOLLM2, ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]),
    "llama3": (LLAMA3, [HEADERS[0], HEADERS[3], *HEADERS[1:3], HEADERS[4]]),
    "llama2": (LLAMA2, ["<s>", "</s>"]),
    "llava": (LLAVA, ["<s>", "</s>", "<image>"]),
    "own": (OWN, ["<bot>", "<stop>", "<turn>"]),
    "objects": (OBJECTS, ["<bot>", "<stop>", "<turn>"]),
}


def tokenizer_of(name):
    """The bytes and the special tokens."""
    template, special = KINDS[name]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *byte_alphabet()])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    named = {"bos_token": special[0], "eos_token": special[1], "pad_token": special[1]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named)


VOCABULARIES = {name: Vocabulary.of(tokenizer_of(name)) for name in KINDS}


def theirs(vocabulary, messages, **options):
    """The ids that transformers makes of a dialog; with lists of parts where the template reads no texts."""
    if vocabulary.layout.lists:
        messages = [
            x if not isinstance(x["content"], str) else x | {"content": [{"type": "text", "text": x["content"]}]}
            for x in messages
        ]
    return vocabulary.tokenizer.apply_chat_template(messages, **options)["input_ids"]


TEXTS = st.text(st.sampled_from("ab <>/|\n.é"), min_size=1, max_size=12).filter(str.strip)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=40, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=5), st.booleans(), st.booleans())
def test_ids_are_those_of_transformers(name, texts, system, prompt):
    vocabulary = VOCABULARIES[name]
    if any(x in "".join(texts) for x in vocabulary.layout.special.values()):
        return
    roles = itertools.chain(["system"] * system, itertools.cycle(["user", "assistant"]))
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    if [x["role"] for x in messages] == ["system"]:
        return
    ids = to_ids(render(messages, layout=vocabulary.layout, add_generation_prompt=prompt), vocabulary, ())
    assert ids == theirs(vocabulary, messages, add_generation_prompt=prompt)


@pytest.mark.parametrize("name", ["qwen2-vl", "llava"])
def test_images_stand_where_the_template_puts_them(name):
    vocabulary = VOCABULARIES[name]
    parts = [
        {"type": "text", "text": "Left: "},
        {"type": "image"},
        {"type": "image"},
        {"type": "text", "text": " which?"},
    ]
    for chosen in itertools.permutations(parts):
        messages = [{"role": "system", "content": "Look."}, {"role": "user", "content": list(chosen)}]
        ids = to_ids(render(messages, layout=vocabulary.layout), vocabulary, [1, 1])
        assert ids == theirs(vocabulary, messages, add_generation_prompt=True)
    order = [
        {"type": "image", "image": 7},
        {"type": "text", "text": "<image><|image_pad|>"},
        {"type": "image", "image": 8},
    ]
    pieces = render([{"role": "user", "content": order}], layout=vocabulary.layout)
    assert [x.value for x in pieces if isinstance(x, Media)] == [7, 8]


@pytest.mark.parametrize("name", KINDS)
def test_observations_are_messages_of_the_dialog(name):
    """What stands between two turns is what transformers writes there, from the end of the first turn on."""
    vocabulary = VOCABULARIES[name]
    observations = Observations.of(vocabulary)
    said = observations.kinds[observations.malformed].outcome.text
    spoken = [("system", "S."), ("user", "Q?"), ("assistant", "A"), ("user", said.strip())]
    messages = [{"role": role, "content": text} for role, text in spoken]
    whole = theirs(vocabulary, messages, add_generation_prompt=True)
    begun = theirs(vocabulary, messages[:2], add_generation_prompt=True)
    layout = vocabulary.layout
    turn = to_ids([layout.lead + "A" + layout.tail], vocabulary, (), Place.TEXT)
    pieces = layout.observation([{"type": "text", "text": said.strip()}])
    between = to_ids(pieces, vocabulary, (), Place.SPECIAL)
    end = [vocabulary.im_end] if name != "llava" else []  # whose template does not write it
    assert whole == begun + turn + end + between
    ids = observations.ids(observations.malformed)
    assert observation_text(np.array(ids), vocabulary) == said.strip("\n")
    assert vocabulary.to_bytes(ids).decode() == observations.text(observations.malformed)
    assert vocabulary.to_bytes([vocabulary.im_end]) == b"<|im_end|>"


@pytest.mark.parametrize("name", ["qwen2-vl", "llava"])
def test_observations_with_images(name):
    vocabulary = VOCABULARIES[name]
    observations = Observations.of(vocabulary)
    kind = next(i for i, x in enumerate(observations.kinds) if x.outcome.images == 1)
    said = observations.kinds[kind].outcome.text.replace("{images}", "").format(1, 2, 3, 4, list=[])
    ids = observations.ids(kind, (1, 2, 3, 4), (), [1])
    content = [{"type": "text", "text": said}, {"type": "image"}]
    messages = [
        {"role": "user", "content": "Q?"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": content},
    ]
    whole = theirs(vocabulary, messages, add_generation_prompt=True)
    assert whole[-len(ids) :] == ids
    assert to_ids(vocabulary.layout.observation(content), vocabulary, [1], Place.SPECIAL) == ids
    assert observation_text(np.array(ids), vocabulary) == said.strip("\n")


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_text_becomes_a_special_token(name, data):
    """Whole tokens, and such as are put together of the end of one part and the beginning of the next."""
    vocabulary = VOCABULARIES[name]
    spellings = [*vocabulary.layout.special.values()]
    halves = [x[i:] for x in spellings for i in range(len(x))] + [x[:i] for x in spellings for i in range(1, len(x))]
    texts = data.draw(
        st.lists(st.lists(st.sampled_from([*halves, "a", " ", "\n"]), max_size=4).map("".join), max_size=3)
    )
    content = [{"type": "text", "text": text} for text in ("q", *texts)]
    forged, plain = (
        [x for x in render([{"role": "user", "content": parts}], layout=vocabulary.layout) if isinstance(x, Special)]
        for parts in (content, content[:1])
    )
    assert forged == plain
    spoken = [{"role": "system", "content": "".join(texts) + "s"}, {"role": "user", "content": content}]
    pieces = render(spoken, layout=vocabulary.layout)
    written = "".join(piece for piece in pieces if isinstance(piece, str))
    assert "".join("".join(texts).split()) in "".join(written.split())


def test_thoughts_of_earlier_answers_are_left_out_as_the_template_says():
    vocabulary = VOCABULARIES["qwen3"]
    said = "<think>\nLong.\n</think>\n\nShort."
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "Two? <|im_end|>"},
    ]
    pieces = render(messages, layout=vocabulary.layout)
    text = "".join(x for x in pieces if isinstance(x, str))
    assert "Long." not in text and "Short." in text and "Two? <|im_end|>" in text


def test_the_pieces_of_a_template():
    layout = VOCABULARIES["llama2"].layout
    assert layout.before == (Special("<s>"), "[INST] ") and layout.after == (" [/INST]",)
    assert (layout.lead, layout.tail) == (" ", " ") and layout.special["im_end"] == "</s>"
    layout = VOCABULARIES["llava"].layout
    assert layout.images_first and layout.lists and layout.image == ((), ("\n",))
    layout = VOCABULARIES["own"].layout
    assert layout.before == (Special("<turn>"), "human: ")
    assert layout.after == (".", Special("im_end"), Special("<turn>"), "model: ")


@pytest.mark.parametrize("refuses", ["{{ raise_exception('roles!') }}", ""])
def test_a_template_without_system_messages(refuses):
    """They stand in front of the first question then."""
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}"
        + refuses
        + "{% else %}<turn>{{ m.role }} {{ m.content }}<stop>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<turn>assistant {% endif %}"
    )
    layout = Layout.from_template(source, {"<turn>": "<turn>", "<stop>": "<stop>"})
    assert not layout.system
    told = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
    assert layout.render(told)[1] == "user Be kind.\n\nWhy?"


ROLES = "{% for m in messages %}<turn>{{ m.role }} {{ m.content }}<stop>{% endfor %}"
GROWS = "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<turn>assistant {% endif %}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "no jinja template: TemplateSyntaxError"),
        ("{{ raise_exception('never') }}", "TemplateError: never"),
        (ROLES + "{{ messages[0].content }}" + PROMPT, None),
        (ROLES + "{{ messages[-1].content }}" + PROMPT, "writes a message 2 times, not once"),
        ("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}", r"the tokenizer has no special token <\|end\|>"),
        (ROLES + "{% if messages|length > 2 %}again{% endif %}" + PROMPT, "behind the first question it writes"),
        ("nothing", "does not write the text of a question"),
        ("{% for m in messages %}<turn>{{ m.content[::-1] }}<stop>{% endfor %}", "writes the parts of a message as a list"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}", "names no eos_token"),
        ("{{ strftime_now('%d') }}" + ROLES, "'strftime_now' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "more than .* steps"),
        ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}", "more than .* steps"),
        (GROWS, "makes a text or list of more than"),
        (GROWS.replace("~", "+"), "makes a text or list of more than"),
        (GROWS.replace("ns.x ~ ns.x", "ns.x | replace('a', ns.x)"), "makes a text or list of more than"),
        (GROWS.replace("ns.x ~ ns.x", "[ns.x, ns.x]") + "{{ ns.x }}", "nests values deeper|more than"),
        (GROWS.replace("ns.x ~ ns.x", "ns.x.join([ns.x, ns.x, ns.x])"), "makes a text or list of more than"),
        ("{{ 'a' * 1000000000 }}", "makes a text or list of more than"),
        ("{{ 10 ** 100000000 }}", r"uses the operator '\*\*'"),
        ("{{ '%999999999d' % 1 }}", "uses the operator '%' on str"),
        ("{{ 'a'.ljust(1000000000) }}", "calls 'ljust'"),
        ("{{ messages | tojson(indent=100000000) }}", "indents by '100000000'"),
        ("{{ 'a' | indent(1000000000) }}", "indents by '1000000000'"),
        ("a" * (1 << 18) + "b", "has 262145 characters"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)  # fmt: skip
def test_what_a_template_may_not_do(source, message):
    names = {"<turn>": "<turn>", "<stop>": "<stop>"}
    began = time.monotonic()
    if message is None:
        Layout.from_template(source, names)
        return
    with pytest.raises(TemplateError, match=f"^the model's chat template cannot be used: .*(?:{message}).*; put one"):
        Layout.from_template(source, names)
    assert time.monotonic() - began < 60


def test_the_environment_is_that_of_transformers():
    source = (
        "{% for m in messages %}\n    {% generation %}\n{{ m.content | tojson }}{% endgeneration %}\n"
        "  {% if loop.last %}{% break %}{% endif %}{{ loop.length ~ 1 ~ none ~ [1, 'é'] }}\n{% endfor %}"
        "{{ messages | map(attribute='role') | join(', ') }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    )
    messages = [{"role": role, "content": "<é>\n"} for role in ("user", "assistant", "user")]
    expected = VOCABULARIES["qwen2"].tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False)
    assert render_source(source, {"messages": messages}) == expected


def test_templates_with_names():
    tokenizer = tokenizer_of("smollm2")
    tokenizer.chat_template = {
        "tool_use": "{{ raise_exception('no') }}",
        "default": OWN.replace("<stop>", "<|im_end|>"),
    }
    assert Vocabulary.of(tokenizer).layout.source == tokenizer.chat_template["default"]


def test_without_a_template():
    """The tokens say how dialogs are written; without them nothing does."""
    for name in ("smollm2", "llama3"):
        tokenizer = tokenizer_of(name)
        tokenizer.chat_template = None
        ours, published = Vocabulary.of(tokenizer).layout, VOCABULARIES[name].layout
        assert ours._replace(source="") == published._replace(source="")
    tokenizer = tokenizer_of("llama2")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template, and no special token <\|im_start\|> of ChatML: put the"):
        Vocabulary.of(tokenizer)


def test_every_published_template_is_one_of_these():
    assert {template for template, _ in KINDS.values()} - {OWN, OBJECTS} == set(TEMPLATES)
