"""The configuration of a recommendation study; `configs/unlearn/movielens_*.py` set it."""

import dataclasses
import json
import pathlib
from typing import Any, Literal

from pixel_jax.config import ConfigError, positive
from unlearn_jax.config import ErasureConfig
from unlearn_jax.requests.replay import TrainingRecipe


@dataclasses.dataclass(frozen=True)
class RatingsConfig:
    """The data set, and the rows that are drawn from it."""

    path: str  # directory of the data set's files; "package:NAME/PATH" is one inside an installed package
    reader: str = "recbole"  # a name of `readers.READERS`
    examples: int = 256  # rows to train on, drawn by the seed
    test_share: float = 0.3  # of the users
    test_rows: int | None = None  # None: one of each test user
    history: int = 10  # the most films of a history
    candidates: int = 20  # films to choose from
    length: int = 160  # tokens of a question and its answer; of a longer history the oldest films are left out
    answer: int = 24  # tokens of an answer
    title: int | None = None  # films whose titles have more tokens are left out; None: no film is
    seed: int = 0  # of the split of users and of the test rows


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The adapter that is trained."""

    layers: int = 2  # the topmost layers, which have the adapter
    rank: int = 8
    alpha: float = 16.0
    targets: str = r".*\.(q_proj|v_proj)"  # see `pixel_jax.models.lora.add_lora`


@dataclasses.dataclass(frozen=True)
class RecommendationConfig:
    """The whole study."""

    out: str  # directory of trained adapters and cached hidden states
    cells: str  # directory of the results, a file for each cell
    model: str  # a model's directory or GGUF file
    data: RatingsConfig
    task: Literal["recommendation"] = "recommendation"
    form: str = "tallrec"  # a name of `forms.FORMS`
    adapter: AdapterConfig = AdapterConfig()
    training: TrainingRecipe = TrainingRecipe(epochs=5, batch=16, learning_rate=1e-3)
    erasure: ErasureConfig = ErasureConfig()
    edits: tuple[str, ...] = ("remove",)  # names of `corruption.EDITS`
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

    def identity(self) -> dict[str, Any]:
        """The settings that all cells depend on, as JSON. Paths are not part of them."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        names = ("form", "data", "adapter", "training", "erasure", "learning_rates", "tuning_share", "batch", "rows")
        settings = {name: values[name] for name in names}
        del settings["data"]["path"]
        return {"model": pathlib.PurePath(self.model).name, **settings}
