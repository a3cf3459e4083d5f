"""Text, images and videos -> the arrays of the Hugging Face layout, on the host, for every family.

Images are resized by `host_crop_resize`: the same bits as `pixel_jax.ops.crop_resize` over the whole image.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixel_jax.files import FileError
from pixel_jax.models.config import ModelConfig, TowerConfig
from pixel_jax.models.preprocessors import FrameSampling, PixelLimits, read_preprocessors
from pixel_jax.models.qwen_vl import Qwen2_5_VLConfig, VisionConfig
from pixel_jax.models.side_files import (
    NESTED,
    PREPROCESSOR,
    PREPROCESSOR_FILES,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    VIDEO_PREPROCESSOR,
    as_json,
    is_template,
    load_tokenizer,
    processor_template,
    read_side_files,
    tokenizer_files,
)
from pixel_jax.ops import host_crop_resize, smart_resize, square_window, temporal_slices, timestamps
from pixel_jax.ops.smart_resize import MAX_RATIO
from pixel_jax.pictures import rgb

QWEN2_5_TOWER = VisionConfig()
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"


class Processor:
    """A tokenizer, what a family shows its vision tower, and the limits of an image's size.

    Args:
        tokenizer: of transformers, or one that behaves like it.
        family: says which texts stand for images and videos.
        vision: sizes of patches, and how pixels are normalised; None: the model sees nothing.
        min_pixels, max_pixels: area of an image as the model sees it. Defaults are those of the Hugging Face image processor.
            A family whose images have one size passes over them.
        video: of each frame of a video, or of all its frames together where a family puts them behind times; None: as of images.
        sampling: which frames of a video a model is used to (`FrameSampling`).
    """

    def __init__(
        self,
        tokenizer,
        *,
        family: type[ModelConfig] = Qwen2_5_VLConfig,
        vision: TowerConfig | None = QWEN2_5_TOWER,
        min_pixels: int = 56 * 56,
        max_pixels: int = 28 * 28 * 1280,
        video: PixelLimits | None = None,
        sampling: FrameSampling = FrameSampling(),  # noqa: B008, never changed
    ):
        if not 0 < min_pixels <= max_pixels:
            raise ValueError(f"need 0 < min_pixels <= max_pixels, got {min_pixels} and {max_pixels}")
        self.tokenizer, self.family, self.vision = tokenizer, family, vision
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.video, self.sampling = video, sampling
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
        if config.vision is not None and (template := processor_template(files, directory)) is not None:
            tokenizer.chat_template = template
        for token, expected in zip(config.placeholders, config.visual_tokens, strict=True):
            found = tokenizer.convert_tokens_to_ids(token)
            if found != expected:
                raise FileError(f"{directory}: {token} is token {found} of the tokenizer, {expected} of config.json")
        processor = cls(tokenizer, family=type(config), vision=config.vision)
        if config.vision is not None:
            usual, rate = PixelLimits(processor.min_pixels, processor.max_pixels), 2.0 if config.splits_videos else None
            image, processor.video, processor.sampling = read_preprocessors(
                files, directory, config.vision, usual, rate
            )
            processor.min_pixels, processor.max_pixels = image or usual
        processor._files, processor._as_read = files, (_state(tokenizer), processor._limits())
        return processor

    def save(self, directory: Path) -> None:
        """Writes the files that the processor was read from, unchanged.

        Files whose values have changed since are written anew, in a form that all releases of transformers read.
        """
        files = dict(self._files)
        tokenizer, limits = self._as_read or (None, None)
        if _state(self.tokenizer) != tokenizer:
            files = {
                name: data for name, data in files.items() if name not in TOKENIZER_FILES and not is_template(name)
            }
            files |= tokenizer_files(self.tokenizer)
        has_preprocessor = bool(files.keys() & {PREPROCESSOR, NESTED})
        if self.vision is not None and (self._limits() != limits or not has_preprocessor):
            files = {name: data for name, data in files.items() if name not in PREPROCESSOR_FILES}
            files[PREPROCESSOR] = as_json(self._preprocessor(self.vision))
            if self.video is not None:
                files[VIDEO_PREPROCESSOR] = as_json(self._video_preprocessor(self.vision, self.video))
        for name, data in files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(data)

    def _limits(self) -> tuple:
        return self.min_pixels, self.max_pixels, self.video, self.sampling

    def __call__(
        self,
        text: str | list[str],
        images: list | None = None,
        videos: list | None = None,
        fps: float | Sequence[float] = 2.0,
    ) -> dict[str, np.ndarray]:
        """Returns the keyword arguments of `pixel_jax.forward`.

        Args:
            text: one text or a batch; each placeholder of the family in it (`<|image_pad|>`, `<|video_pad|>`; `<image>`)
                stands for the next image (video).
            images: Pillow images (`pixel_jax.pictures.rgb`) or uint8 [h, w, 3], of all texts in order.
            videos: uint8 [t, h, w, 3] or lists of images, all frames of one size; already sampled.
            fps: frames in a second, as the videos were sampled: of all of them, or of each.

        Raises:
            ValueError: the text has more or fewer placeholders than there are images or videos, or `fps` more or fewer rates.
        """
        texts = [text] if isinstance(text, str) else list(text)
        rates = np.broadcast_to(fps, len(videos or [])) if np.ndim(fps) == 0 else np.asarray(fps)
        if rates.shape != (len(videos or []),) or not (np.isfinite(rates) & (rates > 0)).all():
            raise ValueError(f"fps is {fps}: give one rate above 0, or one for each of the {len(videos or [])} videos")
        out: dict[str, np.ndarray] = {}
        shown: dict[str, list[str]] = {}  # placeholder -> what stands for its items
        items_by_kind = [[[image] for image in images or []], [list(video) for video in videos or []]]
        names = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
        for kind, items, placeholder, keys in zip(
            ("image", "video"), items_by_kind, (*self.family.placeholders, None, None), names, strict=False
        ):
            count = sum(t.count(placeholder) for t in texts) if placeholder else 0
            if count != len(items):
                raise ValueError(
                    f"the text has {count} {placeholder or f'places for a {kind}'}, but {len(items)} were given"
                )
            if not items or placeholder is None or self.vision is None:
                continue
            if self.vision.fixed_grid is not None:
                out[keys[0]] = np.stack([self._square(frames[0], self.vision) for frames in items])
                grids = [(1, *self.vision.fixed_grid)] * len(items)
            else:
                pixels, grids = zip(*(self.patches(frames, kind == "video") for frames in items), strict=True)
                out[keys[0]], out[keys[1]] = np.concatenate(pixels), np.array(grids, np.int32)
            shown[placeholder] = [
                self._shown(grid, placeholder, kind, len(frames), rate)
                for grid, frames, rate in zip(
                    grids, items, rates if kind == "video" else [0.0] * len(items), strict=True
                )
            ]
        if videos and self.vision is not None and not self.family.splits_videos:
            out["second_per_grid_ts"] = (self.vision.temporal_patch_size / rates).astype(np.float32)
        # With the token that some tokenizers put before every text (LLaVA's does), as transformers' processors.
        rows = [self.tokenizer.encode(_expand(t, shown)) for t in texts]
        length = max(map(len, rows))
        pad_id = self.tokenizer.pad_token_id or 0
        out["input_ids"] = np.full((len(rows), length), pad_id, np.int32)
        out["attention_mask"] = np.zeros((len(rows), length), np.int32)
        for r, row in enumerate(rows):
            out["input_ids"][r, : len(row)] = row
            out["attention_mask"][r, : len(row)] = 1
        return out

    def _shown(self, grid: tuple[int, int, int], placeholder: str, kind: str, frames: int, fps: float) -> str:
        """The text that stands for an item of `grid` (slices, height, width in patches)."""
        vision = self.vision
        assert vision is not None
        count = math.prod(vision.token_grid(grid)) // vision.merge_unit
        if kind == "image" or not self.family.splits_videos:
            return placeholder * count
        pads = VISION_START + placeholder * (count // grid[0]) + VISION_END
        return "".join(time + pads for time in timestamps(frames, fps))

    def patches(self, frames: list, is_video: bool = False) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Returns what the vision tower reads of frames of one size.

        Args:
            frames: of a video, or one: a still image.
            is_video: whose limits count.

        Returns:
            float32 [t * h * w, patch_dim] in merge order, and the grid (t, h, w).

        Raises:
            ValueError: there is no frame, or frames differ in size.
        """
        vision = self.vision
        if vision is None:
            raise ValueError(f"a model of the family {self.family.model_type!r} sees no images and no videos")
        if not frames:
            raise ValueError("a video needs at least one frame")
        frames = [_rgb(frame) for frame in frames]
        if len({frame.size for frame in frames}) > 1:
            raise ValueError(f"frames of one video differ in size: {sorted({frame.size for frame in frames})}")
        width, height = frames[0].size
        limits = PixelLimits(self.min_pixels, self.max_pixels)
        limits = (self.video or limits) if is_video else limits
        if is_video and self.family.splits_videos:
            high, wide = volume_size(len(frames), height, width, vision.factor, limits)
        else:
            least, most = limits
            high, wide = smart_resize(height, width, factor=vision.factor, min_pixels=least, max_pixels=most)
        seen = np.stack([host_crop_resize(np.asarray(frame), (0, 0, width, height), (high, wide)) for frame in frames])
        pairs = _normalised(seen, vision)[temporal_slices(len(frames))]  # [t, 2, high, wide, 3]
        side, merge = vision.patch_size, vision.spatial_merge_size
        t, h, w = len(pairs), high // side, wide // side
        cells = pairs.reshape(t, 2, h // merge, merge, side, w // merge, merge, side, 3)
        return cells.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, -1), (t, h, w)

    def _square(self, image: Any, vision: TowerConfig) -> np.ndarray:
        """An image of the family's one size: its shorter side resized to it, the middle cut out; float32 [3, side, side]."""
        assert vision.fixed_grid is not None
        image = _rgb(image)
        side, (width, height) = vision.fixed_grid[0] * vision.patch_size, image.size
        whole, (top, left) = square_window(height, width, side)
        seen = host_crop_resize(np.asarray(image), (0, 0, width, height), whole)
        return _normalised(seen[top : top + side, left : left + side], vision).transpose(2, 0, 1)

    def _video_preprocessor(self, vision: TowerConfig, limits: PixelLimits) -> dict[str, Any]:
        """The fields of the Hugging Face video processor."""
        sampling = {"fps": self.sampling.fps, "num_frames": self.sampling.frames}
        return {
            "processor_class": self.family.processor,
            "image_mean": list(vision.pixel_mean),
            "image_std": list(vision.pixel_std),
            "size": {"shortest_edge": limits.least, "longest_edge": limits.most},
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
            **{name: value for name, value in sampling.items() if value is not None},
            "min_frames": self.sampling.least,
            "max_frames": self.sampling.most,
        }

    def _preprocessor(self, vision: TowerConfig) -> dict[str, Any]:
        """The fields of the Hugging Face image processor."""
        values: dict[str, Any] = {
            "image_processor_type": self.family.image_processor,
            "processor_class": self.family.processor,
            "image_mean": list(vision.pixel_mean),
            "image_std": list(vision.pixel_std),
        }
        if vision.fixed_grid is not None:
            side = vision.fixed_grid[0] * vision.patch_size
            return {**values, "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        return {
            **values,
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
        }


def volume_size(frames: int, height: int, width: int, factor: int, limits: PixelLimits) -> tuple[int, int]:
    """The (height, width) at which frames are seen, so that all of them together have so many pixels (Qwen3-VL's processor)."""
    scale = max(1.0, factor / height, factor / width)
    height, width, frames = int(height * scale), int(width * scale), max(frames, 2)
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(f"a video of {width} x {height} pixels: one side may be {MAX_RATIO} times the other, no more")
    high, wide = (round(side / factor) * factor for side in (height, width))
    area = round(frames / 2) * 2 * high * wide
    if area > limits.most:
        shrink = math.sqrt(frames * height * width / limits.most)
        high, wide = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif area < limits.least:
        grow = math.sqrt(limits.least / (frames * height * width))
        high, wide = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return high, wide


def _normalised(pixels: np.ndarray, vision: TowerConfig) -> np.ndarray:
    """uint8 [..., 3] -> float32; as the Hugging Face processor: rescaled in float64, rounded, normalised in float32."""
    scaled = (pixels * (1 / 255)).astype(np.float32)
    return (scaled - np.array(vision.pixel_mean, np.float32)) / np.array(vision.pixel_std, np.float32)


def _expand(text: str, shown: dict[str, list[str]]) -> str:
    """The text with each placeholder replaced by what stands for the next item; `shown` is used up from the front."""
    pieces, at = [], 0
    while True:
        ahead = [(text.find(pad, at), pad) for pad in shown if text.find(pad, at) >= 0]
        if not ahead:
            return "".join([*pieces, text[at:]])
        start, pad = min(ahead)
        pieces += [text[at:start], shown[pad].pop(0)]
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
