"""Any tools in any call format: host parser and automaton agree, and read what was written."""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest
from device_calls import device_calls, same_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from language_texts import ROWS, any_response, read_texts

from pixel_jax.dialog import DecimalNumber, Language, call_parser, parse_turn
from pixel_jax.dialog.formats import PIXEL_REASONER, Body, CallFormat, Spelled, Spelling
from pixel_jax.tools import RELEASED, Box, Choice, Integer, Integers, Number, Text, Tool, ToolError
from pixel_jax.tools.calls import arguments

ADJUST = Tool(
    "adjust",
    "Changes an image.",
    (
        Number("factor", low=-0.5, high=4.25, default=1.5),
        Integer("target_index", low=1, default=1),
        Choice("mode", options=("brightness", "brightness 2", "é", "")),
    ),
)
ORDER = Tool(
    "order",
    "Two lists.",
    (Integers("first", most=3, default=(7, -1)), Integers("second", most=2), Box("bbox_2d", default=(0, 0, 1, 0.5))),
)
SHORT = Tool("short", "Its list is shorter than another tool's of that name.", (Integers("first", most=1),))
READ = Tool("read", "Reads.", (Text("query"), Box("bbox_2d")), execute=print, host=True)
STILL = Tool("still", "Nothing to say.")
NAMELESS = CallFormat(
    "nameless",
    opening="<look>",
    closing="</look>",
    spellings=(
        Spelling(
            "crop_image_normalized",
            None,
            (
                Spelled("bbox_2d", Box("bbox_2d")),
                Spelled(
                    "target_image", Choice("source", options=("original", "observation_1", "observation_12")), add=1
                ),
            ),
        ),
    ),
    places=-3,
)
SHIFTED = CallFormat(
    "shifted",
    spellings=(
        Spelling(
            "crop_image_normalized",
            "zoom",
            (Spelled("bbox_2d", Box("box")), Spelled("target_image", Integer("img_idx"), add=1)),
        ),
    ),
)
TAGGED = CallFormat("tagged", body=Body.TAGS)
LANGUAGES = {
    "tagged": Language((ADJUST, ORDER, SHORT, READ, STILL), TAGGED),
    "all kinds": Language((ADJUST, ORDER, SHORT, READ, STILL)),
    "nameless": Language(RELEASED[:1], NAMELESS),
    "shifted": Language((*RELEASED, STILL), SHIFTED),
    "one still": Language((STILL,)),
    "none": Language(()),
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_host_and_device_agree(name):
    language = LANGUAGES[name]
    tools = []
    for seed in range(8):
        rng = random.Random(seed)
        texts = [any_response(rng, language) for _ in range(ROWS)]
        turns = [parse_turn(text, language) for text in texts]
        device = read_texts(texts, rng, language)
        if difference := same_calls(device_calls(turns, language), device):
            field, row = difference
            pytest.fail(f"{field} of {texts[row]!r}: host {turns[row]}, device {getattr(device, field)[row]}")
        tools += [turn.call.tool if turn.call else -1 for turn in turns if turn.required]
    counts = [tools.count(tool) for tool in range(-1, len(language.tools))]
    assert min(counts) > 30, counts  # calls of every tool, and calls of none
    assert len(call_parser(language).automaton.save) < 2000


def one(text: str, name: str) -> tuple[dict, dict]:
    """A call's arguments on the host and on the device."""
    language = LANGUAGES[name]
    call = parse_turn(text, language).call
    tool = language.tools[call.tool]
    device = jax.tree.map(lambda x: x[:1], read_texts([text.encode()], random.Random(0), language))
    return call.arguments, jax.tree.map(lambda x: np.asarray(x)[0].tolist(), arguments(device, language.tools, tool))


def test_what_is_not_written_has_its_default():
    host, device = one('<tool_call>{"name": "adjust", "arguments": {"mode": "é"}}</tool_call>', "all kinds")
    assert host == {"factor": DecimalNumber(1, 500_000, False, False), "target_index": 1, "mode": "é"}
    assert device == {"factor": (1, 500_000, False, False), "target_index": 1, "mode": 2}
    host, device = one('<tool_call>{"name": "order", "arguments": {"second": [4, -5, 6]}}</tool_call>', "all kinds")
    assert host["first"] == (7, -1) and host["second"] == (4, -5, 6)
    assert device["first"] == ([7, -1, 0], 2) and device["second"] == ([4, -5], 3)
    assert device["bbox_2d"] == ([0, 0, 1, 0], [0, 0, 0, 500_000], [False] * 4, [True, True, True, False])


def test_a_text_is_what_json_reads():
    text = json.dumps({"name": "read", "arguments": {"query": 'é "x" \n \ud800', "bbox_2d": [1, 2, 3, 4]}})
    host, device = one(f"<tool_call>{text}</tool_call>", "all kinds")
    assert host["query"] == 'é "x" \n \ufffd'
    assert {*device} == {"bbox_2d"}


def test_what_is_written_becomes_the_tools_own():
    host, device = one('<look>{"bbox_2d": [0, 12.5, 1000, 1e3], "source": "observation_12"}</look>', "nameless")
    assert host["target_image"] == DecimalNumber(3, 0, False, True)
    assert [(x.units, x.micros) for x in host["bbox_2d"]] == [(0, 0), (0, 12_500), (1, 0), (1, 0)]
    assert device["target_image"] == (3, 0, False, True)
    assert device["bbox_2d"][:2] == ([0, 0, 1, 1], [0, 12_500, 0, 0])
    call = '<tool_call>{"name": "zoom", "arguments": {"box": [0.1, 0.2, 0.3, 0.4], "img_idx": %d}}</tool_call>'
    for index in (-2, -1, 0, 5, 10**9):
        host, device = one(call % index, "shifted")
        assert host["target_image"].signed_units() == min(index, 999_999_999) + 1
        assert device["target_image"] == tuple(host["target_image"])


def test_texts_between_tags():
    """A text is what stands between the first line feed and the last one; an option is a line."""
    box = "<parameter=bbox_2d>[1,2,3,4]</parameter>"
    call = f"<tool_call><function=read>\n<parameter=query>\n%s\n</parameter>{box}</function></tool_call>"
    for text in ("", "two\nlines\n", 'a "quoted" \\n\t>', "é"):
        host, device = one(call % text, "tagged")
        assert host["query"] == text and {*device} == {"bbox_2d"}
    call = "<tool_call><function=adjust><parameter=mode>%s</parameter></function></tool_call>"
    for number, text in enumerate(("brightness", "brightness 2", "é", "")):
        host, device = one(call % f"\n{text}\n", "tagged")
        assert host["mode"] == text and device["mode"] == number
    for text in ("brightness", "\n brightness\n", "\nbright\n"):
        assert parse_turn(call % text, LANGUAGES["tagged"]) == (True, None)


@pytest.mark.parametrize("text", ["4.25", "-0.5", "-0", "0.4e1"])
def test_within_bounds(text):
    call = f'<tool_call>{{"name": "adjust", "arguments": {{"factor": {text}, "mode": ""}}}}</tool_call>'
    assert one(call, "all kinds")[0]["factor"]


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.text(), st.binary()), st.sampled_from([*LANGUAGES]))
def test_no_text_raises(text, name):
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    language = LANGUAGES[name]
    assert parse_turn(data + language.format.closing.encode(), language).required


def _format(*arguments: Spelled, name: str | None = "zoom", **fields) -> CallFormat:
    return CallFormat("f", spellings=(Spelling("crop_image_normalized", name, arguments),), **fields)


BOX = Spelled("bbox_2d", Box("b"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Language((*RELEASED, RELEASED[0])), "two tools are called 'crop_image_normalized'"),
        (lambda: Language((Tool("a", "", (Text("b"),)),)), "cannot read the text 'b'"),
        (lambda: Language((Tool("a\n", ""),)), "cannot be called"),
        (lambda: Language(RELEASED, NAMELESS), "can only write .'crop_image_normalized'., not 'select_frames'"),
        (lambda: Language(RELEASED, _format(BOX)), "writes .'bbox_2d'. of the tool 'crop_image_normalized', whose"),
        (lambda: Language(RELEASED, _format(BOX, Spelled("target_image"))), "neither writes nor fixes 'target_image'"),
        (
            lambda: Language(RELEASED, _format(BOX, Spelled("target_image", Number("t"), add=1))),
            "a number for the number 'target_image' of 'crop_image_normalized', plus 1",
        ),
        (lambda: Language(RELEASED, _format(BOX, Spelled("target_image", Text("t")))), "a text for the number"),
        (
            lambda: Language(RELEASED, _format(BOX, Spelled("target_image", Integer("target_frames")))),
            "'target_frames' is of kind integer in .* of kind integers in",
        ),
        (
            lambda: Language(RELEASED, _format(BOX, Spelled("target_image", value=1), name="select_frames")),
            "two tools one name",
        ),
        (lambda: Language(tuple(Tool(f"t{i}", "", (Integer(f"a{i}"),)) for i in range(32))), "32 arguments"),
        (lambda: CallFormat("f", opening="look>"), "'look>'"),
        (lambda: dataclasses.replace(NAMELESS, body=Body.TAGS), "have a name, which a spelling lacks"),
        (lambda: CallFormat("f", closing="<a<"), "'<a<'"),
        (lambda: CallFormat("f", opening="<look>", closing="<look>"), "one mark begins with the other"),
        (
            lambda: Language(
                RELEASED,
                CallFormat(
                    "f",
                    spellings=(
                        Spelling(
                            "crop_image_normalized",
                            "z",
                            (BOX, Spelled("target_image", value=1)),
                            texts=(("shwon", ""),),
                        ),
                    ),
                ),
            ),
            "outcome 'shwon' of the tool 'crop_image_normalized', whose outcomes are .'shown'",
        ),
        (lambda: CallFormat("f", closing="<|im_end|>"), "im_end"),
        (
            lambda: call_parser(Language((Tool("a", "", (Choice("b", options=("x" * 30_000,)),)),))),
            "more than 20000: shorten names and options",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(make, message):
    with pytest.raises(ToolError, match=message):
        make()


def test_equal_languages_share_a_reader():
    assert call_parser(Language()) is call_parser(Language(tuple(RELEASED), PIXEL_REASONER))
