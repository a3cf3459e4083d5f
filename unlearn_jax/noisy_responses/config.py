"""The configuration of a study of wrong answers; `configs/unlearn/noisy_responses.py` sets it."""

import dataclasses
import json
import pathlib
from typing import Any, Literal

from pixel_jax.config import positive
from pixel_jax.quickstart.network import NetworkConfig
from pixel_jax.train_config import LoRAConfig
from unlearn_jax.requests.replay import TrainingRecipe
from unlearn_jax.studies.config import StudyConfig


@dataclasses.dataclass(frozen=True)
class QuestionsConfig:
    """The data set, and the questions that are drawn from it."""

    reader: str = "photographs"  # a name of `readers.READERS`
    path: str = ""  # of the released files: MM-SpuBench's directory, one of R-Bench's files of questions
    images: str | None = None  # folder of R-Bench's pictures; None: `images` beside its file
    image_folders: tuple[str, ...] = ()  # other folders in which R-Bench's pictures may lie
    subset: str | None = None  # one of R-Bench's files of ids; None: all questions
    bad_rows: Literal["stop", "drop"] = "stop"  # of released files: rows that cannot be used
    each: int = 60  # questions that are drawn here about each photograph
    agreement: float = 0.25  # share of these with which the cue agrees
    examples: int = 240  # questions to train on, drawn by the seed
    tests: int = 240  # held-out questions
    test_share: float = 0.4  # of the pictures, which are held out
    length: int = 20  # tokens of a question, its picture and its answer
    answer: int = 1  # tokens of an answer
    max_pixels: int | None = None  # of a picture as it is shown; None: as the model's files or the quickstart say
    seed: int = 0  # of the questions that are drawn here, and of the split

    def __post_init__(self):
        positive(self, "each", "examples", "tests", "length", "answer", "max_pixels")
        for name in ("agreement", "test_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, in [0, 1]: {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """The base model that is trained here, on other photographs, where the cue agrees with most answers."""

    network: NetworkConfig = NetworkConfig(
        width=64, layers=2, mlp=128, vision_width=64, vision_layers=2, vision_mlp=128
    )
    each: int = 300  # questions about each photograph
    agreement: float = 0.7  # share of these with which the cue agrees
    training: TrainingRecipe = TrainingRecipe(epochs=14, batch=32, learning_rate=2e-3, checkpoint_every=1_000_000)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyResponsesConfig(StudyConfig):
    """The whole study."""

    task: Literal["noisy_responses"] = "noisy_responses"
    model: str | None = None  # a model's directory; None: one is trained here, see `base`
    base: BaseConfig = BaseConfig()
    data: QuestionsConfig = QuestionsConfig()
    adapter: LoRAConfig = LoRAConfig(rank=8, alpha=16.0, targets=r"model\.layers\..*")
    remat: bool = False  # compute activations again in the backward pass, for large models
    edits: tuple[str, ...] = ("response",)
    shares: tuple[float, ...] = (0.4,)  # the paper's label noise
    tuning_share: float = 0.4

    def own_identity(self) -> dict[str, Any]:
        """See `StudyConfig.own_identity`."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        settings = {name: values[name] for name in ("data", "adapter")}
        for name in ("path", "images", "image_folders", "subset"):
            if (place := settings["data"].pop(name)) and name in ("path", "subset"):
                settings["data"][name] = pathlib.PurePath(place).name
        if self.model is None:
            return {"base": values["base"], **settings}
        return {"model": pathlib.PurePath(self.model).name, **settings}
