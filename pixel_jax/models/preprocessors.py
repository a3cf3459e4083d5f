"""The preprocessors of a model directory: the sizes at which pictures are shown, and flags, which must be those of the model.

The files are those of transformers: `processor_config.json`, whose sections `image_processor` and `video_processor` come first,
or else `preprocessor_config.json` and `video_preprocessor_config.json`. Without a video preprocessor the image's is used.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pixel_jax.files import FileError
from pixel_jax.models.config import TowerConfig, shown
from pixel_jax.models.side_files import NESTED, PREPROCESSOR, VIDEO_PREPROCESSOR, json_object
from pixel_jax.terminal import warn

BICUBIC = 3  # as Pillow numbers it
# Fields that do not concern the pixels that are shown, or that are read elsewhere.
INERT = frozenset(
    "image_processor_type processor_class feature_extractor_type video_processor_type image_processor_class auto_map "
    "_valid_processor_keys return_tensors data_format input_data_format device disable_grouping default_to_square "
    "do_convert_rgb return_metadata max_video_tokens max_image_size image_token video_token image_seq_length "
    "num_additional_image_tokens vision_feature_select_strategy chat_template".split()
)
SAMPLING = ("do_sample_frames", "fps", "num_frames", "min_frames", "max_frames")


class PixelLimits(NamedTuple):
    """Bounds of the area of a picture as the model sees it, in pixels."""

    least: int
    most: int


class FrameSampling(NamedTuple):
    """The sampling of the frames of a video.

    Attributes:
      fps: frames of a second; None: not given.
      frames: frames of a video; None: the number follows from `fps`.
      least, most: bounds of a number that follows from `fps`; a video may have fewer frames than `least`.
    """

    fps: float | None = None
    frames: int | None = None
    least: int = 4
    most: int = 768

    def indices(self, count: int, rate: float) -> list[int]:
        """Returns evenly spread indices of `count` frames at `rate` frames a second (as Qwen3-VL's processor does)."""
        if self.frames is not None:
            number = self.frames
        elif self.fps is not None:
            number = min(max(int(count / rate * self.fps), self.least), self.most)
        else:
            number = min(max(count, self.least), self.most)
        return np.linspace(0, count - 1, min(number, count)).round().astype(int).tolist()


class Preprocessors(NamedTuple):
    """The settings of a directory's preprocessors; None: not given."""

    image: PixelLimits | None = None
    video: PixelLimits | None = None
    sampling: FrameSampling = FrameSampling()


def read_preprocessors(
    files: Mapping[str, bytes], directory: Path, vision: TowerConfig, usual: PixelLimits, rate: float | None
) -> Preprocessors:
    """Reads the preprocessors of a directory.

    Args:
      files: of the directory (`read_side_files`).
      directory: for messages.
      vision: of the model.
      usual: limits for fields that are left out.
      rate: frames of a second if the files say nothing of videos; None: all frames.

    Raises:
      FileError: a file is malformed, or a field differs from what the model supports; the message names field and value.
    """
    own = {} if NESTED not in files else json_object(dict(files), NESTED, directory)
    sections: dict[str, tuple[dict[str, Any], Path]] = {}
    for name, file in (("image_processor", PREPROCESSOR), ("video_processor", VIDEO_PREPROCESSOR)):
        section = _section(own, name, directory / NESTED)
        if section or file in files:
            sections[name] = (
                (section, directory / NESTED)
                if section
                else (json_object(dict(files), file, directory), directory / file)
            )
    if "image_processor" not in sections and own:
        sections["image_processor"] = (own, directory / NESTED)
    image = sections.get("image_processor")
    if vision.fixed_grid is not None:
        if image is not None:
            _check(image[0], image[1], vision)
            _check_square(image[0], image[1], vision)
        return Preprocessors()
    limits = None if image is None else _limits(image[0], image[1], vision, usual)
    if "video_processor" not in sections:
        return Preprocessors(limits, None, FrameSampling(fps=rate))
    values, where = sections["video_processor"]
    video = _limits(values, where, vision, limits or usual)
    return Preprocessors(limits, video, _sampling(values, where, rate))


def _limits(values: dict[str, Any], where: Path, vision: TowerConfig, usual: PixelLimits) -> PixelLimits:
    """Reads the bounds for a family whose pictures keep their proportions. FileError: a field is invalid or not supported."""
    _check(values, where, vision)
    size = _section(values, "size", where)
    if unknown := [name for name in size if name not in ("shortest_edge", "longest_edge", "min_pixels", "max_pixels")]:
        raise FileError(
            f"{where}: size has {unknown[0]} {shown(size[unknown[0]])}: pictures keep their proportions here, so it has "
            "shortest_edge and longest_edge, the least and the most pixels"
        )
    bounds = []
    for field, edge, other in (
        ("min_pixels", "shortest_edge", usual.least),
        ("max_pixels", "longest_edge", usual.most),
    ):
        values_given = [x for x in (values.get(field), size.get(edge), size.get(field)) if x is not None]
        value = values_given[0] if values_given else other
        if type(value) is not int or not 0 < value < 2**31:
            raise FileError(f"{where}: {field} is {shown(value)}, not a positive number of pixels")
        bounds.append(value)
    if bounds[0] > bounds[1]:
        raise FileError(
            f"{where}: the preprocessor: need 0 < min_pixels <= max_pixels, got {bounds[0]} and {bounds[1]}"
        )
    return PixelLimits(*bounds)


def _check(values: dict[str, Any], where: Path, vision: TowerConfig) -> None:
    """Checks the flags. FileError: one differs from what the model supports."""
    flexible = vision.fixed_grid is None
    expected: dict[str, Any] = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_pad": False,
        "do_center_crop": not flexible,
        "cap_pixels_per_frame": False,
        "resample": BICUBIC,
        "image_mean": list(vision.pixel_mean),
        "image_std": list(vision.pixel_std),
        "patch_size": vision.patch_size,
    }
    if flexible:
        expected |= {"temporal_patch_size": vision.temporal_patch_size, "merge_size": vision.spatial_merge_size}
    for field, value in expected.items():
        actual = values.get(field)
        if actual is not None and (actual != value or type(actual) is not type(value)):
            raise FileError(f"{where}: the preprocessor has {field} {shown(actual)}, the model {value}")
    factor = values.get("rescale_factor")
    if factor is not None and not (isinstance(factor, float) and math.isclose(factor, 1 / 255, rel_tol=1e-9)):
        raise FileError(f"{where}: the preprocessor has rescale_factor {shown(factor)}, the model 1/255")
    known = {*expected, *INERT, *SAMPLING, "rescale_factor", "size", "crop_size", "min_pixels", "max_pixels"}
    if unknown := [name for name in values if name not in known and not isinstance(values[name], dict)]:
        if wanted := [name for name in unknown if name.startswith("do_") and values[name]]:
            raise FileError(
                f"{where}: the preprocessor has {wanted[0]} {shown(values[wanted[0]])}, which is not known here"
            )
        warn(
            f"{where}: nothing is done with {', '.join(unknown)}, which no preprocessor of the family is known to have"
        )


def _check_square(values: dict[str, Any], where: Path, vision: TowerConfig) -> None:
    """Checks the sizes. FileError: the preprocessor does not make images of the model's only size."""
    assert vision.fixed_grid is not None
    side = vision.fixed_grid[0] * vision.patch_size
    for field, expected in (
        ("size", (side, {"shortest_edge": side})),
        ("crop_size", (side, {"height": side, "width": side})),
    ):
        if (value := values.get(field)) is not None and value not in expected:
            raise FileError(f"{where}: the preprocessor has {field} {shown(value)}, the model {expected[0]}")


def _sampling(values: dict[str, Any], where: Path, rate: float | None) -> FrameSampling:
    """Reads the sampling of videos. FileError: the fields contradict one another, or one is invalid."""
    for field in SAMPLING[1:]:
        value = values.get(field)
        types = (int, float) if field == "fps" else (int,)
        if value is not None and (type(value) not in types or not 0 < value < 2**31):
            raise FileError(f"{where}: {field} is {shown(value)}, not a positive number")
    fps, frames = values.get("fps"), values.get("num_frames")
    if fps is not None and frames is not None:
        raise FileError(f"{where}: fps is {fps} and num_frames {frames}: give one of the two")
    least, most = values.get("min_frames") or FrameSampling().least, values.get("max_frames") or FrameSampling().most
    if least > most:
        raise FileError(f"{where}: min_frames is {least}, max_frames {most}")
    if fps is None and frames is None:
        fps = rate
    return FrameSampling(None if fps is None else float(fps), frames, least, most)


def _section(values: dict[str, Any], name: str, where: Path) -> dict[str, Any]:
    found = values.get(name) or {}
    if not isinstance(found, dict):
        raise FileError(f"{where}: {name} is {shown(found)}, not an object of fields")
    return found
