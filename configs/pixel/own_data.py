"""Tune a Qwen2.5-VL directory on JSON-lines files of your own or on the released data: first `pixel-jax sft`, then
`pixel-jax rl` on its result.

    pixel-jax sft --config=configs/pixel/own_data.py --config.model=DIR --config.data=traces.jsonl --config.out=runs/sft
    pixel-jax rl  --config=configs/pixel/own_data.py --config.model=runs/sft/model --config.data=questions.jsonl \
                  --config.out=runs/rl

The formats are described in `pixel_jax/data/jsonl.py` and `pixel_jax/data/released.py`. Fields that are not set here have
the paper's values; any can be set as `--config.FIELD=VALUE` (`--config.rl.reward.alpha=0.3`).
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = config_dict.placeholder(str)
    config.data = config_dict.placeholder(str)
    config.out = config_dict.placeholder(str)
    # Axis sizes; -1 takes the devices that are left. An empty mesh runs on one device.
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.canvas = (1, 1536, 1536)  # one image a prompt; larger than 1536 x 1536 pixels it is made smaller
    config.prompt_width = 2560  # with `video_canvas` and `video_prompt_width` as in `pixel_jax/recipe.py` videos, too
    config.buckets = (1024, 2048)  # and 4096, the room of a trace

    config.rollout = ConfigDict()

    config.sft = ConfigDict()
    config.sft.optimizer = {}
    config.sft.steps = 246  # four epochs of the paper's 7,850 traces
    config.sft.batch_size = 128  # packed rows, of one trace or more
    config.sft.forward = {"micro_batches": 16, "compute_dtype": "bfloat16"}

    config.rl = ConfigDict()
    config.rl.iterations = 90
    config.rl.prompts = 512
    config.rl.rollout = {"in_flight": 32}  # prompts at a time, for their caches; a multiple of data x fsdp
    config.rl.train_batch = 256
    config.rl.time_operations = 10  # iterations
    config.rl.update({name: {} for name in ("reward", "replay", "loss", "optimizer")})
    config.rl.reward.scorer = ConfigDict()
    config.rl.forward = {"micro_batches": 64, "compute_dtype": "bfloat16"}
    return config
