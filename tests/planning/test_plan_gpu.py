"""The same for GPUs that are not there: every step, kernel and pixel operation compiles, is read and is counted."""

import dataclasses
import json

import jax
import jax.experimental.topologies
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from pixel_jax.models.flops import padded_work, training_flops
from pixel_jax.models.kernels import triton
from pixel_jax.ops import crop_resize, gather_frames
from pixel_jax.planning.gpus import GPUS, target_config
from pixel_jax.planning.machines import CHIPS, machine, slices
from pixel_jax.planning.search import plan, slots
from tests.planning.small_recipe import recipe

compiles = [pytest.mark.slow, pytest.mark.cuda]
KINDS = sorted(GPUS)


def test_what_the_compiler_is_told_of_a_gpu():
    text = target_config(GPUS["h100"])
    assert text.count("{") == text.count("}") and "core_count: 132 " in text
    assert "cuda_compute_capability { major: 9 }" in text and 'device_description_str: "NVIDIA H100 80GB HBM3"' in text
    assert CHIPS["h200"].memory < GPUS["h200"].memory and CHIPS["b200"].network == 50e9
    assert slices("a100") == {8: "a100:1x8", 16: "a100:2x8", 32: "a100:4x8", 64: "a100:8x8"} | {
        8 * n: f"a100:{n}x8" for n in (16, 32, 64, 128)
    }


@pytest.mark.parametrize(
    "name", ["h100:9", "h100:0", "h100:2x0", "h100:1x2x8", "b200:2x9", "h200:1025x8", "h200:9999999x8"]
)
def test_nodes_that_cannot_be(name):
    with pytest.raises(
        ValueError, match=f"^{name} is not NODESxGPUS with 1 to 8 GPUs a node and at most 1024 nodes, as"
    ):
        machine(name)


@pytest.mark.parametrize(
    "name", ["l40:8", "H100:8", "h100", "h100:", "h100:3x", "h100:x8", "h100:-8", "h100:8 x 2", "h100:8;1"]
)
def test_gpus_that_are_not_known(name):
    with pytest.raises(
        ValueError, match=f"^topology '{name}' is neither .* as h100:2x8; KIND is one of .*a100, h100, h200, b200"
    ):
        machine(name)


def test_a_missing_compiler_is_said_in_one_line(monkeypatch):
    def missing(**given):
        raise RuntimeError("no plugin for cuda\nand much more")

    monkeypatch.setattr(jax.experimental.topologies, "get_topology_desc", missing)
    with pytest.raises(
        ValueError, match=r"NVIDIA B200 here: `pip install 'pixel_jax\[plan-gpu\]'` .* \(no plugin for cuda\)$"
    ):
        machine("b200:2x8")


def wider():
    """The small recipe with heads that Triton's kernel takes, of 64 channels."""
    small = recipe()
    text = dataclasses.replace(small.network.text, hidden_size=256, intermediate_size=512, mrope_section=(8, 12, 12))
    vision = dataclasses.replace(small.network.vision, out_hidden_size=256)
    forward = dataclasses.replace(small.config.rl.forward, implementation="kernel")
    rl = dataclasses.replace(small.config.rl, forward=forward)
    network = dataclasses.replace(small.network, text=text, vision=vision)
    return dataclasses.replace(small, network=network, config=dataclasses.replace(small.config, rl=rl))


class TestCompiled:
    pytestmark = compiles

    @pytest.mark.parametrize("kind", KINDS)
    def test_training_steps(self, kind):
        small, target = wider(), machine(f"{kind}:2x4")
        work = padded_work(8, small.length("update"), 2, 32, small.network)
        found = plan(small, "update", target, {"data": 2, "fsdp": 2, "tensor": 2}).plan
        assert found.fits and json.loads(json.dumps(dataclasses.asdict(found)))["topology"] == f"{kind}:2x4"
        by_hand = sum(training_flops(small.network, work, remat=True))
        assert 0.9 * by_hand < target.chips * found.flops_per_chip < 1.1 * by_hand
        # Only gradients of the two replicas go from node to node.
        sent = sum(x["bytes"] for x in found.collectives.values())
        assert 0 < found.between_nodes < sent / 2

    def test_a_rollout_holds_its_caches_once(self):
        small, responses = recipe(), 16_384
        rollout = small.config.rl.rollout
        rollout = dataclasses.replace(
            rollout, max_response=responses, max_tokens=2 * responses, in_flight=8, observe_chunk=1
        )
        config = dataclasses.replace(small.config, rl=dataclasses.replace(small.config.rl, rollout=rollout))
        small = dataclasses.replace(small, config=config)
        short = dataclasses.replace(rollout, max_response=responses // 2)
        config = dataclasses.replace(config, rl=dataclasses.replace(config.rl, rollout=short))
        mesh = {"data": 1, "fsdp": 1, "tensor": 1}
        long, half = (
            plan(x, "rollout", machine("h100:1"), mesh).plan for x in (small, dataclasses.replace(small, config=config))
        )
        row = (long.bytes_per_chip - half.bytes_per_chip) / slots(small)
        cache = small.network.text.cache_bytes(responses // 2, 4)
        others = 6 * 4 * responses // 2  # token, flags, log-probability, order and rank of every position
        assert cache < row < 1.1 * cache + others

    @pytest.mark.parametrize("kind", KINDS)
    def test_kernels_and_pixel_operations(self, kind):
        place = SingleDeviceSharding(machine(f"{kind}:1").devices[0])
        array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        image, box, size = array(jnp.uint8, 448, 448, 3), array(jnp.int32, 4), array(jnp.int32, 2)
        crop = jax.jit(lambda *given: crop_resize(*given, canvas=(224, 224))).lower(image, box, size).compile()
        assert crop.memory_analysis().temp_size_in_bytes < 64 * 448 * 448 * 3
        frames = jax.jit(gather_frames).lower(array(jnp.uint8, 32, 448, 448, 3), array(jnp.int32, 8)).compile()
        assert frames.memory_analysis().temp_size_in_bytes < 2 * 8 * 448 * 448 * 3
        q, k, segments = (
            array(jnp.bfloat16, 1, 512, 4, 128),
            array(jnp.bfloat16, 1, 512, 2, 128),
            array(jnp.int32, 1, 512),
        )

        def attention(q, k, v, q_segments, k_segments):
            return jnp.sum(triton(q, k, v, q_segments, k_segments, causal=True).astype(jnp.float32))

        gradient = jax.jit(jax.grad(attention, argnums=(0, 1, 2)))
        assert "__gpu$xla.gpu.triton" in gradient.lower(q, k, k, segments, segments).compile().as_text()
