"""Preprocessors as they are published, against transformers' own (Pillow backend) of the same files; and what is refused."""

import json
import types

import numpy as np
import PIL
import pytest
import tiny_families
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_processors_of_families import resized, words

from pixel_jax.files import FileError
from pixel_jax.models.preprocessors import FrameSampling, PixelLimits, read_preprocessors
from pixel_jax.models.processor import Processor, volume_size

pytestmark = pytest.mark.torch  # the tiny models of `tiny_families` are made by transformers

CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
FLAGS = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
}
# What lies in released directories, but for the limits, which are those of small pictures here.
SMALL = {"shortest_edge": 4 * 28 * 28, "longest_edge": 12 * 28 * 28}
QWEN2_VL = {
    **CLIP,
    **FLAGS,
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": SMALL["shortest_edge"],
    "max_pixels": SMALL["longest_edge"],
    "size": {"min_pixels": SMALL["shortest_edge"], "max_pixels": SMALL["longest_edge"]},
}
QWEN2_5_VL = {name: QWEN2_VL[name] for name in QWEN2_VL if name not in (*FLAGS, "size")}
# Written by transformers 4.50 and later.
FAST = {
    **CLIP,
    **FLAGS,
    "crop_size": None,
    "data_format": "channels_first",
    "default_to_square": True,
    "device": None,
    "disable_grouping": None,
    "do_center_crop": None,
    "do_pad": None,
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "input_data_format": None,
    "max_pixels": None,
    "merge_size": 2,
    "min_pixels": None,
    "patch_size": 14,
    "return_tensors": None,
    "size": SMALL,
    "temporal_patch_size": 2,
}
QWEN3_VL = {
    **HALF,
    "size": {"shortest_edge": 4 * 32 * 32, "longest_edge": 12 * 32 * 32},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
LLAVA = {
    **CLIP,
    **FLAGS,
    "crop_size": {"height": 28, "width": 28},
    "do_center_crop": True,
    "image_processor_type": "CLIPImageProcessor",
    "processor_class": "LlavaProcessor",
    "size": {"shortest_edge": 28},
}
# name -> family, files
PUBLISHED = {
    "qwen2-vl": ("qwen2_vl", {"preprocessor_config.json": QWEN2_VL}),
    "qwen2.5-vl": ("qwen2_vl", {"preprocessor_config.json": QWEN2_5_VL}),
    "fast": ("qwen2_vl", {"preprocessor_config.json": FAST}),
    "transformers 5": ("qwen2_vl", {"processor_config.json": {"image_processor": FAST, "video_processor": FAST}}),
    "qwen3-vl": ("qwen3_vl", {"preprocessor_config.json": QWEN3_VL}),
    "llava": ("llava", {"preprocessor_config.json": LLAVA}),
    "llava 5": (
        "llava",
        {"processor_config.json": {"image_processor": LLAVA, "patch_size": 14, "image_token": "<image>"}},
    ),
}
MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def vision_of(family):
    return tiny_families.pair(family)[0].config.vision


def read(family, files, tmp_path):
    encoded = {name: json.dumps(values).encode() for name, values in files.items()}
    return read_preprocessors(encoded, tmp_path, vision_of(family), PixelLimits(56 * 56, 28 * 28 * 1280), None)


@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=12, deadline=None)
@given(st.tuples(st.integers(20, 150), st.integers(20, 150)))
def test_pictures_are_those_of_transformers(name, tmp_path_factory, size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    family, files = PUBLISHED[name]
    config = tiny_families.pair(family)[0].config
    limits = read(family, files, tmp_path_factory.mktemp("x")).image
    given_limits = {} if limits is None else {"min_pixels": limits.least, "max_pixels": limits.most}
    special = ("<pad>", "<image>") if family == "llava" else MARKS
    ours = Processor(words(*special), family=type(config), vision=config.vision, **given_limits)
    values = next(iter(files.values()))
    values = values.get("image_processor", values)
    image = Image.fromarray(np.random.default_rng(sum(size)).integers(0, 256, (*size, 3)).astype(np.uint8))
    made = CLIPImageProcessorPil if family == "llava" else Qwen2VLImageProcessorPil
    theirs = made.from_dict(values)
    found = ours("<image>" if family == "llava" else MARKS[2], images=[image])
    if int(PIL.__version__.partition(".")[0]) < 13:
        expected = theirs(images=[image])
        pixels = np.asarray(expected["pixel_values"])
    elif family == "llava":
        high, wide = np.asarray(made.from_dict(values | {"do_center_crop": False})(image)["pixel_values"]).shape[-2:]
        pixels = made.from_dict(values | {"do_resize": False})(resized(image, wide, high))["pixel_values"]
    else:
        expected = theirs(images=[image])
        _, high, wide = np.asarray(expected["image_grid_thw"])[0] * config.vision.patch_size
        shown = resized(image, int(wide), int(high))
        pixels = made.from_dict(values | {"do_resize": False})(images=[shown])["pixel_values"]
    if family != "llava":
        np.testing.assert_array_equal(found["image_grid_thw"], np.asarray(expected["image_grid_thw"]))
    np.testing.assert_allclose(found["pixel_values"], np.asarray(pixels), atol=1e-6)


def test_limits(tmp_path):
    """`min_pixels` goes before `size`; what is left out is as usual; a section of `processor_config.json` goes first."""
    least, most = SMALL["shortest_edge"], SMALL["longest_edge"]
    for name in ("qwen2-vl", "qwen2.5-vl", "fast", "transformers 5"):
        assert read(*PUBLISHED[name], tmp_path).image == (least, most)
    both = {"preprocessor_config.json": FAST | {"min_pixels": 784, "max_pixels": 7840}}
    assert read("qwen2_vl", both, tmp_path).image == (784, 7840)
    assert read("qwen2_vl", {"preprocessor_config.json": {"max_pixels": 7840}}, tmp_path).image == (3136, 7840)
    nested = {"processor_config.json": {"image_processor": FAST}, "preprocessor_config.json": {"max_pixels": 7840}}
    assert read("qwen2_vl", nested, tmp_path).image == (least, most)
    assert read("qwen2_vl", {}, tmp_path) == (None, None, FrameSampling())
    assert read("llava", {"preprocessor_config.json": LLAVA | {"size": 28, "crop_size": 28}}, tmp_path).image is None


def test_videos(tmp_path):
    """Limits and sampling of their own; where they have none, those of images."""
    video = {**HALF, "size": {"longest_edge": 32768, "shortest_edge": 4096}, "patch_size": 16, "temporal_patch_size": 2}
    files = {
        "preprocessor_config.json": QWEN3_VL,
        "video_preprocessor_config.json": video | {"fps": 2, "max_frames": 64},
    }
    found = read("qwen3_vl", files, tmp_path)
    assert found.video == (4096, 32768) and found.sampling == FrameSampling(fps=2.0, most=64)
    files["video_preprocessor_config.json"] = video | {"num_frames": 8, "do_sample_frames": False}
    assert read("qwen3_vl", files, tmp_path).sampling == FrameSampling(frames=8)
    encoded = {name: json.dumps(values).encode() for name, values in files.items()}
    config = tiny_families.pair("qwen3_vl")[0].config
    assert read_preprocessors(encoded, tmp_path, config.vision, PixelLimits(1, 2), 2.0).sampling == FrameSampling(
        frames=8
    )
    processor = Processor(words(*MARKS), family=type(config), vision=config.vision, video=PixelLimits(4096, 32768))
    frames = [np.zeros((200, 300, 3), np.uint8)] * 5
    _, grid = processor.patches(frames, True)
    high, wide = volume_size(5, 200, 300, 32, PixelLimits(4096, 32768))
    assert grid == (3, high // 16, wide // 16) and processor.patches(frames[:1])[1] != (1, *grid[1:])
    processor.save(tmp_path)
    again = {
        name: (tmp_path / name).read_bytes() for name in ("preprocessor_config.json", "video_preprocessor_config.json")
    }
    assert read_preprocessors(again, tmp_path, config.vision, PixelLimits(1, 2), None).video == (4096, 32768)


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 40), st.integers(8, 400), st.integers(8, 400), st.sampled_from([28, 32]), st.integers(1, 60))
def test_the_size_of_frames_together(frames, height, width, factor, cells):
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    limits = PixelLimits(cells * factor**2, 4 * cells * factor**2)
    expected = smart_resize(frames, height, width, 2, factor, *limits)
    assert volume_size(frames, height, width, factor, limits) == expected


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 2000),
    st.floats(1, 60),
    st.one_of(st.none(), st.floats(0.1, 8)),
    st.integers(1, 8),
    st.integers(8, 64),
)
def test_which_frames_are_taken(count, rate, fps, least, most):
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    frames = None if fps else most
    own = types.SimpleNamespace(fps=fps, min_frames=least, max_frames=most, num_frames=None)
    metadata = types.SimpleNamespace(total_num_frames=count, fps=rate)
    expected = Qwen3VLVideoProcessor.sample_frames(own, metadata, num_frames=frames, fps=fps).tolist()
    if frames and frames > count:  # transformers repeats some
        expected = list(range(count))
    assert FrameSampling(fps, frames, least, most).indices(count, rate) == expected


@pytest.mark.parametrize(
    ("family", "field", "value", "message"),
    [
        ("qwen2_vl", "do_resize", False, "do_resize False, the model True"),
        ("qwen2_vl", "do_rescale", False, "do_rescale False, the model True"),
        ("qwen2_vl", "do_normalize", False, "do_normalize False, the model True"),
        ("qwen2_vl", "do_center_crop", True, "do_center_crop True, the model False"),
        ("qwen2_vl", "do_pad", True, "do_pad True, the model False"),
        ("qwen2_vl", "do_resize", 1, "do_resize 1, the model True"),
        ("qwen2_vl", "resample", 2, "resample 2, the model 3"),
        ("qwen2_vl", "rescale_factor", 1.0, "rescale_factor 1.0, the model 1/255"),
        ("qwen2_vl", "rescale_factor", "x", "rescale_factor 'x', the model 1/255"),
        ("qwen2_vl", "image_mean", [0.5] * 3, r"image_mean \[0.5, 0.5, 0.5\], the model \[0.48"),
        ("qwen2_vl", "image_std", 0.5, "image_std 0.5, the model"),
        ("qwen2_vl", "patch_size", 16, "patch_size 16, the model 14"),
        ("qwen2_vl", "merge_size", 1, "merge_size 1, the model 2"),
        ("qwen2_vl", "temporal_patch_size", 1, "temporal_patch_size 1, the model 2"),
        ("qwen2_vl", "size", {"height": 28, "width": 28}, "size has height 28: pictures keep their proportions"),
        ("qwen2_vl", "size", 28, "size is 28, not an object"),
        ("qwen2_vl", "min_pixels", 0, "min_pixels is 0, not a positive number"),
        ("qwen2_vl", "min_pixels", True, "min_pixels is True, not a positive number"),
        ("qwen2_vl", "min_pixels", 1 << 30, "need 0 < min_pixels <= max_pixels"),
        ("qwen2_vl", "do_flip", True, "do_flip True, which is not known"),
        ("llava", "do_center_crop", False, "do_center_crop False, the model True"),
        ("llava", "do_pad", True, "do_pad True, the model False"),
        ("llava", "size", {"height": 28, "width": 28}, "size .*height.*, the model 28"),
        ("llava", "size", {"shortest_edge": 30}, "size .*30.*, the model 28"),
        ("llava", "crop_size", 14, "crop_size 14, the model 28"),
        ("llava", "patch_size", 16, "patch_size 16, the model 14"),
    ],
)
def test_what_cannot_be_followed_is_named(family, field, value, message, tmp_path):
    whole = LLAVA if family == "llava" else FAST
    with pytest.raises(FileError, match=f"preprocessor_config.json: .*{message}"):
        read(family, {"preprocessor_config.json": whole | {field: value}}, tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fps": 0}, "fps is 0, not a positive number"),
        ({"fps": 2, "num_frames": 8}, "fps is 2 and num_frames 8: give one of the two"),
        ({"num_frames": 2.5}, "num_frames is 2.5"),
        ({"min_frames": 8, "max_frames": 4}, "min_frames is 8, max_frames 4"),
        ({"cap_pixels_per_frame": True}, "cap_pixels_per_frame True, the model False"),
        ({"patch_size": 14}, "patch_size 14, the model 16"),
    ],
)
def test_what_cannot_be_followed_of_videos(fields, message, tmp_path):
    files = {"preprocessor_config.json": QWEN3_VL, "video_preprocessor_config.json": {**HALF, **fields}}
    with pytest.raises(FileError, match=f"video_preprocessor_config.json: .*{message}"):
        read("qwen3_vl", files, tmp_path)


def test_what_nobody_knows_is_said(tmp_path, capsys):
    read("qwen2_vl", {"preprocessor_config.json": FAST | {"sharpness": 3}}, tmp_path)
    assert "nothing is done with sharpness" in capsys.readouterr().err
