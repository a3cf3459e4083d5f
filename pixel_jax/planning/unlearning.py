"""What an edit of a tuned adapter spends its time in, the Gauss-Newton matrix times a vector, for abstract arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pixel_jax.models.qwen2_5_vl import Qwen2_5_VL
from pixel_jax.parallel.sharding import ROWS
from pixel_jax.training.batch import Batch

LEARNED = 1024  # of a row's tokens, at most those that the assistant wrote: an assumption about traces


def gauss_newton(model: Qwen2_5_VL, batch: Batch, mesh: Mesh, micro_batches: int) -> tuple[Callable, Any, Any, Any]:
    """(`unlearn_jax.curvature.product`, objective, adapter, vector): every row of the batch is an example."""
    # unlearn_jax.vision_language builds on pixel_jax; only this function goes the other way.
    from unlearn_jax.curvature import product
    from unlearn_jax.objective import Objective, automatic, zeros
    from unlearn_jax.vision_language import adapter_loss

    rows, length = batch.tokens.shape
    learned = min(LEARNED, length)
    spread = NamedSharding(mesh, PartitionSpec(None, ROWS))
    stacked = lambda dtype, *shape: jax.ShapeDtypeStruct(
        (micro_batches, rows // micro_batches, *shape), dtype, sharding=spread
    )
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    examples = {
        "tokens": stacked(jnp.int32, length),
        "valid": stacked(jnp.bool_, length),
        "places": stacked(jnp.int32, learned),
        "labels": stacked(jnp.int32, learned),
        "loss_mask": stacked(jnp.bool_, learned),
        "visual": {name: stacked(x.dtype, *x.shape[1:]) for name, x in batch.visual._asdict().items()},
    }
    loss, adapter = adapter_loss(model)
    objective = Objective(loss, examples, stacked(jnp.float32), scalar, rows, automatic(mesh))
    like = lambda zero, x: jax.ShapeDtypeStruct(zero.shape, zero.dtype, sharding=x.sharding)
    vector = jax.tree.map(like, jax.eval_shape(zeros, adapter), adapter)
    return product, objective, adapter, vector
