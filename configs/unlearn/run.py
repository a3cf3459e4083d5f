"""Edits of the adapter of a finished `pixel-jax sft`:

    unlearn-jax erase --run=runs/sft --request=requests.jsonl

is short for `--config=unlearn/run --config.run=runs/sft`. How an example is weighed and what an edit may cost follow from
what the run recorded of itself."""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = "run"
    config.run = config_dict.placeholder(str)

    # AdamW's decay acts beside its steps: as a coefficient of |params|^2 / 2 it is next to nothing.
    config.erasure = {"weight_decay": 0.0, "micro_batch": 8, "solver": {"name": "cg", "rtol": 0.1}}
    config.requests = {"allow": ("unconverged", "solver", "shortened", "negative_curvature", "finish", "budget")}
    return config
