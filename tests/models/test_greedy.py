"""Greedy conversations, token for token as transformers' `generate`: two turns, and where the family sees, an image in each;
and about several videos and an image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import MIXED, QWEN, arrays_of, grids_of, mixed, our_positions, pixels_of, show, typed
from tiny_families import END, IMAGE, START, VALUES, VIDEO, pair, parameters

import pixel_jax
from pixel_jax.models import LanguageModel
from pixel_jax.models.io import patched

NEW = 8
BANNED = [IMAGE, VIDEO, START, END]  # placeholders that a model writes are no images


def theirs_writes(theirs, name, ids, images):
    import torch

    theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id = None, 0
    ids = np.array([ids])
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), **images}
    arrays |= typed(name, ids) if images else {}
    arrays = {key: torch.tensor(np.asarray(value)) for key, value in arrays.items()}
    with torch.no_grad():
        out = theirs.generate(**arrays, do_sample=False, max_new_tokens=NEW, suppress_tokens=BANNED)
    return out[0, ids.shape[1] :].tolist()


class Conversation:
    """Ours: one cache for all turns; a turn's images are encoded when they come."""

    def __init__(self, model):
        self.model, self.layers, self.cache = model, model.unstack(), model.empty_cache(1, 128)
        self.next, self.run = jnp.zeros(1, jnp.int32), jax.jit(LanguageModel.step)

    def read(self, ids, grid=None, pixels=None):
        """Tokens, with an image of `grid` among them."""
        model, vision, ids = self.model, self.model.config.vision, jnp.array([ids])
        features, grids = None, np.zeros((1, 0, 3), np.int32)
        if vision is not None and grid is not None:
            rows, _ = patched(pixels, None, model.config)
            features = jax.jit(LanguageModel.encode)(model, rows[None], jnp.array([grid[1:]]))[None]
            grids = np.array([[vision.token_grid(grid)]])
        valid = jnp.ones(ids.shape, bool)
        positions, self.next = model.positions(ids, valid, grids, np.zeros(grids.shape[:2]), self.next)
        x = model.embed(ids, features, grids)
        hidden, self.cache = self.run(model, self.layers, x, positions, valid, self.cache)
        logits = model.logits(hidden[:, -1]).at[:, jnp.array(BANNED)].set(-jnp.inf)
        return int(jnp.argmax(logits))

    def write(self, token):
        written = [token]
        for _ in range(NEW - 1):
            written.append(self.read(written[-1:]))
        return written


@pytest.mark.torch
@pytest.mark.parametrize("name", parameters(name for name in VALUES if name != "qwen3_vl_tied"))
def test_two_turns(name, rng):
    ours, theirs = pair(name)
    vision = ours.config.vision
    if vision is None:
        grids, shown = [None, None], [[], []]
        images = [{}, {}]
    else:
        grids = grids_of(name, vision)[:2]
        shown = [show(grid, IMAGE, vision) for grid in grids]
        both = pixels_of(rng, grids, vision)
        cut = 1 if vision.fixed_grid else grids[0][1] * grids[0][2]
        images = [{key: value[: cut if key == "pixel_values" else 1] for key, value in both.items()}, both]
    pixels = [x.get("pixel_values") for x in images]
    if vision is not None:
        pixels[1] = pixels[1][cut:]
    talk = Conversation(ours)
    ids, written = [], []
    for turn, text in enumerate(([5, 9, 11], [17, 4])):
        # The last token that was written has not been read.
        new = written[-1:] + [7, *shown[turn], *text]
        ids += [7, *shown[turn], *text]
        expected = theirs_writes(theirs, name, ids, images[turn])
        written = talk.write(talk.read(new, grids[turn], pixels[turn]))
        assert written == expected, turn
        ids += written


@pytest.mark.torch
@pytest.mark.parametrize("name", parameters(QWEN))
def test_videos_and_an_image(name, rng, monkeypatch):
    """What is written about two videos with an image between them. Where a video is not split, transformers gets our positions,
    as in `test_families.py`; those of what it writes are its own."""
    import torch

    ours, theirs = pair(name)
    row = mixed(name, ours.config.vision, *MIXED[0])
    arrays = arrays_of([row], "left", rng, ours.config.vision)
    positions, end = our_positions(ours, [row], arrays)
    if not ours.config.splits_videos:
        moved = torch.tensor([[int(end[0]) - len(row.ids)]])
        given = torch.tensor(np.asarray(positions, np.int64))
        monkeypatch.setattr(theirs.model, "get_rope_index", lambda *_, **__: (given, moved))
    expected = theirs_writes(theirs, name, row.ids, arrays)
    timed = {"second_per_grid_ts": [1.5, 0.5]} if name == "qwen2_5_vl" else {}
    written = []
    for _ in range(NEW):
        arrays["input_ids"] = np.array([row.ids + written])
        arrays["attention_mask"] = np.ones_like(arrays["input_ids"])
        logits = pixel_jax.forward(ours, **arrays, **timed)[0, -1].copy()
        logits[BANNED] = -np.inf
        written.append(int(logits.argmax()))
    assert written == expected
