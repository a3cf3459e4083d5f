"""Text, images and videos -> the arrays of the Hugging Face layout, on the host.

Images are resized by `host_crop_resize`: the same bits as `pixel_jax.ops.crop_resize` over the whole image.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixel_jax.files import FileError
from pixel_jax.models.config import ModelConfig, shown
from pixel_jax.models.side_files import (
    NESTED,
    PREPROCESSOR,
    PREPROCESSOR_FILES,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    as_json,
    is_template,
    json_object,
    load_tokenizer,
    read_side_files,
    tokenizer_files,
)
from pixel_jax.ops import IMAGE_MEAN, IMAGE_STD, host_crop_resize, smart_resize, temporal_slices
from pixel_jax.pictures import rgb

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
        self._files: dict[str, bytes] = {}  # those it was read from
        self._as_read: tuple | None = None  # what they say of the tokenizer and of the limits

    @classmethod
    def from_directory(cls, directory: Path, config: ModelConfig) -> "Processor | None":
        """The processor of a model directory; None if it holds no tokenizer.

        Raises:
            FileError: a file is not what it should be, or does not fit the model.
        """
        files = read_side_files(directory)
        if not any(name in files for name in (TOKENIZER, "vocab.json", TOKENIZER_CONFIG)):
            return None
        tokenizer = load_tokenizer(directory)
        for token, expected in ((IMAGE_PAD, config.image_token_id), (VIDEO_PAD, config.video_token_id)):
            found = tokenizer.convert_tokens_to_ids(token)
            if found != expected:
                raise FileError(f"{directory}: {token} is token {found} of the tokenizer, {expected} of config.json")
        limits = _read_limits(files, directory, config)
        try:
            processor = cls(tokenizer, **limits)
        except ValueError as error:
            raise FileError(f"{directory}: the preprocessor: {error}") from None
        processor._files, processor._as_read = files, (_state(tokenizer), processor._limits())
        return processor

    def save(self, directory: Path) -> None:
        """Writes the files it was read from as they were; for what has been made or changed since, those that all releases
        of transformers read.
        """
        files = dict(self._files)
        tokenizer, limits = self._as_read or (None, None)
        if _state(self.tokenizer) != tokenizer:
            files = {
                name: data for name, data in files.items() if name not in TOKENIZER_FILES and not is_template(name)
            }
            files |= tokenizer_files(self.tokenizer)
        if self._limits() != limits or not files.keys() & {PREPROCESSOR, NESTED}:
            files = {name: data for name, data in files.items() if name not in PREPROCESSOR_FILES}
            files[PREPROCESSOR] = as_json(_preprocessor(self.min_pixels, self.max_pixels))
        for name, data in files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(data)

    def _limits(self) -> tuple[int, int]:
        return self.min_pixels, self.max_pixels

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


def _state(tokenizer) -> tuple:
    """What changes when tokens or a template are added."""
    return len(tokenizer), tokenizer.chat_template, tokenizer.special_tokens_map


def _preprocessor(min_pixels: int, max_pixels: int) -> dict[str, Any]:
    """The fields of the Hugging Face image processor."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
        "patch_size": PATCH,
        "temporal_patch_size": TEMPORAL,
        "merge_size": MERGE,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }


def _read_limits(files: dict[str, bytes], directory: Path, config: ModelConfig) -> dict[str, int]:
    """min_pixels and max_pixels of the directory's preprocessor, whose other fields must be those of the model."""
    name = next((name for name in (PREPROCESSOR, NESTED) if name in files), None)
    if name is None:
        return {}
    values, where = json_object(files, name, directory), directory / name
    if name == NESTED:
        values = _section(values, "image_processor", where) or values
    vision = config.vision
    for field, expected in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.spatial_merge_size),
        ("image_mean", list(IMAGE_MEAN)),
        ("image_std", list(IMAGE_STD)),
    ):
        if values.get(field, expected) != expected:
            raise FileError(f"{where}: the preprocessor has {field} {shown(values[field])}, the model {expected}")
    size = _section(values, "size", where)
    limits = {}
    for field, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        value = size.get(edge) if values.get(field) is None else values[field]
        if value is not None:
            if type(value) is not int or not 0 < value < 2**31:
                raise FileError(f"{where}: {field} is {shown(value)}, not a positive number of pixels")
            limits[field] = value
    return limits


def _section(values: dict[str, Any], name: str, where: Path) -> dict[str, Any]:
    found = values.get(name) or {}
    if not isinstance(found, dict):
        raise FileError(f"{where}: {name} is {shown(found)}, not an object of fields")
    return found
