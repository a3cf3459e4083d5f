"""Traces from seeds, written by templates, or by a model behind an OpenAI-compatible endpoint:

    pixel-jax synth --config=configs/pixel/synth.py --config.seeds=seeds.jsonl --config.out=runs/traces
    pixel-jax synth --config=configs/pixel/synth.py:endpoint --config.seeds=... --config.out=... \\
        --config.endpoint.url=http://localhost:8000/v1 --config.endpoint.model=Qwen/Qwen2.5-VL-72B-Instruct

The formats are described in `pixel_jax/synthesis/seeds.py` and `pixel_jax/data/own.py`.
"""

from ml_collections import ConfigDict, config_dict


def get_config(writer: str = "templates") -> ConfigDict:
    config = ConfigDict()
    config.seeds = config_dict.placeholder(str)
    config.out = config_dict.placeholder(str)
    config.seed = 0
    # The paper's mix: single-pass, recrop once, recrop twice, further zoom-in; single-pass, reselect.
    config.image = (0.3, 0.2, 0.2, 0.3)
    config.video = (0.9, 0.1)
    config.attempts = 3
    config.pad = config_dict.placeholder(float)  # that of the tool in training and evaluation; None: the format's
    if writer == "endpoint":
        config.endpoint = ConfigDict()
        config.endpoint.url = config_dict.placeholder(str)
        config.endpoint.model = config_dict.placeholder(str)
        config.endpoint.key = config_dict.placeholder(
            str
        )  # the name of the environment variable that holds the API key
        config.endpoint.requests_per_second = config_dict.placeholder(float)
        config.endpoint.workers = 16
        config.temperature = 0.7
        config.max_tokens = 600
    elif writer != "templates":
        raise ValueError(f"the analyses are written by 'templates' or by an 'endpoint', not by {writer!r}")
    return config
