"""The host parser: what is a call, what is not, and what its numbers are."""

import random
from decimal import ROUND_DOWN, Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import call, number, response

from pixel_jax.dialog import Call, MalformedCallError, Number, Turn, parse_call, parse_turn

CROP = '{"name": "crop_image_normalized", "arguments": {"bbox_2d": [0.1, 0.25, -3, 12.5], "target_image": 2}}'
SELECT = '{"name": "select_frames", "arguments": {"target_frames": [1, 16, -0, 999999999999]}}'


def test_the_calls_of_the_released_data():
    turn = parse_turn(f"I will zoom in.\n<tool_call>\n{CROP}\n</tool_call><|im_end|>")
    box = (
        Number(0, 100000, False, False),
        Number(0, 250000, False, False),
        Number(3, 0, True, True),
        Number(12, 500000, False, False),
    )
    assert turn == Turn(True, Call(0, box=box, target_image=Number(2, 0, False, True)))
    # As printed in the instruction-tuning data, without a space before "arguments".
    printed = '<tool_call>\n{"name": "select_frames","arguments": {"target_frames":[1, 2]}}\n</tool_call>'
    assert parse_turn(printed) == Turn(True, Call(1, frames=(1, 2)))
    assert parse_call(SELECT.encode()).frames == (1, 16, 0, 999_999_999)


@pytest.mark.parametrize(
    ("response", "required"),
    [
        ("", False),
        ("\\boxed{3}<|im_end|>", False),
        (f"<tool_call>{SELECT}</tool_call>\n", False),
        (f"<tool_call>{SELECT}</tool_call><|endoftext|>", False),
        ("</tool_call>", True),
        ("</tool_<|im_end|>call>", True),
        ("</tool_call><|im_<|im_end|>end|>", False),
    ],
)
def test_a_call_is_required_when_the_response_ends_with_the_tag(response, required):
    assert parse_turn(response) == Turn(required, None)


def test_the_last_opening_tag_counts():
    assert parse_turn(f"<tool_call>{CROP}</tool_call> no: <tool_call>{SELECT}</tool_call>").call.tool == 1
    assert parse_turn(f"<tool_call>{CROP}<tool_call>{SELECT}</tool_call>").call.tool == 1
    assert parse_turn(f"{SELECT}</tool_call>") == Turn(True, None)
    assert parse_turn(f"<tool_call>{SELECT}</tool_call></tool_call>") == Turn(True, None)


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
        SELECT.replace("[1, 16", "[1234567890123, 16"),
        SELECT.replace("[1, 16", "[NaN, 16"),
        SELECT.replace("[1, 16", "[\u00a01, 16"),
        SELECT.replace("[1, 16", "[\x0c1, 16"),
        SELECT.replace("[1, 16, -0, 999999999999]", "3"),
        SELECT.replace("}}", ', "label": "x"}}'),
        SELECT.replace("}}", ', "target_frames": [1]}}'),
        SELECT.replace("}}", '}, "name": "select_frames"}'),
        '{"name": "select_frames", "arguments": []}',
        '{"name": "select_frames"}',
        '{"arguments": {"target_frames": [1]}}',
        CROP.replace("12.5]", "12.5, 1]"),
        CROP.replace(", 12.5]", "]"),
        CROP.replace("12.5", "1e-3"),
        CROP.replace("12.5", "12."),
        CROP.replace("12.5", ".5"),
        CROP.replace("12.5", "+5"),
        CROP.replace("12.5", "-"),
        CROP.replace("12.5", "0.00000000001"),
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
    assert parse_turn(f"<tool_call>{body}</tool_call>") == Turn(True, None)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_generated_calls_are_calls(seed):
    assert parse_call(call(random.Random(seed)).encode()).tool in (0, 1)
    parse_turn(response(random.Random(seed), odd=0.5))  # never raises


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 2**32))
def test_numbers_are_their_decimals_cut_off(seed):
    text = number(random.Random(seed))
    read = parse_call(CROP.replace("12.5", text).encode()).box[3]
    exact = Decimal(text)
    micros = int((abs(exact) * 10**6).to_integral_value(ROUND_DOWN))
    assert (read.units, read.micros) == (min(micros // 10**6, 999_999_999), micros % 10**6)
    assert read.negative == text.startswith("-") and read.integer == ("." not in text)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.binary()))
def test_no_text_raises(text):
    parse_turn(text)
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    assert parse_turn(data + b"</tool_call>").required
