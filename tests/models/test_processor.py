"""The processor against transformers' image processor, and by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_qwen import tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import pixel_jax
from pixel_jax.models.processor import Processor

WORDS = ["<pad>", "<|image_pad|>", "<|video_pad|>", "look", "here", "?"]


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(WORDS[:3])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="?")


@pytest.fixture(scope="module")
def processor(tokenizer):
    return Processor(tokenizer, min_pixels=56 * 56, max_pixels=112 * 140)


def picture(rng, height, width):
    return rng.integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.torch
@pytest.mark.parametrize("size", [(60, 90), (333, 100), (20, 30), (112, 112)])
def test_image_equals_transformers(processor, rng, size):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image = Image.fromarray(picture(rng, *size))
    theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 140})(images=[image])
    pixels, grid = processor.patches([image])
    assert list(grid) == np.asarray(theirs["image_grid_thw"])[0].tolist()
    # Resized in two calls of one pass each: the order of Pillow 12, under which models were trained, in every release.
    across = image.resize((grid[2] * 14, image.height), Image.Resampling.BICUBIC)
    shown = across.resize((grid[2] * 14, grid[1] * 14), Image.Resampling.BICUBIC)
    theirs = Qwen2VLImageProcessorPil(do_resize=False)(images=[shown])
    np.testing.assert_allclose(pixels, np.asarray(theirs["pixel_values"]), atol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white_as_in_transformers(processor, rng, mode):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image = Image.fromarray(rng.integers(0, 256, (112, 112, 4)).astype(np.uint8))
    image = image.convert("RGB").quantize(8) if mode == "P" else image.convert(mode)
    if mode == "P":
        image.info["transparency"] = 3
    theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 140})(images=[image])
    np.testing.assert_allclose(processor.patches([image])[0], np.asarray(theirs["pixel_values"]), atol=1e-6)


def test_an_image_is_what_its_file_is(processor, rng, tmp_path):
    """Opened with Pillow or read by `read_image`: 16 bits, transparency and orientation are the same."""
    exif = Image.Exif()
    exif[0x0112] = 6
    ramp = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.fromarray(rng.integers(0, 256, (60, 90, 4)).astype(np.uint8)).save(tmp_path / "clear.png", exif=exif)
    for path in (tmp_path / "deep.png", tmp_path / "clear.png"):
        pixels, grid = processor.patches([Image.open(path)])
        expected, same = processor.patches([pixel_jax.read_image(path)])
        assert grid == same
        np.testing.assert_array_equal(pixels, expected)
    assert (pixel_jax.read_image(tmp_path / "deep.png") == 255).mean() == 1 / 256


def test_equals_the_device_operations(processor, rng):
    """Resized on the host or on the device: the same pixels, and the same numbers up to rounding."""
    from pixel_jax.ops import crop_resize, patchify, pixel_values

    image = picture(rng, 75, 120)
    pixels, (_, h, w) = processor.patches([image])
    size = jnp.array([h * 14, w * 14])
    seen = crop_resize(jnp.array(image), jnp.array([0, 0, 120, 75]), size, (h * 14, w * 14))
    frame = patchify(seen, size, max_patches=h * w)
    np.testing.assert_allclose(pixels, pixel_values(frame, frame), atol=1e-6)


def test_a_rate_for_each_video(processor, rng):
    videos = [[picture(rng, 56, 56)] * count for count in (2, 4)]
    shown = "<|video_pad|> here <|video_pad|>"
    assert processor(shown, videos=videos, fps=[4.0, 1.0])["second_per_grid_ts"].tolist() == [0.5, 2.0]
    assert processor(shown, videos=videos, fps=4.0)["second_per_grid_ts"].tolist() == [0.5, 0.5]
    for wrong in ([4.0], [4.0, 1.0, 1.0], 0.0, [1.0, -1.0], float("nan")):
        with pytest.raises(ValueError, match="give one rate above 0, or one for each of the 2 videos"):
            processor(shown, videos=videos, fps=wrong)


def test_text_images_and_video(processor, rng):
    """Placeholders grow to the number of visual tokens, kinds interleaved; rows are padded on the right."""
    texts = ["look <|image_pad|> here <|video_pad|> ?", "<|image_pad|>"]
    images = [picture(rng, 56, 84), Image.fromarray(picture(rng, 112, 56))]
    video = [picture(rng, 56, 56) for _ in range(3)]
    out = processor(texts, images=images, videos=[video], fps=4.0)
    assert out["image_grid_thw"].tolist() == [[1, 4, 6], [1, 8, 4]]
    assert out["video_grid_thw"].tolist() == [[2, 4, 4]]
    assert out["second_per_grid_ts"].tolist() == [0.5]
    assert out["pixel_values"].shape == (24 + 32, 1176) and out["pixel_values_videos"].shape == (32, 1176)
    row = [3, *[1] * 6, 4, *[2] * 8, 5]
    assert out["input_ids"].tolist() == [row, [1] * 8 + [0] * (len(row) - 8)]
    assert out["attention_mask"].tolist() == [[1] * len(row), [1] * 8 + [0] * (len(row) - 8)]
    # The odd last frame is repeated: both halves of its temporal patch are equal.
    last = out["pixel_values_videos"][16:].reshape(16, 3, 2, 196)
    assert (last[:, :, 0] == last[:, :, 1]).all()


def test_text_alone(processor):
    out = processor("look here")
    assert set(out) == {"input_ids", "attention_mask"} and out["input_ids"].tolist() == [[3, 4]]


@pytest.mark.parametrize("arguments, message", [
    ({"text": "look"}, "has 0 .*image_pad.*, but 1 were given"),
    ({"text": "<|image_pad|> <|image_pad|>"}, "has 2 .*image_pad.*, but 1 were given"),
    ({"text": "<|image_pad|>", "images": [np.zeros((4, 4), np.uint8)]}, r"got uint8 \(4, 4\)"),
    ({"text": "<|image_pad|>", "images": [np.zeros((4, 4, 3))]}, r"got float64 \(4, 4, 3\)"),
    ({"text": "<|image_pad|> <|video_pad|>", "videos": [[]]}, "at least one frame"),
    ({"text": "<|image_pad|> <|video_pad|>",
      "videos": [[np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)]]}, "differ in size"),
])  # fmt: skip
def test_bad_input(processor, rng, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**{"images": [picture(rng, 56, 56)], **arguments})


def directory_with(model, processor, path):
    """A model whose placeholder ids are those of the tokenizer above."""
    model = jax.tree.map(lambda x: x, model)
    model.config = dataclasses.replace(model.config, image_token_id=1, video_token_id=2)
    pixel_jax.save_pretrained(model, processor, path)


def test_saved_with_the_model_and_read_again(model, processor, tmp_path):
    directory_with(model, processor, tmp_path)
    again, read = pixel_jax.from_pretrained(tmp_path)
    assert (read.min_pixels, read.max_pixels) == (56 * 56, 112 * 140)
    assert read("look <|image_pad|>", images=[np.zeros((56, 56, 3), np.uint8)])["input_ids"].tolist() == [
        [3, 1, 1, 1, 1]
    ]
    values = json.loads((tmp_path / "preprocessor_config.json").read_text())
    # transformers 5 writes the limits as `size`, in a file of its own.
    del values["min_pixels"], values["max_pixels"]
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    assert pixel_jax.from_pretrained(tmp_path)[1].max_pixels == 112 * 140
    values["patch_size"] = 16
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    with pytest.raises(ValueError, match="patch_size 16, the model 14"):
        pixel_jax.from_pretrained(tmp_path)


def test_tokenizer_of_another_model(model, processor, tmp_path):
    directory_with(model, processor, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_hf()))
    with pytest.raises(ValueError, match="<|image_pad|> is token 1 of the tokenizer, 60 of config.json"):
        pixel_jax.from_pretrained(tmp_path)


def test_limits_that_clash(tokenizer):
    with pytest.raises(ValueError, match="got 200 and 100"):
        Processor(tokenizer, min_pixels=200, max_pixels=100)
