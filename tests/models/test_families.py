"""Every family against transformers' torch code in float32, on tiny random models.

`python tests/models/family_errors.py` measures the same errors and writes the table of docs/families.md.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import END, IMAGE, START, TEXT_ONLY, VALUES, VIDEO, VISUAL, pair, parameters
from tiny_qwen import relative

import pixel_jax
from pixel_jax.models import FAMILIES, LanguageModel
from pixel_jax.models.checkpoint import layer_numbers, named_weights

QWEN = [name for name in VISUAL if name.startswith("qwen")]


def their_logits(theirs, **arrays):
    import torch

    arrays = {name: torch.tensor(np.asarray(value)) for name, value in arrays.items()}
    with torch.no_grad():
        return theirs(**arrays, use_cache=False).logits.numpy()


def show(grid, pad, vision):
    """The tokens of an item of `grid` (slices, height, width in patches)."""
    return [START, *[pad] * (math.prod(vision.token_grid(grid)) // vision.merge_unit), END]


def grids_of(name, vision):
    """Three images' grids."""
    if vision.fixed_grid is not None:
        return [(1, *vision.fixed_grid)] * 3
    return [(1, 4, 6), (1, 2, 10), (1, 10, 8)]


def pixels_of(rng, grids, vision):
    """The pixel values of images, and their grids where the family has them, as keyword arguments."""
    if vision.fixed_grid is not None:
        side = vision.patch_size * vision.fixed_grid[0]
        return {"pixel_values": rng.standard_normal((len(grids), 3, side, side), dtype=np.float32)}
    count = sum(map(math.prod, grids))
    pixels = rng.standard_normal((count, vision.patch_dim), dtype=np.float32)
    return {"pixel_values": pixels, "image_grid_thw": np.array(grids)}


def padded(rows, side):
    """Rows of tokens -> input_ids and attention_mask [rows, length], padded on one side."""
    length = max(map(len, rows))
    ids, mask = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), np.int64)
    for r, row in enumerate(rows):
        place = slice(length - len(row), None) if side == "left" else slice(len(row))
        ids[r, place], mask[r, place] = row, 1
    return ids, mask


def typed(name, ids):
    """What transformers wants to know besides."""
    return {"mm_token_type_ids": (ids == IMAGE) + 2 * (ids == VIDEO)} if name in QWEN else {}


@pytest.mark.torch
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", parameters(VALUES))
def test_logits(name, side, rng):
    """Rows of unlike length, padded on either side; where the family sees, one image in a row and two in the next."""
    compare_logits(name, side, rng, *pair(name))


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", [name for name in VALUES if name != "qwen3_vl_tied"])
def test_logits_of_a_head_of_its_own_or_tied_to_the_embeddings(name, tied, rng):
    ours, theirs = pair(name, tie_word_embeddings=tied)
    assert (theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight) == tied
    compare_logits(name, "left", rng, ours, theirs)


def compare_logits(name, side, rng, ours, theirs):
    vision, arrays = ours.config.vision, {}
    rows = [rng.integers(0, 50, 11).tolist(), rng.integers(0, 50, 7).tolist()]
    if vision is not None:
        grids = grids_of(name, vision)
        images = [show(grid, IMAGE, vision) for grid in grids]
        rows = [[1, 2, *images[0], 3, 4, 5], [*images[1], 7, *images[2], 8, 9]]
        arrays = pixels_of(rng, grids, vision)
    ids, mask = padded(rows, side)
    arrays |= {"input_ids": ids, "attention_mask": mask}
    expected = their_logits(theirs, **arrays, **typed(name, ids))
    got = pixel_jax.forward(ours, **arrays)
    assert got.dtype == np.float32
    assert relative(got[mask == 1], expected[mask == 1]) < 1e-5


class Shown(NamedTuple):
    """A row that shows videos and images, for both sides: tokens, pixels and grids, items in order of appearance."""

    ids: list[int]
    images: list[tuple[int, int, int]]  # their grids
    videos: list[tuple[int, int, int]]
    items: list[tuple[int, int, int]]  # grids; where a video is split, of each pair of its frames
    seconds: list[float]  # of each item, between pairs of frames


def mixed(name, vision, *shown):
    """A row of (kind, grid, seconds): videos and images in any order, with text between them."""
    row = Shown([1], [], [], [], [])
    for number, (kind, grid, seconds) in enumerate(shown):
        pad, known = (IMAGE, row.images) if kind == "image" else (VIDEO, row.videos)
        known.append(grid)
        slices = [(1, *grid[1:])] * grid[0] if name.startswith("qwen3") else [grid]
        for piece in slices:  # behind its time in the text
            row.ids.extend([10 + number, *show(piece, pad, vision)])
            row.items.append(piece)
            row.seconds.append(seconds if name == "qwen2_5_vl" and kind == "video" else 0.0)
    row.ids.extend([3, 4])
    return row


MIXED = (
    (("video", (3, 4, 6), 1.5), ("image", (1, 6, 2), 0.0), ("video", (2, 2, 4), 0.5)),
    (("image", (1, 2, 4), 0.0), ("video", (1, 4, 4), 1.0)),
)


def arrays_of(rows, side, rng, vision):
    """The arrays of rows that are padded on one side, without what is a family's own."""
    ids, mask = padded([row.ids for row in rows], side)
    arrays = {"input_ids": ids, "attention_mask": mask}
    for key, grids in (
        ("pixel_values", [grid for row in rows for grid in row.images]),
        ("pixel_values_videos", [grid for row in rows for grid in row.videos]),
    ):
        count = sum(map(math.prod, grids))
        arrays[key] = rng.standard_normal((count, vision.patch_dim), dtype=np.float32)
        arrays["video_grid_thw" if "videos" in key else "image_grid_thw"] = np.array(grids)
    return arrays


def our_positions(model, rows, arrays):
    """Positions [3, rows, length], and where each row goes on."""
    most = max(len(row.items) for row in rows)
    filled = lambda values, nothing: [[*x, *[nothing] * (most - len(x))] for x in values]
    items = np.array(filled([[model.config.vision.token_grid(x) for x in row.items] for row in rows], (0, 0, 0)))
    seconds = np.array(filled([row.seconds for row in rows], 0.0), np.float32)
    ids, valid = jnp.array(arrays["input_ids"]), jnp.array(arrays["attention_mask"]) == 1
    return model.positions(ids, valid, items, seconds, jnp.zeros(len(rows), jnp.int32))


@pytest.mark.torch
@pytest.mark.parametrize("name", parameters(QWEN))
def test_videos_and_images(name, rng):
    """Several videos in a row, mixed with images; another row, padded. transformers since 5.3 starts the text after a video of
    Qwen2-VL elsewhere: it gets our positions, which are those of 4.49 (`test_positions.py`)."""
    import torch

    ours, theirs = pair(name)
    vision, rows = ours.config.vision, [mixed(name, ours.config.vision, *shown) for shown in MIXED]
    for side in ("left", "right"):
        arrays = arrays_of(rows, side, rng, vision)
        mask = arrays["attention_mask"] == 1
        typing = typed(name, arrays["input_ids"])
        positions, _ = our_positions(ours, rows, arrays)
        given = {"position_ids": np.asarray(positions, np.int64)}
        if ours.config.splits_videos:
            known = {key: arrays[key] for key in ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw")}
            known = {key: torch.tensor(np.asarray(x)) for key, x in (known | typing).items()}
            expected = theirs.model.get_rope_index(**known)[0].numpy()
            np.testing.assert_array_equal(np.asarray(positions)[:, mask], expected[:, mask])
            given = {}
        timed = {"second_per_grid_ts": [1.5, 0.5, 1.0]} if name == "qwen2_5_vl" else {}
        expected = their_logits(theirs, **arrays, **typing, **given)
        got = pixel_jax.forward(ours, **arrays, **timed)
        assert relative(got[mask], expected[mask]) < 1e-5
        assert relative(pixel_jax.forward(ours, **arrays, position_ids=np.asarray(positions))[mask], got[mask]) < 1e-5


@pytest.mark.torch
@pytest.mark.parametrize("name", parameters(VISUAL))
def test_tower(name, rng):
    """Features of images of unlike sizes, in one compilation, and those for the first decoder layers."""
    import torch

    ours, theirs = pair(name)
    vision = ours.config.vision
    encode = jax.jit(lambda *arguments: LanguageModel.encode(*arguments))
    grids = {(1, 4, 6), (1, 2, 10), (1, 8, 8), (1, 2, 2)} if vision.fixed_grid is None else set(grids_of(name, vision))
    for grid in sorted(grids):
        arrays = pixels_of(rng, [grid], vision)
        pixels = torch.tensor(arrays["pixel_values"])
        with torch.no_grad():
            if vision.fixed_grid is None:
                out = theirs.model.visual(pixels, torch.tensor([grid]))
                expected = torch.cat([out.pooler_output, *(getattr(out, "deepstack_features", None) or [])], dim=-1)
            else:
                features = theirs.model.get_image_features(
                    pixels,
                    vision_feature_layer=theirs.config.vision_feature_layer,
                    vision_feature_select_strategy=theirs.config.vision_feature_select_strategy,
                )
                expected = features.pooler_output[0]
        from pixel_jax.models.io import patched

        rows, _ = patched(arrays["pixel_values"], np.array([grid]), ours.config)
        wide = np.full((1, 68, vision.patch_dim), 3.0, np.float32)
        wide[0, : len(rows)] = rows
        got = encode(ours, wide, np.array([grid[1:]], np.int32))[0, : len(expected)]
        assert got.shape[-1] == vision.feature_size
        assert relative(got, expected) < 1e-5
    assert encode._cache_size() == 1


@pytest.mark.torch
@pytest.mark.parametrize("name", parameters(VALUES))
def test_a_saved_model_is_what_transformers_reads(name, tmp_path, rng):
    """Names of weights and `config.json`, as released: nothing missing, nothing over, the same logits; and we read it again."""
    import torch

    ours, theirs = pair(name)
    pixel_jax.save_pretrained(ours, None, tmp_path)
    again, _ = pixel_jax.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(ours), strict=True))
    back, info = type(theirs).from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.tensor(rng.integers(0, 50, (1, 9)))
    with torch.no_grad():
        assert torch.equal(back(input_ids=ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_vl", "qwen3_5", "llava"])
def test_gradients_of_every_weight(name, rng):
    import torch

    ours, theirs = pair(name)
    vision, config = ours.config.vision, ours.config
    ids, arrays = np.array([[1, 2, 7, 9, 3]]), {}
    if vision is not None:
        grid = grids_of(name, vision)[0]
        ids, arrays = np.array([[1, *show(grid, IMAGE, vision), 2, 3]]), pixels_of(rng, [grid], vision)
    theirs.zero_grad()
    given = {key: torch.tensor(value) for key, value in {"input_ids": ids, **arrays, **typed(name, ids)}.items()}
    (theirs(**given).logits[:, -3:] ** 2).sum().backward()
    expected = {config.names.ours(key): p.grad for key, p in theirs.named_parameters()}
    theirs.zero_grad()

    @jax.jit
    @jax.grad
    def gradient(model):
        from pixel_jax.models.io import patched

        features, grids = None, np.zeros((1, 0, 3), np.int32)
        if vision is not None:
            rows, _ = patched(arrays["pixel_values"], None, config)
            features = model.encode(rows[None], jnp.array([grid[1:]]))[None]
            grids = np.array([[vision.token_grid(grid)]])
        valid = jnp.ones(ids.shape, bool)
        positions, _ = model.positions(jnp.array(ids), valid, grids, np.zeros(grids.shape[:2]), jnp.zeros(1, jnp.int32))
        hidden = model.backbone(model.embed(jnp.array(ids), features, grids), positions, valid, remat=True)
        return jnp.sum(model.logits(hidden)[:, -3:] ** 2)

    for _, key, weight in named_weights(gradient(ours)):
        for place, layer in enumerate(layer_numbers(ours, key, weight)):
            theirs_grad = expected.pop(key.format(layer))
            ours_grad = np.asarray(weight[place] if "{}" in key else weight[...])
            if theirs_grad is None:  # CLIP's last layers, which LLaVA does not read
                assert not ours_grad.any(), key.format(layer)
            else:
                # A bias of keys that are not rotated shifts all scores alike: its gradient is rounding.
                floor = 1.0 if name == "llava" and key.endswith("k_proj.bias") else 1e-3
                scale = max(float(theirs_grad.abs().max()), floor)
                assert np.abs(ours_grad - theirs_grad.numpy()).max() / scale < 1e-4, key.format(layer)
    assert not expected


@pytest.mark.torch
@pytest.mark.parametrize("name", ["llama3", "qwen3", "qwen3_vl", "qwen3_5", "qwen3_5_text", "llava"])
def test_cached_steps_equal_the_full_forward(name, rng):
    """A prompt with an image where the family sees, read in two steps, then single tokens; also behind a shared prefix."""
    from pixel_jax.models.decoder import Prefix
    from pixel_jax.models.io import patched

    ours, _ = pair(name)
    vision, ids, features, grids = ours.config.vision, rng.integers(0, 50, (1, 9)), None, np.zeros((1, 0, 3), np.int32)
    if vision is not None:
        grid = grids_of(name, vision)[0]
        ids = np.array([[1, *show(grid, IMAGE, vision), 2, 3, 4, 5]])
        rows, _ = patched(pixels_of(rng, [grid], vision)["pixel_values"], None, ours.config)
        features, grids = ours.encode(rows[None], jnp.array([grid[1:]]))[None], np.array([[vision.token_grid(grid)]])
    length = ids.shape[1]
    valid = jnp.ones(ids.shape, bool)
    positions, end = ours.positions(jnp.array(ids), valid, grids, np.zeros(grids.shape[:2]), jnp.zeros(1, jnp.int32))
    x = ours.embed(jnp.array(ids), features, grids)
    full = jax.jit(LanguageModel.backbone)(ours, x, positions, valid)
    layers, step = ours.unstack(), jax.jit(LanguageModel.step)
    cache, hidden = ours.empty_cache(1, length), []
    for part in (slice(0, 4), slice(4, length - 2), slice(length - 2, length - 1), slice(length - 1, length)):
        out, cache = step(ours, layers, x[:, part], positions[:, :, part], valid[:, part], cache)
        hidden.append(out)
    assert relative(jnp.concatenate(hidden, axis=1), full) < 1e-5
    cut = length - 3
    before, prefix = jax.jit(LanguageModel.prefill)(ours, x[:, :cut], positions[:, :, :cut], valid[:, :cut])
    shared = Prefix.of(prefix, 2)
    own = shared.continued(ours.empty_cache(2, 3))
    twice = lambda y, axis: jnp.repeat(y, 2, axis=axis)
    after, _ = step(
        ours,
        layers,
        twice(x[:, cut:], 0),
        twice(positions[:, :, cut:], 1),
        twice(valid[:, cut:], 0),
        own,
        shared,
    )
    assert relative(before, full[:, :cut]) < 1e-5
    assert relative(after, twice(full[:, cut:], 0)) < 1e-5


def test_an_unknown_family_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt_bigcode"}')
    with pytest.raises(
        pixel_jax.files.FileError, match="model_type is 'gpt_bigcode'; the known families are .*qwen3_vl"
    ):
        pixel_jax.from_pretrained(tmp_path)
    assert set(FAMILIES) == {
        *("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_5", "llava"),
        *("qwen2", "qwen3", "qwen3_5_text", "llama"),
    }


def test_text_only_models_have_no_tower():
    from pixel_jax.models import config_from_hf

    for name in TEXT_ONLY:
        model = jax.eval_shape(
            lambda key, name=name: LanguageModel(config_from_hf(VALUES[name]), key), jax.random.key(0)
        )
        assert model.visual is None
