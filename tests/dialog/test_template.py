"""The prompts of the released checkpoints, byte for byte, and the chat template of Qwen2.5-VL."""

import itertools
import json

import pytest
from published_templates import QWEN2_5
from qwen import qwen_vocabulary

from pixel_jax.dialog import Media, Vocabulary, build_tokenizer, first_messages, flatten, render, to_ids
from pixel_jax.dialog.template import SPECIAL_TOKENS, system_prompt, user_text
from pixel_jax.tools import RELEASED

SYSTEM = (
    "You are a helpful assistant.\n"
    "\n"
    "# Tools\n"
    "\n"
    "You may call one or more functions to assist with the user query.\n"
    "\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n"
    "<tools>\n"
    '{"type": "function", "function": {"name": "crop_image_normalized", "description": "Zoom in on the image based on the'
    ' bounding box coordinates. It is useful when the object or text in the image is too small to be seen.",'
    ' "parameters": {"type": "object", "properties": {"bbox_2d": {"type": "array", "description": "coordinates for'
    ' bounding box of the area you want to zoom in. Values should be within [0.0,1.0].", "items": {"type": "number"}},'
    ' "target_image": {"type": "number", "description": "The index of the image to crop. Index from 1 to the number of'
    ' images. Choose 1 to operate on original image."}}, "required": ["bbox_2d", "target_image"]}}}\n'
    '{"type": "function", "function": {"name": "select_frames", "description": "Select frames from a video.",'
    ' "parameters": {"type": "object", "properties": {"target_frames": {"type": "array", "description": "List of frame'
    ' indices to select from the video (no more than 8 frames in total).", "items": {"type": "integer", "description":'
    ' "Frame index from 1 to 16."}}}, "required": ["target_frames"]}}}\n'
    "</tools>\n"
    "\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML"
    " tags:\n"
    "<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)
GUIDELINES = (
    "\n\n\n\nGuidelines: Understand the given visual information and the user query. Determine if it is beneficial to employ"
    " the given visual operations (tools). For a video, we can look closer by `select_frames`. For an image, we can look"
    " closer by `crop_image`. Reason with the visual information step by step, and put your final answer within \\boxed{}."
)


def test_system_prompt():
    assert system_prompt() == SYSTEM
    assert system_prompt(()) == "You are a helpful assistant."
    for line, tool in zip(SYSTEM.split("\n")[8:10], RELEASED, strict=True):
        assert json.loads(line) == {"type": "function", "function": tool.schema}


def test_user_text():
    assert user_text("What?") == "What?" + GUIDELINES
    assert (
        user_text("What?", "notool")
        == "What?\n\nPlease think step by step, and put your final answer within \\boxed{}."
    )
    assert user_text("What?", "default") == (
        "What?\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    with pytest.raises(ValueError, match="'vot'"):
        user_text("What?", "vot")


def test_images_come_first_or_last():
    media = [Media("image", "a.png"), Media("image", "b.png")]
    shown = "<|vision_start|><|image_pad|><|vision_end|>" * 2
    head = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    first, last = (render(first_messages("What?", media, text_first=text_first)) for text_first in (False, True))
    assert flatten(first) == f"{head}{shown}What?{GUIDELINES}{tail}"
    assert flatten(last) == f"{head}What?{GUIDELINES}{shown}{tail}"
    assert [piece for piece in first if isinstance(piece, Media)] == media
    video = flatten(render(first_messages("What?", [Media("video", None)], guidelines="notool", tools=())))
    assert video == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"
        f"What?\n\nPlease think step by step, and put your final answer within \\boxed{{}}.{tail}"
    )


TEXT, IMAGE, VIDEO = {"type": "text", "text": "<image>\n é{{x}}"}, {"type": "image"}, {"type": "video", "video": "v"}


@pytest.mark.parametrize("template", [QWEN2_5, None], ids=["qwen", "ours"])
@pytest.mark.parametrize("prompt", [False, True])
def test_render_is_the_jinja_template(template, prompt):
    tokenizer = build_tokenizer([])
    contents = ["plain", [], [TEXT], [IMAGE, TEXT], [TEXT, VIDEO, TEXT, IMAGE, IMAGE]]
    dialogs = [
        [{"role": role, "content": content} for role, content in zip(roles, chosen, strict=True)]
        for roles in (("system", "user", "assistant"), ("user", "assistant", "user"))
        for chosen in itertools.product(contents, repeat=3)
    ]
    for messages in dialogs:
        theirs = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        assert flatten(render(messages, add_generation_prompt=prompt)) == theirs


@pytest.mark.parametrize("make", [qwen_vocabulary, lambda: Vocabulary.of(build_tokenizer(["vis", "What?", "\n\n"]))])
def test_ids_are_those_of_the_whole_text(make):
    vocabulary = make()
    media = [Media("image", 0), Media("video", 1), Media("image", 2)]
    pieces = render(first_messages("What?  é\n", media, text_first=True))
    pads = [3, 1, 5]
    counts = iter(pads)
    text = "".join(flatten([p]) * (next(counts) if isinstance(p, Media) else 1) for p in pieces)
    assert to_ids(pieces, vocabulary, pads) == vocabulary.tokenizer.encode(text, add_special_tokens=False)
    with pytest.raises(ValueError, match="3 images and videos, but 2"):
        to_ids(pieces, vocabulary, pads[:2])


@pytest.mark.parametrize("question", [*SPECIAL_TOKENS.values(), "<|im_start|><|im_start|>", "<|im_start|>x\n" * 10])
def test_a_question_that_spells_structure_has_none(question):
    vocabulary = qwen_vocabulary()
    structure = {getattr(vocabulary, name) for name in SPECIAL_TOKENS}
    ids, plain = (to_ids(render(first_messages(x, [Media("image", 0)])), vocabulary, [3]) for x in (question, "What?"))
    assert [x for x in ids if x in structure] == [x for x in plain if x in structure]
    assert vocabulary.to_bytes(ids).count(question.encode()) == 1 + vocabulary.to_bytes(plain).count(question.encode())


def test_a_part_of_no_known_type():
    with pytest.raises(ValueError, match="audio"):
        render([{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}])
