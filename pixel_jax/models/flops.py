"""Floating-point operations (FLOPs) of the network, by formula from its shapes.

MFU, the bench and the choice of batch shapes use this count, and the planner the peak rates. What a compiled program computes,
padding and recomputation included, is counted by `planning.hlo`.

A product of [m, k] and [k, n] is 2 m k n. Only matrix products count: what else there is (norms, rotary angles, softmax) is
linear in the width and below one per cent of a layer at the released sizes. Attention counts every pair of a query and a key,
also those a causal mask hides: our implementations, like most, compute them (PaLM, arXiv:2204.02311, App. B, counts so, too).
"""

from typing import NamedTuple

import numpy as np

from pixel_jax.models.config import ModelConfig, TowerConfig
from pixel_jax.models.vision import Blocks

# Published dense peak of one chip, bfloat16 products a second, by `jax.Device.device_kind`.
# cloud.google.com/tpu/docs/v4 v5e v5p v6e tpu7x (a JAX device of v4, v5p is a chip, of TPU7x half a chip); NVIDIA data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


class Work(NamedTuple):
    """The size of one forward pass. Fields are sums over rows; the work of two passes adds up field by field."""

    tokens: float  # tokens that enter the decoder
    pairs: float  # pairs of queries and keys: length ** 2 for a row without a cache
    predictions: float  # positions whose logits are computed
    patches: float  # patches that enter the vision tower
    full_pairs: float  # of patches: their number in a temporal slice, squared
    window_pairs: float  # of patches within a window


class Flops(NamedTuple):
    """FLOPs by part of the network; their `sum` is the total."""

    patch_embed: float
    vision_layers: float  # linear layers of the blocks
    vision_attention: float
    merger: float
    layers: float  # linear layers of the decoder
    attention: float
    adapters: float
    head: float


def window_pairs(height: np.ndarray, width: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The number of pairs of patches in the same window, of slices of `height` x `width` patches (int arrays of one shape)."""
    if config.vision is None or config.vision.window_size is None:
        return np.zeros_like(height)
    side = config.vision.window_cells * config.vision.spatial_merge_size
    squares = lambda n: (n // side) * side**2 + (n % side) ** 2
    return squares(height) * squares(width)


def row_work(lengths: np.ndarray, grids: np.ndarray, config: ModelConfig) -> Work:
    """Returns the useful work of rows; padding does not count, however much of it the program computes.

    Args:
        lengths: tokens of each row, int [R].
        grids: the items of the rows, int [..., 3] (slices, height, width in patches; zeros: absent).
        config: of the model.
    """
    lengths = np.asarray(lengths, np.float64)
    t, h, w = np.moveaxis(np.asarray(grids, np.float64).reshape(-1, 3), -1, 0)
    return Work(
        tokens=lengths.sum(),
        pairs=(lengths**2).sum(),
        predictions=lengths.sum(),
        patches=(t * h * w).sum(),
        full_pairs=(t * (h * w) ** 2).sum(),
        window_pairs=(t * window_pairs(h, w, config)).sum(),
    )


def padded_work(rows: int, length: int, slices: int, patches: int, config: ModelConfig) -> Work:
    """Returns the work of a program on `rows` rows of static shape: `length` tokens, `slices` slices of `patches` patches."""
    blocks = Blocks(0, 0, 0)
    if patches and config.vision is not None and config.vision.window_size is not None:
        blocks = Blocks.of(patches, config.vision)
    return Work(
        tokens=rows * length,
        pairs=rows * length**2,
        predictions=rows * length,
        patches=rows * slices * patches,
        full_pairs=rows * slices * patches**2,
        window_pairs=rows * slices * blocks.number * blocks.size**2 * (2 * blocks.reach + 1),
    )


def forward_flops(config: ModelConfig, work: Work, *, adapter_weights: int = 0) -> Flops:
    """Returns the FLOPs of one forward pass. `adapter_weights`: numbers in the LoRA matrices of all decoder layers together."""
    text = config.text
    heads = text.num_attention_heads * text.head_dim
    return Flops(
        *(0.0,) * 4 if config.vision is None else _vision_flops(config.vision, work),
        layers=2.0 * work.tokens * text.layer_weights,
        attention=4.0 * work.pairs * text.attention_layers * heads + float(work.tokens) * text.recurrence_flops,
        adapters=2.0 * work.tokens * adapter_weights,
        head=2.0 * work.predictions * text.hidden_size * text.vocab_size,
    )


def _vision_flops(vision: TowerConfig, work: Work) -> tuple[float, float, float, float]:
    """The first four fields of `Flops`."""
    depth, dim = vision.depth, vision.hidden_size
    full = depth
    if vision.window_size is not None:
        full = len([i for i in vision.fullatt_block_indexes if i < depth])
    return (
        2.0 * work.patches * vision.patch_dim * dim,
        # fused query, key, value; output; the MLP
        2.0 * work.patches * depth * (4 * dim**2 + _mlp(vision) * dim * vision.intermediate_size),
        # scores and weighted values, 2 each per pair and channel
        4.0 * dim * (full * work.full_pairs + (depth - full) * work.window_pairs),
        2.0 * work.patches / vision.merge_unit * vision.merger_weights,
    )


def _mlp(vision: TowerConfig) -> int:
    """Matrices in an MLP of the tower."""
    return 3 if vision.gated else 2


def training_flops(
    config: ModelConfig,
    work: Work,
    *,
    vision: bool = True,
    base: bool = True,
    adapter_weights: int = 0,
    remat: bool = False,
) -> Flops:
    """Returns the FLOPs of one forward and backward pass. The backward pass of a product is two products, one for each gradient.

    vision: whether the tower is trained (else there is no backward pass through it)
    base:   whether the decoder's own weights are trained (else only the gradients of their inputs are computed, for adapters)
    remat:  whether recomputation counts, too: that of the layers up to their last product, whose result is not needed, and of
            the logits. Utilisation (MFU) leaves it out.
    """
    text, tower = config.text, config.vision
    forward = forward_flops(config, work, adapter_weights=adapter_weights)
    seen = 3 if vision else 1
    again = int(remat)
    # The share of a layer's FLOPs that are its last product's.
    down = text.num_hidden_layers * text.hidden_size * text.intermediate_size / text.layer_weights
    vision_down = 0.0
    if tower is not None:
        vision_down = tower.intermediate_size / (4 * tower.hidden_size + _mlp(tower) * tower.intermediate_size)
    times = Flops(
        patch_embed=2 if vision else 1,  # pixels need no gradient
        vision_layers=seen + again * vision * (1 - vision_down),
        vision_attention=seen + again * vision,
        merger=seen,
        layers=(3 if base else 2) + again * (1 - down),
        attention=3 + again,
        adapters=3 + again,
        head=(3 if base else 2) + again,
    )
    return Flops(*(a * b for a, b in zip(forward, times, strict=True)))
