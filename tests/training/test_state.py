"""The policy on the mesh of a rollout: the same weights, laid out as asked, and only adapters move after the first time."""

import jax
import numpy as np
import pytest

from pixel_jax.models.checkpoint import named_weights
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.lora import add_lora
from pixel_jax.parallel import make_mesh
from pixel_jax.training.checkpoint import CheckpointError, Checkpoints, fingerprint
from pixel_jax.training.optimizer import OptimizerConfig, make_optimizer
from pixel_jax.training.state import Resharder, init_state

OPTIMIZER = make_optimizer(OptimizerConfig(), 10)


@pytest.fixture
def adapted(model):
    return add_lora(model, jax.random.key(1), rank=2, alpha=4, targets=r"model\.layers.*")


def test_only_adapters_move_after_the_first_time(adapted):
    train, serve = make_mesh({"fsdp": 4, "tensor": 2}), make_mesh({"data": 4, "tensor": 2})
    state = init_state(adapted, OPTIMIZER, trainable=".*lora_", mesh=train)
    expected = [np.asarray(x) for x in jax.tree.leaves(state.model)]
    policy = Resharder(train, serve)
    first = policy(state)
    again = init_state(adapted, OPTIMIZER, trainable=".*lora_", mesh=train)
    for x in jax.tree.leaves(state):
        x.delete()  # as a step does that was given the state
    second = policy(again)
    for value, (_, path, a), (_, _, b) in zip(expected, named_weights(first), named_weights(second), strict=True):
        assert b[...].sharding.mesh == serve
        np.testing.assert_array_equal(b[...], value)
        assert isinstance(a, LoRAWeight) or a[...] is b[...], path
    weight = second.language_model.layers.mlp.up_proj.weight[...]
    assert weight.addressable_shards[0].data.size == weight.size // 2  # over `tensor`, no longer over `fsdp`


@pytest.mark.parametrize("serve", [None, {"data": 4, "tensor": 2}])
def test_base_weights_come_in_the_type_that_training_computes_in(adapted, serve):
    train = make_mesh({"fsdp": 4, "tensor": 2})
    state = init_state(adapted, OPTIMIZER, trainable="model.*", mesh=train)
    serve = serve and make_mesh(serve)
    policy = Resharder(train, serve, "bfloat16")(state)
    for (_, path, weight), (_, _, cast) in zip(named_weights(state.model), named_weights(policy), strict=True):
        adapter = isinstance(cast, LoRAWeight)
        assert cast[...].dtype == ("float32" if adapter else "bfloat16"), path
        assert cast[...].sharding.mesh == (serve or train) and cast.axes == weight.axes
        np.testing.assert_array_equal(cast[...], weight[...] if adapter else weight[...].astype("bfloat16"))


def test_meshes_of_other_devices_are_refused():
    with pytest.raises(ValueError, match="same devices"):
        Resharder(make_mesh({"data": 4}), make_mesh({"data": 8}))


def test_frozen_weights_are_named_and_not_stored(adapted, tmp_path):
    state = init_state(adapted, OPTIMIZER, trainable=".*lora_")
    base, bare = fingerprint(state.rest), state._replace(rest=())
    split = init_state(adapted, OPTIMIZER, trainable=".*lora_", mesh=make_mesh({"fsdp": 4, "tensor": 2}))
    assert fingerprint(split.rest) == base and len(base) > 10  # whatever the mesh
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, bare, base=base)
    with Checkpoints(tmp_path / "whole") as checkpoints:
        checkpoints.save(1, state)
    stored = {
        name: sum(path.stat().st_size for path in (tmp_path / name / "1").rglob("*") if path.is_file())
        for name in ("checkpoints", "whole")
    }
    frozen = sum(x.nbytes for x in jax.tree.leaves(state.rest))
    assert stored["whole"] - stored["checkpoints"] > frozen / 2
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        found = checkpoints.restore(bare, base=base)
        jax.tree.map(np.testing.assert_array_equal, found.state, bare)
        other = jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1e-3), state.rest)
        with pytest.raises(CheckpointError, match="frozen .* in the checkpoint, not"):
            checkpoints.restore(bare, base=fingerprint(other))
