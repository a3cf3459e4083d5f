"""The settings that all studies have."""

import abc
import dataclasses
import json
import pathlib
from typing import Any

from pixel_jax.config import ConfigError, positive
from unlearn_jax.config import ErasureConfig
from unlearn_jax.requests.replay import TrainingRecipe

# Settings on which every number of a study depends.
COMMON = ("training", "erasure", "learning_rates", "tuning_share", "batch", "rows")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig(abc.ABC):
    """The settings of a study. Subclasses add the data and the model."""

    task: str  # a name of `unlearn_jax.commands.TASKS`
    out: str  # directory of trained adapters and of what is computed once
    cells: str  # directory of the results, a file for each cell
    training: TrainingRecipe = TrainingRecipe(epochs=5, batch=16, learning_rate=1e-3)
    erasure: ErasureConfig = ErasureConfig()
    edits: tuple[str, ...] = ()  # names of the study's kinds of edits
    shares: tuple[float, ...] = (0.05, 0.1)  # of the examples
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] = ()  # names of `methods.METHODS`; (): all
    learning_rates: tuple[float, ...] = (1e-5, 1e-4, 1e-3)  # of Adam, tried for each baseline on `tuning_seed`
    tuning_seed: int = 1000
    tuning_share: float = 0.1  # of the examples, in the trials of learning rates
    batch: int = 16  # examples of a step of a baseline
    rows: int = 64  # kept rows on which adapters are compared, and test rows for the attack on membership, at most

    def __post_init__(self):
        positive(self, "batch", "rows", "tuning_share")
        if self.tuning_seed in self.seeds:
            raise ConfigError(f"config.tuning_seed {self.tuning_seed} is one of config.seeds {self.seeds}")
        if not self.learning_rates:
            raise ConfigError("config.learning_rates is empty: every baseline needs one to try")

    @property
    def directory(self) -> pathlib.Path:
        """The directory of adapters."""
        return pathlib.Path(self.out)

    @abc.abstractmethod
    def own_identity(self) -> dict[str, Any]:
        """The settings beyond `COMMON` that all cells depend on, as JSON. Paths are not part of them."""

    def identity(self) -> dict[str, Any]:
        """The settings that all cells depend on, as JSON."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        return {**self.own_identity(), **{name: values[name] for name in COMMON}}
