"""The positions of a row split over devices: the same update, and a part of the memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import make_batch

from pixel_jax.models import forward_hidden
from pixel_jax.parallel import make_mesh, shard, shard_batch
from pixel_jax.training.losses import PolicyLossConfig
from pixel_jax.training.optimizer import OptimizerConfig, make_optimizer
from pixel_jax.training.state import init_state
from pixel_jax.training.steps import ForwardConfig, make_rl_step, make_score_step, make_sft_step

MESH = {"data": 2, "sequence": 2, "tensor": 2}
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, eps=1e-2, warmup=0.0), 10)


def update(kind, model, batch, mesh, **options):
    """(loss, row losses, what the step changed) on the host."""
    config = ForwardConfig(**{"remat": False, **options})
    state = init_state(model, OPTIMIZER, mesh=mesh)
    before = jax.device_get(state.trainable)
    if kind == "sft":
        step = make_sft_step(config, OPTIMIZER, mesh=mesh)
    else:
        step = make_rl_step(config, PolicyLossConfig(), OPTIMIZER, later_temperature=0.9, mesh=mesh)
    state, report = step(state, batch if mesh is None else shard_batch(batch, mesh))
    change = jax.tree.map(np.subtract, jax.device_get(state.trainable), before)
    return jax.device_get(report.metrics["loss"]), jax.device_get(report.rows), jax.tree.leaves(change)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("sft", {"implementation": "chunked", "logit_chunk": 5, "remat": True}),
        ("rl", {"micro_batches": 2, "remat": "dots"}),
    ],
)
def test_an_update_is_the_same(model, batch, kind, options):
    loss, rows, change = update(kind, model, batch, None)
    loss_split, rows_split, change_split = update(kind, model, batch, make_mesh(MESH), **options)
    np.testing.assert_allclose(loss_split, loss, rtol=1e-5)
    np.testing.assert_allclose(rows_split, rows, rtol=1e-5, atol=1e-5 * np.abs(rows).max())
    apart = sum(np.sum((a - b) ** 2) for a, b in zip(change, change_split, strict=True))
    assert apart <= (1e-4) ** 2 * sum(np.sum(a**2) for a in change)


def test_activations_lie_in_parts(model):
    """Hidden states come out split, and a step on long rows needs a fraction of the memory for what it computes."""
    mesh = make_mesh({"sequence": 8})
    batch = make_batch(2)
    wide = lambda x: np.pad(x, [(0, 0), (0, 1000)]) if x.ndim == 2 else x
    long = jax.tree.map(wide, batch._replace(visual=None))
    run = jax.jit(lambda model, batch: forward_hidden(model, batch.tokens, batch.valid, None, mesh=mesh))
    hidden = run(shard(model, mesh), shard_batch(long, mesh))
    assert hidden.addressable_shards[0].data.shape == (2, 128, 32)

    def memory(mesh):
        placed = (model, long) if mesh is None else (shard(model, mesh), shard_batch(long, mesh))
        step = make_score_step(ForwardConfig(remat=False), mesh=mesh)
        return step.lower(*placed).compile().memory_analysis().temp_size_in_bytes

    assert memory(mesh) < memory(None) / 4


def test_rows_that_cannot_be_split_are_refused(model):
    batch = jax.tree.map(jnp.asarray, make_batch(2)._replace(visual=None))
    with pytest.raises(ValueError, match="rows of 24 tokens .* sequence = 5"):
        forward_hidden(model, batch.tokens, batch.valid, None, mesh=make_mesh({"sequence": 5}, jax.devices()[:5]))
