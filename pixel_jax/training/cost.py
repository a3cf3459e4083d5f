"""The cost of a training step: its memory, by formula from its shapes, and its speed.

Memory counts what grows with the rows: the inputs of the layers, which are kept for the backward pass; the arrays of a layer
during its backward pass; and a chunk of logits. Attention counts as linear in the length, as it is wherever it is long
(`pixel_jax.models.attention.chosen`).
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pixel_jax.models.attention import TILE
from pixel_jax.models.checkpoint import named_weights
from pixel_jax.models.config import Qwen2_5_VLConfig
from pixel_jax.models.flops import PEAK_FLOPS, row_work, training_flops
from pixel_jax.models.inputs import Visual
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.qwen2_5_vl import Qwen2_5_VL
from pixel_jax.parallel.memory import device_memory
from pixel_jax.parallel.sharding import row_shards, sequence_shards
from pixel_jax.training.batch import Batch

LIVE = (12, 6)  # arrays as wide as the model, and as its inner layer, that exist at a time in a layer's backward pass
SCORES = 2  # arrays of attention's scores, float32
LOGITS = 3  # arrays of logits: they, their softmax and its gradient


def row_bytes(
    network: Qwen2_5_VLConfig, tokens: int, visual: tuple[int, int], *, width: int = 4, remat: bool = True
) -> int:
    """The bytes that one row takes.

    Args:
        network: its shapes.
        tokens: of the row.
        visual: (slices, patches of each slice) of the row.
        width: bytes of a number.
        remat: whether the inputs of layers are kept and nothing else; False: all that their backward passes need.
    """
    text, tower = network.text, network.vision

    def layer(size: int, inner: int) -> int:
        return LIVE[0] * size + LIVE[1] * inner

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
    """The pairs of queries and keys whose scores exist at once."""
    return min(length**2, TILE[0] * TILE[1])


def fixed_bytes(network: Qwen2_5_VLConfig, logit_chunk: int) -> int:
    """The bytes that a step takes whatever its rows: those of a chunk of logits."""
    return 4 * LOGITS * logit_chunk * network.text.vocab_size


def micro_batches(
    network: Qwen2_5_VLConfig,
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
    """The smallest number of turns in which the rows of a batch fit the memory of a device.

    Where not even one row seems to fit, every row is a turn: the formula is careful, and the device may have enough after all.

    Args:
        network: its shapes.
        rows: of the batch, split evenly over the mesh.
        tokens: of a row.
        visual: of the batch; None: text only.
        mesh: None: one device.
        held: bytes of a device that are taken already: the state, gradients, the batch.
        width: bytes of a number.
        remat: as for `row_bytes`.
        logit_chunk: positions whose logits exist at once.
    """
    own = rows // (1 if mesh is None else row_shards(mesh))
    shown = (0, 0) if visual is None else (visual.slices.shape[1], visual.patches.shape[2])
    shards = 1 if mesh is None else sequence_shards(mesh)
    row = row_bytes(network, tokens // shards, shown, width=width, remat=remat)
    at_once = max(1, (device_memory() - held - fixed_bytes(network, logit_chunk)) // row)
    return next(turns for turns in range(1, own + 1) if own % turns == 0 and own // turns <= at_once)


def bytes_of(tree: Any) -> int:
    """The bytes of a tree of arrays, or of their shapes."""
    return sum(
        int(np.prod(x.shape, dtype=np.int64)) * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x, "dtype")
    )


class Throughput:
    """Measures tokens a second, and the share of the hardware's peak that useful operations reach (MFU).

    Useful are one forward and one backward pass over valid tokens and patches: padding, rows of weight 0, recomputation and the
    forward passes that score are not. With several processes, each takes its own rows for the average.
    """

    def __init__(self, model: Qwen2_5_VL, trainable: str, mesh: Mesh | None):
        pattern = re.compile(trainable)
        trained = {key: weight for _, key, weight in named_weights(model) if pattern.match(key)}
        decoder = {key: weight for key, weight in trained.items() if not key.startswith("visual.")}
        adapters = {key for key, weight in decoder.items() if isinstance(weight, LoRAWeight)}
        self.config = model.config
        self.options: dict[str, Any] = {
            "vision": len(decoder) < len(trained),
            "base": len(adapters) < len(decoder),
            "adapter_weights": sum(decoder[key].size for key in adapters),
        }
        devices = jax.local_devices()[:1] if mesh is None else mesh.local_devices
        self.peak = sum(PEAK_FLOPS.get(device.device_kind, np.nan) for device in devices)
        self.tokens = self.flops = 0.0

    def count(self, batch: Batch) -> None:
        """Counts the rows of a host batch that is about to be trained on."""
        real = np.asarray(batch.weight) > 0
        valid = np.asarray(batch.valid) & real[:, None]
        grids = np.zeros((len(real), 0, 3), int) if batch.visual is None else np.asarray(batch.visual.grids)
        grids = grids * real[:, None, None]
        if batch.segments is None:
            lengths = valid.sum(axis=1)
        else:  # traces of a packed row do not see each other
            rows = np.arange(len(valid))[:, None] * valid.shape[1]
            lengths = np.bincount((rows + batch.segments)[valid])
        self.tokens += float(valid.sum())
        self.flops += float(sum(training_flops(self.config, row_work(lengths, grids, self.config), **self.options)))

    def metrics(self, seconds: float) -> dict[str, float]:
        """The metrics of what was counted since the last call and took `seconds`. No `mfu` where the peak is unknown (CPU)."""
        processes = jax.process_count()
        metrics = {
            "tokens_per_second": self.tokens / seconds * processes,
            "flops_per_second": self.flops / seconds * processes,
        }
        if np.isfinite(self.peak):
            metrics["mfu"] = self.flops / seconds / self.peak
        self.tokens = self.flops = 0.0
        return metrics
