"""The processors of Qwen3-VL, Qwen3.5 and LLaVA against transformers' (Pillow backend), on random pictures of random sizes."""

import numpy as np
import pytest
import tiny_families
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pixel_jax.models.processor import Processor

pytestmark = pytest.mark.torch
SIZES = st.tuples(st.integers(20, 150), st.integers(20, 150))  # height and width
LIMITS = {"min_pixels": 32 * 32, "max_pixels": 6 * 32 * 32}


def picture(size):
    return Image.fromarray(np.random.default_rng(sum(size)).integers(0, 256, (*size, 3)).astype(np.uint8))


def resized(image, width, height):
    """In two calls of one pass each: the order of Pillow 12, under which models were trained, in every release."""
    across = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return across.resize((width, height), Image.Resampling.BICUBIC)


def words(*special):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, "look", "?"])}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(list(special))
    if "<s>" in special:  # which LLaVA's tokenizer puts before every text
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", special.index("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=special[0], unk_token="?")


def processor_of(name, *special, **limits):
    config = tiny_families.pair(name)[0].config
    return Processor(words(*special), family=type(config), vision=config.vision, **limits)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5"])
@settings(max_examples=25, deadline=None)
@given(SIZES)
def test_qwen3_vl(name, size):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    ours, image = processor_of(name, *marks, **LIMITS), picture(size)
    known = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    limits = {"shortest_edge": LIMITS["min_pixels"], "longest_edge": LIMITS["max_pixels"]}
    theirs = Qwen2VLImageProcessorPil(size=limits, **known)(images=[image])
    grid = np.asarray(theirs["image_grid_thw"])
    found = ours("look <|vision_start|><|image_pad|><|vision_end|> ?", images=[image])
    np.testing.assert_array_equal(found["image_grid_thw"], grid)
    shown = resized(image, int(grid[0, 2]) * 16, int(grid[0, 1]) * 16)
    pixels = Qwen2VLImageProcessorPil(do_resize=False, **known)(images=[shown])["pixel_values"]
    np.testing.assert_allclose(found["pixel_values"], np.asarray(pixels), atol=1e-6)
    assert found["input_ids"].tolist() == [[4, 0, *[2] * (int(grid.prod()) // 4), 1, 5]]


@settings(max_examples=25, deadline=None)
@given(SIZES)
def test_llava(size):
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    ours, image = processor_of("llava", "<pad>", "<image>", "<s>"), picture(size)
    side = 28  # two patches of 14 pixels
    known = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    height, width = np.asarray(CLIPImageProcessorPil(**known, do_center_crop=False)(image)["pixel_values"]).shape[-2:]
    cut = CLIPImageProcessorPil(**known, do_resize=False)
    shown = resized(image, width, height)
    made = LlavaProcessor(
        image_processor=cut,
        tokenizer=words("<pad>", "<image>", "<s>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    theirs = made(text="look <image> ?", images=shown)
    found = ours("look <image> ?", images=[image])
    np.testing.assert_allclose(found["pixel_values"], np.asarray(theirs["pixel_values"]), atol=1e-6)
    assert found["input_ids"].tolist() == np.asarray(theirs["input_ids"]).tolist()
