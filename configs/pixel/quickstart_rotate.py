"""The quickstart with another tool: `rotate`, on cards that lie on their side (`pixel-jax quickstart
--config=configs/pixel/quickstart_rotate.py`). Reinforcement learning runs twice, with the tool and without. What is not said
here is as in `quickstart.py`."""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("quickstart.py")))["get_config"]()
    config.lesson = "turn"
    config.scenes = {"small_share": 0.0, "on_side": 0.7}
    config.ground.steps, config.ground_rows, config.look_share = 400, 8_000, 0.5
    config.warm.steps, config.warm.save_every, config.warm_rows = 100, 50, 2_000
    del config.traces  # of the other lesson
    config.turns = {"direct": 0.4, "corrected": 0.2}

    config.rl.iterations = 60
    config.rl.reward = {"alpha": 0.0, "beta": 0.0}  # right answers are all that is rewarded
    limits = config.rl.rollout
    limits.temperature = 1.0
    for name in ("later_temperature", "pad", "video_min_pixels", "video_max_pixels"):
        del limits[name]  # the defaults: nothing is cropped here, and there are no videos
    return config
