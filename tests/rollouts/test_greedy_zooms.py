"""Greedy conversations with zooms, token for token as transformers' `generate` and Pillow's crops, of the Qwens that see.

LLaVA is in test_llava.py, a video of Qwen3-VL in test_split_videos.py.
"""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

from pixel_jax import save_pretrained
from pixel_jax.rollouts.prompts import build_prompts
from pixel_jax.rollouts.rollout import rollout
from pixel_jax.rollouts.trajectory import to_host
from tests.rollouts import scripted_model
from tests.rollouts.test_rollout_of_families import PIXELS, qwen2_vl, qwen3_5, qwen3_vl, visible

FAMILIES = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": scripted_model.qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_5": qwen3_5,
}
ANSWERS = {"\\boxed{7}": 0.3, "\\boxed{3}": 0.25}
CHAIN = scripted_model.CHAIN | {scripted_model.START: {scripted_model.CROP: 0.4, **ANSWERS}}


class Their:
    """transformers' model and its processor of images (Pillow backend)."""

    def __init__(self, folder, config, words):
        import torch
        from transformers import AutoModelForImageTextToText
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.torch, self.words = torch, words
        self.network = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        vision, ours = self.network.config.vision_config, config
        known = {
            "patch_size": vision.patch_size,
            "size": {"shortest_edge": ours.min_pixels, "longest_edge": ours.max_pixels},
        }
        if vision.patch_size == 16:
            known |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        self.processor, self.whole = (Qwen2VLImageProcessorPil(**known, do_resize=x) for x in (True, False))

    def shown(self, image):
        """Pixel values and grid of an image, resized in two calls of one pass each: the order of Pillow 12 in every release."""
        image = Image.fromarray(image)
        grid = np.asarray(self.processor(images=[image])["image_grid_thw"])
        _, high, wide = (grid[0] * self.processor.patch_size).tolist()
        across = image.resize((wide, image.height), Image.Resampling.BICUBIC)
        made = self.whole(images=[across.resize((wide, high), Image.Resampling.BICUBIC)])
        return np.asarray(made["pixel_values"]), grid

    def generate(self, ids, images, most):
        pixels, grids = map(np.concatenate, zip(*map(self.shown, images), strict=True))
        arrays = {"input_ids": ids[None].astype(np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
        arrays |= {"pixel_values": pixels, "image_grid_thw": grids}
        arrays["mm_token_type_ids"] = (ids[None] == self.words.image_pad).astype(np.int64)
        with self.torch.no_grad():
            out = self.network.generate(
                **{name: self.torch.tensor(x) for name, x in arrays.items()}, do_sample=False, max_new_tokens=most,
                min_new_tokens=1, eos_token_id=[self.words.im_end, self.words.end_of_text],
                pad_token_id=self.words.end_of_text, suppress_tokens=[self.words.image_pad, self.words.video_pad],
            )  # fmt: skip
        return out[0, len(ids) :].tolist()


def zoomed(text, images):
    """What a turn's call shows; None: nothing."""
    found = re.search(r"<tool_call>(.*)</tool_call>", text, re.DOTALL)
    try:
        call = json.loads(found[1])["arguments"] if found else {}
    except ValueError:
        return None
    number, box = call.get("target_image", 0), call.get("bbox_2d", [2.0])
    if not 0 < number <= len(images) or max(box) > 1:
        return None
    image = Image.fromarray(images[number - 1])
    x1, y1, x2, y2 = (round(share * side) for share, side in zip(box, image.size * 2, strict=True))
    return np.asarray(image.crop((x1, y1, x2, y2))) if min(x2 - x1, y2 - y1) > scripted_model.CONFIG.min_crop else None


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("name", FAMILIES)
def test_zooms(name, tmp_path):
    words = scripted_model.vocabulary()
    model = visible(scripted_model.network(words, CHAIN, make_config=FAMILIES[name]))
    greedy = dataclasses.replace(scripted_model.CONFIG, temperature=0.0, group_size=1, **PIXELS)
    config, queries = greedy.for_model(model.config), scripted_model.queries(6)
    prompts = build_prompts(queries, words, scripted_model.token_tables(), config)
    t = to_host(rollout(model, prompts, jax.random.key(7), config))
    save_pretrained(model, None, tmp_path)
    theirs = Their(tmp_path, config, words)
    zooms = 0
    for row, query in enumerate(queries):
        ids, mine = t.tokens[row][t.valid[row]], t.loss_mask[row][t.valid[row]]
        images = list(query.images)
        edges = [*np.flatnonzero(np.diff(mine)) + 1, len(ids)]
        for turn, (start, end) in enumerate(zip(edges[::2], edges[1::2], strict=False)):
            assert theirs.generate(ids[:start], images, config.max_new_tokens) == ids[start:end].tolist(), (row, turn)
            if end < len(ids):
                crop = zoomed(words.to_bytes(ids[start:end].tolist()).decode(), images)
                answered = ids[end : edges[2 * turn + 2]]
                assert (words.image_pad in answered) == (crop is not None)
                images += [] if crop is None else [crop]
        zooms += len(images) - len(query.images)
    assert zooms > 3
