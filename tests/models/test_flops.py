"""The formulas against XLA's own count of the same network with its layers unrolled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixel_jax.models import Mask, Model, Qwen2_5_VLConfig, TextConfig, VisionConfig
from pixel_jax.models import vision as vision_module
from pixel_jax.models.flops import PEAK_FLOPS, Work, forward_flops, padded_work, row_work, training_flops
from pixel_jax.models.layers import LoRAWeight, unstack
from pixel_jax.models.lora import add_lora, combine, split
from pixel_jax.models.released import released, weight_shapes
from pixel_jax.models.rope import vision_angles
from pixel_jax.models.vision import PatchLayout

# Wide, so that what is not a matrix product is little; nothing of this size is ever run.
CONFIG = Qwen2_5_VLConfig(
    TextConfig(5000, 768, 2000, 3, 12, 2, mrope_section=(8, 12, 12)),
    VisionConfig(4, 640, 1700, 10, out_hidden_size=768, fullatt_block_indexes=(1, 3)),
)
ROWS, LENGTH, SLICES, PATCHES = 2, 320, 3, 256


@pytest.fixture(scope="module")
def model():
    return weight_shapes(CONFIG)


def counted(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def decode(model: Model, x, remat=False):
    """The decoder's layers in a Python loop, and the logits; a nonlinear function of them, so that none is computed in vain."""
    order = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
    cos, sin = model.language_model.angles(jnp.broadcast_to(order, (3, ROWS, LENGTH)))
    block = lambda layer, x: layer(x, cos, sin, Mask(order, order), "dense")[0]
    logits = lambda model, x: jnp.mean(model.logits(model.language_model.norm(x)) ** 2)
    if remat:
        block, logits = jax.checkpoint(block), jax.checkpoint(logits)
    for layer in model.unstack():
        x = block(layer, x)
    return logits(model, x)


def see(tower, pixels, remat=False):
    """The vision tower's blocks in a Python loop, each with the attention it has."""
    config = tower.config
    layout = PatchLayout(jnp.full((ROWS * SLICES, 2), 16), PATCHES, config)
    cos, sin = vision_angles(layout.row, layout.column, config.head_dim)
    x = tower.patch_embed(pixels)
    for i, layer in enumerate(unstack(tower.blocks, config.depth)):
        full = i in config.fullatt_block_indexes
        block = lambda layer, x, full=full: layer(x, cos, sin, layout, full, "dense")
        x = (jax.checkpoint(block) if remat else block)(layer, x)
    return jnp.mean(tower.merger(x) ** 2)


@pytest.fixture
def no_branches(monkeypatch):
    """XLA counts both branches of a condition, or one: here the condition is known."""
    choose = lambda known, yes, no, *arguments: (yes if known else no)(*arguments)
    monkeypatch.setattr(vision_module.jax.lax, "cond", choose)


WORK = padded_work(ROWS, LENGTH, SLICES, PATCHES, CONFIG)
DECODER, TOWER = (
    ("layers", "attention", "adapters", "head"),
    ("patch_embed", "vision_layers", "vision_attention", "merger"),
)


def part(flops, names):
    return sum(getattr(flops, name) for name in names)


def test_decoder(model):
    x = array(ROWS, LENGTH, 768)
    assert counted(decode, model, x) == pytest.approx(part(forward_flops(CONFIG, WORK), DECODER), rel=0.02)
    # Of x, too: in a whole network the gradient goes on into the vision tower.
    for remat in (False, True):
        gradient = jax.value_and_grad(lambda model, x, remat=remat: decode(model, x, remat), argnums=(0, 1))
        expected = training_flops(CONFIG, WORK, remat=remat)
        assert counted(gradient, model, x) == pytest.approx(part(expected, DECODER), rel=0.02)


def test_adapters(model):
    targets = r"model\.layers\..*"
    adapted = jax.eval_shape(lambda m: add_lora(m, jax.random.key(0), rank=32, alpha=1.0, targets=targets), model)
    adapter, rest = jax.eval_shape(lambda m: split(m, LoRAWeight), adapted)
    weights = sum(x.size for x in adapter.values())
    x = array(ROWS, LENGTH, 768)
    expected = forward_flops(CONFIG, WORK, adapter_weights=weights)
    assert expected.adapters > 0.03 * expected.layers
    assert counted(decode, adapted, x) == pytest.approx(part(expected, DECODER), rel=0.02)
    gradient = jax.value_and_grad(lambda adapter, x, rest: decode(combine(adapter, rest), x), argnums=(0, 1))
    expected = training_flops(CONFIG, WORK, base=False, adapter_weights=weights)
    assert counted(gradient, adapter, x, rest) == pytest.approx(part(expected, DECODER), rel=0.02)


def test_vision_tower(model, no_branches):
    pixels = array(ROWS * SLICES, PATCHES, CONFIG.vision.patch_dim)
    assert counted(see, model.visual, pixels) == pytest.approx(part(forward_flops(CONFIG, WORK), TOWER), rel=0.02)
    for remat in (False, True):
        gradient = jax.value_and_grad(lambda tower, pixels, remat=remat: see(tower, pixels, remat))
        expected = training_flops(CONFIG, WORK, remat=remat)
        assert counted(gradient, model.visual, pixels) == pytest.approx(part(expected, TOWER), rel=0.02)


def test_what_is_frozen_has_no_backward_pass():
    trained, frozen = (training_flops(CONFIG, WORK, vision=v) for v in (True, False))
    forward = forward_flops(CONFIG, WORK)
    assert part(frozen, TOWER) == part(forward, TOWER) and part(frozen, DECODER) == part(trained, DECODER)
    assert training_flops(CONFIG, WORK, vision=False, remat=True).vision_layers == forward.vision_layers


def test_useful_work_of_rows():
    """Two rows: 5 tokens with an image of 10 x 8 patches (windows 8 x 8 and 2 x 8), and 3 with two slices of 4 x 4."""
    grids = [[[1, 10, 8], [0, 0, 0]], [[2, 4, 4], [0, 0, 0]]]
    found = row_work(np.array([5, 3]), np.array(grids), CONFIG)
    assert found == Work(8, 34, 8, 80 + 32, 80**2 + 2 * 16**2, 64**2 + 16**2 + 2 * 16**2)
    # A full square has no padding, but its windows are looked for in three blocks.
    square = row_work(np.array([7, 7]), np.array([[[3, 16, 16]]] * 2), CONFIG)
    padded = padded_work(2, 7, 3, 256, CONFIG)
    assert square._replace(window_pairs=0) == padded._replace(window_pairs=0)
    assert square.window_pairs * 3 == padded.window_pairs


def test_six_operations_a_weight_and_token():
    """The rule of thumb for text: 6 N T, plus 12 layers x width x length a token for attention (PaLM, App. B)."""
    config = released("qwen2.5-vl-7b")
    model = weight_shapes(config)
    weights = sum(x.size for x in jax.tree.leaves((model.language_model.layers, model.lm_head)))
    found = sum(training_flops(config, padded_work(1, 2048, 0, 0, config)))
    assert found == pytest.approx(6 * weights * 2048 + 12 * 28 * 3584 * 2048**2, rel=1e-3)


def test_peaks_are_per_device():
    assert PEAK_FLOPS["TPU v5p"] == PEAK_FLOPS["TPU v5"] == 459e12 and PEAK_FLOPS["NVIDIA H100 80GB HBM3"] == 989e12
