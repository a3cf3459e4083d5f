"""The recipe of the search set in its smallest form: every part runs, and a second start has nothing left to do.

The page is `docs/visual-search.md`.
"""

import json
import runpy

import pytest

from pixel_jax.config import find_config, load
from pixel_jax.quickstart.config import QuickstartConfig
from pixel_jax.search_set import baseline
from pixel_jax.search_set.writing import SetConfig


def shipped(name):
    return runpy.run_path(str(find_config(name)))["get_config"]()


@pytest.mark.slow
def test_the_recipe_in_small(tmp_path, capsys):
    training, asking = shipped("pixel/search_quickstart"), shipped("pixel/search_eval")
    training.network = {"width": 32, "layers": 1, "vision_width": 32, "vision_layers": 1, "mlp": 32, "vision_mlp": 32}
    for phase in ("ground", "warm"):
        section = training[phase]
        section.steps, section.batch_size, section.save_every = 2, 4, 2
    training.ground_rows, training.warm_rows = 16, 16
    training.rl.update({"iterations": 1, "prompts": 2, "train_batch": 16, "save_every": 1})
    training.rl.packing = {"length": 108, "slices": 4, "rows": 16}
    training.rl.rollout.group_size = 8
    training.evaluation = {"scenes": 6, "batch": 6, "traces": 2}
    asking.batch = 9
    config, made_of = load(QuickstartConfig, training), SetConfig(tiers=("miniature",), share=0.03)
    found = baseline.run(tmp_path, config, asking, made_of)
    assert found["set"]["items"]["miniature/test"] == 9 and list(found["models"]) == [
        "warm",
        "curiosity",
        "no_curiosity",
    ]
    for modes in found["models"].values():
        for mode in ("operations", "none", "blank", "blind", "evidence"):
            row = modes[mode]["all"]
            assert row["questions"] == 9 and row["unanswered"] == 0 and 0 <= row["score"]["mean"] <= 1
        assert modes["exchange"].keys() == {"none", "blank", "blind", "evidence"}
        assert modes["none"]["all"]["rapr"]["mean"] == 0
    answers = [json.loads(x) for x in (tmp_path / "eval/warm/search/none/results-0.jsonl").read_text().splitlines()]
    assert all(text.startswith("The answer is \\boxed{") for x in answers for text in x["responses"])
    capsys.readouterr()
    again = baseline.run(tmp_path, config, asking, made_of)
    assert again["models"] == found["models"] and "items 3" not in capsys.readouterr().err
