"""Videos of Qwen3-VL, whose temporal patches each stand behind their time: prompts, conversations, traces, transcripts."""

import dataclasses
import re
import types

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixel_jax import save_pretrained
from pixel_jax.data.traces import Trace, right, to_trajectories
from pixel_jax.dialog import template
from pixel_jax.evaluation.transcript import make_transcript
from pixel_jax.models.processor import Processor
from pixel_jax.models.qwen3_vl import Qwen3VLConfig
from pixel_jax.ops import timestamps
from pixel_jax.rollouts.prompts import Query, build_prompts, prompt_tokens
from pixel_jax.rollouts.rollout import rollout
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.rollouts.trajectory import to_host
from tests.rollouts import scripted_model
from tests.rollouts.test_rollout_of_families import PIXELS, qwen3_vl, visible

START, SELECT = scripted_model.START, scripted_model.SELECT
CHAIN = scripted_model.CHAIN | {START: {SELECT: 0.45, "\\boxed{7}": 0.3, "\\boxed{3}": 0.25}}
FRAMES = [scripted_model.image(i, 96, 128) for i in range(5)]
QUERY = Query("Which frame?", FRAMES, True, 0.6)


@pytest.fixture(scope="module")
def model():
    return visible(scripted_model.network(scripted_model.vocabulary(), CHAIN, make_config=qwen3_vl))


@pytest.fixture(scope="module")
def config(model):
    greedy = dataclasses.replace(scripted_model.CONFIG, temperature=0.0, group_size=1, **PIXELS)
    return greedy.for_model(model.config)


@pytest.mark.torch
@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.sampled_from([0.5, 1.0, 2.0, 10 / 3, 4.0, 7.0, 10.0, 24.0, 29.97, 30.0]))
def test_a_written_video_is_that_of_transformers(frames, fps):
    """With a token for each pair of frames. The chat template's marks stay around all of them."""
    from transformers import Qwen3VLProcessor
    from transformers.video_utils import VideoMetadata

    names = {f"{name}_token": template.SPECIAL_TOKENS[name] for name in ("vision_start", "vision_end")}
    known = types.SimpleNamespace(
        video_processor=types.SimpleNamespace(merge_size=2, temporal_patch_size=2), video_token="<|video_pad|>", **names
    )
    known._calculate_timestamps = lambda *x: Qwen3VLProcessor._calculate_timestamps(known, *x)
    metadata = VideoMetadata(frames, fps, frames_indices=list(range(frames)))
    made = {"video_grid_thw": np.array([[-(-frames // 2), 2, 2]]), "video_metadata": [metadata]}
    asked = template.render([{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "?"}]}])
    theirs = template.flatten(asked).replace("<|video_pad|>", Qwen3VLProcessor.replace_video_token(known, made, 0))
    assert template.flatten(template.in_patches(asked, timestamps(frames, fps))) == theirs


def processor(model, limits):
    low, high = limits
    words = scripted_model.vocabulary()
    known = {"family": Qwen3VLConfig, "vision": model.config.vision}
    return Processor(words.tokenizer, **known, min_pixels=low, max_pixels=high)


@pytest.mark.slow
@pytest.mark.torch
def test_greedy_conversations_are_those_of_transformers(model, config, tmp_path):
    """Each turn of a rollout is what `generate` writes behind what the row has read, from pixels that the processor made."""
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    words = scripted_model.vocabulary()
    others = [[scripted_model.image(10 * i + j, 96, 128) for j in range(2 + i)] for i in range(1, 4)]
    queries = [QUERY, *(Query("Which frame?", frames, True, 0.5) for frames in others)]
    prompts = build_prompts(queries, words, scripted_model.token_tables(), config)
    t = to_host(rollout(model, prompts, jax.random.key(7), config))
    save_pretrained(model, None, tmp_path)
    network = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    overview = processor(model, (config.video_min_pixels, config.video_max_pixels))
    still = processor(model, (config.select_min_pixels, config.select_max_pixels))
    selected = 0
    for row, query in enumerate(queries):
        ids, mine = t.tokens[row][t.valid[row]], t.loss_mask[row][t.valid[row]]
        told = [{"role": "system", "content": template.system_prompt()}]
        told.append(
            {
                "role": "user",
                "content": [{"type": "video"}, {"type": "text", "text": template.user_text(query.question)}],
            }
        )
        text = words.tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
        seen = overview(text, videos=[query.images], fps=2 / query.seconds)
        begin = int(np.flatnonzero(mine)[0])
        assert ids[:begin].tolist() == seen["input_ids"][0].tolist()
        pictures: list[np.ndarray] = []
        edges = [*np.flatnonzero(np.diff(mine)) + 1, len(ids)]
        for start, end in zip(edges[::2], edges[1::2], strict=False):
            arrays = {"input_ids": ids[None, :start].astype(np.int64), "attention_mask": np.ones((1, start), np.int64)}
            arrays |= {name: seen[name] for name in ("pixel_values_videos", "video_grid_thw")}
            arrays["mm_token_type_ids"] = (ids[:start] == words.image_pad) + 2 * (ids[:start] == words.video_pad)[None]
            if pictures:
                shown = still("<|image_pad|>" * len(pictures), images=pictures)
                arrays |= {name: shown[name] for name in ("pixel_values", "image_grid_thw")}
            given = {name: torch.tensor(np.asarray(x)) for name, x in arrays.items()}
            with torch.no_grad():
                out = network.generate(
                    **given,
                    do_sample=False,
                    max_new_tokens=config.max_new_tokens,
                    min_new_tokens=1,
                    eos_token_id=[words.im_end, words.end_of_text],
                    pad_token_id=words.end_of_text,
                    suppress_tokens=[words.image_pad, words.video_pad],
                )
            assert out[0, start:].tolist() == ids[start:end].tolist()
            found = re.search(r'"target_frames": \[([\d, ]+)\]', words.to_bytes(ids[start:end].tolist()).decode())
            numbers = [int(x) for x in found[1].split(",")] if found else []
            if end < len(ids) and all(x <= len(query.images) for x in numbers):
                pictures += [query.images[x - 1] for x in numbers]
        selected += len(pictures)
    assert selected > 2
    # Transcripts have each frame of the video, and what was selected.
    pixels = scripted_model.with_pixels(t, prompts, config)
    for row, query in enumerate(queries):
        talk = make_transcript(pixels, row, query, words)
        assert len(talk.overview) == len(query.images)
        assert sum(len(turn.pictures) for turn in talk.turns) == (t.calls.source.image[row] >= 0).sum()


def test_a_written_trace_is_what_a_rollout_reads(config):
    words, tables = scripted_model.vocabulary(), scripted_model.token_tables()
    call = SELECT + "1, 2]" + scripted_model.CLOSE
    trace = Trace(QUERY, (right(call), right("\\boxed{7}")), "7")
    rows = to_trajectories([trace], words, tables, config, BatchShape(256, 7, 7, 8, video=True))
    ids = prompt_tokens(QUERY, words, config)
    assert rows.tokens[0, : len(ids)].tolist() == ids and ids.count(words.video_pad) == 3
    assert rows.visual.grids[0, :6, 0].tolist() == [1] * 5 + [0]
    assert rows.visual.slices[0, :5].tolist() == [[0, 1], [2, 3], [4, 4], [5, 5], [6, 6]]
