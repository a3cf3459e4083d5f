"""The quickstart's recipe about the miniature tier of the visual search set; `python -m pixel_jax.search_set.baseline` runs it
and evaluates it. What is not said here is as in `quickstart.py`."""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("quickstart.py")))["get_config"]()
    config.lesson = "search"
    config.scenes = {"small_share": 0.65}  # the rest are close-ups, which can be read at once
    config.traces.video_share = 0.0
    return config
