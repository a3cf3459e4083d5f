"""The layers with which rows are written and observations are read."""

import math
from typing import Any

from flax import nnx

from pixel_jax.models.config import TextConfig
from pixel_jax.models.int8 import quantised
from pixel_jax.models.layers import Weight
from pixel_jax.models.lora import copied, linears
from pixel_jax.models.model import Model
from pixel_jax.rollouts.config import RolloutConfig


def decoding_layers(model: Model, config: RolloutConfig) -> Any:
    """Returns the model's layers one by one, with weights of the type that the config says."""
    layers = model.unstack()
    return quantised_layers(layers) if config.weights == "int8" else layers


def row_cache_bytes(text: TextConfig, config: RolloutConfig, itemsize: int) -> int:
    """Returns the bytes of a row's own cache in a model whose numbers have `itemsize` bytes."""
    size = text.cache_bytes(config.max_response, itemsize)
    if config.caches is None:
        return size
    return math.ceil(size * (1 + 4 / text.head_dim) / itemsize)  # a number, and a share of a scale


def quantised_layers(layers: tuple[nnx.Module, ...]) -> tuple[nnx.Module, ...]:
    """Returns layers whose linear layers have weights of eight bits; adapters, biases and norms stay as they are."""
    layers = copied(layers)
    for layer in layers:
        for _, linear in list(linears(layer)):
            axes, small = linear.weight.axes, quantised(linear.weight[...])
            linear.weight, linear.scale = Weight(small.values, axes=axes), Weight(small.scale, axes=axes[:-1])
    return layers
