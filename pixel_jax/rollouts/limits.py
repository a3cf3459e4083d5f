"""`rollout.json` beside a model: the limits and pixel budgets that it was trained under, for whoever uses it next.

How training explored is not among them: a model is evaluated, and talked to, at temperature 1 or greedily.
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
# Fields that say what a model is shown, and how much of it.
VIEW_FIELDS = (
    *(f"{kind}{bound}_pixels" for kind in ("", "crop_", "select_", "video_") for bound in ("min", "max")),
    *("max_side", "pad", "min_crop", "one_is_absolute", "call_format", "max_calls", "max_images"),
)


def single_answer(config: RolloutConfig, temperature: float = 1.0) -> RolloutConfig:
    """The limits of `config` with one answer a question, all of whose turns are sampled at one temperature; 0 is greedy."""
    return dataclasses.replace(config, group_size=1, temperature=temperature, later_temperature=None)


def write_limits(directory: str | os.PathLike, config: RolloutConfig) -> None:
    """`config` beside the model in `directory`, without the sampling that trained it."""
    write_json(pathlib.Path(directory) / FILE, dataclasses.asdict(single_answer(config)))


def read_limits(directory: str | os.PathLike) -> RolloutConfig | None:
    """What lies beside the model in `directory`, sampled as it is judged; None where nothing does.

    Raises:
        ConfigError, FileError: the file is damaged; the message names it and the field.
    """
    path = pathlib.Path(directory) / FILE
    return single_answer(load(RolloutConfig, read_json(path), str(path))) if path.exists() else None


def differences(used: RolloutConfig, other: RolloutConfig, fields: Iterable[str]) -> dict[str, tuple]:
    """Of these fields: name -> (value in `used`, value in `other`), where they differ."""
    pairs = {name: (value(used, name), value(other, name)) for name in fields}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def value(config: RolloutConfig, name: str) -> Any:
    """A field of `config`; `pad` is the call format's where that is left to it."""
    found = getattr(config, name)
    return (
        FORMATS[config.call_format].pad if name == "pad" and found is None and config.call_format in FORMATS else found
    )
