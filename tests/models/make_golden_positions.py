"""Writes golden_positions.json: M-RoPE position ids from the release that introduced Qwen2.5-VL.

Run it where `transformers==4.49.0` and torch are installed:  python tests/models/make_golden_positions.py
Later releases differ for video: 4.57 cuts fractional `second_per_grid_ts` to whole seconds before multiplying, 5.3 and
later also start the text after a video elsewhere.
"""

import json
import pathlib
import random

import torch
import transformers
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

IMAGE, VIDEO, START, END = 60, 61, 58, 59


def main():
    if transformers.__version__ != "4.49.0":
        raise SystemExit(f"needs transformers 4.49.0, found {transformers.__version__}")
    random.seed(0)
    cases = []
    for number in range(24):
        config = Qwen2_5_VLConfig(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START)
        config.vision_config.tokens_per_second = random.choice([2, 4, 25])
        stub = Qwen2_5_VLForConditionalGeneration.__new__(Qwen2_5_VLForConditionalGeneration)
        torch.nn.Module.__init__(stub)
        stub.config = config
        tokens, grids, seconds, image_grids, video_grids, video_seconds = [], [], [], [], [], []
        for _ in range(random.choice([1, 2, 3, 4])):
            tokens += [random.randrange(50) for _ in range(random.choice([0, 1, 2, 7]))] + [START]
            h, w = 2 * random.randint(1, 5), 2 * random.randint(1, 5)
            if random.random() < 0.5:
                grid, interval, pad = [1, h, w], 0.0, IMAGE
                image_grids.append(grid)
            else:
                grid, pad = [random.randint(1, 6), h, w], VIDEO
                interval = random.choice([1.0, 2.0, 0.5, 0.3, 1.3, 0.08])
                video_grids.append(grid)
                video_seconds.append(interval)
            tokens += [pad] * (grid[0] * h * w // 4) + [END]
            grids.append(grid)
            seconds.append(interval)
        tokens += [random.randrange(50) for _ in range(number % 3)]
        ids = torch.tensor([tokens])
        positions, delta = stub.get_rope_index(
            ids,
            torch.tensor(image_grids) if image_grids else None,
            torch.tensor(video_grids) if video_grids else None,
            torch.tensor(video_seconds) if video_grids else None,
            torch.ones_like(ids),
        )
        cases.append(
            {
                "tokens": tokens,
                "grids": grids,
                "seconds": seconds,
                "tokens_per_second": config.vision_config.tokens_per_second,
                "positions": positions[:, 0].tolist(),
                "next": len(tokens) + int(delta[0, 0]),
            }
        )
    path = pathlib.Path(__file__).with_name("golden_positions.json")
    path.write_text("[\n" + ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases) + "\n]\n")


if __name__ == "__main__":
    main()
