"""Text, images and videos -> the arrays of the Hugging Face layout, on the host.

Images are resized by `host_crop_resize`: the same bits as `pixel_jax.ops.crop_resize` over the whole image.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixel_jax.models.config import Qwen2_5_VLConfig
from pixel_jax.ops import IMAGE_MEAN, IMAGE_STD, host_crop_resize, smart_resize, temporal_slices
from pixel_jax.pictures import rgb

PREPROCESSOR = "preprocessor_config.json"
NESTED = "processor_config.json"  # where transformers 5 keeps the same fields, under "image_processor"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json")
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
PATCH, MERGE, TEMPORAL = 14, 2, 2


class Processor:
    """A tokenizer and the limits of an image's size.

    min_pixels, max_pixels: area of an image as the model sees it; defaults are those of the Hugging Face image processor
    """

    def __init__(self, tokenizer, *, min_pixels: int = 56 * 56, max_pixels: int = 28 * 28 * 1280):
        if not 0 < min_pixels <= max_pixels:
            raise ValueError(f"need 0 < min_pixels <= max_pixels, got {min_pixels} and {max_pixels}")
        self.tokenizer = tokenizer
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels

    @classmethod
    def from_directory(cls, directory: Path, config: Qwen2_5_VLConfig) -> "Processor | None":
        """The processor of a model directory; None if it holds no tokenizer."""
        if not any((directory / name).is_file() for name in TOKENIZER_FILES):
            return None
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        for token, expected in ((IMAGE_PAD, config.image_token_id), (VIDEO_PAD, config.video_token_id)):
            found = tokenizer.convert_tokens_to_ids(token)
            if found != expected:
                raise ValueError(f"{directory}: {token} is token {found} of the tokenizer, {expected} of config.json")
        return cls(tokenizer, **_limits(directory, config))

    def save(self, directory: Path) -> None:
        self.tokenizer.save_pretrained(directory)
        values = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "patch_size": PATCH,
            "temporal_patch_size": TEMPORAL,
            "merge_size": MERGE,
            "image_mean": list(IMAGE_MEAN),
            "image_std": list(IMAGE_STD),
        }
        (directory / PREPROCESSOR).write_text(json.dumps(values, indent=2))

    def __call__(
        self, text: str | list[str], images: list | None = None, videos: list | None = None, fps: float = 2.0
    ) -> dict[str, np.ndarray]:
        """The keyword arguments of `pixel_jax.forward`.

        text:   one text or a batch; each `<|image_pad|>` (`<|video_pad|>`) in it stands for the next image (video)
        images: Pillow images (`pixel_jax.pictures.rgb`) or uint8 [h, w, 3], of all texts in order
        videos: uint8 [t, h, w, 3] or lists of images, all frames of one size; already sampled, at `fps` frames a second
        """
        texts = [text] if isinstance(text, str) else list(text)
        out: dict[str, np.ndarray] = {}
        counts: dict[str, list[int]] = {}
        for pad, items, names in (
            (IMAGE_PAD, [[image] for image in images or []], ("pixel_values", "image_grid_thw")),
            (VIDEO_PAD, [list(video) for video in videos or []], ("pixel_values_videos", "video_grid_thw")),
        ):
            shown = sum(t.count(pad) for t in texts)
            if shown != len(items):
                raise ValueError(f"the text has {shown} {pad}, but {len(items)} were given")
            if items:
                pixels, grids = zip(*(self.patches(frames) for frames in items), strict=True)
                out[names[0]], out[names[1]] = np.concatenate(pixels), np.array(grids, np.int32)
            counts[pad] = [int(np.prod(grid)) // MERGE**2 for grid in out.get(names[1], [])]
        if videos:
            out["second_per_grid_ts"] = np.full(len(videos), TEMPORAL / fps, np.float32)
        rows = [self.tokenizer.encode(_expand(t, counts), add_special_tokens=False) for t in texts]
        length = max(map(len, rows))
        pad_id = self.tokenizer.pad_token_id or 0
        out["input_ids"] = np.full((len(rows), length), pad_id, np.int32)
        out["attention_mask"] = np.zeros((len(rows), length), np.int32)
        for r, row in enumerate(rows):
            out["input_ids"][r, : len(row)] = row
            out["attention_mask"][r, : len(row)] = 1
        return out

    def patches(self, frames: list) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Frames of one size (one: a still image) -> float32 [t * h * w, 1176] in merge order and the grid (t, h, w)."""
        if not frames:
            raise ValueError("a video needs at least one frame")
        frames = [_rgb(frame) for frame in frames]
        if len({frame.size for frame in frames}) > 1:
            raise ValueError(f"frames of one video differ in size: {sorted({frame.size for frame in frames})}")
        width, height = frames[0].size
        high, wide = smart_resize(height, width, min_pixels=self.min_pixels, max_pixels=self.max_pixels)
        whole = (0, 0, width, height)
        seen = np.stack([host_crop_resize(np.asarray(frame), whole, (high, wide)) for frame in frames])
        # As the Hugging Face processor: rescaled in float64, rounded, normalised in float32.
        scaled = (seen * (1 / 255)).astype(np.float32)
        scaled = (scaled - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_STD, np.float32)
        pairs = scaled[temporal_slices(len(frames))]  # [t, 2, high, wide, 3]
        t, h, w = len(pairs), high // PATCH, wide // PATCH
        cells = pairs.reshape(t, TEMPORAL, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH, 3)
        return cells.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, -1), (t, h, w)


def _expand(text: str, counts: dict[str, list[int]]) -> str:
    """Each placeholder repeated as often as its item has visual tokens; `counts` is used up from the front."""
    pieces, at = [], 0
    while True:
        found = [(text.find(pad, at), pad) for pad in counts if text.find(pad, at) >= 0]
        if not found:
            return "".join([*pieces, text[at:]])
        start, pad = min(found)
        pieces += [text[at:start], pad * counts[pad].pop(0)]
        at = start + len(pad)


def _rgb(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return Image.fromarray(rgb(image))
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(f"an image must be a Pillow image or uint8 [h, w, 3], got {array.dtype} {array.shape}")
    return Image.fromarray(array)


def _limits(directory: Path, config: Qwen2_5_VLConfig) -> dict[str, int]:
    """min_pixels and max_pixels of the directory's preprocessor, whose other fields must be those of the model."""
    values: dict[str, Any] = {}
    for name in (PREPROCESSOR, NESTED):
        if (directory / name).is_file():
            values = json.loads((directory / name).read_text())
            values = values.get("image_processor", values)
            break
    vision = config.vision
    for field, expected in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.spatial_merge_size),
        ("image_mean", list(IMAGE_MEAN)),
        ("image_std", list(IMAGE_STD)),
    ):
        if values.get(field, expected) != expected:
            raise ValueError(f"{directory}: the preprocessor has {field} {values[field]}, the model {expected}")
    size = values.get("size") or {}
    named = {"min_pixels": values.get("min_pixels"), "max_pixels": values.get("max_pixels")}
    edges = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    return {name: value for name in named if (value := named[name] or edges[name]) is not None}
