"""The processor of Qwen3-VL and Qwen3.5 against transformers': images, several of them, and videos; positions and logits, too.

Pictures have sizes that need no resizing, of which `test_processors_of_families.py` is.
"""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_families
from test_families import their_logits
from tiny_qwen import relative
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import pixel_jax
from pixel_jax.models.processor import Processor

pytestmark = pytest.mark.torch
MARKS = {
    "<|vision_start|>": tiny_families.START,
    "<|vision_end|>": tiny_families.END,
    "<|image_pad|>": tiny_families.IMAGE,
    "<|video_pad|>": tiny_families.VIDEO,
}
IMAGE, VIDEO = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
SQUARE = 32  # pixels of the side of a visual token
LIMITS = {"min_pixels": SQUARE**2, "max_pixels": 100 * SQUARE**2}


def words():
    """Every mark at its place in the tiny model, and a token for each piece of a time."""
    known = [*"?<>.0123456789", "seconds", "look", "here"]
    vocabulary = {word: i for i, word in enumerate(known)} | {f"w{i}": i for i in range(len(known), 58)} | MARKS
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    core.add_special_tokens([*MARKS])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="?", unk_token="?")


def their_processor(tokenizer):
    from transformers import Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    class Unchecked(Qwen3VLProcessor):
        """Without a check of its parts' classes, which needs torchvision."""

        def check_argument_for_proper_class(self, argument_name, argument):
            return type(argument)

    size = {"shortest_edge": LIMITS["min_pixels"], "longest_edge": LIMITS["max_pixels"]}
    image = Qwen2VLImageProcessorPil(size=size, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    # Resizing, colours and normalising need torchvision; the last is a line of arithmetic.
    undone = dict.fromkeys(("do_resize", "do_sample_frames", "do_convert_rgb", "do_normalize"), False)
    return Unchecked(image_processor=image, tokenizer=tokenizer, video_processor=Qwen3VLVideoProcessor(**undone))


def pictures(rng, *shape):
    return rng.integers(0, 256, (*shape, 3)).astype(np.uint8)


def items_of(text, arrays):
    """What positions are computed from: each pair of frames of a video is an item."""
    ids, items = arrays["input_ids"], []
    left = {kind: iter(arrays.get(f"{kind}_grid_thw", ())) for kind in ("image", "video")}
    for kind in re.findall(r"<\|(\w+)_pad\|>", text):
        slices, *size = next(left[kind]).tolist()
        items += [(1, *size)] * slices
    return ids, np.ones(ids.shape, bool), np.array([items]), np.zeros((1, len(items)), np.float32)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5"])
@pytest.mark.parametrize(
    ("text", "sizes", "frames"),
    [
        (f"look {IMAGE} here", [(2, 3)], []),
        (f"{IMAGE} look {IMAGE} {IMAGE} here", [(1, 2), (4, 1), (2, 2)], []),
        (f"look {VIDEO} here", [], [(6, 2, 1)]),
        (f"{IMAGE} look {VIDEO} here {VIDEO} {IMAGE} ?", [(1, 1), (3, 2)], [(5, 1, 2), (1, 2, 2)]),
        (f"<|video_pad|> look {VIDEO} here", [], [(3, 1, 2), (8, 2, 2)]),  # without marks around it
    ],
)
def test_arrays_and_what_the_model_makes_of_them(name, text, sizes, frames, rng):
    import torch
    from transformers.video_utils import VideoMetadata

    model, theirs = tiny_families.pair(name)
    tokenizer = words()
    rates = [10.0, 7.5][: len(frames)]  # of 10 some times are halfway between tenths
    images = [pictures(rng, *(SQUARE * x for x in size)) for size in sizes]
    videos = [pictures(rng, count, *(SQUARE * x for x in size)) for count, *size in frames]
    known = {
        "videos": videos,
        "video_metadata": [
            VideoMetadata(total_num_frames=len(x), fps=rate, frames_indices=[*range(len(x))])
            for x, rate in zip(videos, rates, strict=True)
        ],
    }
    made = their_processor(tokenizer)(
        text=[text], images=images or None, **(known if videos else {}), return_tensors="np"
    )
    expected = {name: np.asarray(x) for name, x in made.items()}
    if videos:
        expected["pixel_values_videos"] = (expected["pixel_values_videos"] - 0.5) / 0.5
    ours = Processor(tokenizer, family=type(model.config), vision=model.config.vision, **LIMITS)
    found = ours(text, images=images, videos=videos, fps=rates)
    assert found.keys() == expected.keys() - {"mm_token_type_ids"}
    for key, x in found.items():
        close = np.testing.assert_allclose if x.dtype == np.float32 else np.testing.assert_array_equal
        close(x, expected[key], **({"atol": 1e-6} if x.dtype == np.float32 else {}), err_msg=key)
    arrays = {key: x.astype(np.int64 if x.dtype.kind == "i" else np.float32) for key, x in expected.items()}
    known = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    indices = {key: torch.tensor(arrays[key]) for key in known if key in arrays}
    positions, _ = model.positions(*items_of(text, found), jnp.zeros(1, jnp.int32))
    np.testing.assert_array_equal(positions, theirs.model.get_rope_index(**indices)[0])
    assert relative(pixel_jax.forward(model, **found), their_logits(theirs, **arrays)) < 1e-5
