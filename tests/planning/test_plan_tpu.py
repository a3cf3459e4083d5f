"""The same for TPUs that are not there: every step compiles, is read and is counted. One process at a time can do this."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from pixel_jax.models.flops import padded_work, training_flops
from pixel_jax.ops import crop_resize, gather_frames
from pixel_jax.parallel import make_mesh
from pixel_jax.planning.machines import machine
from pixel_jax.planning.search import plan
from tests.planning.small_recipe import recipe

pytestmark = [pytest.mark.slow, pytest.mark.libtpu]

TOPOLOGIES = ["v4:2x2x2", "v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_training_steps(name):
    small, target = recipe(), machine(name)
    work = padded_work(8, small.length("update"), 2, 32, small.network)
    found = plan(small, "update", target, {"data": 2, "fsdp": 2, "tensor": 2}).plan
    assert found.fits and found.topology == name
    by_hand = sum(training_flops(small.network, work, remat=True))
    assert 0.9 * by_hand < target.chips * found.flops_per_chip < 1.5 * by_hand  # heads of 8 channels are padded


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_rollout(name):
    small, target = recipe(), machine(name)
    found = plan(small, "rollout", target, {"data": 4, "tensor": 2})
    assert found.plan.fits and found.plan.flops_per_chip > 0
    assert {"turns", "fill", "prompts", "tokens", "cache", "observe", "readers", "pieces"} <= set(found.assumed)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_pixel_operations(name):
    """Crops as products of matrix units, and frames of a video."""
    place = SingleDeviceSharding(machine(name).devices[0])
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    image, box, size = array(jnp.uint8, 448, 448, 3), array(jnp.int32, 4), array(jnp.int32, 2)
    crop = jax.jit(lambda *given: crop_resize(*given, canvas=(224, 224))).lower(image, box, size).compile()
    assert "bf16" in crop.as_text() and "while" not in crop.as_text()
    frames = jax.jit(gather_frames).lower(array(jnp.uint8, 32, 448, 448, 3), array(jnp.int32, 8)).compile()
    assert frames.memory_analysis().temp_size_in_bytes < 2 * 8 * 448 * 448 * 3


@pytest.mark.parametrize("name", ["v5p:4x4x4", "v5e:16x16", "v6e:16x16"])
def test_an_axis_may_be_a_part_of_the_torus(name):
    mesh = make_mesh({"fsdp": -1, "tensor": 4}, machine(name).devices)
    assert mesh.shape["tensor"] == 4
    groups = mesh.devices.reshape(-1, 4)
    for group in groups:  # neighbours: within two hops of each other
        places = np.array([device.coords for device in group])
        assert np.abs(places - places[0]).sum(axis=1).max() <= 3


def test_what_does_not_fit_is_a_plan_that_says_so():
    """All scores of a row at once, and a row of 65,536 tokens: 64 GiB."""
    target, small = machine("v5e:2x4"), recipe()
    dense = dataclasses.replace(small.config.sft.forward, implementation="dense")
    sft = dataclasses.replace(small.config.sft, forward=dense)
    config = dataclasses.replace(small.config, sft=sft, trace_tokens=65_536)
    found = plan(dataclasses.replace(small, config=config), "sft", target, {"data": 8, "fsdp": 1, "tensor": 1}).plan
    assert not found.fits and found.seconds is None
