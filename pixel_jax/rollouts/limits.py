"""`rollout.json` beside a model: the limits and pixel budgets that it was trained with, for evaluation and chat.

The sampling settings of training are left out, because a model is evaluated at temperature 1 or greedily.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from pixel_jax.config import load
from pixel_jax.dialog.formats import FORMATS
from pixel_jax.files import read_json
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.state_files import write_json

FILE = "rollout.json"
# Fields that decide which images a model is shown, and at which size.
VIEW_FIELDS = (
    *(f"{kind}{bound}_pixels" for kind in ("", "crop_", "select_", "video_") for bound in ("min", "max")),
    *("max_side", "pad", "min_crop", "one_is_absolute", "call_format", "max_calls", "max_images"),
)


def single_answer(config: RolloutConfig, temperature: float = 1.0) -> RolloutConfig:
    """Returns `config` with one answer a question, whose turns are all sampled at one temperature; 0 is greedy."""
    return dataclasses.replace(config, group_size=1, temperature=temperature, later_temperature=None)


def write_limits(directory: str | os.PathLike, config: RolloutConfig) -> None:
    """Writes `config` beside the model in `directory`, without the sampling settings of training."""
    write_json(pathlib.Path(directory) / FILE, dataclasses.asdict(single_answer(config)))


def limits_file(model: str | os.PathLike) -> pathlib.Path:
    """Where the limits of a model lie: in its directory, or in that of its GGUF file."""
    path = pathlib.Path(model)
    return (path.parent if path.suffix == ".gguf" else path) / FILE


def read_limits(directory: str | os.PathLike) -> RolloutConfig | None:
    """Reads the limits beside a model, with the sampling of evaluation; None if there is no file.

    Args:
      directory: of the model, or its GGUF file, beside which they lie.

    Raises:
      ConfigError: a field is wrong; the message names it and the file.
      FileError: the file is damaged.
    """
    path = limits_file(directory)
    return single_answer(load(RolloutConfig, read_json(path), str(path))) if path.exists() else None


def differences(used: RolloutConfig, other: RolloutConfig, fields: Iterable[str]) -> dict[str, tuple]:
    """Returns name -> (value in `used`, value in `other`) for those of `fields` that differ."""
    pairs = {name: (value(used, name), value(other, name)) for name in fields}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def value(config: RolloutConfig, name: str) -> Any:
    """Returns a field of `config`; for a `pad` of None, that of the call format."""
    if name == "pad" and config.pad is None and config.call_format in FORMATS:
        return FORMATS[config.call_format].pad
    return getattr(config, name)
