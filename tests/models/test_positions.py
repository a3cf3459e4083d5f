"""M-RoPE position ids against golden values of transformers 4.49 (make_golden_positions.py)."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_qwen import IMAGE, VIDEO, relative

from pixel_jax.models import mrope_positions
from pixel_jax.models.rope import rotary_angles

CASES = json.loads(pathlib.Path(__file__).with_name("golden_positions.json").read_text())
LENGTH, ITEMS = max(len(case["tokens"]) for case in CASES), max(len(case["grids"]) for case in CASES)
compute = jax.jit(mrope_positions, static_argnums=5)


def batch(cases):
    """Cases of any length as padded rows."""
    tokens = np.zeros((len(cases), LENGTH), np.int32)
    valid = np.zeros((len(cases), LENGTH), bool)
    grids = np.zeros((len(cases), ITEMS, 3), np.int32)
    seconds = np.zeros((len(cases), ITEMS), np.float32)
    for r, case in enumerate(cases):
        tokens[r, : len(case["tokens"])] = case["tokens"]
        valid[r, : len(case["tokens"])] = True
        grids[r, : len(case["grids"])] = case["grids"]
        seconds[r, : len(case["seconds"])] = case["seconds"]
    return (tokens == IMAGE) | (tokens == VIDEO), valid, grids, seconds


def with_rate(config, rate):
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, tokens_per_second=rate))


@pytest.mark.parametrize("rate", sorted({case["tokens_per_second"] for case in CASES}))
def test_golden(config, rate):
    """Images and videos, several a row, fractional seconds; positions and the position after the last token."""
    cases = [case for case in CASES if case["tokens_per_second"] == rate]
    visual, valid, grids, seconds = batch(cases)
    start = jnp.zeros(len(cases), jnp.int32)
    positions, end = compute(visual, valid, grids, seconds, start, with_rate(config, rate))
    for r, case in enumerate(cases):
        assert np.asarray(positions)[:, r, : len(case["tokens"])].tolist() == case["positions"]
        assert int(end[r]) == case["next"]


def test_golden_cases_cover_what_they_should():
    videos = [s for case in CASES for s in case["seconds"] if s > 0]
    assert {0.5, 0.3, 1.0} <= set(videos)
    assert any(len(case["grids"]) > 2 for case in CASES)
    assert any(
        g[0] > 1 and (g[0] - 1) * s * c["tokens_per_second"] > max(g[1:]) // 2
        for c in CASES
        for g, s in zip(c["grids"], c["seconds"], strict=True)
    )  # time decides the span


def test_a_turn_appended_later_continues(config):
    """Cutting a row between items and carrying the next position gives the same ids; so do gaps of invalid tokens."""
    case = next(c for c in CASES if len(c["grids"]) >= 3)
    config = with_rate(config, case["tokens_per_second"])
    visual, valid, grids, seconds = batch([case])
    first = np.prod(case["grids"][0]) // 4
    cut = int(np.flatnonzero(visual[0])[first - 1]) + 1
    start = jnp.array([5])
    whole, end = compute(visual, valid, grids, seconds, start, config)
    head, middle = compute(visual[:, :cut], valid[:, :cut], grids[:, :1], seconds[:, :1], start, config)
    tail, last = compute(visual[:, cut:], valid[:, cut:], grids[:, 1:], seconds[:, 1:], middle, config)
    joined = np.concatenate([head, tail], axis=2)
    assert (joined == np.asarray(whole))[:, valid].all() and int(last[0]) == int(end[0])
    spread = lambda x: np.insert(x, [1, cut, cut], True, axis=1)
    holes = np.insert(valid, [1, cut, cut], False, axis=1)
    gappy, gappy_end = compute(spread(visual), holes, grids, seconds, start, config)
    assert (np.asarray(gappy)[:, holes] == np.asarray(whole)[:, valid]).all() and int(gappy_end[0]) == int(end[0])


def test_visual_tokens_without_an_item_count_as_text(config):
    """A policy may write a placeholder token; without pixels it is a token like any other."""
    visual, valid = jnp.array([[False, True, True, False]]), jnp.ones((1, 4), bool)
    for grids in (np.zeros((1, 0, 3), np.int32), np.zeros((1, 2, 3), np.int32)):
        seconds = np.zeros(grids.shape[:2], np.float32)
        positions, end = compute(visual, valid, grids, seconds, jnp.array([3]), config)
        assert np.asarray(positions).tolist() == [[[3, 4, 5, 6]]] * 3 and int(end[0]) == 7


@pytest.mark.torch
def test_angles(pair, rng):
    """Cosines and sines at positions far beyond what bfloat16 could tell apart."""
    import torch

    ours, theirs = pair
    text = ours.config.text
    positions = rng.integers(0, 30000, (3, 2, 9))
    with torch.no_grad():
        expected = theirs.model.language_model.rotary_emb(torch.zeros(1), torch.tensor(positions))
    got = rotary_angles(jnp.array(positions), text)
    for a, b in zip(got, expected, strict=True):
        half = b[..., : text.head_dim // 2]
        if half.ndim == 4:  # transformers 5.10 gives the angles of all three axes, and chooses where they are applied
            parts = half.split(text.mrope_section, dim=-1)
            half = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
        assert a.dtype == jnp.float32
        assert relative(a, half) < 1e-5
