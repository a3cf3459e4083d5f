"""The mesh and the one table that places weights on it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pixel_jax.parallel import batch_sharding, make_mesh, process_shard, shard, shard_batch, shardings
from pixel_jax.parallel.sharding import RULES, partition_spec, undivided


class Weight(nnx.Param):
    pass


class Toy(nnx.Module):
    def __init__(self, width=8):
        self.up = Weight(jnp.arange(16.0 * width).reshape(16, width), axes=("mlp", "embed"))
        self.norm = Weight(jnp.ones(width), axes=(None,))


@pytest.fixture
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def test_mesh_axes_are_auto_and_minus_one_takes_the_rest(mesh):
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert dict(make_mesh({"tensor": 2, "data": -1}).shape) == {"data": 4, "fsdp": 1, "sequence": 1, "tensor": 2}
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1}
    assert dict(make_mesh({"fsdp": 2}).shape) == {"data": 1, "fsdp": 2, "sequence": 1, "tensor": 1}


@pytest.mark.parametrize(
    "shape, words",
    [
        ({"model": 2}, "model"),
        ({"data": 3, "fsdp": -1}, "3"),
        ({"data": 16}, "16"),
        ({"data": -1, "fsdp": -1}, "-1"),
        ({"data": 0}, "positive"),
    ],
)
def test_bad_meshes_are_named(shape, words):
    with pytest.raises(ValueError, match=words):
        make_mesh(shape)


@dataclasses.dataclass(frozen=True)
class Device:
    """A device that is not there, of one of two slices; JAX counts the nodes of GPUs as slices."""

    id: int
    platform: str
    device_kind: str = "a kind"
    process_index = property(lambda self: self.id // 4)
    slice_index = process_index


def test_a_mesh_may_span_nodes_of_gpus_but_not_slices_of_tpus():
    mesh = make_mesh({"fsdp": -1, "tensor": 4}, [Device(i, "gpu") for i in range(8)])
    assert [[device.process_index for device in row] for row in mesh.devices.reshape(2, 4)] == [[0] * 4, [1] * 4]
    with pytest.raises(ValueError, match="the devices lie on 2 slices"):
        make_mesh({"fsdp": -1}, [Device(i, "tpu") for i in range(8)])


def test_weights_and_moments_go_where_their_axes_say(mesh):
    model = Toy()
    state = shard((model, optax.adamw(1e-3).init(model), jnp.int32(3)), mesh)
    placed = shardings(state, mesh)
    assert jax.tree.leaves(state[0])[1].sharding.spec == P("tensor", "fsdp")
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    moments = [x for x in jax.tree.leaves(state[1]) if x.shape == (16, 8)]
    assert len(moments) == 2 and all(x.sharding.spec == P("tensor", "fsdp") for x in moments)
    np.testing.assert_array_equal(jax.tree.leaves(state[0])[1], np.arange(128.0).reshape(16, 8))


def test_abstract_models_have_the_same_shardings(mesh):
    concrete, abstract = shardings(Toy(), mesh), shardings(jax.eval_shape(Toy), mesh)
    assert jax.tree.leaves(concrete) == jax.tree.leaves(abstract)


def test_a_dimension_that_does_not_divide_is_replicated_and_listed(mesh):
    model = Toy(width=7)
    assert partition_spec(("mlp", "embed"), (16, 7), mesh) == P("tensor")
    assert undivided(model, mesh.shape) == ["up dimension 1 (embed = 7) is not divisible by fsdp = 2: replicated"]
    assert undivided(Toy(), mesh.shape) == []
    shard(model, mesh)


def test_clashing_axes_name_both(mesh):
    with pytest.raises(ValueError, match="'heads' and 'mlp' both go to mesh axis 'tensor'"):
        partition_spec(("heads", "mlp"), (4, 4), mesh)
    with pytest.raises(ValueError, match="'wings'"):
        partition_spec(("wings",), (4,), mesh)
    with pytest.raises(ValueError, match="2 dimensions"):
        partition_spec(("mlp",), (4, 4), mesh)


def test_a_tuple_of_mesh_axes(mesh):
    rules = {**RULES, "embed": ("data", "fsdp")}
    assert partition_spec(("embed",), (8,), mesh, rules) == P(("data", "fsdp"))
    assert partition_spec(("embed",), (6,), mesh, rules) == P("data")


def test_a_weight_without_axes_is_an_error(mesh):
    class Bare(nnx.Module):
        def __init__(self):
            self.w = Weight(jnp.ones(4))

    with pytest.raises(ValueError, match="w .*declares no logical axes"):
        shardings(Bare(), mesh)


def test_rows_over_data_and_fsdp(mesh):
    rows = shard_batch({"x": np.arange(8.0)}, mesh)["x"]
    assert rows.sharding == batch_sharding(mesh)
    assert {s.data.shape for s in rows.addressable_shards} == {(2,)}
    with pytest.raises(ValueError, match="6 rows .* 4"):
        shard_batch(np.zeros(6), mesh)


def test_a_process_without_a_device_in_the_mesh_is_named(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(ValueError, match=r"'data': 2.* has 2 devices of 8, none of them in process 1 of 3"):
        process_shard(make_mesh({"data": 2}))
