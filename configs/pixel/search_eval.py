"""The miniature tier of the visual search set, asked of a model that `search_quickstart.py` trained, in every mode.

    python -m pixel_jax.search_set data/search --tiers miniature
    pixel-jax eval --config=pixel/search_eval --config.model=runs/search/seed-0/curiosity/model --config.out=runs/search/eval \\
        --config.benchmarks.search.data=data/search/miniature/test

Greedy, with the limits of the quickstart's training.
"""

import pathlib
import runpy

from ml_collections import ConfigDict, config_dict

from pixel_jax.data.synthesis import SENTENCES

SIDE = 448  # pixels of the pictures


def get_config() -> ConfigDict:
    trained = runpy.run_path(str(pathlib.Path(__file__).with_name("search_quickstart.py")))["get_config"]()
    limits = trained.rl.rollout
    config = ConfigDict()
    config.model, config.out = config_dict.placeholder(str), config_dict.placeholder(str)
    config.benchmarks = {
        "search": {
            "format": "jsonl",
            "data": config_dict.placeholder(str),
            "split": "test",
            "buckets": ((1, SIDE, SIDE, trained.width),),
            "scorer": {"rules": ("box", "choice")},
            "max_side": limits.max_side,
        }
    }
    config.assistant_prefix = SENTENCES.answer  # the model knows no other prompt than that of its training
    config.modes = ("operations", "none", "blank", "blind", "evidence")
    config.batch = 50
    config.rollout = ConfigDict(limits)
    config.rollout.update({"temperature": 0.0, "group_size": 1})
    del config.rollout.later_temperature
    return config
