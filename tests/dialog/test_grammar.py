"""The host parser: what is a call, what is not, and what its numbers are."""

import collections
import json
import math
import operator
import pathlib
import random
import re
from decimal import ROUND_DOWN, Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import call, number, response

from pixel_jax.dialog import DecimalNumber, MalformedCallError, ParsedTurn, ToolCall, parse_call, parse_turn

CROP = '{"name": "crop_image_normalized", "arguments": {"bbox_2d": [0.1, 0.25, -3, 12.5], "target_image": 2}}'
SELECT = '{"name": "select_frames", "arguments": {"target_frames": [1, 16, -0, 999999999999]}}'


def frames(call):
    return parse_call(call.encode()).arguments["target_frames"]


def test_the_calls_of_the_released_data():
    turn = parse_turn(f"I will zoom in.\n<tool_call>\n{CROP}\n</tool_call><|im_end|>")
    box = (
        DecimalNumber(0, 100000, False, False),
        DecimalNumber(0, 250000, False, False),
        DecimalNumber(3, 0, True, True),
        DecimalNumber(12, 500000, False, False),
    )
    assert turn == ParsedTurn(True, ToolCall(0, {"bbox_2d": box, "target_image": DecimalNumber(2, 0, False, True)}))
    # As printed in the instruction-tuning data, without a space before "arguments".
    printed = '<tool_call>\n{"name": "select_frames","arguments": {"target_frames":[1, 2]}}\n</tool_call>'
    assert parse_turn(printed) == ParsedTurn(True, ToolCall(1, {"target_frames": (1, 2)}))
    assert frames(SELECT) == (1, 16, 0, 999_999_999)


@pytest.mark.parametrize(
    ("response", "required"),
    [
        ("", False),
        ("\\boxed{3}<|im_end|>", False),
        (f"<tool_call>{SELECT}</tool_call><|endoftext|>", False),
        (f"<tool_call>{SELECT}</tool_call> a", False),
        ("</tool_call>\n", True),
        ("</tool_call> \n<|im_end|>\t", True),
        ("</tool_call>", True),
        ("</tool_<|im_end|>call>", True),
        ("</tool_call><|im_<|im_end|>end|>", False),
    ],
)
def test_a_call_is_required_when_the_response_ends_with_the_tag(response, required):
    assert parse_turn(response) == ParsedTurn(required, None)


def test_the_last_opening_tag_counts():
    assert parse_turn(f"<tool_call>{CROP}</tool_call> no: <tool_call>{SELECT}</tool_call>").call.tool == 1
    assert parse_turn(f"<tool_call>{CROP}<tool_call>{SELECT}</tool_call>").call.tool == 1
    assert parse_turn(f"{SELECT}</tool_call>") == ParsedTurn(True, None)
    assert parse_turn(f"<tool_call>{SELECT}</tool_call></tool_call>") == ParsedTurn(True, None)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "null",
        "[]",
        "{}",
        SELECT + "x",
        SELECT + SELECT,
        SELECT[:-1],
        SELECT.replace("select_frames", "crop_image_normalized"),
        SELECT.replace("select_frames", "select_frames "),
        SELECT.replace("select_frames", "Select_frames"),
        SELECT.replace("select_frames", "s\\u0065lect_frames"),
        SELECT.replace("select_frames", "séléct_frames"),
        SELECT.replace('"', "'"),
        SELECT.replace("[1, 16", "[1, 16,"),
        SELECT.replace("[1, 16", "[01, 16"),
        SELECT.replace("[1, 16", "[1.0, 16"),
        SELECT.replace("[1, 16", "[1e0, 16"),
        SELECT.replace("[1, 16", "[[1], 16"),
        SELECT.replace("[1, 16", '["1", 16'),
        SELECT.replace("[1, 16", "[true, 16"),
        SELECT.replace("[1, 16", "[NaN, 16"),
        SELECT.replace("[1, 16", "[\u00a01, 16"),
        SELECT.replace("[1, 16", "[\x0c1, 16"),
        SELECT.replace("[1, 16, -0, 999999999999]", "3"),
        SELECT.replace("}}", ', "label": {"x": 1}}}'),
        SELECT.replace("}}", ', "label": ["x"]}}'),
        SELECT.replace("}}", ', "label": "a < b"}}'),
        SELECT.replace("}}", ', "label": "a\nb"}}'),
        SELECT.replace("}}", ', "label": "\\x"}}'),
        SELECT.replace("}}", ', "label": NaN}}'),
        SELECT.replace("}}", ', "la\\u0062el": "x"}}'),
        SELECT.replace("}}", ', "label"}}'),
        SELECT.replace("}}", ', "bbox_2d": [1]}}'),
        SELECT.replace("}}", ', "target_frames": "x"}}'),
        SELECT.replace("}}", '}, "name": "crop_image_normalized"}'),
        SELECT.replace("}}", '}, "arguments": {"label": 1}}'),
        SELECT.replace("}}", "},}"),
        '{"name": "select_frames", "arguments": []}',
        '{"name": "select_frames"}',
        '{"arguments": {"target_frames": [1]}}',
        CROP.replace("12.5]", '12.5, "sign"]'),
        CROP.replace(", 12.5]", "]"),
        CROP.replace("12.5", "1e"),
        CROP.replace("12.5", "1e-"),
        CROP.replace("12.5", "1e0.5"),
        CROP.replace("12.5", "12."),
        CROP.replace("12.5", ".5"),
        CROP.replace("12.5", "+5"),
        CROP.replace("12.5", "-"),
        CROP.replace("12.5", "-Infinity"),
        CROP.replace(', "target_image": 2', ""),
        CROP.replace('"target_image": 2', '"target_image": null'),
        CROP.replace('"target_image": 2', '"target_image": [2]'),
        "[" * 100_000,
        '{"name":' * 100_000,
        "1" * 100_000,
    ],
)
def test_what_is_no_call(body):
    with pytest.raises(MalformedCallError):
        parse_call(body.encode())
    assert parse_turn(f"<tool_call>{body}</tool_call>") == ParsedTurn(True, None)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_generated_calls_are_calls(seed):
    assert parse_call(call(random.Random(seed)).encode()).tool in (0, 1)
    parse_turn(response(random.Random(seed), odd=0.5))  # never raises


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 2**32))
def test_numbers_are_their_decimals_cut_off(seed):
    text = number(random.Random(seed))
    read = parse_call(CROP.replace("12.5", text).encode()).arguments["bbox_2d"][3]
    assert read.negative == text.startswith("-") and read.integer == isinstance(json.loads(text), int)
    mantissa, _, exponent = text.lower().partition("e")
    micros = int((abs(Decimal(mantissa)) * 10**6).to_integral_value(ROUND_DOWN))  # before the exponent
    if micros >= 10**15:
        return  # units are at their limit, and stay there unless an exponent moves them down
    exact = micros * Fraction(10) ** int(exponent or 0)
    assert read.units == min(int(exact) // 10**6, 999_999_999)
    assert read.micros == int(exact) % 10**6 or read.units == 999_999_999


LONG = '{"name": "crop_image_normalized", "arguments": {"bbox_2d": [0.3333333333333333, 1e-1, 2.5E+2, 12e2, 7], "label": %s}}'


def test_what_the_released_code_reads_and_people_write():
    call = (
        LONG.replace("}}", ', "target_image": 1, "target_frames": [2]}, "id": 3}')
        % '"the \\"STOP\\" sign, \\u00e9 é日"'
    )
    read = parse_call(call.encode()).arguments
    assert read["target_image"].units == 1 and {*read} == {"bbox_2d", "target_image"}
    assert [(n.units, n.micros, n.integer) for n in read["bbox_2d"]] == [
        (0, 333333, False),
        (0, 100000, False),
        (250, 0, False),
        (1200, 0, False),
    ]
    twice = SELECT.replace("}}", ', "target_frames": [7, 8]}}')
    assert frames(twice) == (7, 8)
    again = SELECT.replace("}}", '}, "arguments": {"target_frames": [5]}, "name": "select_frames"}')
    assert frames(again) == (5,)


def released(text: str):
    """`parse_last_tool` and what the released code then looks up: (tool, its values), or None where it raises."""
    try:
        call = json.loads(text.split("<tool_call>")[-1].split("</tool_call>")[0])
        name, arguments = call["name"], call["arguments"]
        if name == "select_frames":
            return name, [operator.index(frame) for frame in arguments["target_frames"]]
        if name == "crop_image_normalized":
            target = arguments["target_image"] - 1
            return name, [*(float(side) / 1 for side in arguments["bbox_2d"][:4]), target + 1]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, OverflowError):
        pass
    return None


@settings(max_examples=1500, deadline=None)
@given(st.integers(0, 2**32))
def test_calls_are_those_that_the_released_code_carries_out(seed):
    """Ours are some of theirs, with the same values to the millionth; what we leave is what the docstring says."""
    rng = random.Random(seed)
    text = call(rng, odd=rng.choice([0, 0.05, 0.3]))
    ours, theirs = parse_turn(f"<tool_call>{text}</tool_call>").call, released(text)
    if ours is None:
        others = ("NaN", "Infinity", "true", "{}", "[1]", "null", "\\u006e")
        wrong_kind = re.search(r'"(bbox_2d|target_image|target_frames)"[ \t\n\r]*:', text)
        assert (
            theirs is None
            or any(word in text for word in others)
            or wrong_kind
            and len(wrong_kind.re.findall(text)) > 1
        )
        return
    name, values = theirs
    assert name == ("crop_image_normalized", "select_frames")[ours.tool]
    if ours.tool == 1:
        assert [max(min(frame, 999_999_999), -999_999_999) for frame in values] == list(ours.arguments["target_frames"])
        return
    powers = [int(power) for power in re.findall(r"[0-9][eE](\+?[0-9]+)", text)]
    cut = 1.001e-6 * 10.0 ** min(max([0, *powers]), 300)  # decimals are cut off before an exponent is applied
    for mine, value in zip([*ours.arguments["bbox_2d"], ours.arguments["target_image"]], values, strict=True):
        assert mine.negative == (math.copysign(1, value) < 0) or value == 0
        if abs(value) < 10**8 and not re.search(r"[0-9]{9}", text):  # where units do not stay at their limit
            assert 0 <= abs(value) - (mine.units + mine.micros / 10**6) + 1e-8 < cut + 1e-7


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.binary()))
def test_no_text_raises(text):
    parse_turn(text)
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    assert parse_turn(data + b"</tool_call>").required


def test_a_stored_corpus_reads_as_it_did():
    """Verdicts and values of the parser that knew these two tools only, on calls of every sort."""
    seen = collections.Counter()
    for line in (pathlib.Path(__file__).parent / "released_calls.jsonl").read_text().splitlines():
        text, required, stored = json.loads(line)
        turn = parse_turn(text.encode("latin-1"))
        seen[required, stored and stored[0]] += 1
        assert turn.required == required
        if stored is None:
            assert turn.call is None
            continue
        tool, box, target, selected = stored
        found = (
            {"target_frames": tuple(selected)}
            if tool
            else {"bbox_2d": tuple(DecimalNumber(*x) for x in box), "target_image": DecimalNumber(*target)}
        )
        assert turn.call == ToolCall(tool, found), text
    assert min(seen.values()) > 70 and len(seen) == 4
