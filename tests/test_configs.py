"""Configs are found by name, wherever a command is started and however the package was installed."""

import pathlib

import pytest

from pixel_jax.config import ConfigError, ConfigFileParser, find_config, load, shipped_configs
from pixel_jax.evaluation.config import EvalConfig
from pixel_jax.quickstart.config import QuickstartConfig
from pixel_jax.synthesis.run import SynthConfig
from pixel_jax.train_config import TrainConfig
from unlearn_jax.noisy_responses.config import NoisyResponsesConfig
from unlearn_jax.own_run.config import RunEditConfig
from unlearn_jax.people.config import PeopleConfig
from unlearn_jax.quickstart.config import Config as UnlearningConfig
from unlearn_jax.recommendation.config import RecommendationConfig

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
# What a command line has to add before a config is whole.
GIVEN = {name: {"model": "m", "data": "d", "out": "o"} for name in ("pixel/own_data",)}
GIVEN |= {
    "pixel/eval": {"model": "m", "out": "o", "benchmarks.vstar.data": "d"},
    "pixel/search_eval": {"model": "m", "out": "o", "benchmarks.search.data": "d"},
    "pixel/synth": {"seeds": "s", "out": "o"},
    "unlearn/run": {"run": "runs/sft"},
}
KINDS = {
    "pixel/eval": EvalConfig,
    "pixel/quickstart": QuickstartConfig,
    "pixel/quickstart_rotate": QuickstartConfig,
    "pixel/search_eval": EvalConfig,
    "pixel/search_quickstart": QuickstartConfig,
    "pixel/synth": SynthConfig,
    "unlearn/movielens_llara": RecommendationConfig,
    "unlearn/movielens_tallrec": RecommendationConfig,
    "unlearn/movielens_tallrec_all": RecommendationConfig,
    "unlearn/noisy_responses": NoisyResponsesConfig,
    "unlearn/people": PeopleConfig,
    "unlearn/quickstart": UnlearningConfig,
    "unlearn/run": RunEditConfig,
}


def test_the_package_ships_what_the_top_level_has():
    """Also an installed one, which has them as files of its own."""
    there = {path.relative_to(CONFIGS).with_suffix("").as_posix(): path.read_bytes() for path in CONFIGS.rglob("*.py")}
    assert {name: path.read_bytes() for name, path in shipped_configs().items()} == there
    assert {"pixel/quickstart", "pixel/ablations/no_curiosity", "unlearn/quickstart"} <= set(there)


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_every_shipped_config_loads_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ConfigFileParser("config", lock_config=False).parse(name)
    for key, value in GIVEN.get(name, {}).items():
        *sections, last = key.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[last] = value
    load(KINDS.get(name, TrainConfig), config)


def test_a_name_may_have_its_ending_and_a_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = ConfigFileParser("config", lock_config=False)
    assert find_config("pixel/eval.py") == find_config("pixel/eval") == shipped_configs()["pixel/eval"]
    plain, adapters = (parser.parse(f"pixel/qwen2_5_vl_7b_sft{word}") for word in ("", ":lora"))
    assert plain.to_dict().get("lora") is None and adapters.lora is not None


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pixel").mkdir()
    (tmp_path / "pixel" / "eval.py").write_text("def get_config(): return {'mine': 1}\n")
    assert ConfigFileParser("config", lock_config=False).parse("pixel/eval.py") == {"mine": 1}
    assert find_config("pixel/eval") == shipped_configs()["pixel/eval"]


@pytest.mark.parametrize("name", ["pixel/quikstart", "configs/pixel/eval.py", "../setup.py", "", "."])
def test_a_config_that_is_nowhere(name, tmp_path, monkeypatch):
    """Where it was looked for, and what there is."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        find_config(name)
    message = str(error.value)
    assert str(tmp_path) in message and "pixel/quickstart" in message and "unlearn/quickstart" in message


@pytest.mark.parametrize("word", ["lora", "gspo", "lora,dapo", "full,rloo"])
def test_words_of_own_data_choose_what_they_do_in_the_recipe(word):
    parse = ConfigFileParser("config", lock_config=False).parse
    own, plain, recipe = (
        parse(f"pixel/{name}") for name in (f"own_data:{word}", "own_data", f"qwen2_5_vl_7b_rl:{word}")
    )
    for config in (own, plain):
        config.update(GIVEN["pixel/own_data"])
    own, plain, recipe = (load(TrainConfig, config) for config in (own, plain, recipe))
    assert own.lora == recipe.lora and (own.lora is not None) is word.startswith("lora")
    for name in ("trainable", "baseline", "scale_by_std", "replay", "loss", "reward"):
        assert getattr(own.rl, name) == getattr(recipe.rl, name)
    assert own.rl.optimizer == recipe.rl.optimizer
    adapted = ".*lora_" if own.lora else plain.sft.trainable
    rate = 1e-5 if own.lora else plain.sft.optimizer.learning_rate
    assert (own.sft.trainable, own.sft.optimizer.learning_rate) == (adapted, rate)


def test_an_algorithm_that_there_is_not():
    with pytest.raises(ValueError, match="no algorithm is called 'grop'; known are grpo"):
        ConfigFileParser("config", lock_config=False).parse("pixel/own_data:grop")
