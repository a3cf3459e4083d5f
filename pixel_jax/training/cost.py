"""The cost of a training step: its memory, estimated from its shapes, and its measured speed.

The memory of a row is that of the layers' inputs, which are kept for the backward pass, and of the arrays of one layer during its
backward pass; a chunk of logits is added for all rows. Attention counts as linear in the length, because long rows use such an
implementation (`pixel_jax.models.attention.select_implementation`).
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pixel_jax.models.attention import TILE
from pixel_jax.models.checkpoint import named_weights
from pixel_jax.models.config import ModelConfig
from pixel_jax.models.flops import PEAK_FLOPS, row_work, training_flops
from pixel_jax.models.inputs import Visual
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.model import Model
from pixel_jax.parallel.memory import device_memory
from pixel_jax.parallel.processes import members
from pixel_jax.parallel.sharding import row_shards, sequence_shards
from pixel_jax.training.batch import Batch

LIVE = (12, 6)  # arrays of the model's width, and of its MLP's, that exist at once in a layer's backward pass
SCORES = 2  # float32 arrays of attention scores that exist at once
LOGITS = 3  # float32 arrays of logits: the logits, their softmax and its gradient


def row_bytes(network: ModelConfig, tokens: int, visual: tuple[int, int], *, width: int = 4, remat: bool = True) -> int:
    """Estimates the bytes of one row.

    Args:
        network: the model's configuration.
        tokens: of the row.
        visual: (slices, patches of each slice) of the row.
        width: bytes of a number.
        remat: whether only the inputs of layers are kept; False: all that their backward passes need.
    """
    text, tower = network.text, network.vision

    def layer(size: int, inner: int) -> int:
        return LIVE[0] * size + LIVE[1] * inner

    def layers(size: int, inner: int, depth: int) -> int:
        """Numbers for a token or a patch in a stack of layers."""
        return layer(size, inner) + depth * size if remat else layer(size, inner) * depth

    numbers = tokens * layers(text.hidden_size, text.intermediate_size, text.num_hidden_layers)
    scores = text.num_attention_heads * pairs(tokens)
    slices, patches = visual
    if tower is not None:
        per_patch = layers(tower.hidden_size, tower.intermediate_size, tower.depth)
        numbers += slices * patches * (per_patch + tower.patch_dim)
        scores += slices * tower.num_heads * pairs(patches)
    return width * numbers + 4 * SCORES * scores


def pairs(length: int) -> int:
    """The number of pairs of queries and keys whose scores exist at once."""
    return min(length**2, TILE[0] * TILE[1])


def fixed_bytes(network: ModelConfig, logit_chunk: int) -> int:
    """Estimates the bytes of a step that do not depend on its rows: those of a chunk of logits."""
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
    """The smallest number of micro-batches with which a batch fits into the memory of a device.

    If not even one row seems to fit, every row is a micro-batch: the estimate is cautious, and the row may fit after all.

    Args:
        network: the model's configuration.
        rows: of the batch, split evenly over the mesh.
        tokens: of a row.
        visual: of the batch; None: text only.
        mesh: None: one device.
        held: bytes of a device that are taken already: the state, gradients, the batch.
        width: bytes of a number.
        remat: as for `row_bytes`.
        logit_chunk: positions whose logits exist at once.
    """
    device_rows = rows // (1 if mesh is None else row_shards(mesh))
    shown = (0, 0) if visual is None else (visual.slices.shape[1], visual.patches.shape[2])
    shards = 1 if mesh is None else sequence_shards(mesh)
    row = row_bytes(network, tokens // shards, shown, width=width, remat=remat)
    at_once = max(1, (device_memory() - held - fixed_bytes(network, logit_chunk)) // row)
    return next(
        turns for turns in range(1, device_rows + 1) if device_rows % turns == 0 and device_rows // turns <= at_once
    )


def bytes_of(tree: Any) -> int:
    """The bytes of a tree of arrays or abstract arrays."""
    return sum(
        int(np.prod(x.shape, dtype=np.int64)) * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x, "dtype")
    )


class Throughput:
    """Measures tokens a second, and the share of the hardware's peak that useful operations reach (MFU).

    Useful operations are one forward and one backward pass over valid tokens and patches; padding, rows of weight 0,
    recomputation and scoring are not. Each process counts its own rows, and takes them for the average of all processes.
    """

    def __init__(self, model: Model, trainable: str, mesh: Mesh | None):
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
        else:  # traces of a packed row do not attend to each other
            rows = np.arange(len(valid))[:, None] * valid.shape[1]
            lengths = np.bincount((rows + batch.segments)[valid])
        self.tokens += float(valid.sum())
        self.flops += float(sum(training_flops(self.config, row_work(lengths, grids, self.config), **self.options)))

    def metrics(self, seconds: float) -> dict[str, float]:
        """The metrics of the rows counted since the last call, which took `seconds`. No `mfu` if the peak is unknown (CPU)."""
        processes = len(members())
        metrics = {
            "tokens_per_second": self.tokens / seconds * processes,
            "flops_per_second": self.flops / seconds * processes,
        }
        if np.isfinite(self.peak):
            metrics["mfu"] = self.flops / seconds / self.peak
        self.tokens = self.flops = 0.0
        return metrics
