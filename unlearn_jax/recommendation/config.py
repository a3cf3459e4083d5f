"""The configuration of a recommendation study; `configs/unlearn/movielens_*.py` set it."""

import dataclasses
import json
import pathlib
from typing import Any, Literal

from unlearn_jax.studies.config import StudyConfig


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecommendationConfig(StudyConfig):
    """The whole study."""

    model: str  # a model's directory or GGUF file
    data: RatingsConfig
    task: Literal["recommendation"] = "recommendation"
    form: str = "tallrec"  # a name of `forms.FORMS`
    adapter: AdapterConfig = AdapterConfig()
    edits: tuple[str, ...] = ("remove",)  # names of `corruption.EDITS`

    def own_identity(self) -> dict[str, Any]:
        """See `StudyConfig.own_identity`."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        settings = {name: values[name] for name in ("form", "data", "adapter")}
        del settings["data"]["path"]
        return {"model": pathlib.PurePath(self.model).name, **settings}
