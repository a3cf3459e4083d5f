"""How fast training goes: tokens a second, and the share of the hardware's peak that useful operations reach (MFU)."""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pixel_jax.models.checkpoint import named_weights
from pixel_jax.models.flops import PEAK_FLOPS, row_work, training_flops
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.model import Model
from pixel_jax.training.batch import Batch


class Throughput:
    """Counts the rows that steps are given; `facts` says what that came to.

    Useful is one forward and one backward pass over valid tokens and patches: padding, rows of weight 0, recomputation and
    the forward passes that score are not. With several processes, each one's rows stand for all.
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
        """Rows of a host batch are about to be trained on."""
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

    def facts(self, seconds: float) -> dict[str, float]:
        """Of what was counted, if it took `seconds`; counting begins anew. No `mfu` where the peak is not known (CPU)."""
        processes = jax.process_count()
        facts = {
            "tokens_per_second": self.tokens / seconds * processes,
            "flops_per_second": self.flops / seconds * processes,
        }
        if np.isfinite(self.peak):
            facts["mfu"] = self.flops / seconds / self.peak
        self.tokens = self.flops = 0.0
        return facts
