"""The configuration of facts about people; `configs/unlearn/people.py` sets it."""

import dataclasses
import json
import pathlib
from typing import Any, Literal

from pixel_jax.config import ConfigError
from pixel_jax.identity import changes, flatten
from pixel_jax.state_files import read_note
from unlearn_jax.config import ErasureConfig
from unlearn_jax.requests.replay import TrainingRecipe
from unlearn_jax.requests.task import RequestsConfig

CONFIG = "config.json"  # in the run's directory: what the adapter was trained with
Method = Literal["fine-tune", "gradient ascent", "GradDiff", "NPO", "SimNPO"]


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """The questions and answers that an adapter learns."""

    format: Literal["invented", "tofu", "muse"] = "invented"
    directory: str = ""  # of the released files of TOFU or MUSE
    people: int = 50  # invented ones that are learned
    known: int = 150  # invented ones that the base model knows
    holdout: int = 40  # invented ones that are not learned; adapters are trained further on half of their facts
    questions: int = 4  # about each person
    passage: int = 64  # words of an example of MUSE


@dataclasses.dataclass(frozen=True)
class PeopleNetworkConfig:
    """A small transformer, trained on what the base model knows, and the adapter on it."""

    width: int = 32
    heads: int = 2
    layers: int = 2
    rank: int = 4  # of the adapter, on the queries and values of all layers
    pretraining: int = 1000  # steps of Adam, of 64 examples


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How edits are evaluated. Baselines may spend as many example-gradients as the edits did."""

    baselines: tuple[Method, ...] = ("fine-tune", "GradDiff", "NPO")
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)  # of Adam; the best of each baseline is reported
    batch: int = 20  # examples of a step
    rows: int = 300  # the most rows of a set that are evaluated
    relearning: int = 50  # steps on facts that were neither learned nor forgotten


@dataclasses.dataclass(frozen=True)
class PeopleConfig:
    """The whole experiment."""

    out: str  # run directory
    task: Literal["people"] = "people"  # a name of `unlearn_jax.commands.TASKS`
    corpus: CorpusConfig = CorpusConfig()
    network: PeopleNetworkConfig = PeopleNetworkConfig()
    training: TrainingRecipe = TrainingRecipe()
    erasure: ErasureConfig = ErasureConfig()
    requests: RequestsConfig = RequestsConfig()
    forget: str = "forget10"  # the set that `unlearn-jax erase` removes without a file of requests
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = 0  # of the people, the base model and the adapter

    @property
    def directory(self) -> pathlib.Path:
        """The directory of the run's files."""
        return pathlib.Path(self.out)

    def trained(self) -> dict[str, Any]:
        """The settings that an adapter depends on, as JSON."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        return {name: values[name] for name in ("corpus", "network", "training", "seed")}

    def check_trained(self) -> None:
        """Raises ConfigError unless the adapter in `out` was trained with this configuration."""
        trained = read_note(self.directory / CONFIG)
        if trained is None:
            raise ConfigError(f"{self.out} holds no adapter: run `unlearn-jax train` with the same --config.out first")
        for name, (old, new) in changes(flatten(trained), flatten(self.trained())).items():
            raise ConfigError(
                f"config.{name} is {new!r}, the adapter in {self.out} was trained with {old!r}: "
                f"give --config.{name} as it was, or train in another --config.out"
            )
