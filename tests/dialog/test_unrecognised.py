"""Calls in another format than the one that is read are seen, and the format is named."""

import time

import pytest
from test_formats import GOLDEN, LANGUAGES

from pixel_jax.dialog.formats import FORMATS
from pixel_jax.dialog.unrecognised import WARNING_RATE, fitting_formats, format_warning, unrecognised_turns

END = "<|im_end|>"


def turn(name: str) -> str:
    return GOLDEN[name][0].removesuffix(END)


@pytest.mark.parametrize("name", FORMATS)
def test_calls_of_every_other_format(name):
    for other in FORMATS:
        text = f"{turn(other)}{END}The answer is \\boxed{{3}}.{END}"
        readable = other == name or (name, other) == ("deepeyes", "qwen3_vl")
        assert unrecognised_turns(text, LANGUAGES[name]) == ([] if readable else [turn(other)])
        assert next(iter(fitting_formats([turn(other)]))) == other


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "zoom_in", "arguments": {"bbox_2d": [1, 2, 3, 4]}}',
        'Look:\n```json\n{\n  "function": "zoom_in",\n  "bbox_2d": [1, 2, 3, 4],\n  "label": "x"\n}\n```',
        '{"arguments": {"bbox_2d": [1, 2, 3, 4]}, "name": "crop"}',
        '<tool_call>{"name": "crop_image", "arguments": {"bbox_2d": [1, 2, 3, 4], "target_image": 1}}</tool_call>',
        "<tool_call>crop</tool_call>",
        "<grounding>[1, 2, 3, 4]</grounding> and more",
        '<tool_call>{"name": "select_frames", "arguments": {"target_frames": [1]}}</tool_call> a word',
    ],
)
def test_what_looks_like_a_call(text):
    assert unrecognised_turns(text + END, LANGUAGES["pixel_reasoner"]) == [text]


@pytest.mark.parametrize(
    "text",
    [
        f"\\boxed{{3}}{END}",
        f'[{{"bbox_2d": [1, 2, 3, 4], "label": "a dog"}}]{END}',  # how Qwen2.5-VL answers where something is
        f'The "name": "Ann" and "arguments": {{}} are words.{END}',
        '<tool_call>{"name": "crop_image", "argum',  # cut short
        f'{{"name": "Ann", "age": 3}}{END}',
        "",
    ],
)
def test_what_does_not(text):
    assert unrecognised_turns(text, LANGUAGES["pixel_reasoner"]) == []


def test_a_warning_names_the_format_that_fits():
    plain, odd = f"\\boxed{{3}}{END}", f"{turn('mini_o3')}{END}"
    language = LANGUAGES["pixel_reasoner"]
    few = int(100 * WARNING_RATE)
    assert format_warning([odd] * few + [plain] * (100 - few), language) is None
    said = format_warning([odd] * (few + 1) + [plain] * (99 - few), language)
    assert said == (
        "6 of 100 answers hold calls that are none in the format 'pixel_reasoner': 6 of them are calls in 'mini_o3': set "
        "rollout.call_format to it"
    )
    assert "nor in any other" in format_warning([f"<tool_call>no{END}"], language)
    assert format_warning([], language) is None


def test_long_texts_are_read_in_linear_time():
    began = time.perf_counter()
    for text in ("{" * 200_000, '{"name": "' * 20_000, '{"arguments": [' * 20_000, '{ "arguments": {' + "]," * 100_000):
        unrecognised_turns(text + END, LANGUAGES["pixel_reasoner"])
    assert time.perf_counter() - began < 20
