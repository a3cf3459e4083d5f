"""The vision tower against transformers, part by part and whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_qwen import relative, tiny_config

from pixel_jax.models.layers import unstack
from pixel_jax.models.rope import vision_angles
from pixel_jax.models.vision import Blocks, PatchLayout, VisionTower

GRIDS = [(2, 2), (2, 40), (40, 2), (8, 8), (10, 12), (12, 6), (6, 26), (8, 16)]  # patches; windows are 8 x 8


@pytest.fixture(params=[160, 224])
def patches(request) -> int:
    """Room for patches: where attention within windows is one product under a mask, and where it is one of blocks."""
    return request.param


def padded(values: np.ndarray, patches: int, fill=0.0) -> np.ndarray:
    """[n, d] -> [1, patches, d]"""
    out = np.full((1, patches, values.shape[1]), fill, np.float32)
    out[0, : len(values)] = values
    return out


@pytest.mark.torch
def test_patch_embed(pair, rng):
    import torch

    ours, theirs = pair
    pixels = rng.standard_normal((7, 1176), dtype=np.float32)
    with torch.no_grad():
        expected = theirs.model.visual.patch_embed(torch.tensor(pixels))
    assert relative(ours.visual.patch_embed(jnp.array(pixels)), expected) < 1e-5


@pytest.mark.torch
@pytest.mark.parametrize("index, full", [(0, False), (1, True)])
def test_block(pair, rng, patches, index, full):
    """A windowed and a full block on a grid whose windows are cut at both edges: the block's own input and output, seen while
    the tower of transformers works, whose parts are called otherwise in every release."""
    import torch

    ours, theirs = pair
    h, w = 10, 12
    tower, seen = theirs.model.visual, {}
    hooks = [
        tower.patch_embed.register_forward_hook(lambda module, given, out: seen.update(embedded=out)),
        tower.blocks[0].register_forward_pre_hook(lambda module, given: seen.update(first=given[0])),
        tower.blocks[index].register_forward_hook(lambda module, given, out: seen.update(given=given[0], made=out)),
    ]
    with torch.no_grad():
        tower(torch.tensor(rng.standard_normal((h * w, 1176), dtype=np.float32)), grid_thw=torch.tensor([[1, h, w]]))
    for hook in hooks:
        hook.remove()
    cells = {name: np.asarray(value).reshape(-1, 4, 32) for name, value in seen.items()}
    # The first block gets the embedded cells by window: where each of them went.
    place = [int(np.flatnonzero((cells["first"] == cell).all(axis=(1, 2)))[0]) for cell in cells["embedded"]]
    assert sorted(place) == list(range(h * w // 4)) != place
    x, expected = (cells[name][place].reshape(h * w, 32) for name in ("given", "made"))
    layout = PatchLayout(jnp.array([[h, w]]), patches, ours.config.vision)
    cos, sin = vision_angles(layout.row, layout.column, ours.config.vision.head_dim)
    block = unstack(ours.visual.blocks, ours.config.vision.depth)[index]
    by_window = padded(x, patches).reshape(patches // 4, -1)[layout.order[0]].reshape(1, patches, -1)
    got = jax.jit(lambda block, x: block(x, cos, sin, layout, jnp.array(full), "dense"))(block, by_window)
    got = got.reshape(patches // 4, -1)[jnp.argsort(layout.order[0])].reshape(patches, -1)
    assert relative(got[: h * w], expected) < 1e-5


@pytest.mark.torch
def test_merger(pair, rng):
    import torch

    ours, theirs = pair
    x = rng.standard_normal((12, 32), dtype=np.float32)
    with torch.no_grad():
        expected = theirs.model.visual.merger(torch.tensor(x))
    assert relative(ours.visual.merger(jnp.array(x)[None])[0], expected) < 1e-5


@pytest.mark.torch
@pytest.mark.parametrize("implementation", ["dense", "chunked"])
def test_tower_every_grid_in_one_compilation(pair, rng, patches, implementation):
    import torch

    ours, theirs = pair
    encode = jax.jit(lambda tower, x, hw: tower(x, hw, implementation=implementation))
    for h, w in GRIDS:
        pixels = rng.standard_normal((h * w, 1176), dtype=np.float32)
        with torch.no_grad():
            expected = theirs.model.visual(torch.tensor(pixels), torch.tensor([[1, h, w]])).pooler_output
        got = encode(ours.visual, padded(pixels, patches, fill=3.0), np.array([[h, w]], np.int32))
        assert relative(got[0, : h * w // 4], expected) < 1e-5
    assert encode._cache_size() == 1


@pytest.mark.torch
def test_several_slices_at_once(pair, rng):
    """Images of unlike sizes and a video of three slices, as one call of theirs and one of ours."""
    import torch

    ours, theirs = pair
    grids = [(1, 4, 6), (3, 8, 4), (1, 2, 20)]
    pixels = [rng.standard_normal((t * h * w, 1176), dtype=np.float32) for t, h, w in grids]
    with torch.no_grad():
        out = theirs.model.visual(torch.tensor(np.concatenate(pixels)), torch.tensor(grids))
        expected = out.pooler_output
    hw = [(h, w) for t, h, w in grids for _ in range(t)] + [(0, 0)]  # the last slice is absent
    slices = [part for values, (t, _, _) in zip(pixels, grids, strict=True) for part in np.split(values, t)]
    slices = [np.pad(part, ((0, 48 - len(part)), (0, 0))) for part in slices] + [np.zeros((48, 1176), np.float32)]
    got = jax.jit(VisionTower.__call__)(ours.visual, np.stack(slices), jnp.array(hw))
    assert np.isfinite(got).all()
    got = np.concatenate([part[: h * w // 4] for part, (h, w) in zip(np.asarray(got), hw, strict=True)])
    assert relative(got, expected) < 1e-5


def test_layout_puts_the_patches_of_a_window_together(config):
    """All grids of up to 64 patches: every token once, windows in raster order, padding at the end, patches in merge order."""
    grids = [(h, w) for h in range(2, 66, 2) for w in range(2, 66, 2) if h * w <= 64]
    layout = PatchLayout(jnp.array(grids), 64, config.vision)
    for i, (h, w) in enumerate(grids):
        tokens, patches = h * w // 4, h * w
        down, across = np.divmod(np.arange(tokens), w // 2)
        expected = np.lexsort((across, down, across // 4, down // 4))
        np.testing.assert_array_equal(layout.order[i], [*expected, *range(tokens, 16)])
        assert (np.asarray(layout.valid[i]) == (np.arange(64) < patches)).all()
        row, column, window = (np.asarray(x[i, :patches]) for x in (layout.row, layout.column, layout.window))
        np.testing.assert_array_equal(row, np.repeat(2 * down[expected], 4) + np.tile([0, 0, 1, 1], tokens))
        np.testing.assert_array_equal(column, np.repeat(2 * across[expected], 4) + np.tile([0, 1, 0, 1], tokens))
        pairs = zip(window, zip(row // 8, column // 8, strict=True), strict=True)
        assert len(set(window)) == -(-h // 8) * -(-w // 8) == len(set(pairs))


@pytest.mark.parametrize("patches", [4, 64, 68, 160, 192, 196, 500])
def test_blocks_hold_every_window(config, patches):
    """Any stretch of as many patches as a window can have lies within what each of its patches' blocks sees."""
    blocks = Blocks.of(patches, config.vision)
    assert blocks.number * blocks.size >= patches > (blocks.number - 1) * blocks.size
    seen = np.asarray(blocks.around(jnp.arange(patches)[None], -1))
    assert seen.shape == (blocks.number, (2 * blocks.reach + 1) * blocks.size)
    for patch in range(patches):
        near = range(max(0, patch - 63), min(patches, patch + 64))
        assert set(near) <= set(seen[patch // blocks.size])
        assert (seen[patch // blocks.size] == patch).sum() == 1


def test_padding_changes_nothing_and_has_no_gradient(rng):
    """Neither values nor derivatives of the real tokens depend on what stands in the padding."""
    tower = jax.jit(VisionTower, static_argnums=(0, 2))(tiny_config().vision, jax.random.key(0), jnp.float32)
    x = rng.standard_normal((2, 32, 1176), dtype=np.float32)
    hw = jnp.array([[4, 6], [0, 0]])
    loss = jax.jit(jax.value_and_grad(lambda x: jnp.sum(tower(x, hw)[0, :6] ** 2)))
    value, gradient = loss(x)
    other, other_gradient = loss(np.where(np.arange(32)[:, None] < 24, x, -7.0).astype(np.float32))
    np.testing.assert_allclose(value, other, rtol=1e-6)
    np.testing.assert_allclose(gradient, other_gradient, atol=1e-6)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[0, 24:] == 0).all() and (np.asarray(gradient)[1] == 0).all()


def test_remat_equals_plain(rng):
    tower = jax.jit(VisionTower, static_argnums=(0, 2))(tiny_config().vision, jax.random.key(0), jnp.float32)
    x, hw = rng.standard_normal((1, 16, 1176), dtype=np.float32), jnp.array([[4, 4]])
    gradient = jax.jit(jax.grad(lambda t, remat: jnp.sum(t(x, hw, remat=remat) ** 2)), static_argnums=1)
    for a, b in zip(*(jax.tree.leaves(gradient(tower, remat)) for remat in (False, True)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_odd_number_of_patches_is_an_error(config):
    tower = VisionTower(config.vision, jax.random.key(0), jnp.float32)
    with pytest.raises(ValueError, match="18 is no multiple of 4"):
        tower(jnp.zeros((1, 18, 1176)), jnp.array([[2, 2]]))
