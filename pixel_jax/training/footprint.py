"""How much memory a training step takes beside its arguments, by formula from its shapes: how many rows it can take at a time.

Counted is what grows with the rows: the inputs of the layers, which are kept for the backward pass; what a layer holds while
its backward pass runs; and a chunk of logits. Attention counts as linear in the length, as it is wherever it is long
(`pixel_jax.models.attention.chosen`).
"""

import jax
import numpy as np
from jax.sharding import Mesh

from pixel_jax.models.attention import TILE
from pixel_jax.models.config import ModelConfig
from pixel_jax.models.inputs import Visual
from pixel_jax.parallel.memory import device_memory
from pixel_jax.parallel.sharding import row_shards, sequence_shards

LIVE = (12, 6)  # arrays as wide as the model, and as its inner layer, that a layer and its backward pass hold at a time
SCORES = 2  # arrays of attention's scores, float32
LOGITS = 3  # arrays of logits: they, their softmax and its gradient


def row_bytes(
    network: ModelConfig, tokens: int, visual: tuple[int, int], *, width: int = 4, remat: bool = True
) -> int:
    """Of one row of `tokens` tokens that shows `visual` = (slices, patches of each).

    Args:
        width: bytes of a number.
        remat: the inputs of layers are kept and nothing else; False: all that their backward passes need.
    """
    text, tower = network.text, network.vision
    layer = lambda size, inner: LIVE[0] * size + LIVE[1] * inner
    decoder, seen = layer(text.hidden_size, text.intermediate_size), layer(tower.hidden_size, tower.intermediate_size)
    if remat:
        decoder += text.num_hidden_layers * text.hidden_size
        seen += tower.depth * tower.hidden_size
    else:
        decoder, seen = decoder * text.num_hidden_layers, seen * tower.depth
    slices, patches = visual
    scores = text.num_attention_heads * pairs(tokens) + slices * tower.num_heads * pairs(patches)
    return width * (tokens * decoder + slices * patches * (seen + tower.patch_dim)) + 4 * SCORES * scores


def pairs(length: int) -> int:
    """Queries and keys whose scores are there at once."""
    return min(length**2, TILE[0] * TILE[1])


def fixed_bytes(network: ModelConfig, logit_chunk: int) -> int:
    """Of a step, whatever its rows."""
    return 4 * LOGITS * logit_chunk * network.text.vocab_size


def micro_batches(
    network: ModelConfig,
    rows: int,
    tokens: int,
    visual: Visual | None,
    mesh: Mesh | None,
    *,
    held: int,
    width: int,
    remat: bool,
    logit_chunk: int,
) -> int:
    """In how few turns `rows` rows fit the memory of a device, each part of the mesh taking as many of them. As many as there are
    rows where not even one seems to fit: the formula is careful, and the device has the last word.

    Args:
        held: bytes of a device that are taken already: the state, gradients, the batch.
    """
    own = rows // (1 if mesh is None else row_shards(mesh))
    shown = (0, 0) if visual is None else (visual.slices.shape[1], visual.patches.shape[2])
    parts = 1 if mesh is None else sequence_shards(mesh)
    row = row_bytes(network, tokens // parts, shown, width=width, remat=remat)
    at_once = max(1, (device_memory() - held - fixed_bytes(network, logit_chunk)) // row)
    return next(turns for turns in range(1, own + 1) if own % turns == 0 and own // turns <= at_once)


def bytes_of(tree) -> int:
    """Of arrays, or what stands for them."""
    return sum(
        int(np.prod(x.shape, dtype=np.int64)) * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x, "dtype")
    )
