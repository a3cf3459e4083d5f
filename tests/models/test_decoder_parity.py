"""Decoder and whole model against transformers in float32; cached decoding against the full forward."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_qwen import END, IMAGE, START, VIDEO, relative, tiny_config, torch_model

import pixel_jax
from pixel_jax.models import LanguageModel, Visual, forward_hidden, mrope_positions
from pixel_jax.models.decoder import Prefix

backbone = jax.jit(LanguageModel.backbone)


def show(grid, pad):
    return [START] + [pad] * (int(np.prod(grid)) // 4) + [END]


def their_logits(theirs, **arrays):
    import torch

    arrays = {name: torch.tensor(np.asarray(value)) for name, value in arrays.items()}
    with torch.no_grad():
        return theirs(**arrays, use_cache=False).logits.numpy()


@pytest.mark.torch
def test_text_only(pair, rng):
    ours, theirs = pair
    ids = rng.integers(0, 50, (2, 11))
    mask = np.ones((2, 11), np.int64)
    mask[0, 7:] = 0
    expected = their_logits(theirs, input_ids=ids, attention_mask=mask)
    got = pixel_jax.forward(ours, input_ids=ids, attention_mask=mask)
    assert got.dtype == np.float32 and got.shape == (2, 11, 64)
    assert relative(got[mask == 1], expected[mask == 1]) < 1e-5


@pytest.mark.torch
@pytest.mark.parametrize("side", ["left", "right"])
def test_images_in_several_rows(pair, rng, side):
    """One image in a row, two in the next, padding on either side; position ids computed here and there (images: equal)."""
    ours, theirs = pair
    grids = [(1, 4, 6), (1, 2, 10), (1, 10, 8)]
    rows = [
        [1, 2, *show(grids[0], IMAGE), 3, 4, 5],
        [*show(grids[1], IMAGE), 7, *show(grids[2], IMAGE), 8, 9],
    ]
    length = max(map(len, rows))
    ids, mask = np.full((2, length), 0), np.zeros((2, length), np.int64)
    for r, row in enumerate(rows):
        place = slice(length - len(row), None) if side == "left" else slice(len(row))
        ids[r, place], mask[r, place] = row, 1
    pixels = rng.standard_normal((sum(map(np.prod, grids)), 1176), dtype=np.float32)
    arrays = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_grid_thw": np.array(grids)}
    kinds = (ids == IMAGE).astype(np.int64)
    expected = their_logits(theirs, **arrays, mm_token_type_ids=kinds)
    got = pixel_jax.forward(ours, **arrays)
    assert relative(got[mask == 1], expected[mask == 1]) < 1e-5
    assert relative(got[mask == 1], their_logits(theirs, **arrays)[mask == 1]) > 1e-3  # without M-RoPE


@pytest.mark.torch
def test_video_and_image(pair, rng):
    """A video before an image; transformers gets our position ids, its own differ after a video since 5.3."""
    ours, theirs = pair
    video, image = (3, 4, 6), (1, 6, 2)
    ids = np.array([[1, *show(video, VIDEO), 2, *show(image, IMAGE), 3, 4, 5]])
    valid = np.ones(ids.shape, bool)
    visual = (ids == IMAGE) | (ids == VIDEO)
    positions, _ = mrope_positions(
        visual, valid, jnp.array([[video, image]]), jnp.array([[1.5, 0.0]]), jnp.zeros(1, jnp.int32), ours.config
    )
    arrays = {
        "input_ids": ids,
        "attention_mask": valid.astype(np.int64),
        "pixel_values": rng.standard_normal((12, 1176), dtype=np.float32),
        "image_grid_thw": np.array([image]),
        "pixel_values_videos": rng.standard_normal((72, 1176), dtype=np.float32),
        "video_grid_thw": np.array([video]),
    }
    expected = their_logits(theirs, **arrays, position_ids=np.asarray(positions, np.int64))
    got = pixel_jax.forward(ours, **arrays, second_per_grid_ts=[1.5])
    assert relative(got, expected) < 1e-5
    given = pixel_jax.forward(ours, **arrays, position_ids=np.asarray(positions))
    assert (given == got).all()


@pytest.mark.torch
def test_tied_embeddings(tmp_path, rng):
    """The head is the embedding: one leaf, whose gradient is the sum of both uses, as in torch."""
    import torch

    theirs = torch_model(tiny_config(tied=True))
    theirs.save_pretrained(tmp_path)
    ours, _ = pixel_jax.from_pretrained(tmp_path)
    assert ours.lm_head is None
    leaves = jax.tree.leaves(ours)
    assert sum(leaf.shape == (64, 32) for leaf in leaves) == 1
    ids = rng.integers(0, 50, (1, 9))
    logits = theirs(input_ids=torch.tensor(ids)).logits
    (logits**2).mean().backward()
    assert relative(pixel_jax.forward(ours, input_ids=ids), logits.detach()) < 1e-5

    def loss(model):
        hidden = forward_hidden(model, jnp.array(ids), jnp.ones(ids.shape, bool), None)
        return jnp.mean(model.logits(hidden) ** 2)

    gradient = jax.jit(jax.grad(loss))(ours).language_model.embed_tokens.weight[...]
    assert relative(gradient, theirs.model.language_model.embed_tokens.weight.grad) < 1e-5


@pytest.mark.torch
def test_gradients_of_every_weight(pair, rng):
    """Through the vision tower too."""
    import torch

    from pixel_jax.models.checkpoint import named_weights

    ours, theirs = pair
    grid = (1, 8, 10)
    ids = np.array([[1, *show(grid, IMAGE), 2, 3]])
    pixels = rng.standard_normal((80, 1176), dtype=np.float32)
    positions, _ = mrope_positions(
        ids == IMAGE, np.ones(ids.shape, bool), np.array([[grid]]), np.zeros((1, 1)), np.zeros(1, np.int32), ours.config
    )
    theirs.zero_grad()
    logits = theirs(
        input_ids=torch.tensor(ids),
        pixel_values=torch.tensor(pixels),
        image_grid_thw=torch.tensor([grid]),
        position_ids=torch.tensor(np.asarray(positions, np.int64)),
    ).logits
    (logits[:, -3:] ** 2).sum().backward()
    expected = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): p.grad.numpy()
        for name, p in theirs.named_parameters()
    }
    theirs.zero_grad()

    @jax.jit
    @jax.grad
    def gradient(model):
        features = model.encode(pixels[None], jnp.array([grid[1:]]))
        x = model.embed(ids, features[None], jnp.array([[grid]]))
        hidden = model.backbone(x, positions, jnp.ones(ids.shape, bool), remat=True)
        return jnp.sum(model.logits(hidden)[:, -3:] ** 2)

    for _, key, weight in named_weights(gradient(ours)):
        stacked = "{}" in key
        for layer in range(weight.shape[0]) if stacked else [None]:
            theirs_grad = expected.pop(key.format(layer))
            ours_grad = weight[...] if layer is None else weight[layer]
            assert relative(ours_grad, theirs_grad) < 1e-4, key.format(layer)
    assert not expected


def random_rows(model, rng, batch, length):
    """Embeddings, M-RoPE-like positions and full validity."""
    x = jnp.array(rng.standard_normal((batch, length, 32), dtype=np.float32))
    positions = jnp.array(np.sort(rng.integers(0, 40, (3, batch, length)), axis=-1))
    return x, positions, jnp.ones((batch, length), bool)


def test_cached_decoding_equals_full_forward(model, rng):
    """Chunks of unlike length a row, then single tokens."""
    x, positions, valid = random_rows(model, rng, 3, 12)
    full = backbone(model, x, positions, valid)
    layers, step = model.unstack(), jax.jit(LanguageModel.step)
    cache = model.empty_cache(3, 16)
    given = np.array([5, 2, 4])
    at = jnp.arange(5)[None] < given[:, None]
    hidden, cache = step(model, layers, x[:, :5], positions[:, :, :5], at, cache)
    for r, n in enumerate(given):
        np.testing.assert_allclose(hidden[r, :n], full[r, :n], atol=1e-5)
    assert cache.length.tolist() == given.tolist()
    for _ in range(7):
        here = cache.length[:, None]
        token = jnp.take_along_axis(x, here[..., None], axis=1)
        where = jnp.take_along_axis(positions, jnp.broadcast_to(here, (3, 3, 1)), axis=2)
        hidden, cache = step(model, layers, token, where, jnp.ones((3, 1), bool), cache)
        expected = jnp.take_along_axis(full, here[..., None], axis=1)
        assert relative(hidden, expected) < 1e-5
    assert cache.length.tolist() == (given + 7).tolist()


def test_rows_that_do_not_move_keep_their_cache(model, rng):
    x, positions, valid = random_rows(model, rng, 2, 4)
    layers, step = model.unstack(), jax.jit(LanguageModel.step)
    _, cache = step(model, layers, x, positions, valid, model.empty_cache(2, 6))
    still = jnp.array([[True], [False]])
    _, after = step(model, layers, x[:, :1], positions[:, :, :1], still, cache)
    assert after.length.tolist() == [5, 4]
    for before, now in zip(cache.k + cache.v, after.k + after.v, strict=True):
        assert (before[1] == now[1]).all() and (before[0] != now[0]).any()


@pytest.mark.parametrize("tile", [512, 2])
def test_shared_prefix_equals_full_forward(model, rng, monkeypatch, tile):
    """Two prompts of unlike length, three rows each, continued together; the rows' caches read at once or in tiles."""
    monkeypatch.setattr(importlib.import_module("pixel_jax.models.attention"), "CACHE_TILE", tile)
    x, positions, _ = random_rows(model, rng, 6, 10)
    lengths = np.array([6, 4])
    prompt = x[::3, :6]  # rows 0 and 3 lend their prompts to their neighbours
    where = positions[:, ::3, :6]
    valid = jnp.arange(6)[None] < lengths[:, None]
    layers, step = model.unstack(), jax.jit(lambda *arguments: LanguageModel.step(*arguments))
    _, prefix = jax.jit(LanguageModel.prefill)(model, prompt, where, valid)
    assert prefix.length.tolist() == [6, 4]
    prefix = Prefix.of(prefix, 6)
    cache = model.empty_cache(6, 4)
    got = []
    for t in (slice(6, 8), slice(8, 9), slice(9, 10)):
        new = jnp.ones((6, t.stop - t.start), bool)
        hidden, cache = step(model, layers, x[:, t], positions[:, :, t], new, cache, prefix)
        got.append(hidden)
    got = jnp.concatenate(got, axis=1)
    for r in range(6):
        n = lengths[r // 3]
        row = jnp.concatenate([prompt[r // 3, :n], x[r, 6:]])[None]
        pos = jnp.concatenate([where[:, r // 3, :n], positions[:, r, 6:]], axis=1)[:, None]
        full = backbone(model, row, pos, jnp.ones((1, n + 4), bool))
        assert relative(got[r], full[0, n:]) < 1e-5
    with pytest.raises(ValueError, match="5 rows cannot share the prefixes of 2 groups"):
        few = prefix._replace(entry=jnp.zeros(5, jnp.int32))
        model.step(layers, x[:5, :1], positions[:, :5, :1], jnp.ones((5, 1), bool), model.empty_cache(5, 4), few)


def test_gaps_and_segments(model, rng):
    """Invalid tokens between valid ones change nothing; packed segments give what separate rows give."""
    x, positions, valid = random_rows(model, rng, 1, 9)
    full = backbone(model, x, positions, valid)
    keep = np.array([0, 2, 3, 6, 8, 9, 10, 11, 13])
    spread = jnp.full((1, 14, 32), 7.0).at[:, keep].set(x)
    holes = jnp.zeros((1, 14), bool).at[:, keep].set(True)
    places = jnp.zeros((3, 1, 14), positions.dtype).at[:, :, keep].set(positions)
    gappy = backbone(model, spread, places, holes)
    assert np.isfinite(gappy).all()
    assert relative(gappy[:, keep], full) < 1e-5
    segments = jnp.array([[0] * 4 + [1] * 5])
    packed = backbone(model, x, positions, valid, segments=segments)
    for part in (slice(0, 4), slice(4, 9)):
        alone = backbone(model, x[:, part], positions[:, :, part], valid[:, part])
        assert relative(packed[:, part], alone) < 1e-5


def test_embed_by_rank(model, rng):
    """The j-th visual token takes the j-th feature, also when earlier ones were embedded before."""
    grids = jnp.array([[[1, 2, 4], [2, 2, 2], [0, 0, 0]]])  # 2 tokens, then 2 slices of 1
    features = jnp.array(rng.standard_normal((1, 4, 3, 32), dtype=np.float32))
    tokens = jnp.array([[5, IMAGE, IMAGE, 6, VIDEO, VIDEO, IMAGE]])
    table = model.language_model.embed_tokens.weight[...]
    got = model.embed(tokens, features, grids)[0]
    expected = jnp.stack(
        [table[5], features[0, 0, 0], features[0, 0, 1], table[6], features[0, 1, 0], features[0, 2, 0], table[IMAGE]]
    )
    assert (got == expected).all()
    later = model.embed(tokens[:, 4:], features, grids, seen=jnp.array([2]))[0]
    assert (later == expected[4:]).all()
    assert (model.embed(tokens)[0] == table[tokens[0]]).all()


def test_forward_hidden_from_frames(model, rng):
    """uint8 frame patches in, the same hidden states as through `encode`, `embed` and `backbone` by hand."""
    from pixel_jax.ops import pixel_values

    patches = rng.integers(0, 256, (2, 3, 16, 588)).astype(np.uint8)
    visual = Visual(
        patches=jnp.array(patches),
        slices=jnp.array([[[0, 0], [1, 2]], [[2, 2], [-1, -1]]]),
        grids=jnp.array([[[1, 2, 4], [1, 4, 4]], [[1, 4, 2], [0, 0, 0]]]),
        seconds=jnp.array([[0.0, 1.0], [0.0, 0.0]]),
    )
    tokens = jnp.array([[1, IMAGE, IMAGE, 2, VIDEO, VIDEO, VIDEO, VIDEO, 3], [4, IMAGE, IMAGE, 5, 6, 7, IMAGE, 0, 0]])
    valid = jnp.array([[True] * 9, [True] * 6 + [False] * 3])
    hidden = jax.jit(forward_hidden)(model, tokens, valid, visual)
    assert np.isfinite(hidden).all()
    pairs = [[(0, 0), (1, 2)], [(2, 2), (2, 2)]]
    pixels = [pixel_values(patches[r, a], patches[r, b]) for r in range(2) for a, b in pairs[r]]
    features = jax.jit(LanguageModel.encode)(
        model, jnp.stack(pixels), jnp.array([[2, 4], [4, 4], [4, 2], [0, 0]])
    ).reshape(2, 2, 4, 32)
    x = model.embed(tokens, features, visual.grids)
    is_visual = model.is_visual(tokens)
    start = jnp.zeros(2, jnp.int32)
    positions, _ = mrope_positions(is_visual, valid, visual.grids, visual.seconds, start, model.config)
    expected = backbone(model, x, positions, valid)
    assert relative(hidden[0], expected[0]) < 1e-5
    assert relative(hidden[1, :6], expected[1, :6]) < 1e-5


def test_bfloat16_weights_keep_float32_where_it_matters(model):
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), model)
    tokens, valid = jnp.arange(20)[None], jnp.ones((1, 20), bool)
    hidden = jax.jit(forward_hidden)(half, tokens, valid, None)
    assert hidden.dtype == jnp.bfloat16
    logits = half.logits(hidden)
    assert logits.dtype == jnp.float32
    assert relative(logits, model.logits(jax.jit(forward_hidden)(model, tokens, valid, None))) < 0.1
    assert half.empty_cache(1, 4).k[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("field, value, message", [
    ("input_ids", [[1, 64]], r"input_ids must lie in \[0, 64\), got 1 to 64"),
    ("attention_mask", [[1]], r"attention_mask has shape \(1, 1\), input_ids"),
    ("image_grid_thw", [[1, 4, 4]], "must be given together"),
    ("position_ids", [[0, 1]], r"position_ids must be \(3, 1, 2\)"),
])  # fmt: skip
def test_forward_names_the_bad_input(model, field, value, message):
    with pytest.raises(ValueError, match=message):
        pixel_jax.forward(model, **{"input_ids": np.array([[1, 2]]), field: np.array(value)})


def test_forward_counts_placeholders(model):
    good = {"pixel_values": np.zeros((16, 1176)), "image_grid_thw": np.array([[1, 4, 4]])}
    pixel_jax.forward(model, input_ids=np.array([[1, *[IMAGE] * 4]]), **good)
    for ids, message in [
        ([[1, *[IMAGE] * 3, 2]], "image 0 with grid .* needs 4 tokens, has 3"),
        ([[1, *[IMAGE] * 5]], "row 0 shows more images than the 1 given"),
        ([[1, 2, 3]], "input_ids show 0 images, the grids describe 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            pixel_jax.forward(model, input_ids=np.array(ids), **good)
    with pytest.raises(ValueError, match=r"shape \(12, 1176\), their grids need \(16, 1176\)"):
        pixel_jax.forward(model, input_ids=np.array([[1]]), **{**good, "pixel_values": np.zeros((12, 1176))})
    with pytest.raises(ValueError, match=r"grid \[1, 3, 4\] must be positive, height and width multiples of 2"):
        pixel_jax.forward(
            model, input_ids=np.array([[1]]), pixel_values=np.zeros((12, 1176)), image_grid_thw=[[1, 3, 4]]
        )
