"""Videos against transformers' video processors, from directories as they are published: ids, grids, times, pixels.

`pip install torch torchvision`, then `pytest tests/models/test_video_processors.py`.
"""

import dataclasses
import json

import numpy as np
import pytest
import tiny_families
from test_preprocessors import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from tiny_qwen import tiny_config

from pixel_jax.dialog.tokenizer import build_tokenizer
from pixel_jax.models import config_from_hf
from pixel_jax.models.processor import Processor
from tests.data import ffmpeg

pytestmark = pytest.mark.torchvision

VIDEO = {x: y for x, y in QWEN3_VL.items() if x != "image_processor_type"} | {
    "size": {"shortest_edge": 4096, "longest_edge": 64 * 32 * 32},
    "video_processor_type": "Qwen3VLVideoProcessor",
}
# family -> its configuration, the files of its directories
FAMILIES = {
    "qwen2_vl": (
        lambda: config_from_hf(tiny_families.values("qwen2_vl")),
        {"preprocessor_config.json": QWEN2_VL | {"size": None}},
    ),
    "qwen2_5_vl": (
        tiny_config,
        {"preprocessor_config.json": QWEN2_5_VL | {"processor_class": "Qwen2_5_VLProcessor"}},
    ),
    "qwen3_vl": (
        lambda: config_from_hf(tiny_families.values("qwen3_vl")),
        {"preprocessor_config.json": QWEN3_VL, "video_preprocessor_config.json": VIDEO},
    ),
    "qwen3_5": (
        lambda: config_from_hf(tiny_families.values("qwen3_5")),
        {"preprocessor_config.json": QWEN3_VL, "video_preprocessor_config.json": VIDEO | {"fps": 2}},
    ),
}
TEXT = "See: <|vision_start|><|video_pad|><|vision_end|> and <|vision_start|><|video_pad|><|vision_end|>?"
# Frames, height, width, frames a second: two videos a case.
CASES = [
    ((4, 60, 90, 2.0), (5, 100, 64, 3.0)),
    ((7, 33, 150, 24.0), (2, 300, 200, 0.5)),
    ((3, 112, 112, 29.97), (16, 48, 64, 10 / 3)),
    ((2, 20, 25, 1.0), (12, 240, 320, 2.5)),
]


@pytest.fixture(scope="module", params=FAMILIES)
def processors(request, tmp_path_factory):
    """(ours, theirs), read from one directory."""
    from transformers import AutoProcessor

    make, files = FAMILIES[request.param]
    config, folder = make(), tmp_path_factory.mktemp(request.param)
    tokenizer = build_tokenizer([])
    image, video = tokenizer.convert_tokens_to_ids(list(config.placeholders))
    config = dataclasses.replace(config, image_token_id=image, video_token_id=video)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    for name, values in files.items():
        (folder / name).write_text(json.dumps({x: y for x, y in values.items() if y is not None}))
    theirs = AutoProcessor.from_pretrained(folder, local_files_only=True)
    assert type(theirs).__name__ == config.processor
    return Processor.from_directory(folder, config), theirs


def noise(frames, height, width, _):
    return np.random.default_rng(height + width).integers(0, 256, (frames, height, width, 3), np.uint8)


def both(processors, videos, rates, **options):
    """What the two make of videos that are sampled already."""
    from transformers.video_utils import VideoMetadata

    ours, theirs = processors
    known = [
        VideoMetadata(total_num_frames=len(x), fps=rate, frames_indices=list(range(len(x))))
        for x, rate in zip(videos, rates, strict=True)
    ]
    made = theirs(
        text=[TEXT], videos=videos, video_metadata=known, do_sample_frames=False, return_tensors="np", **options
    )
    return ours(TEXT, videos=videos, fps=rates), made


def levels_off(processors, found, made):
    """By how many levels of 255 pixel values differ."""
    pixels = found["pixel_values_videos"]
    off = np.abs(pixels - np.asarray(made["pixel_values_videos"])).reshape(len(pixels), 3, -1)
    return off * np.array(processors[0].vision.pixel_std, np.float32)[:, None] * 255


@pytest.mark.parametrize("case", CASES)
def test_videos(case, processors):
    """Everything but the pixels is equal. torchvision rounds other weights than Pillow: some are a level or two off."""
    rates = [rate for *_, rate in case]
    found, made = both(processors, [noise(*x) for x in case], rates)
    np.testing.assert_array_equal(found["video_grid_thw"], made["video_grid_thw"])
    assert found["input_ids"].tolist() == made["input_ids"].tolist()
    if "second_per_grid_ts" in made:
        np.testing.assert_allclose(found["second_per_grid_ts"], made["second_per_grid_ts"], rtol=1e-6)
    off = levels_off(processors, found, made)
    assert off.max() < 2.01 and (off > 0.5).mean() < 0.02


def test_frames_that_keep_their_size(processors):
    """Without resizing, pixel values are equal."""
    side = 2 * processors[0].vision.factor
    videos = [noise(4, side, side, 0) for _ in range(2)]
    found, made = both(processors, videos, [2.0, 2.0], do_resize=False)
    np.testing.assert_array_equal(found["video_grid_thw"], made["video_grid_thw"])
    np.testing.assert_allclose(found["pixel_values_videos"], made["pixel_values_videos"], atol=2e-6)


def test_a_film(processors, tmp_path):
    """Frames of a file rather than noise."""
    film = ffmpeg.frames_of(ffmpeg.make(tmp_path / "a.mp4", count=9, size=(120, 160)))
    found, made = both(processors, [film, film[::2]], [20.0, 10.0])
    off = levels_off(processors, found, made)
    assert off.max() < 2.01 and (off > 0.5).mean() < 0.02
