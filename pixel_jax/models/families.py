"""The families of models, by the `model_type` of their `config.json`.

docs/add-a-family.md says how to add one: `register` takes it from anywhere.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from pixel_jax.files import FileError, read_json
from pixel_jax.models.config import CONFIG, ModelConfig, shown
from pixel_jax.models.llava import CLIPTower, LlavaConfig
from pixel_jax.models.qwen3_5 import Qwen3_5Config, Qwen3_5LanguageConfig
from pixel_jax.models.qwen3_vl import DeepstackTower, Qwen3VLConfig
from pixel_jax.models.qwen_vl import Qwen2_5_VLConfig, Qwen2VLConfig
from pixel_jax.models.text_families import LlamaConfig, Qwen2Config, Qwen3Config
from pixel_jax.models.vision import VisionTower

DTYPES = ("bfloat16", "float16", "float32", "float64")


class Family(NamedTuple):
    """A configuration, which names the weights and declares what the decoder is made of, and the vision tower.

    Args:
        config: read from `config.json`.
        tower: (vision configuration, key, dtype) -> module; called with (pixels [N, P, patch_dim], hw int32 [N, 2]) and
            the options `remat` and `implementation` it returns features [N, P / m, F]. None for a language model.
    """

    config: type[ModelConfig]
    tower: Callable[[Any, Any, Any], nnx.Module] | None = None


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Makes a family known; its `model_type` must be new."""
    name = family.config.model_type
    if name in FAMILIES:
        raise ValueError(f"there is a family {name!r} already: {FAMILIES[name].config.__name__}")
    FAMILIES[name] = family


for _family in (
    Family(Qwen2_5_VLConfig, VisionTower),
    Family(Qwen2VLConfig, VisionTower),
    Family(Qwen3VLConfig, DeepstackTower),
    Family(Qwen3_5Config, DeepstackTower),
    Family(LlavaConfig, CLIPTower),
    Family(Qwen2Config),
    Family(Qwen3Config),
    Family(Qwen3_5LanguageConfig),
    Family(LlamaConfig),
):
    register(_family)


def tower_of(config: ModelConfig) -> Callable[[Any, Any, Any], nnx.Module]:
    """Returns the maker of the vision tower of a family that has one."""
    tower = FAMILIES[config.model_type].tower
    assert tower is not None
    return tower


def config_from_hf(values: Any, where: str = CONFIG) -> ModelConfig:
    """Returns the configuration that the contents of a `config.json` of any known family describe.

    Args:
        values: the parsed file.
        where: what messages call it.

    Raises:
        FileError: the family is not known, or a field asks for what is not supported.
    """
    if not isinstance(values, dict):
        raise FileError(f"{where}: the file holds {shown(values)}, not an object of fields")
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise FileError(f"{where}: model_type is {shown(name)}; the known families are {', '.join(FAMILIES)}")
    return FAMILIES[name].config.from_hf(values, where)


def read_config(directory: Path) -> tuple[ModelConfig, str | None]:
    """Returns the configuration in a model directory, and the name of the dtype that its weights are meant to have, if any.

    Raises:
        FileError: `config.json` is not what it should be.
    """
    path = directory / CONFIG
    values = read_json(path, limit=2**24)
    config = config_from_hf(values, str(path))
    inner = values.get("text_config")  # where some files have it alone
    places = (values, inner) if isinstance(inner, dict) else (values,)
    # As transformers up to 4.55, and since.
    named = next((x for x in (place.get(key) for place in places for key in ("torch_dtype", "dtype")) if x), None)
    if named is not None and named not in DTYPES:
        raise FileError(f"{path}: torch_dtype is {shown(named)}, not one of {', '.join(DTYPES)}")
    return config, named
